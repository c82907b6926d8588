"""The schemes a recipe can name: each has the tensors that it stores for a weight, and encodes rows into them.

A new scheme is a new class in `MODES`; nothing else asks which scheme it has.
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from fastvlm.common.dtypes import ITEMSIZE, Array
from quantization.coreml.compression import COMPRESSIONS
from quantization.mlx import affine, casting, floating

DTYPES = ("float16", "bfloat16", "float32")

Spec = tuple[str, tuple[int, ...]]  # of a stored tensor: its type's name, its shape


Settings = dict[str, tuple[Any, ...]]  # setting -> values allowed; any combination of them is legal


class Scheme:
    """A way to store one weight: as parts, each a tensor whose rows belong to the weight's rows."""

    MODE: ClassVar[str]  # its name in a recipe
    LEGAL: ClassVar[Settings] = {"dtype": DTYPES}
    dtype: str  # of the stored values, or of a quantized weight's values before rounding

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core.core_schema import no_info_plain_validator_function

        return no_info_plain_validator_function(from_json)

    def to_json(self) -> dict[str, Any]:
        """The settings, as in a recipe."""
        return {"mode": self.MODE, **{key: getattr(self, key) for key in self.LEGAL}}

    def fault(self, shape: tuple[int, ...]) -> str | None:
        """The reason why a weight of this shape cannot be stored so, or None."""
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """The tensors stored for a weight `x.weight` of this shape: part name ("weight", "scales", ...) -> dtype,
        shape."""
        return {}

    def encode(self, rows: Array) -> tuple[dict[str, Array], float]:
        """The parts of some rows of a weight, which are rounded to `dtype` first, and their largest magnitude then."""
        raise NotImplementedError(self.MODE)

    def decode(self, parts: Mapping[str, Array]) -> Array:
        """The values, in `dtype`, that MLX computes with."""
        raise NotImplementedError(self.MODE)

    def mlx(self) -> dict[str, Any] | None:
        """The entry for config.json's `quantization` block, or None if the weight is not quantized."""
        return None


@dataclass(frozen=True)
class Cast(Scheme):
    """Stored as it is, in a floating-point type."""

    dtype: str

    MODE = "cast"

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def parts(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        return {"weight": (self.dtype, shape)}

    def encode(self, rows: Array) -> tuple[dict[str, Array], float]:
        values, largest = casting.cast(rows, self.dtype)
        return {"weight": values}, largest

    def decode(self, parts: Mapping[str, Array]) -> Array:
        return parts["weight"]


class Grouped(Scheme):
    """A matrix quantized in groups of neighbours along its rows, which share a scale."""

    bits: int
    group_size: int

    def fault(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self.MODE} quantization takes matrices, got {len(shape)} dimension(s)"
        if shape[1] % self.group_size:
            fitting = [str(size) for size in self.LEGAL.get("group_size", ()) if shape[1] % size == 0]
            return (
                f"rows of {shape[1]} do not divide into {self.MODE}'s groups of {self.group_size} "
                f"(groups that do: {', '.join(fitting) or 'none, store it unquantized'})"
            )
        return None


@dataclass(frozen=True)
class Affine(Grouped):
    """MLX's affine quantization; `dtype` is also that of the scales and biases."""

    bits: int
    group_size: int
    dtype: str

    MODE = "affine"
    LEGAL: ClassVar[Settings] = {"bits": affine.BITS, "group_size": affine.GROUP_SIZES, "dtype": DTYPES}

    def parts(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        rows, columns = shape
        groups = (self.dtype, (rows, columns // self.group_size))
        return {"weight": ("uint32", (rows, columns * self.bits // 32)), "scales": groups, "biases": groups}

    def encode(self, rows: Array) -> tuple[dict[str, Array], float]:
        parts, largest = affine.quantize(rows, self.bits, self.group_size, self.dtype)
        return dict(zip(("weight", "scales", "biases"), parts, strict=True)), largest

    def decode(self, parts: Mapping[str, Array]) -> Array:
        return affine.dequantize(parts["weight"], parts["scales"], parts["biases"], self.bits, self.group_size)

    def mlx(self) -> dict[str, Any] | None:
        # "affine" is every loader's default mode; mlx-swift-examples 2.21 knows only these two keys
        return {"group_size": self.group_size, "bits": self.bits}


@dataclass(frozen=True)
class Floating(Grouped):
    """One of MLX's floating-point modes, which fixes bits and group size. There are no biases."""

    dtype: str

    def __init_subclass__(cls) -> None:
        cls.bits, cls.group_size = floating.FORMATS[cls.MODE].bits, floating.FORMATS[cls.MODE].group_size

    def parts(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        rows, columns = shape
        return {
            "weight": ("uint32", (rows, columns * self.bits // 32)),
            "scales": ("uint8", (rows, columns // self.group_size)),
        }

    def encode(self, rows: Array) -> tuple[dict[str, Array], float]:
        parts, largest = floating.quantize(rows, self.MODE, self.dtype)
        return dict(zip(("weight", "scales"), parts, strict=True)), largest

    def decode(self, parts: Mapping[str, Array]) -> Array:
        return floating.dequantize(parts["weight"], parts["scales"], self.MODE, self.dtype)

    def mlx(self) -> dict[str, Any] | None:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.MODE}


class Mxfp4(Floating):
    MODE = "mxfp4"


class Mxfp8(Floating):
    MODE = "mxfp8"


class Nvfp4(Floating):
    MODE = "nvfp4"


@dataclass(frozen=True)
class CoreML(Scheme):
    """A layer of the Core ML encoder in one of `quantization.coreml.compression`'s forms, which the MLX folder has no
    part of."""

    form: str

    MODE = "coreml"
    LEGAL: ClassVar[Settings] = {"form": ("fp16", *COMPRESSIONS)}
    dtype = "float16"

    def fault(self, shape: tuple[int, ...]) -> str | None:
        return "a Core ML form is for the vision encoder's layers"


MODES: dict[str, type[Scheme]] = {kind.MODE: kind for kind in (Cast, Affine, Mxfp4, Mxfp8, Nvfp4, CoreML)}


def spec_bytes(spec: Spec) -> int:
    """The size of a stored tensor's data in bytes."""
    return math.prod(spec[1]) * ITEMSIZE[spec[0]]


def nbytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes of a weight of this shape when it is stored."""
    return sum(map(spec_bytes, scheme.parts(shape).values()))


@cache
def _legal() -> dict[str, Scheme]:
    every = [kind(*values) for kind in MODES.values() for values in itertools.product(*kind.LEGAL.values())]
    return {json.dumps({"mode": scheme.MODE} | scheme.to_json(), sort_keys=True): scheme for scheme in every}


def from_json(document: Any) -> Scheme:
    """The scheme of a document as `to_json` gives it. Raises ValueError with the legal ones for any other."""
    settings = {"mode": Cast.MODE} | document if isinstance(document, dict) else document
    scheme = _legal().get(json.dumps(settings, sort_keys=True))
    if scheme is None:
        raise ValueError(f"no such scheme; legal: {legal_combinations()}")
    return scheme


def legal_combinations() -> str:
    """All legal schemes of a recipe, in one line."""
    modes: dict[tuple[str, ...], list[str]] = {}  # settings -> the modes that have them
    for mode, kind in MODES.items():
        settings = tuple(f'"{key}": {"|".join(map(str, legal))}' for key, legal in kind.LEGAL.items())
        modes.setdefault(settings, []).append(mode)
    return " or ".join(
        f'{{"mode": {"|".join(map(json.dumps, same))}, {", ".join(settings)}}}' for settings, same in modes.items()
    )
