"""Joining, splitting, padding, sorting. Semantics: coremltools defs `tensor_operation.py`."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op, positive


def _shapes(node: Node, key: str) -> list[tuple[int | None, ...]]:
    """The shapes of a list-valued parameter's tensors."""
    types = [node.types.get(item) if isinstance(item, str) else item.type for item in node.operation.inputs[key]]
    return [type.shape for type in types if type is not None]


@mil_op("identity")
def identity(node: Node) -> Kernel:
    return node.kernel(lambda x: x, "x", exact=True, view=True)


@mil_op("concat")
def concat(node: Node) -> Kernel:
    """One after another or, interleaved, the first of each, the second of each, ... Scalars make a vector."""
    axis, interleaved = node.const("axis"), node.const("interleave", False)
    shapes = [shape or (1,) for shape in _shapes(node, "values")]
    axis %= len(shapes[0])
    joined = [shape[axis] for shape in shapes]
    whole = list(shapes[0])
    whole[axis] = None if None in joined else sum(size or 0 for size in joined)
    node.expects(*whole)

    def run(*values: torch.Tensor) -> torch.Tensor:
        values = tuple(value if value.ndim else value.reshape(1) for value in values)
        return torch.stack(values, axis + 1).flatten(axis, axis + 1) if interleaved else torch.cat(values, axis)

    return Kernel(run, node.operands("values"), exact=True)


@mil_op("stack")
def stack(node: Node) -> Kernel:
    axis = node.const("axis")
    shapes = _shapes(node, "values")
    whole = list(shapes[0])
    whole.insert(axis % (len(whole) + 1), len(shapes))
    node.expects(*whole)
    return Kernel(lambda *values: torch.stack(values, axis), node.operands("values"), exact=True)


