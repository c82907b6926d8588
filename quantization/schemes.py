"""The schemes a recipe can name: each says what it stores for a weight, and turns rows of it into that.

A new scheme is a new class in `MODES`; nothing else asks which scheme it has.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from quantization import affine

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


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

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What is stored for a weight `x.weight` of this shape: part name ("weight", "scales", ...) -> dtype, shape."""
        ...

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """The parts of some rows (already in `dtype`) of a weight."""
        ...

    def mlx(self) -> dict[str, Any] | None:
        """The entry for config.json's `quantization` block, or None if the weight is not quantized."""
        ...


@dataclass(frozen=True)
class Cast:
    """Stored as it is, in a floating-point type."""

    dtype: str

    LEGAL: ClassVar[dict[str, tuple[Any, ...]]] = {"dtype": tuple(DTYPES)}

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def fault(self, shape: tuple[int, ...]) -> str | None:
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"weight": (DTYPES[self.dtype], shape)}

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        return {"weight": rows}

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
        "dtype": tuple(DTYPES),
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

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, columns = shape
        groups = (DTYPES[self.dtype], (rows, columns // self.group_size))
        return {
            "weight": (torch.uint32, (rows, affine.packed_columns(columns, self.bits))),
            "scales": groups,
            "biases": groups,
        }

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        packed, scales, biases = affine.quantize(rows, self.bits, self.group_size)
        return {"weight": packed, "scales": scales, "biases": biases}

    def mlx(self) -> dict[str, Any] | None:
        # "affine" is every loader's default mode; mlx-swift-examples 2.21 knows only these two keys
        return {"group_size": self.group_size, "bits": self.bits}


MODES: dict[str, type[Cast] | type[Affine]] = {"cast": Cast, "affine": Affine}


def legal_combinations() -> str:
    """What a recipe may say, in a line."""
    dtypes = "|".join(DTYPES)
    bits, groups = "|".join(map(str, affine.BITS)), "|".join(map(str, affine.GROUP_SIZES))
    return f'{{"dtype": {dtypes}}} or {{"mode": "affine", "bits": {bits}, "group_size": {groups}, "dtype": {dtypes}}}'
