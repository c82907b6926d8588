"""A function of an ML program as a graph that a check can walk, and what each of its operations costs.

Costs are the saved program's, not a device's time: multiply-accumulates, and bytes that an operation reads and
writes if nothing stays on the chip (inputs + outputs + weights as they are stored).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from model_export.mil import Function, Operation, TensorType
from model_export.mil.program import BlobRef, Block, Constant, NamedType
from model_export.mil.types import HELD, SUB_BYTE

INPUT, OUTPUT = "input", "output"  # stand among the operation types that `Graph.reached` returns
_SETTINGS = ("string", "bool", "int32", "uint32", "int64")  # outside the weight file: axes, pads, shapes, flags
_NEVER_CONSTANT = ("random_", "make_list", "read_state")


class Graph:
    """One function: its operations without the constant ones, and who makes and who reads each value.

    Constant is what needs no input: `const`, `constexpr_*` and operations on nothing else (folded at compilation).
    Blocks inside operations (loops, branches) are flattened.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.types: dict[str, TensorType | None] = {item.name: item.type for item in function.inputs}
        self.operations: list[Operation] = []
        self.producer: dict[str, Operation] = {}
        self.consumers: dict[str, list[Operation]] = {}
        self._constant: dict[str, Operation] = {}
        for operation in _flat(function.block):
            self._add(operation)
        self.inputs = {item.name for item in function.inputs}
        self.outputs = set(function.block.outputs)

    def _add(self, operation: Operation) -> None:
        for block in operation.blocks:
            self.types.update({item.name: item.type for item in block.inputs})
        self.types.update({item.name: item.type for item in operation.outputs})
        names = list(_names(operation))
        constant = not operation.blocks and all(name in self._constant for name in names)
        if constant and not operation.type.startswith(_NEVER_CONSTANT):
            self._constant.update({item.name: operation for item in operation.outputs})
            return
        self.operations.append(operation)
        self.producer.update({item.name: operation for item in operation.outputs})
        for name in dict.fromkeys((*names, *(output for block in operation.blocks for output in block.outputs))):
            self.consumers.setdefault(name, []).append(operation)

    @cached_property
    def constants(self) -> list[Operation]:
        """The constant operations, each once."""
        return list({id(operation): operation for operation in self._constant.values()}.values())

    def live(self, operation: Operation) -> list[str]:
        """Names of the values that it reads and that depend on an input, each once."""
        return [name for name in dict.fromkeys(_names(operation)) if name not in self._constant]

    def is_constant(self, operation: Operation, key: str) -> bool:
        """Whether the argument is given and known before the program runs."""
        given = operation.inputs.get(key, ())
        return bool(given) and all(isinstance(item, Constant) or item in self._constant for item in given)

    def value(self, operation: Operation, key: str, default: Any = None) -> Any:
        """A small constant argument as a Python value; the default when absent, computed or in the weight file."""
        for item in operation.inputs.get(key, ()):
            if isinstance(item, str):
                maker = self._constant.get(item)
                item = maker.attributes.get("val") if maker is not None else None  # type: ignore[assignment]
            if isinstance(item, Constant) and not isinstance(item.data, BlobRef):
                return item.data if isinstance(item.data, (str, tuple)) else item.data.tolist()
        return default

    def shape(self, operation: Operation, key: str) -> tuple[int | None, ...] | None:
        """The shape of an argument that is one tensor."""
        for item in operation.inputs.get(key, ()):
            type = item.type if isinstance(item, Constant) else self.types.get(item)
            return type.shape if type is not None else None
        return None

    def reached(self, operation: Operation, through: frozenset[str], forward: bool) -> dict[str, list[Operation]]:
        """The operations behind (or before) an operation, looking on through operations of the types given.

        Operation type -> those operations; INPUT or OUTPUT is a key when the function's own interface is reached.
        """
        reached: dict[str, list[Operation]] = {}
        waiting, seen = [operation], {id(operation)}
        while waiting:
            current = waiting.pop()
            names = [item.name for item in current.outputs] if forward else self.live(current)
            for name in names:
                if name in (self.outputs if forward else self.inputs):
                    reached.setdefault(OUTPUT if forward else INPUT, [])
                if forward:
                    neighbours = self.consumers.get(name, [])
                else:
                    neighbours = [self.producer[name]] if name in self.producer else []
                for other in neighbours:
                    if id(other) not in seen:
                        seen.add(id(other))
                        reached.setdefault(other.type, []).append(other)
                        if other.type in through:
                            waiting.append(other)
        return reached

    def weights(self, operation: Operation) -> dict[Any, tuple[str, int]]:
        """The stored tensors behind its constant arguments: identity -> (element type, bytes as stored).

        A compressed weight is what its `constexpr_*` operation holds.
        """
        stored: dict[Any, tuple[str, int]] = {}
        for item in (argument for given in operation.inputs.values() for argument in given):
            maker = self._constant.get(item) if isinstance(item, str) else None
            if isinstance(item, Constant):
                _store(stored, item)
            elif maker is not None:
                stored.update(self.weights(maker))
                for constant in maker.attributes.values():  # a const's value; the data of iOS 16's constexpr operations
                    _store(stored, constant)
        return stored


def _flat(block: Block) -> Iterator[Operation]:
    for operation in block.operations:
        for inner in operation.blocks:
            yield from _flat(inner)
        yield operation


def _names(operation: Operation) -> Iterator[str]:
    return (item for given in operation.inputs.values() for item in given if isinstance(item, str))


