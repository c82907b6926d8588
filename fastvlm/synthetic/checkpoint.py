"""Seeded checkpoints with random, non-trivial weights, for tests and benchmarks: real layouts, real names, real sizes.

A tensor's values depend only on (seed, canonical name, shape), so the two layouts hold numerically the same model.
BatchNorm statistics, biases and layer scales are far from their initial values (timm's would hide errors), and the
scales are chosen so that activations stay of order one through the depth and logits are neither flat nor one-hot.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvlm.checkpoint import naming
from fastvlm.common.dtypes import ITEMSIZE, SAFETENSORS_NAMES, torch_dtype
from fastvlm.common.errors import UserError
from fastvlm.common.image_tokens import tokens_per_image
from fastvlm.common.staging import staged
from fastvlm.synthetic import tokenizer

LAYOUTS = ("fast_vlm", "llava_qwen2")
FORMS = ("folded", "training")
_LICENCE = "Random numbers, drawn by fastvlm/synthetic. They may be used, copied, changed and passed on freely.\n"
_CHUNK = 1 << 22  # elements generated at a time: bounds the memory of writing any shape


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: Qwen2's fields and, for a reduced FastViTHD, timm's arguments."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    image_size: int = 1024
    vision_args: dict[str, Any] | None = None
    published_ids: bool = True  # Qwen's special tokens at 151643...; else right after a small vocabulary

    @property
    def vision_width(self) -> int:
        """Channels of the encoder's output."""
        return 2 * (self.vision_args["embed_dims"][-1] if self.vision_args else 1536)


_TINY_VISION = {"layers": [1, 1, 2, 1, 1], "embed_dims": [8, 16, 32, 64, 128]}
_APP_VISION = {"layers": [1, 1, 1, 1, 1], "embed_dims": [8, 16, 32, 64, 1536], "mlp_ratios": [1, 1, 1, 1, 1]}

# Published sizes: Qwen/Qwen2-{0.5B,1.5B,7B} config.json, which apple/FastVLM-* keep.
SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 576, False, 128, _TINY_VISION, published_ids=False),
    "encoder": Shape(64, 2, 4, 2, 128, 576, False, published_ids=False),  # the real encoder, the tiny language model
    # what the demo app's hard-coded shapes allow, and little more: 1024 pixels, 3072 channels
    "app": Shape(64, 2, 4, 2, 128, 576, True, vision_args=_APP_VISION, published_ids=False),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936, True),
    "1.5b": Shape(1536, 28, 12, 2, 8960, 151936, True),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, False),
}


def write_checkpoint(
    path: str | os.PathLike[str],
    shape: str = "tiny",
    layout: str = "fast_vlm",
    form: str = "folded",
    dtype: str = "float32",
    shards: int = 1,
    tied: bool | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> Path:
    """Write a complete checkpoint folder (weights, config, tokenizer, processor files, licence) and return its path.

    `shape` is a key of SHAPES, `layout` one of LAYOUTS, `form` one of FORMS; `tied` None takes the published value, and
    a tied checkpoint has no `lm_head.weight`. The same (shape, form, dtype, seed) is the same model in both layouts.
    UserError if `path` exists or an argument is unknown.
    """
    target, sizes = Path(path), SHAPES.get(shape)
    if sizes is None or layout not in LAYOUTS or form not in FORMS or shards < 1:
        raise UserError(
            f"write_checkpoint: unknown among shape {shape!r}, layout {layout!r}, form {form!r}, shards {shards}"
        )
    if target.exists():
        raise UserError(f"write_checkpoint: {target} exists; choose another path or remove it")
    tied = sizes.tied if tied is None else tied
    config = _config(sizes, layout, form, dtype, tied, image_size or sizes.image_size)
    with staged(target) as staging:
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (staging / "LICENSE").write_text(_LICENCE)
        tokenizer.write(staging, layout, sizes.published_ids, image_size or sizes.image_size)
        _write_weights(staging, _expected(config, layout, form, tied), layout, dtype, shards, seed)
    return target


def _config(s: Shape, layout: str, form: str, dtype: str, tied: bool, image_size: int) -> dict[str, Any]:
    first = 151643 if s.published_ids else tokenizer.SMALL_SIZE
    text = {
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "intermediate_size": s.intermediate,
        "vocab_size": s.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "max_window_layers": s.layers,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "bos_token_id": first,
        "eos_token_id": first + 2,
    }
    if layout == "llava_qwen2":
        config = {"architectures": ["LlavaQwen2ForCausalLM"], "model_type": "llava_qwen2", **text}
        config |= {
            "image_aspect_ratio": "pad",
            "mm_hidden_size": s.vision_width,
            "mm_patch_merge_type": "flat",
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": f"mobileclip_l_{image_size}",
            "tokenizer_model_max_length": 8192,
            "tokenizer_padding_side": "right",
            "torch_dtype": dtype,
            "unfreeze_mm_vision_tower": True,
            "use_mm_proj": True,
        }
        return config | ({"mm_vision_model_args": s.vision_args} if s.vision_args else {})
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": "fast_vlm",
        "dtype": dtype,
        "image_seq_length": tokens_per_image(image_size),
        "image_token_index": first + 3,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "qwen2", **text},
        "tie_word_embeddings": tied,
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": s.vision_width,
            "num_classes": 0,
            "model_args": {"inference_mode": form == "folded", **(s.vision_args or {})},
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _expected(config: dict[str, Any], layout: str, form: str, tied: bool) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape, from Transformers' own class on the meta device."""
    from fastvlm.checkpoint.configuration import configuration_of, hf_config_of
    from fastvlm.checkpoint.shapes import skeleton

    state = skeleton(hf_config_of(configuration_of(config, layout, form, tied))).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not (tied and name == naming.LM_HEAD)}


