"""The tensors of an MLX folder by name, and its config.json: as they are stored, and their values."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvlm.common.documents import Unreadable, load
from fastvlm.common.dtypes import as_array, as_tensor, dtype_name
from fastvlm.common.errors import UserError
from fastvlm.data.prompt import prompt_findings
from fastvlm.model.streamed import Rows
from model_export import contract
from quantization.mlx import affine, floating


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

        arrays: dict[str, Any] = {}
        for path in {path for name, path in self._files.items() if name.startswith(prefix)}:
            loaded: Any = mx.load(str(path))  # lazy: only what is used is read
            arrays |= {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}
        return arrays

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
        """The names of a quantized module's tensors beside its weight."""
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
        """The same out of a mapping of its own, dequantized at their use, to float32."""
        parts = self.stored(name)
        return lambda index: self.value(name, {part: tensor[index] for part, tensor in parts.items()}, as_float32=True)

    def _unusable(self, module: str, error: Exception) -> UserError:
        return UserError(f"{self.folder}: {module}: unusable quantized weight ({error}); export again")

    def value(self, name: str, stored: dict[str, Tensor], as_float32: bool = False) -> Tensor:
        """The values of a weight from its stored parts, or the same rows of all of them; `as_float32`: quantized ones
        in float32. UserError as `read`."""
        module = name.removesuffix(".weight")
        if "scales" not in stored:
            return stored["weight"]
        try:
            return self._dequantized(stored, self.scheme(module), as_float32)
        except (KeyError, ValueError) as error:
            raise self._unusable(module, error) from None

    @staticmethod
    def _dequantized(stored: dict[str, Tensor], scheme: dict[str, Any], as_float32: bool) -> Tensor:
        mode, bits, group_size = scheme["mode"], scheme["bits"], scheme["group_size"]
        packed, scales = as_array(stored["weight"]), as_array(stored["scales"])
        if mode == "affine":
            return as_tensor(
                affine.dequantize(packed, scales, as_array(stored["biases"]), bits, group_size, as_float32)
            )
        form = floating.FORMATS[mode]
        if (bits, group_size) != (form.bits, form.group_size):
            raise ValueError(f"{mode} has {form.bits} bits in groups of {form.group_size}")
        return as_tensor(floating.dequantize(packed, scales, mode, "bfloat16", as_float32))  # MLX's default, and exact

    def _get(self, name: str) -> Tensor:
        # Mapped anew for each tensor: what was read and converted doesn't stay in memory beside what it became.
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @property
    def label(self) -> str:
        """The stored form in a word or two: "int4", "mixed int4/int8", "mxfp4", "float16"."""
        schemes = [self.scheme(module) for module in self._modules()]
        kinds = sorted({contract.stored_as(scheme) for scheme in schemes})
        if not kinds:
            return dtype_name(self._get("language_model.model.norm.weight").dtype)
        return ("mixed " if len(kinds) > 1 else "") + "/".join(kinds)


def read_config(folder: Path) -> dict[str, Any]:
    """An artefact's config.json; UserError if it is not there, not JSON, or another model's."""
    path = folder / contract.CONFIG
    try:
        config = load(path)
    except Unreadable as error:
        raise UserError(f"{path}: {error}: expected an artefact's folder") from None
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
