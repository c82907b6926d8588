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
# Iterations of a prediction, all of its loops together: minutes of the smallest body, and the end of an endless loop.
MOST_ITERATIONS = 1 << 20
# Blocks within blocks.
MOST_DEPTH = 24


class MILError(RuntimeError):
    """An unusable package, program or input: one line saying what failed, where, got and expected.

    What coremltools' `MLModel` raises for the same fault is a base of it: RuntimeError, or one of those below.
    """

    def __str__(self) -> str:  # KeyError's would quote it; a program's names may hold anything
        text = " ".join(map(str, self.args))
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class InputNameError(MILError, KeyError):
    """An input that the function does not have."""


class InputTypeError(MILError, TypeError):
    """An input of a wrong kind."""


def reason(error: BaseException) -> str:
    """A library's exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")


@dataclass(frozen=True)
class TensorType:
    """Element type (a MIL name such as "fp16") and shape; None is a size known only at run time.

    variadic: so is how many sizes there are, and the shape is (None,).
    """

    dtype: str
    shape: tuple[int | None, ...]
    variadic: bool = False

    def __str__(self) -> str:
        if self.variadic:
            return f"{self.dtype}[...]"
        return f"{self.dtype}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape fits."""
        same = len(shape) == len(self.shape) and all(a is None or a == b for a, b in zip(self.shape, shape))
        return same or self.variadic


@dataclass(frozen=True)
class ListType:
    """A list of tensors of one type and a length (None: known only at run time)."""

    element: TensorType
    length: int | None

    def __str__(self) -> str:
        return f"list of {self.element}"


@dataclass(frozen=True)
class StateType:
    """A tensor that a function reads and writes, and that the caller keeps between predictions."""

    tensor: TensorType

    def __str__(self) -> str:
        return f"state of {self.tensor}"


@dataclass(frozen=True)
class DictionaryType:
    """A dictionary with keys and values of these element types."""

    key: str
    value: str

    def __str__(self) -> str:
        return f"dictionary of {self.key} to {self.value}"


OtherType = ListType | StateType | DictionaryType


@dataclass(frozen=True)
class NamedType:
    """A value's name and type: `type` of a tensor, `other` of a list, a state or a dictionary."""

    name: str
    type: TensorType | None
    other: OtherType | None = None


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
class Feature:
    """An input, an output or a state as the model description shows it to a caller.

    kind: FeatureTypes.proto's word: multiArrayType, imageType, stateType, stringType, int64Type, dictionaryType, ...
    type: of an array or a state, with None for a flexible size; of a picture its bytes, [1, channels, height, width].
    shape: the one that it has by default. ranges: least and most (None: any) of each size. shapes: those enumerated.
    color: of a picture, ImageFeatureType's word. default: the value that fills an input which is not given.
    """

    name: str
    kind: str
    type: TensorType | None = None
    shape: tuple[int, ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    color: str = ""
    optional: bool = False
    default: float | int | None = None
    description: str = ""

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape may be given."""
        if self.shapes:
            return shape in self.shapes
        if self.ranges:
            within = (a <= size and (b is None or size <= b) for size, (a, b) in zip(shape, self.ranges))
            return len(shape) == len(self.ranges) and all(within)
        return self.type is None or self.type.accepts(shape)

    @property
    def shown_shape(self) -> str:
        """The shapes that it takes, in words."""
        if self.shapes:
            return " or ".join(str(list(shape)) for shape in self.shapes)
        sizes = [str(a) if a == b else f"{a}..{'' if b is None else b}" for a, b in self.ranges]
        known = self.type.shape if self.type else ()
        return f"[{', '.join(sizes or ('?' if size is None else str(size) for size in known))}]"


@dataclass(frozen=True)
class Function:
    """A function in the opset that it selects, with the inputs and outputs that the model description promises.

    `described_*` have the multi-arrays; `other_features` the kind of the rest (pictures, dictionaries) by name;
    `*_features` have all of them. `predicted`: the names of a classifier's label and probabilities, or empty.
    """

    name: str
    opset: str
    inputs: tuple[NamedType, ...]
    block: Block
    described_inputs: Mapping[str, TensorType]
    described_outputs: Mapping[str, TensorType]
    other_features: Mapping[str, str] = field(default_factory=dict)
    input_features: Mapping[str, Feature] = field(default_factory=dict)
    output_features: Mapping[str, Feature] = field(default_factory=dict)
    state_features: Mapping[str, Feature] = field(default_factory=dict)
    predicted: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Program:
    """A whole package: its functions and which one runs when none is named."""

    path: Path
    specification_version: int
    functions: Mapping[str, Function]
    default_function: str
    metadata: Mapping[str, str] = field(default_factory=dict)  # user-defined