def _write_weights(
    folder: Path, expected: dict[str, tuple[int, ...]], layout: str, dtype: str, shards: int, seed: int
) -> None:
    total = sum(math.prod(shape) for shape in expected.values())
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    done = 0
    for name, shape in expected.items():
        parts[min(shards - 1, done * shards // total)][name] = shape
        done += math.prod(shape)
    source = naming.to_llava if layout == "llava_qwen2" else str
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write_safetensors(folder / file, part, source, dtype, seed)
        weight_map.update({source(name): file for name in part})
    if shards > 1:
        index = {"metadata": {"total_size": total * torch_dtype(dtype).itemsize}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_safetensors(path: Path, part: dict[str, tuple[int, ...]], source: Any, dtype: str, seed: int) -> None:
    """The safetensors format: 8 bytes of header length, a JSON header, the data (huggingface.co/docs/safetensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in part.items():
        kind = "int64" if name.endswith("num_batches_tracked") else dtype
        size = math.prod(shape) * ITEMSIZE[kind]
        header[source(name)] = {
            "dtype": SAFETENSORS_NAMES[kind],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in part.items():
            for chunk in _values(name, shape, seed):
                stored = chunk if chunk.dtype == torch.int64 else chunk.to(torch_dtype(dtype))
                file.write(stored.view(torch.uint8).numpy().data)


def _values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """The tensor's values, flattened, float32 (a counter: int64), a chunk at a time."""
    if name.endswith("num_batches_tracked"):
        yield torch.full((1,), 1000)
        return
    kind, low, high, skip = rule(name, shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    count = math.prod(shape)
    for start in range(0, count, _CHUNK):
        values = torch.empty(min(_CHUNK, count - start))
        if kind == "normal":
            values.normal_(low, high, generator=generator)
        else:
            values.uniform_(low, high, generator=generator)
        if skip:  # a depthwise kernel that has absorbed its skip connection: one at the centre
            area = shape[2] * shape[3]
            values.view(-1, area)[:, area // 2] += 1.0
        yield values


def rule(name: str, shape: tuple[int, ...]) -> tuple[str, float, float, bool]:
    """How a tensor is drawn: ("normal", mean, std) or ("uniform", low, high), and whether a skip is added."""
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    if not name.startswith(naming.VISION):
        return _language_rule(name, shape, fan_in)
    if name.endswith(".running_var"):
        return "uniform", 0.6, 1.6, False
    if name.endswith(".running_mean"):
        return "normal", 0.0, 0.2, False
    if name.endswith(".gamma"):  # smaller in the token mixers, whose two branches both pass the stream on
        return ("uniform", 0.03, 0.15, False) if ".token_mixer." in name else ("uniform", 0.1, 0.3, False)
    if name.endswith(".bias"):
        return "normal", 0.0, 0.1, False
    if len(shape) == 1:  # BatchNorm and LayerNorm weights; a parallel identity branch is weaker, or depth would amplify
        return ("uniform", 0.3, 0.7, False) if ".identity." in name else ("uniform", 0.7, 1.3, False)
    if ".token_mixer.reparam_conv." in name:
        return "normal", 0.0, 0.05, True
    if ".pos_emb.reparam_conv." in name:
        return "normal", 0.0, 0.03, True
    if ".pos_emb." in name:
        return "normal", 0.0, 0.03, False
    gain = 1.0
    if ".reparam_conv." in name:  # one convolution does all the work that training spreads over branches
        gain = 2.5 if ".final_conv." in name else 1.7
    elif any(part in name for part in (".fc2.", ".large_conv.", ".conv_kxk.")):
        gain = math.sqrt(2.0)
    return "normal", 0.0, gain / math.sqrt(fan_in), False


def _language_rule(name: str, shape: tuple[int, ...], fan_in: int) -> tuple[str, float, float, bool]:
    if len(shape) == 1:
        if "norm" in name:
            return "uniform", 0.7, 1.3, False
        return "normal", 0.0, 0.5 if ".k_proj." in name else 0.1, False
    if name in (naming.EMBEDDINGS, naming.LM_HEAD):  # logits of standard deviation 2.5 from a normalized hidden state
        return "normal", 0.0, 2.5 / math.sqrt(shape[1]), False
    if ".linear_2." in name or ".o_proj." in name:  # comparable to the embeddings
        return "normal", 0.0, 2.5 / math.sqrt(shape[0] * fan_in), False
    if ".down_proj." in name:  # larger, or a tied head would repeat one token for ever
        return "normal", 0.0, 10.0 / math.sqrt(shape[0] * fan_in), False
    return "normal", 0.0, 1.0 / math.sqrt(fan_in), False
