"""The schemes a recipe can name: each says what it stores for a weight, and turns rows of it into that.

A new scheme is a new class in `MODES`; nothing else asks which scheme it has.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from fastvlm.common.dtypes import ITEMSIZE, Array
from quantization.coreml.compression import COMPRESSIONS
from quantization.mlx import affine, casting, floating

DTYPES = ("float16", "bfloat16", "float32")

Spec = tuple[str, tuple[int, ...]]  # of a stored tensor: its type's name, its shape


class Scheme(Protocol):
    """How one weight is stored: as parts, each a tensor whose rows belong to the weight's rows."""

    LEGAL: ClassVar[dict[str, tuple[Any, ...]]]  # setting -> values allowed; any combination of them is legal

    @property
    def dtype(self) -> str:
        """The type of the stored values, or of a quantized weight's scales and of its values before rounding."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The settings, as in a recipe."""
        ...

    def fault(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored so, or None."""
        ...

    def parts(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """What is stored for a weight `x.weight` of this shape: part name ("weight", "scales", ...) -> dtype, shape."""
        ...

    def encode(self, rows: Array) -> tuple[dict[str, Array], float]:
        """The parts of some rows of a weight, which are rounded to `dtype` first, and their largest magnitude then."""
        ...

    def decode(self, parts: Mapping[str, Array]) -> Array:
        """The values, in `dtype`, that MLX computes with."""
        ...

    def mlx(self) -> dict[str, Any] | None:
        """The entry for config.json's `quantization` block, or None if the weight is not quantized."""
        ...


@dataclass(frozen=True)
class Cast:
    """Stored as it is, in a floating-point type."""

    dtype: str

    LEGAL: ClassVar[dict[str, tuple[Any, ...]]] = {"dtype": DTYPES}

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def fault(self, shape: tuple[int, ...]) -> str | None:
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        return {"weight": (self.dtype, shape)}

    def encode(self, rows: Array) -> tuple[dict[str, Array], float]:
        values, largest = casting.cast(rows, self.dtype)
        return {"weight": values}, largest

    def decode(self, parts: Mapping[str, Array]) -> Array:
        return parts["weight"]

    def mlx(self) -> dict[str, Any] | None:
        return None


@dataclass(frozen=True)
class Affine:
    """MLX's affine quantization; `dtype` is that of the scales and biases, and of the values before rounding."""

    bits: int
    group_size: int
    dtype: str

    LEGAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bits": affine.BITS,
        "group_size": affine.GROUP_SIZES,
        "dtype": DTYPES,
    }

    def to_json(self) -> dict[str, Any]:
        return {"mode": "affine", **asdict(self)}

    def fault(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"affine quantization takes matrices, got {len(shape)} dimension(s)"
        if shape[1] % self.group_size:
            fitting = [str(size) for size in affine.GROUP_SIZES if shape[1] % size == 0]
            return (
                f"rows of {shape[1]} do not divide into groups of {self.group_size} "
                f"(groups that do: {', '.join(fitting) or 'none, store it unquantized'})"
            )
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        rows, columns = shape
        groups = (self.dtype, (rows, columns // self.group_size))
        return {
            "weight": ("uint32", (rows, affine.packed_columns(columns, self.bits))),
            "scales": groups,
            "biases": groups,
        }

    def encode(self, rows: Array) -> tuple[dict[str, Array], float]:
        (packed, scales, biases), largest = affine.quantize(rows, self.bits, self.group_size, self.dtype)
        return {"weight": packed, "scales": scales, "biases": biases}, largest

    def decode(self, parts: Mapping[str, Array]) -> Array:
        return affine.dequantize(parts["weight"], parts["scales"], parts["biases"], self.bits, self.group_size)

    def mlx(self) -> dict[str, Any] | None:
        # "affine" is every loader's default mode; mlx-swift-examples 2.21 knows only these two keys
        return {"group_size": self.group_size, "bits": self.bits}


@dataclass(frozen=True)
class Floating:
    """One of MLX's floating-point modes; `dtype` is that of the values before rounding. There are no biases."""

    dtype: str

    MODE: ClassVar[str]
    LEGAL: ClassVar[dict[str, tuple[Any, ...]]] = {"dtype": DTYPES}

    @property
    def form(self) -> floating.Format:
        """What the mode fixes."""
        return floating.FORMATS[self.MODE]

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.MODE, "dtype": self.dtype}

    def fault(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self.MODE} takes matrices, got {len(shape)} dimension(s)"
        if shape[1] % self.form.group_size:
            return f"rows of {shape[1]} do not divide into {self.MODE}'s groups of {self.form.group_size}"
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        rows, columns = shape
        return {
            "weight": ("uint32", (rows, columns * self.form.bits // 32)),
            "scales": ("uint8", (rows, columns // self.form.group_size)),
        }

    def encode(self, rows: Array) -> tuple[dict[str, Array], float]:
        (packed, scales), largest = floating.quantize(rows, self.MODE, self.dtype)
        return {"weight": packed, "scales": scales}, largest

    def decode(self, parts: Mapping[str, Array]) -> Array:
        return floating.dequantize(parts["weight"], parts["scales"], self.MODE, self.dtype)

    def mlx(self) -> dict[str, Any] | None:
        return {"group_size": self.form.group_size, "bits": self.form.bits, "mode": self.MODE}


class Mxfp4(Floating):
    MODE = "mxfp4"


class Mxfp8(Floating):
    MODE = "mxfp8"


class Nvfp4(Floating):
    MODE = "nvfp4"


@dataclass(frozen=True)
class CoreML:
    """A layer of the Core ML encoder in one of `quantization.coreml.compression`'s forms; the MLX folder has nothing
    of it."""

    form: str

    LEGAL: ClassVar[dict[str, tuple[Any, ...]]] = {"form": ("fp16", *COMPRESSIONS)}

    @property
    def dtype(self) -> str:
        return "float16"

    def to_json(self) -> dict[str, Any]:
        return {"mode": "coreml", "form": self.form}

    def fault(self, shape: tuple[int, ...]) -> str | None:
        return "a Core ML form is for the vision encoder's layers"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        return {}

    def encode(self, rows: Array) -> tuple[dict[str, Array], float]:
        return {}, 0.0

    def decode(self, parts: Mapping[str, Array]) -> Array:
        raise ValueError("a Core ML form has no parts in the MLX folder")

    def mlx(self) -> dict[str, Any] | None:
        return None


MODES: dict[str, type[Cast] | type[Affine] | type[Floating] | type[CoreML]] = {
    "cast": Cast,
    "affine": Affine,
    "mxfp4": Mxfp4,
    "mxfp8": Mxfp8,
    "nvfp4": Nvfp4,
    "coreml": CoreML,
}


def spec_bytes(spec: Spec) -> int:
    """The size of a stored tensor's data in bytes."""
    return math.prod(spec[1]) * ITEMSIZE[spec[0]]


def nbytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """What a weight of this shape takes when it is stored."""
    return sum(map(spec_bytes, scheme.parts(shape).values()))


def legal_combinations() -> str:
    """What a recipe may say, in a line."""
    modes: dict[tuple[str, ...], list[str]] = {}  # settings -> the modes that have them
    for mode, kind in MODES.items():
        settings = tuple(f'"{key}": {"|".join(map(str, legal))}' for key, legal in kind.LEGAL.items())
        modes.setdefault(settings, []).append(mode)
    return " or ".join(
        f'{{"mode": {"|".join(map(json.dumps, same))}, {", ".join(settings)}}}' for settings, same in modes.items()
    )
