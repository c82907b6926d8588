"""Pooling. Semantics: coremltools defs `pool.py`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op
from ._windows import pad_spatial, padding, windows

_AVERAGE: dict[int, Callable[..., torch.Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM: dict[int, Callable[..., torch.Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True)
class _Window:
    spatial: int
    sizes: list[int]
    strides: list[int]
    before: list[int]
    after: list[int]


def _window(node: Node) -> _Window:
    type = node.type_of("x")
    spatial = len(type.shape) - 2
    sizes = node.const("kernel_sizes")
    strides = node.const("strides", [1] * spatial)
    pad = node.const("pad", [0] * 2 * spatial)
    before, after = padding(node.const("pad_type"), pad, type.shape[2:], sizes, strides, [1] * spatial)
    if node.const("ceil_mode", False):
        # Whether a last, incomplete window exists is in the declared size; its elements are padding.
        after = list(after)
        for axis, (size, out) in enumerate(zip(type.shape[2:], node.type.shape[2:])):
            if size is None or out is None:
                raise Unsupported("ceil_mode with a size known only at run time")
            if (out - 1) * strides[axis] + sizes[axis] > size + before[axis] + after[axis]:
                raise Unsupported("ceil_mode with an incomplete last window")
    node.expects(*type.shape[:2], *(windows(*axis) for axis in zip(type.shape[2:], before, after, sizes, strides)))
    return _Window(spatial, sizes, strides, before, after)


@mil_op("avg_pool")
def avg_pool(node: Node) -> Kernel:
    window = _window(node)
    if not (node.const("exclude_padding_from_average", False) and any(window.before + window.after)):
        pool = _AVERAGE[window.spatial]
        return node.kernel(
            lambda x: pool(pad_spatial(x, window.before, window.after), window.sizes, window.strides), "x"
        )
    if window.spatial != 2:
        raise Unsupported("exclude_padding_from_average over other than two dimensions")

    def total(x: torch.Tensor) -> torch.Tensor:
        padded = pad_spatial(x, window.before, window.after)
        return F.avg_pool2d(padded, window.sizes, window.strides, divisor_override=1)

    # One division, so that the mean is rounded once.
    return node.kernel(lambda x: total(x) / total(torch.ones_like(x[:1, :1])), "x")


@mil_op("max_pool")
def max_pool(node: Node) -> Kernel:
    window = _window(node)
    pool = _MAXIMUM[window.spatial]
    return node.kernel(
        lambda x: pool(pad_spatial(x, window.before, window.after, -torch.inf), window.sizes, window.strides),
        "x",
        exact=True,
    )
