"""Pooling. Semantics: coremltools defs `pool.py`."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op
from ._windows import pad_spatial, padding, windows

_AVERAGE: dict[int, Callable[..., torch.Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM: dict[int, Callable[..., torch.Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True)
class _Axis:
    """The windows along one axis: their number, the padding, and `added`, what has to be there after the last element:
    the padding, or more where the last window is incomplete."""

    size: int
    before: int
    after: int
    count: int
    added: int


class _Windows:
    """The windows of a pooling operation, held to the declared result."""

    def __init__(self, node: Node, most: int = 3) -> None:
        type = node.type_of("x")
        self.spatial = spatial = len(type.shape) - 2
        if not 1 <= spatial <= most:
            raise Unsupported(f"pooling over {spatial} dimensions")
        self.sizes = node.const("kernel_sizes")
        self.strides = node.const("strides", [1] * spatial)
        self._pad_type = node.const("pad_type")
        self._pad = node.const("pad", [0] * 2 * spatial)
        self._ceil = node.const("ceil_mode", False)
        if self._ceil and self._pad_type not in ("valid", "custom"):
            raise Unsupported(f"ceil_mode with pad_type {self._pad_type!r}")
        self.axes = functools.lru_cache(maxsize=16)(self._axes)
        known = [size for size in type.shape[2:] if size is not None]
        if len(known) == spatial:
            counts: list[int | None] = [axis.count for axis in self.axes(tuple(known))]
        else:
            counts = [None] * spatial
            padding(self._pad_type, self._pad, [1] * spatial, self.sizes, self.strides, [1] * spatial)  # checks
        node.expects(*type.shape[:2], *counts)

    def _axes(self, sizes: tuple[int, ...]) -> list[_Axis]:
        """Per axis, for x of these sizes."""
        before, after = padding(self._pad_type, self._pad, sizes, self.sizes, self.strides, [1] * self.spatial)
        return [self._axis(*axis) for axis in zip(sizes, before, after, self.sizes, self.strides)]

    def _axis(self, size: int, before: int, after: int, kernel: int, stride: int) -> _Axis:
        count = windows(size, before, after, kernel, stride) or 0
        if not self._ceil:
            return _Axis(size, before, after, count, after)
        count = -((kernel - size - before - after) // stride) + 1
        if (count - 1) * stride >= size + before:  # as coremltools and PyTorch: not a window of nothing but padding
            if before + after == 0:
                raise Unsupported("ceil_mode with a window outside the input")
            count -= 1
        added = max(after, (count - 1) * stride + kernel - size - before)
        windows(size, before, added, kernel, stride)  # refuses padding that no picture has
        return _Axis(size, before, after, count, added)

    def pooled(self, pool: Callable[..., torch.Tensor], x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """`pool` of x with `value` around it."""
        axes = self.axes(tuple(x.shape[2:]))
        padded = pad_spatial(x, [axis.before for axis in axes], [axis.added for axis in axes], value)
        return pool(padded, self.sizes, self.strides)

    def present(self, sizes: tuple[int, ...], padded: bool) -> torch.Tensor | None:
        """How many elements each window has, padding's among them or not; None: all of them as many as the kernel."""
        counts = []
        for axis, kernel, stride in zip(self.axes(sizes), self.sizes, self.strides):
            first, end = (0, axis.before + axis.size + axis.after) if padded else (axis.before, axis.before + axis.size)
            start = torch.arange(axis.count) * stride
            counts.append(((start + kernel).clamp(max=end) - start.clamp(min=first)).clamp(min=0))
        if all(bool((count == kernel).all()) for count, kernel in zip(counts, self.sizes)):
            return None
        return functools.reduce(lambda whole, count: whole.unsqueeze(-1) * count, counts)


@mil_op("avg_pool")
def avg_pool(node: Node) -> Kernel:
    """The mean of each window. What an incomplete last window lacks is not counted, as in PyTorch; padding is, unless
    `exclude_padding_from_average`."""
    window = _Windows(node)
    pool, padded = _AVERAGE[window.spatial], not node.const("exclude_padding_from_average", False)
    whole = math.prod(window.sizes)

    @functools.lru_cache(maxsize=16)
    def factor(sizes: tuple[int, ...]) -> torch.Tensor | None:
        present = window.present(sizes, padded)
        return None if present is None else whole / present

    def run(x: torch.Tensor) -> torch.Tensor:
        mean, more = window.pooled(pool, x), factor(tuple(x.shape[2:]))
        return mean if more is None else (mean * more).to(x.dtype)

    return node.kernel(run, "x")


@mil_op("max_pool")
def max_pool(node: Node) -> Kernel:
    window = _Windows(node)
    pool = _MAXIMUM[window.spatial]
    return node.kernel(lambda x: window.pooled(pool, x, -torch.inf), "x", exact=True)


@mil_op("l2_pool")
def l2_pool(node: Node) -> Kernel:
    """The root of each window's sum of squares: square, sum, root."""
    window, step = _Windows(node, most=2), node.step

    def total(x: torch.Tensor, sizes: list[int], strides: list[int]) -> torch.Tensor:
        if window.spatial == 2:
            return F.avg_pool2d(x, sizes, strides, divisor_override=1)
        return F.avg_pool2d(x.unsqueeze(2), [1, *sizes], [1, *strides], divisor_override=1).squeeze(2)

    return node.kernel(lambda x: step(window.pooled(total, step(x.square()))).sqrt(), "x")
