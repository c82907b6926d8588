"""An artefact's language model and projector from its own bytes, in PyTorch (in MLX: `mlx_language.py`).

PyTorch computes with the values that MLX's quantized tensors stand for, dequantized bit for bit as MLX does.
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvlm.common.dtypes import torch_dtype
from fastvlm.common.errors import UserError
from fastvlm.model.language import TorchLanguage
from fastvlm.model.streamed import Memory, StreamedEmbedding, StreamedLinear
from fastvlm.model.torch_parts import TorchProjector
from model_export import contract
from model_export.mil.allocator import returned_buffers
from model_export.runtime.fast_linear import fast
from model_export.stored import StoredTensors, eos_ids

# What to do when an artefact's language model or projector computes NaN or infinity.
REMEDY = (
    "its weights are damaged (`fastvlm verify` tells), or too large for their dtype: export the"
    " checkpoint again, with --quant bf16 if they are float16"
)


class _Projector(nn.Module):
    """Two linear layers with an exact GELU between them, under the artefact's names."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.linear_0, self.linear_2 = nn.Linear(features, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_0(x)))


def torch_language(
    folder: Path, dtype: str = "float32", decode: str | None = None, eight_bits: bool = False
) -> tuple[TorchLanguage, TorchProjector]:
    """The language model and the projector on the CPU, computing in `dtype` with the artefact's own values.

    "float32" is the model as Transformers builds it; "as-stored" computes in float32, too, but its matrices stay as
    they are stored (`fastvlm.model.streamed`), for proofs. "bfloat16", and whatever `decode` is given for, is for
    speed: matrices packed, the embedding table as it is stored. `decode` is what single tokens are multiplied in; the
    matrices are held once, so that "bfloat16" there or in `dtype` makes their values bfloat16's in both. `eight_bits`:
    8-bit operands for the vocabulary's logits.

    Raises UserError with every missing, unexpected and misshapen tensor.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    stored = StoredTensors(Path(folder))
    config = stored.config
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    text = Qwen2Config(
        **{key: config[key] for key in fields},
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
    )
    text._attn_implementation = "sdpa"
    with torch.device("meta"):
        model, projector = Qwen2ForCausalLM(text), _Projector(config["mm_hidden_size"], config["hidden_size"])
    expected: dict[str, tuple[nn.Module, str]] = {}
    for prefix, owner in ((contract.LANGUAGE_PREFIX, model), (contract.PROJECTOR_PREFIX, projector)):
        expected |= {prefix + name: (owner, name) for name, _ in owner.named_parameters()}
    speed = dtype == "bfloat16" or decode is not None
    decode = "bfloat16" if dtype == "bfloat16" else decode or dtype
    with returned_buffers():
        _fill(expected, stored, dtype, model, (decode, eight_bits) if speed else None)
    if not speed and dtype != "as-stored":
        model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=text)  # its table is computed, not stored
    release = torch.__version__.split("+")[0]
    dtype, decode = (value.replace("as-stored", "float32") for value in (dtype, decode))
    computed = (dtype if decode == dtype else f"{dtype} prompts, {decode} tokens") + ", int8 logits" * eight_bits
    name = f"PyTorch {release} CPU {computed} over MLX {stored.label} tensors"
    for module in (model, projector):
        module.eval().requires_grad_(False)
    return TorchLanguage(model, eos_ids(config), name, REMEDY), TorchProjector(projector, name, REMEDY)


def _fill(
    expected: dict[str, tuple[nn.Module, str]],
    stored: StoredTensors,
    dtype: str,
    model: nn.Module,
    speed: tuple[str, bool] | None,
) -> None:
    """Put each stored weight into its module, one after the other, so that no second copy of the model exists; `model`
    may get packed or streamed linear layers on the way, and then its embedding table stays where it is.

    `speed`: packed, by the dtype that matrices are held in, and whether the logits have 8-bit operands.
    """
    names, target = stored.names(), torch_dtype("float32" if dtype == "as-stored" else dtype)
    faults = [f"{name} is missing" for name in sorted(set(expected) - names)]
    faults += [f"{name} is unexpected" for name in sorted(names - set(expected))]
    memory = Memory()
    for name in sorted(set(expected) & names):
        module, path = expected[name]
        shape, got = module.get_parameter(path).shape, stored.shape(name)
        if got != tuple(shape):
            faults.append(f"{name} is {list(got)}, expected {list(shape)}")
        if faults:
            continue
        path, _, leaf = path.rpartition(".")
        owner, replaced = module.get_submodule(path), module is model and (speed or dtype == "as-stored")
        if replaced and isinstance(owner, nn.Embedding):
            rows = stored.mapped(name)
            rows(torch.zeros(1, dtype=torch.int64))  # refused now, if its parts contradict each other
            module.set_submodule(path, StreamedEmbedding(rows, target))
            if not stored.config["tie_word_embeddings"]:
                continue
            path, owner = "lm_head", module.get_submodule("lm_head")
        linear = owner if replaced and isinstance(owner, nn.Linear) else None
        if linear and speed is None and leaf == "weight":
            keeps = memory.take(2 * math.prod(got))  # the values have 16 bits, but for float32's
            read = partial(stored.dense if keeps else stored.mapped, name)
            module.set_submodule(path, StreamedLinear(read, got, keeps, linear.bias))
            continue
        held = torch_dtype(speed[0]) if speed and linear and leaf == "weight" else target
        setattr(owner, leaf, nn.Parameter(stored.read(name).to(held), requires_grad=False))
        if speed and linear and not any(parameter.is_meta for parameter in linear.parameters()):
            module.set_submodule(path, fast(linear, dtype, speed[1] and path == "lm_head"))
    if faults:
        raise UserError(f"{stored.folder}: the weights are not this config.json's: {'; '.join(faults)}; export again")
