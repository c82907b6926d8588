"""Operations that move elements: every result is exact. Semantics: coremltools defs `tensor_transformation.py`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op, positive


@mil_op("expand_dims")
def expand_dims(node: Node) -> Kernel:
    axes = node.const("axes")
    rank = node.rank("x") + len(axes)
    axes = sorted(axis % rank for axis in axes)

    def run(x: torch.Tensor) -> torch.Tensor:
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    return node.kernel(run, "x", exact=True, view=True)


@mil_op("squeeze")
def squeeze(node: Node) -> Kernel:
    """An axis of another size than 1 stays, as in PyTorch."""
    axes = node.const("axes", None)
    if axes is None:
        axes = [axis for axis, size in enumerate(node.type_of("x").shape) if size == 1]
    return node.kernel(lambda x: x.squeeze(tuple(axes)) if axes else x, "x", exact=True, view=True)


def _filled_by_place(shape: list[int], sizes: Sequence[int]) -> list[int]:
    """The shape with its zeros replaced: each one keeps the size at the same position."""
    if 0 in shape and len(shape) != len(sizes):
        raise Unsupported(f"shape {shape} has a 0 and another rank than [{', '.join(map(str, sizes))}]")
    return [size or sizes[axis] for axis, size in enumerate(shape)]


def _filled_from_the_right(shape: list[int], sizes: Sequence[int]) -> list[int]:
    """The shape with its zeros replaced: each one keeps the size as far from the end, or is 1 if there is none."""
    kept = [1] * (len(shape) - len(sizes)) + list(sizes)
    return [size or kept[axis - len(shape)] for axis, size in enumerate(shape)]


def _reshape(node: Node, filled: Callable[[list[int], Sequence[int]], list[int]]) -> Kernel:
    def run(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        return x.reshape(filled(shape.tolist(), x.shape))

    shape, sizes = node.known("shape"), node.type_of("x").shape
    if shape is not None and None not in sizes:
        filled(shape, [size or 0 for size in sizes])  # refused at load, not first when it runs
    return node.kernel(run, "x", "shape", exact=True, view=True)


@mil_op("reshape")
def reshape_15(node: Node) -> Kernel:
    """One size may be -1; a 0 keeps the size at the same position."""
    return _reshape(node, _filled_by_place)


@mil_op("reshape", since="CoreML7")
def reshape_17(node: Node) -> Kernel:
    """One size may be -1; a 0 keeps the size at the same position counted from the end."""
    return _reshape(node, _filled_from_the_right)


@mil_op("reshape_like", since="CoreML6")
def reshape_like(node: Node) -> Kernel:
    """The sizes are parts of other tensors' shapes: of each, those from its begin to its end."""
    begins, ends, masks = (
        [value.item() if isinstance(value, torch.Tensor) else value for value in node.operands(key)]
        for key in ("begins", "ends", "end_masks")
    )
    references = node.operands("ref_tensors")
    if any(isinstance(value, str) for value in (*begins, *ends, *masks)):
        raise Unsupported("begins, ends or end_masks are not constants")
    parts = [slice(a, None if mask else b) for a, b, mask in zip(begins, ends, masks)]
    if {len(references)} != {len(begins), len(ends), len(masks)}:
        raise Unsupported("ref_tensors, begins, ends and end_masks of different lengths")

    def run(x: torch.Tensor, *references: torch.Tensor) -> torch.Tensor:
        return x.reshape([size for tensor, part in zip(references, parts) for size in tensor.shape[part]])

    return Kernel(run, (*node.kernel(run, "x").args, *references), exact=True, view=True)


@mil_op("transpose")
def transpose(node: Node) -> Kernel:
    perm = node.const("perm")
    return node.kernel(lambda x: x.permute(perm), "x", exact=True, view=True)


@mil_op("reverse")
def reverse(node: Node) -> Kernel:
    axes = node.const("axes", list(range(node.rank("x"))))
    return node.kernel(lambda x: x.flip(axes), "x", exact=True)


