"""Gathering and scattering. Semantics: coremltools defs `scatter_gather.py`.

Before iOS 17 a negative index counts from the end, and one beyond that is refused. Since then both are out of range:
refused with validate_indices, else undefined but harmless. Then a 0 is read and nothing is written, as Metal does
(MPSGraph's gather and scatter).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import Kernel, Node, Unsupported, broadcast, mil_op


class _Places:
    """Places given by tensors of indices, one tensor for each dimension of the given sizes."""

    def __init__(self, node: Node, wraps: bool) -> None:
        """`wraps`: negative indices count from the end, and others out of range are refused."""
        self.wraps = wraps
        self.refuses = wraps or node.const("validate_indices", False)

    def __call__(self, indices: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Each place's number in memory, and where there is none (number 0), if that is so anywhere."""
        number = outside = None
        for index, size in zip(indices, sizes, strict=True):
            index = index.to(torch.int64)
            if self.wraps:
                index = torch.where(index < 0, index + size, index)
            beyond = (index < 0) | (index >= size)
            outside = beyond if outside is None else outside | beyond
            number = index if number is None else number * size + index
        if number is None or outside is None:  # no dimension: one place
            return torch.zeros((), dtype=torch.int64), None
        if not outside.any():
            return number, None
        if self.refuses:
            raise IndexError(f"an index out of range of sizes {list(sizes)}")
        return number.masked_fill(outside, 0), outside


def _taken(x: Tensor, places: Tensor, outside: Tensor | None) -> Tensor:
    """The rows of x (rows, ...) with these numbers; zeros where there is none."""
    if outside is not None and not x.shape[0]:
        return x.new_zeros(*places.shape, *x.shape[1:])
    rows = x.index_select(0, places.reshape(-1)).reshape(*places.shape, *x.shape[1:])
    return rows if outside is None else rows.masked_fill_(outside.reshape(*outside.shape, *[1] * (x.ndim - 1)), 0)


# -- gathering --------------------------------------------------------------------------------------------------------


def _gather(node: Node, wraps: bool) -> Kernel:
    rank, batch, places = node.rank("x"), node.const("batch_dims", 0), _Places(node, wraps)
    axis = node.const("axis", 0) % rank
    sizes, (indices,) = node.type_of("x").shape, node.shapes("indices")
    if not 0 <= batch <= min(axis, len(indices)):
        raise Unsupported(f"batch_dims {batch} with axis {axis} and indices of rank {len(indices)}")
    node.expects(*sizes[:axis], *indices[batch:], *sizes[axis + 1 :])

    def run(x: Tensor, indices: Tensor) -> Tensor:
        if not batch:
            place, outside = places([indices], [x.shape[axis]])
            if outside is None:  # the usual case: nothing has to be moved
                taken = x.index_select(axis, place.reshape(-1))
                return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
        x = x.movedim(axis, batch)
        grid = _grid(x.shape[:batch], indices.ndim)
        place, outside = places([*grid, indices], x.shape[: batch + 1])
        taken = _taken(x.flatten(0, batch), place, outside)
        # What was before the axis, beyond the batch, belongs before the indices' dimensions.
        return taken.permute(*_turned(batch, indices.ndim, axis, taken.ndim))

    return node.kernel(run, "x", "indices", exact=True)


def _grid(sizes: Sequence[int], rank: int) -> list[Tensor]:
    """An index for each of the first dimensions of a tensor of this rank: its own place."""
    return [torch.arange(size).reshape(-1, *[1] * (rank - 1 - axis)) for axis, size in enumerate(sizes)]


def _turned(batch: int, indices: int, axis: int, rank: int) -> list[int]:
    """The order that takes (batch, indices, before, after) to (batch, before, indices, after)."""
    before = range(indices, indices + axis - batch)
    return [*range(batch), *before, *range(batch, indices), *range(before.stop, rank)]


@mil_op("gather")
def gather_15(node: Node) -> Kernel:
    """Slices of x along one axis; the indices' dimensions replace it."""
    return _gather(node, wraps=True)