def _store(stored: dict[Any, tuple[str, int]], constant: Constant) -> None:
    blob = isinstance(constant.data, BlobRef)
    if blob or constant.type.dtype not in _SETTINGS:
        stored[constant.data if blob else id(constant)] = (constant.type.dtype, size_of(constant.type) or 0)


def size_of(type: TensorType | None) -> int | None:
    """Bytes of a tensor, unpadded; None when its type or a size is unknown."""
    if type is None or None in type.shape or type.dtype not in HELD:
        return None
    count = math.prod(size for size in type.shape if size is not None)
    return -(-count * SUB_BYTE.get(type.dtype, 8 * np.dtype(HELD[type.dtype]).itemsize) // 8)


def padded_size_of(type: TensorType | None, alignment: int) -> int | None:
    """Bytes of a tensor whose last axis is padded to `alignment` bytes, as in the Neural Engine's buffers."""
    size = size_of(type)
    if size is None or type is None or not type.shape or not type.shape[-1]:
        return size
    rows = math.prod(item for item in type.shape[:-1] if item is not None)
    return rows * -(-(size // rows) // alignment) * alignment if rows else size


@dataclass(frozen=True)
class Cost:
    """One operation's multiply-accumulates (None: unknown shapes) and bytes by element type."""

    macs: int | None
    inputs: int
    outputs: int
    weights: int
    by_type: dict[str, int]

    @property
    def bytes(self) -> int:
        return self.inputs + self.outputs + self.weights

    @property
    def intensity(self) -> float | None:
        """Multiply-accumulates for each byte moved."""
        return self.macs / self.bytes if self.macs is not None and self.bytes else None


def cost_of(graph: Graph, operation: Operation) -> Cost:
    """The cost of one operation: what it computes and moves."""
    by_type: dict[str, int] = {}

    def moved(items: list[TensorType | None]) -> int:
        total = 0
        for type in items:
            size = size_of(type) or 0
            if type is not None and size:
                by_type[type.dtype] = by_type.get(type.dtype, 0) + size
            total += size
        return total

    inputs = moved([graph.types.get(name) for name in graph.live(operation)])
    outputs = moved([item.type for item in operation.outputs])
    weights = 0
    for dtype, size in graph.weights(operation).values():
        by_type[dtype] = by_type.get(dtype, 0) + size
        weights += size
    return Cost(macs_of(graph, operation), inputs, outputs, weights, by_type)


def macs_of(graph: Graph, operation: Operation) -> int | None:
    """Multiply-accumulates of a convolution or a matrix product; 0 for anything else, None for unknown shapes.

    Convolution: every output element takes C_in / groups x kernel products (transposed: every input element
    C_out / groups x kernel); weights are (C_out, C_in / groups, *kernel), transposed (C_in, C_out / groups, *kernel).
    """
    factors = _FACTORS.get(operation.type)
    if factors is None:
        return 0
    try:
        sizes = factors(graph, operation)
    except (TypeError, IndexError, KeyError, ValueError):  # an argument is missing, or of unknown rank
        return None
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


_Sizes = tuple[int | None, ...]


def _shape(graph: Graph, operation: Operation, key: str) -> _Sizes:
    shape = graph.shape(operation, key)
    if shape is None:
        raise ValueError(key)
    return shape


def _result(operation: Operation) -> _Sizes:
    output: NamedType = operation.outputs[0]
    if output.type is None:
        raise ValueError(output.name)
    return output.type.shape


def _conv(graph: Graph, operation: Operation) -> _Sizes:
    return (*_result(operation), *_shape(graph, operation, "weight")[1:])


def _conv_transpose(graph: Graph, operation: Operation) -> _Sizes:
    return (*_shape(graph, operation, "x"), *_shape(graph, operation, "weight")[1:])


def _linear(graph: Graph, operation: Operation) -> _Sizes:
    return (*_result(operation), _shape(graph, operation, "weight")[-1])


def _matmul(graph: Graph, operation: Operation) -> _Sizes:
    x = _shape(graph, operation, "x")
    transposed = len(x) > 1 and graph.value(operation, "transpose_x", False)
    return (*_result(operation), x[-2] if transposed else x[-1])


def _einsum(graph: Graph, operation: Operation) -> _Sizes:
    """Every letter of the equation once."""
    letters: dict[str, int | None] = {}
    terms = str(graph.value(operation, "equation")).split("->")[0].replace(" ", "").split(",")
    for term, item in zip(terms, operation.inputs["values"], strict=True):
        type = item.type if isinstance(item, Constant) else graph.types[item]
        letters.update(zip(term, type.shape, strict=True))  # type: ignore[union-attr]
    return tuple(letters.values())


def _attention(graph: Graph, operation: Operation) -> _Sizes:
    """scaled_dot_product_attention: L x S x (E + E_v) for each batch and head; mask and softmax not counted."""
    query, key, value = (_shape(graph, operation, name) for name in ("query", "key", "value"))
    widths = (query[-1], value[-1])
    return (*query[:-1], key[-2], None if None in widths else sum(width for width in widths if width is not None))


def _recurrent(graph: Graph, operation: Operation) -> _Sizes:
    """Every step's products with both weights: (gates H, inputs) and (gates H, H), in each direction."""
    steps, batch, inputs = _shape(graph, operation, "x")
    rows, hidden = _shape(graph, operation, "weight_hh")
    directions = 2 if graph.value(operation, "direction", "forward") == "bidirectional" else 1
    return (steps, batch, rows, None if inputs is None or hidden is None else inputs + hidden, directions)


_FACTORS = {
    "conv": _conv,
    "conv_quantized": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "matmul": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "rnn": _recurrent,
    "gru": _recurrent,
    "lstm": _recurrent,
}
