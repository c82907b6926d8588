"""Lists of tensors. Semantics: coremltools defs `control_flow.py`."""

from typing import Any

import torch

from ..program import MOST_BYTES, ListType
from ..registry import Kernel, Node, TensorList, Unsupported, mil_op

_MOST_ELEMENTS = 1 << 20


def _bounded(items: list[torch.Tensor | None], length: int, element: int) -> list[torch.Tensor | None]:
    """The items, and nothing up to this length."""
    if length > _MOST_ELEMENTS or length * element > MOST_BYTES:
        raise ValueError(f"a list of {length} elements of {element} bytes")
    return items + [None] * (length - len(items))


def _bytes(list_type: ListType) -> int:
    """At least 1, of an element as far as its sizes are known."""
    count = 4
    for size in list_type.element.shape:
        count *= 1 if size is None else size
    return max(count, 1)


@mil_op("make_list")
def make_list(node: Node) -> Kernel:
    """A list of init_length elements that are not written yet."""
    (result,) = node.operation.outputs
    if not isinstance(result.other, ListType):
        raise Unsupported(f"the result is {result.type}, expected a list")
    element, length = _bytes(result.other), node.value("init_length", 1)
    node.used.update(("elem_shape", "dtype", "dynamic_length"))  # which the result's type has

    def run(length: int) -> TensorList:
        return TensorList(tuple(_bounded([], max(length, 0), element)))

    return Kernel(run, (length,), exact=True, keeps=True)


@mil_op("list_length")
def list_length(node: Node) -> Kernel:
    node.list_type("ls")
    return node.kernel(lambda ls: torch.tensor(len(ls.items), dtype=torch.int32), "ls")


def _place(ls: TensorList, index: int) -> int:
    if not 0 <= index < len(ls.items):
        raise IndexError(f"index {index} of a list of {len(ls.items)}")
    return index


@mil_op("list_read")
def list_read(node: Node) -> Kernel:
    """An element; zeros where nothing was written, as in an array of tensors."""
    node.list_type("ls")
    dtype, sizes = node.policy.holds(node.type.dtype), node.type.shape

    def run(ls: TensorList, index: int) -> torch.Tensor:
        return _written(ls.items[_place(ls, index)], sizes, dtype)

    return node.kernel(run, "ls", values=[node.value("index")], exact=True, keeps=True)


def _written(item: torch.Tensor | None, sizes: tuple[int | None, ...], dtype: torch.dtype) -> torch.Tensor:
    if item is not None:
        return item
    if None in sizes:
        raise ValueError("an element of unknown shape that was never written")
    return torch.zeros([size or 0 for size in sizes], dtype=dtype)


@mil_op("list_write")
def list_write(node: Node) -> Kernel:
    """The list with one element replaced; a list grows up to the index."""
    element = _bytes(node.list_type("ls"))
    node.type_of("value")

    def run(ls: TensorList, value: torch.Tensor, index: int) -> TensorList:
        return TensorList(tuple(_replaced(ls, [index], [value], element)))

    return node.kernel(run, "ls", "value", values=[node.value("index")], exact=True, keeps=True)


def _replaced(ls: TensorList, indices: list[int], values: Any, element: int) -> list[torch.Tensor | None]:
    if min(indices, default=0) < 0:
        raise IndexError(f"index {min(indices)} of a list")
    items = _bounded(list(ls.items), max([len(ls.items), *(index + 1 for index in indices)]), element)
    for index, value in zip(indices, values, strict=True):
        items[index] = value
    return items


@mil_op("list_gather")
def list_gather(node: Node) -> Kernel:
    """Elements, one behind the other along a new first axis."""
    node.list_type("ls")
    dtype, sizes = node.policy.holds(node.type.dtype), node.type.shape[1:]

    def run(ls: TensorList, indices: list[int]) -> torch.Tensor:
        if not indices:
            return torch.zeros([0, *(size or 0 for size in sizes)], dtype=dtype)
        known = next((tuple(item.shape) for item in ls.items if item is not None), sizes)
        items = [_written(ls.items[_place(ls, index)], known, dtype) for index in indices]
        if len(items) * max(item.nbytes for item in items) > MOST_BYTES:
            raise ValueError(f"{len(items)} elements of a list at once")
        return torch.stack(items)

    return node.kernel(run, "ls", values=[node.value("indices")], exact=True)


@mil_op("list_scatter")
def list_scatter(node: Node) -> Kernel:
    """The list with elements replaced by the slices of value; it grows up to the largest index."""
    element = _bytes(node.list_type("ls"))

    def run(ls: TensorList, value: torch.Tensor, indices: list[int]) -> TensorList:
        return TensorList(tuple(_replaced(ls, indices, value.unbind(0), element)))

    return node.kernel(run, "ls", "value", values=[node.value("indices")], exact=True, keeps=True)