@mil_op("split")
def split(node: Node) -> Kernel:
    axis, count = node.const("axis"), node.const("num_splits", None)
    sizes = node.const("split_sizes", None)
    size = node.type_of("x").shape[axis]
    if sizes is None and count is None:
        raise Unsupported("neither num_splits nor split_sizes")
    if sizes is None:
        positive(node, num_splits=count)
        if size is not None and size % count:
            raise Unsupported(f"splitting {size} into {count}")
    elif count not in (None, len(sizes)):
        raise Unsupported(f"num_splits {count} with {len(sizes)} split_sizes")

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(x, [x.shape[axis] // count] * count if sizes is None else sizes, axis)

    return node.kernel(run, "x", exact=True, view=True)


def _padded(size: int | None, before: int, after: int) -> int | None:
    return None if size is None else size + before + after


@mil_op("pad")
def pad(node: Node) -> Kernel:
    """`pad` holds (before, after) for the last dimensions, the outermost of them first."""
    amounts, mode = node.known("pad"), node.const("mode", "constant")
    value = node.const("constant_val", 0.0)
    if mode not in ("constant", "reflect", "replicate"):
        raise Unsupported(f"mode {mode!r}")

    def pairs(amounts: list[int]) -> list[tuple[int, int]]:
        if min(amounts, default=0) < 0 or len(amounts) % 2 or len(amounts) > 2 * node.rank("x"):
            raise Unsupported(f"pad {amounts} for {node.type_of('x')}")
        unpadded = node.rank("x") - len(amounts) // 2
        return [(0, 0)] * unpadded + list(zip(amounts[::2], amounts[1::2]))

    if amounts is not None:
        node.expects(*(_padded(size, *pair) for size, pair in zip(node.type_of("x").shape, pairs(amounts))))

    def run(x: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        around = pairs(amounts.tolist())
        node.allowed(*(size + before + after for size, (before, after) in zip(x.shape, around)))
        if mode == "constant":
            return F.pad(x, [amount for pair in reversed(around) for amount in pair], value=value)
        for axis, (before, after) in enumerate(around):
            if before or after:
                index = torch.arange(-before, x.shape[axis] + after)
                last = x.shape[axis] - 1
                index = (last - (index.abs() - last).abs()) if mode == "reflect" else index.clamp(0, last)
                x = x.index_select(axis, index)
        return x

    return node.kernel(run, "x", "pad", exact=True)


@mil_op("tile")
def tile(node: Node) -> Kernel:
    reps, sizes = node.known("reps"), node.type_of("x").shape
    if reps is not None:
        if len(reps) != len(sizes):
            raise Unsupported(f"reps {reps} for {node.type_of('x')}")
        positive(node, reps=reps)
        node.expects(*(None if size is None else size * times for size, times in zip(sizes, reps)))

    def run(x: torch.Tensor, reps: torch.Tensor) -> torch.Tensor:
        times = reps.tolist()
        node.allowed(*(size * count for size, count in zip(x.shape, times, strict=True)))
        return x.repeat(times)

    return node.kernel(run, "x", "reps", exact=True)


@mil_op("fill")
def fill(node: Node) -> Kernel:
    shape, value, dtype = node.known("shape"), node.const("value", 0.0), node.policy.holds(node.type.dtype)
    if shape is not None:
        node.expects(*shape)
    return node.kernel(lambda shape: torch.full(node.allowed(*shape.tolist()), value, dtype=dtype), "shape", exact=True)


@mil_op("fill_like", since="CoreML6")
def fill_like(node: Node) -> Kernel:
    value, dtype = node.const("value", 0.0), node.policy.holds(node.type.dtype)
    return node.kernel(lambda x: torch.full(x.shape, value, dtype=dtype), "ref_tensor", exact=True)


@mil_op("range_1d")
def range_1d(node: Node) -> Kernel:
    """start, start + step, ... before end. How many, the program says if it knows: it may have divided in fp16."""
    known = [node.known(key) for key in ("start", "end", "step")]
    declared, dtype = node.type.shape, node.policy.holds(node.type.dtype)

    def count(start: float, end: float, step: float) -> int:
        steps = (end - start) / step
        if len(declared) == 1 and declared[0] is not None and abs(declared[0] - steps) <= 1 + abs(steps) / 1024:
            return declared[0]
        return max(math.ceil(steps), 0)

    if None not in known:
        node.expects(count(*known))

    def run(*numbers: torch.Tensor) -> torch.Tensor:
        start, end, step = (number.item() for number in numbers)
        (size,) = node.allowed(count(start, end, step))
        exact = torch.int64 if dtype == torch.int32 else torch.float64
        return (torch.arange(size, dtype=exact) * step + start).to(dtype)

    return node.kernel(run, "start", "end", "step")


@mil_op("one_hot")
def one_hot(node: Node) -> Kernel:
    """on_value at each index along a new axis, off_value elsewhere, and everywhere for an index out of range."""
    indices, depth = node.type_of("indices").shape, node.known("one_hot_vector_size")
    axis = node.const("axis", -1) % (len(indices) + 1)
    on, off, dtype = node.const("on_value", 1), node.const("off_value", 0), node.policy.holds(node.type.dtype)
    node.expects(*indices[:axis], depth, *indices[axis:])

    def run(indices: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        place = torch.arange(node.allowed(*indices.shape[:axis], int(depth), *indices.shape[axis:])[axis])
        hot = indices.unsqueeze(axis) == place.reshape(-1, *[1] * (indices.ndim - axis))
        return torch.where(hot, torch.tensor(on, dtype=dtype), torch.tensor(off, dtype=dtype))

    return node.kernel(run, "indices", "one_hot_vector_size", exact=True)


@mil_op("non_zero")
def non_zero(node: Node) -> Kernel:
    """The indices of the elements that are not 0, one row each."""
    return node.kernel(lambda x: x.nonzero().to(torch.int32), "x")


@mil_op("band_part")
def band_part(node: Node) -> Kernel:
    """The innermost matrices with zeros outside a band of diagonals; a negative number of them: all on that side."""
    lower, upper = node.const("lower", -1), node.const("upper", -1)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = x if lower < 0 else x.triu(-lower)
        return x if upper < 0 else x.tril(upper)

    return node.kernel(run, "x", exact=True, view=True)


@mil_op("flatten2d")
def flatten2d(node: Node) -> Kernel:
    axis = node.const("axis", 1)
    return node.kernel(lambda x: x.reshape(x.shape[:axis].numel(), x.shape[axis:].numel()), "x", exact=True, view=True)


@mil_op("shape")
def shape(node: Node) -> Kernel:
    return node.kernel(lambda x: torch.tensor(x.shape, dtype=torch.int32), "x")


@mil_op("cumsum")
def cumsum(node: Node) -> Kernel:
    axis, exclusive, reverse = node.const("axis", 0), node.const("exclusive", False), node.const("reverse", False)

    def run(x: torch.Tensor) -> torch.Tensor:
        flipped = x.flip(axis) if reverse else x
        if exclusive and x.shape[axis]:  # a 0 first instead of the last: taking it away again would round
            flipped = torch.cat(
                [torch.zeros_like(flipped.narrow(axis, 0, 1)), flipped.narrow(axis, 0, x.shape[axis] - 1)], axis
            )
        total = flipped.cumsum(axis, dtype=x.dtype)
        return total.flip(axis) if reverse else total

    return node.kernel(run, "x")


# -- sorting ----------------------------------------------------------------------------------------------------------


def _order(x: torch.Tensor, axis: int, ascending: bool) -> torch.Tensor:
    """Indices of the sorted elements: equal ones in their order and, as NumPy has it, NaN last."""
    if ascending or not x.is_floating_point():
        return torch.argsort(x, dim=axis, descending=not ascending, stable=True)
    return torch.argsort(-x, dim=axis, stable=True)


@mil_op("argsort")
def argsort(node: Node) -> Kernel:
    axis, ascending = node.const("axis", -1), node.const("ascending", False)
    return node.kernel(lambda x: _order(x, axis, ascending).to(torch.int32), "x")


@mil_op("topk")
def topk(node: Node) -> Kernel:
    """The k largest or smallest along an axis, always sorted; -1: all. With their indices, if asked for."""
    k, axis, ascending = node.const("k", 1), node.const("axis", -1), node.const("ascending", False)
    node.const("sort", True)  # where it is False, any order will do
    with_indices = node.const("return_indices", True)
    node.const("output_indices_dtype", None)  # equals the declared type
    if k < -1:
        raise Unsupported(f"k {k}")

    def run(x: torch.Tensor) -> Any:
        order = _order(x, axis, ascending).narrow(axis, 0, x.shape[axis] if k == -1 else k)
        values = x.gather(axis, order)
        return (values, order.to(torch.int32)) if with_indices else values

    return node.kernel(run, "x", exact=True)
