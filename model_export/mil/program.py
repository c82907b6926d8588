"""A Core ML ML program as plain frozen data, and the one exception of this package.

The shapes follow coremltools' `mlmodel/format/MIL.proto`: program > function > block > operation > typed values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Bytes of values that are alive at once. FastViTHD has 1 GiB at 2048 x 2048 pixels, the largest that is exported.
MOST_BYTES = 4 << 30


class MILError(Exception):
    """An unusable package, program or input: one line saying what failed, where, got and expected."""


def reason(error: BaseException) -> str:
    """A library's exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")


@dataclass(frozen=True)
class TensorType:
    """Element type (a MIL name such as "fp16") and shape; None is a size known only at run time."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape fits."""
        return len(shape) == len(self.shape) and all(a is None or a == b for a, b in zip(self.shape, shape))


@dataclass(frozen=True)
class NamedType:
    """A value's name and type; the type is None for anything but a tensor (list, tuple, dictionary, state)."""

    name: str
    type: TensorType | None


@dataclass(frozen=True)
class BlobRef:
    """The place of a constant's bytes: a weight file, already resolved inside the package, and a metadata offset."""

    file: Path
    offset: int


@dataclass(frozen=True)
class Constant:
    """A compile-time value: an array (bits of what NumPy has no type for), text, or a reference into a weight file."""

    type: TensorType
    data: np.ndarray | str | tuple[str, ...] | BlobRef


Binding = str | Constant


@dataclass(frozen=True)
class Operation:
    """One operation: its arguments are names of earlier values or constants, several where the parameter is a list."""

    type: str
    name: str
    inputs: Mapping[str, tuple[Binding, ...]]
    outputs: tuple[NamedType, ...]
    attributes: Mapping[str, Constant]
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Block:
    """Operations in topological order and the names they return."""

    inputs: tuple[NamedType, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Function:
    """A function in the opset that it selects, with the inputs and outputs that the model description promises.

    `described_*` have the multi-arrays; `other_features` the kind of the rest (pictures, dictionaries) by name.
    """

    name: str
    opset: str
    inputs: tuple[NamedType, ...]
    block: Block
    described_inputs: Mapping[str, TensorType]
    described_outputs: Mapping[str, TensorType]
    other_features: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A whole package: its functions and which one runs when none is named."""

    path: Path
    specification_version: int
    functions: Mapping[str, Function]
    default_function: str
    metadata: Mapping[str, str] = field(default_factory=dict)  # user-defined