@mil_op("gather", since="CoreML7")
def gather_17(node: Node) -> Kernel:
    return _gather(node, wraps=False)


def _gather_along_axis(node: Node, wraps: bool) -> Kernel:
    axis, places = node.const("axis", 0) % node.rank("x"), _Places(node, wraps)
    sizes, indices = list(node.type_of("x").shape), list(node.type_of("indices").shape)
    sizes[axis] = 1
    whole = broadcast(sizes, indices)
    whole[axis] = indices[axis]
    node.expects(*whole)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        place, outside = places([indices], [x.shape[axis]])
        if outside is not None and not x.shape[axis]:
            return x.new_zeros(indices.shape)
        taken = torch.take_along_dim(x, place, axis)
        return taken if outside is None else taken.masked_fill_(outside, 0)

    return node.kernel(run, "x", "indices", exact=True)


@mil_op("gather_along_axis")
def gather_along_axis_15(node: Node) -> Kernel:
    return _gather_along_axis(node, wraps=True)


@mil_op("gather_along_axis", since="CoreML7")
def gather_along_axis_17(node: Node) -> Kernel:
    return _gather_along_axis(node, wraps=False)


def _gather_nd(node: Node, wraps: bool) -> Kernel:
    batch, places = node.const("batch_dims", 0), _Places(node, wraps)
    sizes, (*outer, depth) = node.type_of("x").shape, node.type_of("indices").shape
    if depth is None or not 0 <= batch <= len(outer) or batch + depth > len(sizes):
        raise Unsupported(f"batch_dims {batch} and {depth} indices in each place of {node.type_of('x')}")
    node.expects(*outer, *sizes[batch + depth :])

    def run(x: Tensor, indices: Tensor) -> Tensor:
        grid = _grid(x.shape[:batch], len(outer))
        place, outside = places([*grid, *indices.unbind(-1)], x.shape[: batch + depth])
        place = place.expand(indices.shape[:-1])
        rows = x.reshape(math.prod(x.shape[: batch + depth]), *x.shape[batch + depth :])
        return _taken(rows, place, outside if outside is None else outside.expand(place.shape))

    return node.kernel(run, "x", "indices", exact=True)


@mil_op("gather_nd")
def gather_nd_15(node: Node) -> Kernel:
    """The part of x at each place, whose indices are in the last dimension."""
    return _gather_nd(node, wraps=True)


@mil_op("gather_nd", since="CoreML7")
def gather_nd_17(node: Node) -> Kernel:
    return _gather_nd(node, wraps=False)


# -- scattering -------------------------------------------------------------------------------------------------------

_REDUCTIONS = {"mul": "prod", "div": "prod", "max": "amax", "min": "amin"}
_MODES = ("update", "add", "sub", *_REDUCTIONS)


def _scattered(mode: str, rows: Tensor, places: Tensor, outside: Tensor | None, updates: Tensor) -> Tensor:
    """`rows` (rows, elements) with each of `updates` (updates, elements) applied to the row with its number.

    Several for one row are applied all, in their order: the last one stays of "update".
    """
    places = places.reshape(-1)
    if outside is not None:
        inside = ~outside.reshape(-1)
        places, updates = places[inside], updates[inside]
    result = rows.clone()
    if mode in ("add", "sub"):
        return result.index_add_(0, places, updates, alpha=1 if mode == "add" else -1)
    if mode == "update":
        last = torch.full(rows.shape[:1], -1).scatter_reduce_(0, places, torch.arange(places.numel()), "amax")
        written = last >= 0
        result[written] = updates[last[written]]
        return result
    places = places.reshape(-1, 1).expand(updates.shape)
    if mode != "div":
        return result.scatter_reduce_(0, places, updates, _REDUCTIONS[mode])
    divisors = torch.ones_like(rows, dtype=torch.float64)
    divisors.scatter_reduce_(0, places, updates.to(torch.float64), _REDUCTIONS[mode])
    quotients = rows / divisors
    if not rows.is_floating_point():  # towards zero, as real_div; 0 where the divisor is
        quotients = torch.where(divisors == 0, 0, quotients)
    return quotients.to(rows.dtype)


