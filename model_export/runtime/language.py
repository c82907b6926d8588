"""Run an artefact's language model and projector from its own bytes: in PyTorch anywhere, or in MLX.

PyTorch computes with the values that MLX's quantized tensors stand for, dequantized bit for bit as MLX does.
"""

import math
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastvlm.common.documents import Unreadable, load
from fastvlm.common.dtypes import as_array, as_tensor, dtype_name, torch_dtype
from fastvlm.common.errors import UserError
from fastvlm.common.limits import positions
from fastvlm.data.prompt import prompt_findings
from fastvlm.model.streamed import Memory, Rows, StreamedEmbedding, StreamedLinear
from fastvlm.model.surface import Language, TorchLanguage, TorchProjector
from model_export import contract
from model_export.mil.allocator import returned_buffers
from model_export.runtime.linear import fast
from quantization.mlx import affine, floating

# What to do when an artefact's language model or projector computes NaN or infinity.
_REMEDY = (
    "its weights are damaged (`python -m model_export verify` tells), or too large for their dtype: export the"
    " checkpoint again, with --quant bf16 if they are float16"
)


class StoredTensors:
    """The weights of an artefact's MLX folder by name; quantized ones are dequantized when read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read_config(folder)
        self.quantization: dict[str, Any] = self.config.get("quantization") or {}
        self._files: dict[str, Path] = {}
        paths = sorted(folder.glob("*.safetensors"))  # all that an app reads, however they are divided
        if not paths:
            raise UserError(f"{folder}: has no *.safetensors: expected an artefact's folder")
        for path in paths:
            try:
                with safe_open(path, "pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error}); export again") from None

    def nbytes(self, prefix: str = "") -> int:
        """Bytes of all stored tensors whose names begin so."""
        return sum(self._get(name).nbytes for name in self._files if name.startswith(prefix))

    def arrays(self, prefix: str) -> dict[str, Any]:
        """The stored tensors whose names begin so as MLX's arrays, by the rest of their names."""
        import mlx.core as mx

        found: dict[str, Any] = {}
        for path in {path for name, path in self._files.items() if name.startswith(prefix)}:
            loaded: Any = mx.load(str(path))  # lazy: only what is used is read
            found |= {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}
        return found

    def names(self) -> set[str]:
        """The weights' names, without the `.scales` and `.biases` that belong to quantized ones."""
        extra = {f"{module}.{part}" for module in self._modules() for part in self._parts(module)}
        return set(self._files) - extra

    def _modules(self) -> list[str]:
        return [name.removesuffix(".scales") for name in self._files if name.endswith(".scales")]

    def scheme(self, module: str) -> dict[str, Any]:
        """config.json's entry for a quantized module, with its mode. UserError if it is none that runs here."""
        scheme = self.quantization.get(module, self.quantization)
        modes = ("affine", *floating.FORMATS)
        if not isinstance(scheme, dict) or scheme.get("mode", "affine") not in modes:
            raise UserError(
                f"{self.folder}: {module}: quantization {scheme!r} is not one that runs here ({', '.join(modes)})"
            )
        return {"mode": "affine"} | {key: scheme[key] for key in ("group_size", "bits", "mode") if key in scheme}

    def _parts(self, module: str) -> tuple[str, ...]:
        """What is stored of a quantized module beside its weight."""
        return ("scales", "biases") if self.scheme(module)["mode"] == "affine" else ("scales",)

    def read(self, name: str) -> Tensor:
        """The weight's values in the dtype that MLX gives them. UserError if its parts contradict each other."""
        return self.value(name, self.stored(name))

    def stored(self, name: str) -> dict[str, Tensor]:
        """A weight as it is stored, mapped and not read yet: {"weight"}, and its {"scales", "biases"} if quantized."""
        module = name.removesuffix(".weight")
        parts = [part for part in ("scales", "biases") if f"{module}.{part}" in self._files]
        return {"weight": self._get(name)} | {part: self._get(f"{module}.{part}") for part in parts}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the weight's values, without reading them. UserError if its parts contradict each other."""
        module, parts = name.removesuffix(".weight"), self.stored(name)
        if "scales" not in parts:
            return tuple(parts["weight"].shape)
        try:
            scheme, (rows, words) = self.scheme(module), parts["weight"].shape
            columns = words * 32 // scheme["bits"]
            if parts["scales"].shape != (rows, columns // scheme["group_size"]):
                raise ValueError(f"{list(parts['scales'].shape)} scales of {[rows, columns]} values")
        except (KeyError, ValueError) as error:
            raise self._unusable(module, error) from None
        return rows, columns

    def dense(self, name: str) -> Rows:
        """Gives the values of a weight's rows, as `read`, which reads them all at once."""
        return self.read(name).__getitem__

    def mapped(self, name: str) -> Rows:
        """The same out of a mapping of its own, dequantized when they are asked for, to float32."""
        parts = self.stored(name)
        return lambda index: self.value(name, {part: tensor[index] for part, tensor in parts.items()}, wide=True)

    def _unusable(self, module: str, error: Exception) -> UserError:
        return UserError(f"{self.folder}: {module}: unusable quantized weight ({error}); export again")

    def value(self, name: str, stored: dict[str, Tensor], wide: bool = False) -> Tensor:
        """What the stored parts of a weight, or the same rows of all of them, stand for; `wide`: quantized ones in
        float32. UserError as `read`."""
        module = name.removesuffix(".weight")
        if "scales" not in stored:
            return stored["weight"]
        try:
            return self._dequantized(stored, self.scheme(module), wide)
        except (KeyError, ValueError) as error:
            raise self._unusable(module, error) from None

    @staticmethod
    def _dequantized(stored: dict[str, Tensor], scheme: dict[str, Any], wide: bool) -> Tensor:
        mode, bits, group_size = scheme["mode"], scheme["bits"], scheme["group_size"]
        packed, scales = as_array(stored["weight"]), as_array(stored["scales"])
        if mode == "affine":
            return as_tensor(affine.dequantize(packed, scales, as_array(stored["biases"]), bits, group_size, wide))
        form = floating.FORMATS[mode]
        if (bits, group_size) != (form.bits, form.group_size):
            raise ValueError(f"{mode} has {form.bits} bits in groups of {form.group_size}")
        return as_tensor(floating.dequantize(packed, scales, mode, "bfloat16", wide))  # MLX's default, and exact

    def _get(self, name: str) -> Tensor:
        # Mapped anew for each tensor: what was read and converted doesn't stay in memory beside what it became.
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @property
    def label(self) -> str:
        """What is stored, in a word or two: "int4", "mixed int4/int8", "mxfp4", "float16"."""
        schemes = [self.scheme(module) for module in self._modules()]
        kinds = sorted({contract.stored_as(one) for one in schemes})
        if not kinds:
            return dtype_name(self._get("language_model.model.norm.weight").dtype)
        return ("mixed " if len(kinds) > 1 else "") + "/".join(kinds)


def read_config(folder: Path) -> dict[str, Any]:
    """An artefact's config.json; UserError if it is not there, not JSON, or another model's."""
    path = folder / contract.CONFIG
    try:
        config = load(path)
    except Unreadable as error:
        raise UserError(f"{path}: not readable as JSON ({error}); expected an artefact's folder") from None
    if not isinstance(config, dict) or config.get("model_type") != contract.MODEL_TYPE:
        raise UserError(f"{path}: not an artefact's: expected an object with model_type {contract.MODEL_TYPE}")
    wrong = [key for key, kind in contract.CONFIG_REQUIRED.items() if type(config.get(key)) is not kind]
    if wrong:
        raise UserError(f"{path}: missing or of the wrong type: {', '.join(wrong)}; export again")
    for finding in prompt_findings(config):
        raise UserError(f"{folder}: {finding}")
    return contract.CONFIG_DEFAULTS | config


def eos_ids(config: dict[str, Any]) -> list[int]:
    """The ids that end an answer, from an artefact's config.json."""
    eos = config.get("eos_token_id", [])
    return [eos] if isinstance(eos, int) else list(eos)


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
    dtype, decode = (one.replace("as-stored", "float32") for one in (dtype, decode))
    computed = (dtype if decode == dtype else f"{dtype} prompts, {decode} tokens") + ", int8 logits" * eight_bits
    name = f"PyTorch {release} CPU {computed} over MLX {stored.label} tensors"
    for module in (model, projector):
        module.eval().requires_grad_(False)
    return TorchLanguage(model, eos_ids(config), name, _REMEDY), TorchProjector(projector, name, _REMEDY)


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
        if speed and linear and not any(one.is_meta for one in linear.parameters()):
            module.set_submodule(path, fast(linear, dtype, speed[1] and path == "lm_head"))
    if faults:
        raise UserError(f"{stored.folder}: the weights are not this config.json's: {'; '.join(faults)}; export again")


class MlxLanguage(Language):
    """The text model that mlx-lm loads, as a `Language`; quantized weights stay quantized."""

    def __init__(self, text: Any, eos: Iterable[int], name: str, remedy: str, positions: int | None) -> None:
        self.text, self.eos_ids, self.name = text, frozenset(eos), name
        self.remedy, self.positions = remedy, positions
        self.dtype: Any = None  # of the last hidden states

    def _embed(self, ids: np.ndarray) -> np.ndarray:
        return _to_numpy(self.text.model.embed_tokens(_to_mlx(ids.astype(np.int32))))

    def _hidden(self, embeds: np.ndarray, past: Any, kept: np.ndarray | None) -> tuple[np.ndarray, Any]:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        if kept is not None:
            raise NotImplementedError("mlx-lm's models take no mask for their cache")
        cache = make_prompt_cache(self.text) if past is None else past
        hidden = self._states(embeds, cache)
        mx.eval(hidden, [layer.state for layer in cache])
        self.dtype = hidden.dtype
        return _to_numpy(hidden), cache

    def _states(self, embeds: np.ndarray, cache: Any) -> Any:
        dtype = self.text.model.embed_tokens(_to_mlx(np.zeros((1, 1), np.int32))).dtype  # what the app merges into
        return self.text.model(None, cache, _to_mlx(embeds).astype(dtype))

    def _head(self, hidden: np.ndarray) -> np.ndarray:
        states, tied = _to_mlx(hidden).astype(self.dtype), self.text.args.tie_word_embeddings
        return _to_numpy(self.text.model.embed_tokens.as_linear(states) if tied else self.text.lm_head(states))

    def length(self, past: Any) -> int:
        return max(getattr(layer, "offset", 0) for layer in past)  # layers without attention keep no count

    def rewind(self, past: Any, length: int) -> Any:
        from mlx_lm.models.cache import trim_prompt_cache

        trim_prompt_cache(past, self.length(past) - length)
        return past


class MlxProjector:
    """The projector in MLX, as the app computes it: float32 features, weights as they are stored."""

    def __init__(self, stored: StoredTensors, name: str) -> None:
        import mlx.nn as mlx_nn

        self.name, self.remedy = name, _REMEDY
        self.layers: list[Any] = []
        for layer in contract.PROJECTOR_LAYERS:
            key = f"{contract.PROJECTOR_PREFIX}{layer}."
            own = stored.arrays(key)
            linear: Any = mlx_nn.Linear(1, 1)
            if "scales" in own:
                linear = mlx_nn.QuantizedLinear(128, 1, **stored.scheme(key[:-1]))
            linear.update(own)
            self.layers.append(linear)
        self.gelu = mlx_nn.GELU()

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(1, N, C) float32 -> (1, N, H) float32."""
        first, second = self.layers
        return _to_numpy(second(self.gelu(first(_to_mlx(features)))))


def mlx_language(folder: Path) -> tuple[MlxLanguage, MlxProjector]:
    """The same two parts run by MLX: the GPU on a Mac, the (slow, one-thread) CPU elsewhere.

    Raises UserError where MLX is not installed or refuses the folder.
    """
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError as error:
        raise UserError(f"MLX is not usable here ({error}): use the PyTorch runner") from None
    folder = Path(folder)
    stored = StoredTensors(folder)
    try:
        model, _ = load_model(folder, model_config=dict(contract.MLX_LM_CONFIG), get_model_classes=_text_model)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: mlx-lm refuses it ({error}); export again") from None
    device = "GPU" if mx.default_device() == mx.gpu else "CPU"
    name = f"MLX {version('mlx')} {device} over {stored.label} tensors"
    language = MlxLanguage(model.language_model, eos_ids(stored.config), name, _REMEDY, positions(stored.config))
    return language, MlxProjector(stored, name)


def _text_model(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's text model and its arguments, for folders that have the projector among the model's weights, too."""
    from mlx_lm.models import qwen2_vl

    class Model(qwen2_vl.Model):
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            kept = {name: value for name, value in weights.items() if not name.startswith(contract.PROJECTOR_PREFIX)}
            return super().sanitize(kept)

    return Model, qwen2_vl.ModelArgs


def _to_mlx(array: np.ndarray) -> Any:
    import mlx.core as mx

    return mx.array(np.ascontiguousarray(array))


def _to_numpy(array: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(array.astype(mx.float32))