@mil_op("reverse_sequence")
def reverse_sequence(node: Node) -> Kernel:
    """The first lengths[b] elements along seq_axis reversed, for each b along batch_axis."""
    rank = node.rank("x")
    sequence, batch = node.const("seq_axis", 0) % rank, node.const("batch_axis", 0) % rank
    if sequence == batch:
        raise Unsupported(f"seq_axis and batch_axis are both {batch}")

    def along(values: torch.Tensor, axis: int) -> torch.Tensor:
        return values.reshape(*[1] * axis, -1, *[1] * (rank - 1 - axis))

    def run(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        place = along(torch.arange(x.shape[sequence]), sequence)
        last = along(lengths.to(torch.int64), batch) - 1
        return torch.take_along_dim(x, torch.where(place <= last, last - place, place), sequence)

    return node.kernel(run, "x", "lengths", exact=True)


# -- slices -----------------------------------------------------------------------------------------------------------

Slices = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[slice]]


def _slices(node: Node) -> tuple[Slices, list[int]]:
    """A function of x, begin and end: NumPy's begin:end:stride for each axis; and the axes that are squeezed out.

    A mask drops a begin or an end, or makes the entry a plain index.
    """
    rank = node.rank("x")
    stride = node.const("stride", [1] * rank)
    begin_mask, end_mask = node.const("begin_mask", [False] * rank), node.const("end_mask", [False] * rank)
    squeeze_mask = node.const("squeeze_mask", [False] * rank)
    squeezed = [axis for axis, drop in enumerate(squeeze_mask) if drop]
    lengths = {len(item) for item in (stride, begin_mask, end_mask, squeeze_mask)}
    if (
        lengths != {rank}
        or {node.type_of("begin").shape, node.type_of("end").shape} - {(rank,), (None,)}
        or 0 in stride
    ):
        raise Unsupported(f"begin, end, stride or a mask that don't fit {node.type_of('x')}")

    def slices(x: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> list[slice]:
        first = [None if mask else at for at, mask in zip(begin.tolist(), begin_mask, strict=True)]
        last = [None if mask else at for at, mask in zip(end.tolist(), end_mask, strict=True)]
        for axis in squeezed:
            at = first[axis] or 0
            if not -x.shape[axis] <= at < x.shape[axis]:
                raise ValueError(f"index {at} of axis {axis} with {x.shape[axis]} elements")
            last[axis] = at + 1 or None
        return [slice(a, b, 1 if axis in squeezed else stride[axis]) for axis, (a, b) in enumerate(zip(first, last))]

    return slices, squeezed


def _forward(x: torch.Tensor, slices: list[slice]) -> tuple[torch.Tensor, list[int]]:
    """A view of the elements that the slices take, and the axes along which it has them in reverse."""
    backward = []
    index = list(slices)
    for axis, part in enumerate(slices):
        if part.step is not None and part.step < 0:  # torch has no negative steps
            taken = range(x.shape[axis])[part][::-1]
            index[axis] = slice(taken.start, taken.stop, taken.step) if taken else slice(0, 0)
            backward.append(axis)
    return x[tuple(index)], backward


@mil_op("slice_by_index")
def slice_by_index(node: Node) -> Kernel:
    """NumPy's x[begin:end:stride, ...]."""
    slices, squeezed = _slices(node)

    def run(x: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        taken, backward = _forward(x, slices(x, begin, end))
        taken = taken.flip(backward) if backward else taken
        return taken.squeeze(tuple(squeezed)) if squeezed else taken

    return node.kernel(run, "x", "begin", "end", exact=True, view=True)


@mil_op("slice_update", since="CoreML8")
def slice_update(node: Node) -> Kernel:
    """x with NumPy's x[begin:end:stride, ...] = update."""
    slices, _ = _slices(node)

    def over(x: torch.Tensor, update: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        target, backward = _forward(x, slices(x, begin, end))
        values = update.reshape(target.shape)
        target.copy_(values.flip(backward) if backward else values)
        return x

    def run(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return over(x.clone(memory_format=torch.contiguous_format), *others)

    return node.kernel(run, "x", "update", "begin", "end", exact=True, inplace=over)


@mil_op("slice_by_size")
def slice_by_size(node: Node) -> Kernel:
    """`size` elements from `begin` in each dimension; -1 means all that remain."""
    node.known("begin")
    node.known("size")

    def run(x: torch.Tensor, begin: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        for axis, (first, count) in enumerate(zip(begin.tolist(), size.tolist(), strict=True)):
            first = first + x.shape[axis] if first < 0 else first
            x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
        return x

    return node.kernel(run, "x", "begin", "size", exact=True, view=True)


@mil_op("sliding_windows")
def sliding_windows(node: Node) -> Kernel:
    """Every window of `size` elements along the axis, each `stride` after the one before; they lie in the next axis."""
    sizes = list(node.type_of("x").shape)
    axis, size, stride = node.const("axis") % len(sizes), node.const("size"), node.const("stride", 1)
    positive(node, size=size, stride=stride)
    length = sizes[axis]
    sizes[axis : axis + 1] = [None if length is None else (length - size) // stride + 1, size]
    node.expects(*sizes)
    return node.kernel(lambda x: x.unfold(axis, size, stride).movedim(-1, axis + 1).contiguous(), "x", exact=True)


# -- blocks -----------------------------------------------------------------------------------------------------------


@mil_op("pixel_shuffle")
def pixel_shuffle(node: Node) -> Kernel:
    factor = node.const("upscale_factor")
    positive(node, upscale_factor=factor)
    return node.kernel(lambda x: F.pixel_shuffle(x, factor), "x", exact=True)


@mil_op("pixel_unshuffle", since="CoreML6")
def pixel_unshuffle(node: Node) -> Kernel:
    factor = node.const("downscale_factor")
    positive(node, downscale_factor=factor)
    return node.kernel(lambda x: F.pixel_unshuffle(x, factor), "x", exact=True)


@mil_op("depth_to_space")
def depth_to_space(node: Node) -> Kernel:
    """As pixel_shuffle, but a channel's number begins with its place in the block (NeuralNetwork.proto)."""
    size = node.const("block_size")
    positive(node, block_size=size)

    def run(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return blocks.reshape(n, c // size**2, h * size, w * size)

    return node.kernel(run, "x", exact=True)


@mil_op("space_to_depth")
def space_to_depth(node: Node) -> Kernel:
    size = node.const("block_size")
    positive(node, block_size=size)

    def run(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
        return blocks.reshape(n, c * size**2, h // size, w // size)

    return node.kernel(run, "x", exact=True)


def _not_negative(*amounts: int) -> None:
    if min(amounts) < 0:
        raise Unsupported(f"paddings or crops of {', '.join(map(str, amounts))}")


@mil_op("space_to_batch")
def space_to_batch(node: Node) -> Kernel:
    """Padded with zeros and cut into blocks; the place in the block is the batch's outer part."""
    (rows, columns), ((top, bottom), (left, right)) = node.const("block_shape"), node.const("paddings")
    positive(node, block_shape=[rows, columns])
    _not_negative(top, bottom, left, right)
    n, c, h, w = node.type_of("x").shape
    high = None if h is None else (h + top + bottom) // rows
    wide = None if w is None else (w + left + right) // columns
    node.expects(None if n is None else n * rows * columns, c, high, wide)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (left, right, top, bottom))
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // rows, rows, w // columns, columns).permute(3, 5, 0, 1, 2, 4)
        return blocks.reshape(rows * columns * n, c, h // rows, w // columns)

    return node.kernel(run, "x", exact=True)


@mil_op("batch_to_space")
def batch_to_space(node: Node) -> Kernel:
    """The reverse of space_to_batch, with its edges cropped."""
    (rows, columns), ((top, bottom), (left, right)) = node.const("block_shape"), node.const("crops")
    positive(node, block_shape=[rows, columns])
    _not_negative(top, bottom, left, right)

    def run(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(rows, columns, n // (rows * columns), c, h, w).permute(2, 3, 4, 0, 5, 1)
        whole = blocks.reshape(n // (rows * columns), c, h * rows, w * columns)
        return F.pad(whole, (-left, -right, -top, -bottom))

    return node.kernel(run, "x", exact=True)
