"""Operations that move elements: every result is exact. Semantics: coremltools defs `tensor_transformation.py`."""

from typing import Any

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op


@mil_op("expand_dims")
def expand_dims(node: Node) -> Kernel:
    rank = len(node.type.shape)
    axes = sorted(axis % rank for axis in node.const("axes"))

    def run(x: torch.Tensor) -> torch.Tensor:
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    return node.kernel(run, "x", exact=True, view=True)


@mil_op("squeeze")
def squeeze(node: Node) -> Kernel:
    axes = node.const("axes", None)
    sizes = node.type_of("x").shape
    if axes is None:
        axes = [axis for axis, size in enumerate(sizes) if size == 1]
    if any(sizes[axis] not in (1, None) for axis in axes):
        raise Unsupported(f"squeezing axes {axes} of {node.type_of('x')}")
    return node.kernel(lambda x: x.squeeze(tuple(axes)), "x", exact=True, view=True)


@mil_op("reshape")
def reshape(node: Node) -> Kernel:
    """One size may be -1; a 0 keeps the size at the same position."""
    shape = node.const("shape")
    zeros = [axis for axis, size in enumerate(shape) if size == 0]
    if zeros and len(shape) != node.rank("x"):
        raise Unsupported(f"shape {shape} has a 0 and another rank than {node.type_of('x')}")

    def run(x: torch.Tensor) -> torch.Tensor:
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])

    return node.kernel(run, "x", exact=True, view=True)


@mil_op("transpose")
def transpose(node: Node) -> Kernel:
    perm = node.const("perm")
    return node.kernel(lambda x: x.permute(perm), "x", exact=True, view=True)


@mil_op("reverse")
def reverse(node: Node) -> Kernel:
    axes = node.const("axes", list(range(node.rank("x"))))
    return node.kernel(lambda x: x.flip(axes), "x", exact=True)


def _take(x: torch.Tensor, axis: int, part: slice) -> torch.Tensor:
    if part.step is None or part.step > 0:
        index: list[Any] = [slice(None)] * x.ndim
        index[axis] = part
        return x[tuple(index)]
    # torch has no negative steps
    return x.index_select(axis, torch.tensor(list(range(x.shape[axis])[part]), dtype=torch.int64))


@mil_op("slice_by_index")
def slice_by_index(node: Node) -> Kernel:
    """NumPy's x[begin:end:stride, ...]; a mask drops a begin or an end, or makes the entry a plain index."""
    rank = node.rank("x")
    begin, end = node.const("begin"), node.const("end")
    stride = node.const("stride", [1] * rank)
    begin_mask, end_mask = node.const("begin_mask", [False] * rank), node.const("end_mask", [False] * rank)
    squeezed = [axis for axis, drop in enumerate(node.const("squeeze_mask", [False] * rank)) if drop]

    def part(axis: int) -> slice:
        if axis in squeezed:
            first = 0 if begin_mask[axis] else begin[axis]
            return slice(first, first + 1 if first != -1 else None)
        return slice(None if begin_mask[axis] else begin[axis], None if end_mask[axis] else end[axis], stride[axis])

    parts = [part(axis) for axis in range(rank)]

    def run(x: torch.Tensor) -> torch.Tensor:
        for axis, taken in enumerate(parts):
            if taken not in (slice(None), slice(None, None, 1)):
                x = _take(x, axis, taken)
        return x.squeeze(tuple(squeezed)) if squeezed else x

    return node.kernel(run, "x", exact=True, view=True)


@mil_op("slice_by_size")
def slice_by_size(node: Node) -> Kernel:
    """`size` elements from `begin` in each dimension; -1 means all that remain."""
    begin, size = node.const("begin"), node.const("size")
    parts = tuple(slice(a, None if n == -1 else a + n) for a, n in zip(begin, size))
    return node.kernel(lambda x: x[parts], "x", exact=True, view=True)


@mil_op("pixel_shuffle")
def pixel_shuffle(node: Node) -> Kernel:
    factor = node.const("upscale_factor")
    return node.kernel(lambda x: F.pixel_shuffle(x, factor), "x", exact=True)


@mil_op("pixel_unshuffle", since="CoreML6")
def pixel_unshuffle(node: Node) -> Kernel:
    factor = node.const("downscale_factor")
    return node.kernel(lambda x: F.pixel_unshuffle(x, factor), "x", exact=True)
