"""Joining, splitting, padding, sorting. Semantics: coremltools defs `tensor_operation.py`."""

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
    axis = node.const("axis")
    if node.const("interleave", False):
        raise Unsupported("interleave")
    shapes = _shapes(node, "values")
    joined = [shape[axis] for shape in shapes]
    whole = list(shapes[0])
    whole[axis] = None if None in joined else sum(size or 0 for size in joined)
    node.expects(*whole)
    return Kernel(lambda *values: torch.cat(values, axis), node.operands("values"), exact=True)


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
    if sizes is None:
        positive(node, num_splits=count or 0)
        if count is None or size is None or size % count:
            raise Unsupported(f"splitting {size} into {count}")
        sizes = [size // count] * count
    return node.kernel(lambda x: torch.split(x, sizes, axis), "x", exact=True, view=True)


@mil_op("pad")
def pad(node: Node) -> Kernel:
    """`pad` holds (before, after) for the last dimensions, the outermost of them first."""
    amounts, mode = node.const("pad"), node.const("mode", "constant")
    value = node.const("constant_val", 0.0)
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    sizes = node.type_of("x").shape
    whole = list(sizes)
    for axis, (before, after) in enumerate(pairs, start=len(sizes) - len(pairs)):
        whole[axis] = None if (size := sizes[axis]) is None else size + before + after
    node.expects(*whole)
    if mode == "constant":
        reverse = [amount for pair in reversed(pairs) for amount in pair]
        return node.kernel(lambda x: F.pad(x, reverse, value=value), "x", exact=True)
    if mode not in ("reflect", "replicate"):
        raise Unsupported(f"mode {mode!r}")

    def run(x: torch.Tensor) -> torch.Tensor:
        for axis, (before, after) in enumerate(pairs, start=x.ndim - len(pairs)):
            index = torch.arange(-before, x.shape[axis] + after)
            last = x.shape[axis] - 1
            index = (last - (index.abs() - last).abs()) if mode == "reflect" else index.clamp(0, last)
            x = x.index_select(axis, index)
        return x

    return node.kernel(run, "x", exact=True)


@mil_op("tile")
def tile(node: Node) -> Kernel:
    reps, sizes = node.const("reps"), node.type_of("x").shape
    if len(reps) != len(sizes):
        raise Unsupported(f"reps {reps} for {node.type_of('x')}")
    node.expects(*(None if size is None else size * times for size, times in zip(sizes, reps)))
    return node.kernel(lambda x: x.repeat(reps), "x", exact=True)


@mil_op("fill")
def fill(node: Node) -> Kernel:
    shape, value, dtype = node.const("shape"), node.const("value", 0.0), node.policy.holds(node.type.dtype)
    node.expects(*shape)
    return Kernel(lambda: torch.full(tuple(shape), value, dtype=dtype), (), exact=True)


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
        total = flipped.cumsum(axis, dtype=x.dtype)
        total = total - flipped if exclusive else total
        return total.flip(axis) if reverse else total

    return node.kernel(run, "x")


def _order(x: torch.Tensor, axis: int, ascending: bool) -> torch.Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True)


@mil_op("argsort")
def argsort(node: Node) -> Kernel:
    axis, ascending = node.const("axis", -1), node.const("ascending", False)
    return node.kernel(lambda x: _order(x, axis, ascending).to(torch.int32), "x")


@mil_op("topk")
def topk(node: Node) -> Kernel:
    k, axis, ascending = node.const("k", 1), node.const("axis", -1), node.const("ascending", False)
    if not node.const("sort", True) or not node.const("return_indices", True):
        raise Unsupported("sort or return_indices is False")
    node.const("output_indices_dtype", None)  # equals the declared type

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = _order(x, axis, ascending).narrow(axis, 0, k)
        return x.gather(axis, order), order.to(torch.int32)

    return node.kernel(run, "x", exact=True)