def _mode(node: Node) -> str:
    mode: str = node.const("mode", "add")
    if mode not in _MODES:
        raise Unsupported(f"mode {mode!r}, expected one of {', '.join(_MODES)}")
    return mode


def _wants(node: Node, *shape: int | None) -> None:
    """Unsupported unless `updates` has this shape."""
    given = node.type_of("updates").shape
    if len(given) != len(shape) or any(a != b for a, b in zip(given, shape) if None not in (a, b)):
        raise Unsupported(f"updates {list(given)}, expected {list(shape)}")


def _scatter(node: Node, wraps: bool) -> Kernel:
    mode, axis, places = _mode(node), node.const("axis", 0) % node.rank("data"), _Places(node, wraps)
    sizes, (indices,) = node.type_of("data").shape, node.shapes("indices")
    _wants(node, *sizes[:axis], *indices, *sizes[axis + 1 :])

    def run(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        rows = data.movedim(axis, 0)
        elements = math.prod(rows.shape[1:])
        taken = range(axis, axis + indices.ndim)
        values = updates.movedim([*taken], [*range(indices.ndim)]).reshape(indices.numel(), elements)
        place, outside = places([indices], rows.shape[:1])
        result = _scattered(mode, rows.reshape(rows.shape[0], elements), place, outside, values)
        return result.reshape(rows.shape).movedim(0, axis)

    return node.kernel(run, "data", "indices", "updates", exact=mode in ("update", "max", "min"))


@mil_op("scatter")
def scatter_15(node: Node) -> Kernel:
    """Updates of slices of data along one axis; their indices' dimensions are in the axis' place."""
    return _scatter(node, wraps=True)


@mil_op("scatter", since="CoreML7")
def scatter_17(node: Node) -> Kernel:
    return _scatter(node, wraps=False)


def _scatter_along_axis(node: Node, wraps: bool) -> Kernel:
    mode, axis, places = _mode(node), node.const("axis", 0) % node.rank("data"), _Places(node, wraps)
    _wants(node, *node.type_of("indices").shape)

    def run(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        grid = _grid(indices.shape, indices.ndim)
        grid[axis] = indices
        place, outside = places(grid, data.shape)
        flat = _scattered(mode, data.reshape(-1, 1), place, outside, updates.reshape(-1, 1))
        return flat.reshape(data.shape)

    return node.kernel(run, "data", "indices", "updates", exact=mode in ("update", "max", "min"))


@mil_op("scatter_along_axis")
def scatter_along_axis_15(node: Node) -> Kernel:
    """Updates of single elements of data, whose index along the axis is given."""
    return _scatter_along_axis(node, wraps=True)


@mil_op("scatter_along_axis", since="CoreML7")
def scatter_along_axis_17(node: Node) -> Kernel:
    return _scatter_along_axis(node, wraps=False)


def _scatter_nd(node: Node, wraps: bool) -> Kernel:
    mode, places = _mode(node), _Places(node, wraps)
    sizes, (*outer, depth) = node.type_of("data").shape, node.type_of("indices").shape
    if depth is None or depth > len(sizes):
        raise Unsupported(f"{depth} indices in each place of {node.type_of('data')}")
    _wants(node, *outer, *sizes[depth:])

    def run(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        place, outside = places(indices.unbind(-1), data.shape[:depth])
        rows = data.reshape(math.prod(data.shape[:depth]), math.prod(data.shape[depth:]))
        values = updates.reshape(math.prod(indices.shape[:-1]), rows.shape[1])
        return _scattered(mode, rows, place.expand(indices.shape[:-1]), outside, values).reshape(data.shape)

    return node.kernel(run, "data", "indices", "updates", exact=mode in ("update", "max", "min"))


@mil_op("scatter_nd")
def scatter_nd_15(node: Node) -> Kernel:
    """Updates of the parts of data at places whose indices are in the last dimension."""
    return _scatter_nd(node, wraps=True)


@mil_op("scatter_nd", since="CoreML7")
def scatter_nd_17(node: Node) -> Kernel:
    return _scatter_nd(node, wraps=False)
