"""Resizing of the last two dimensions. Semantics: coremltools defs `image_resizing.py`."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op


def _resized(node: Node, resize: Callable[..., torch.Tensor], exact: bool) -> Kernel:
    sizes = [size for size in node.type.shape[-2:] if size is not None]
    node.const("scale_factor_height", 1), node.const("scale_factor_width", 1)
    if len(sizes) != 2:
        raise Unsupported("an output size known only at run time")

    node.expects(*node.type_of("x").shape[:-2], *sizes)

    def run(x: torch.Tensor) -> torch.Tensor:
        batch = x.reshape(-1, 1, *x.shape[-2:])
        return resize(batch, size=sizes).reshape(*x.shape[:-2], *sizes)

    return node.kernel(run, "x", exact=exact)


@mil_op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(node: Node) -> Kernel:
    """The output size is floor(size * scale), which is the declared one."""
    return _resized(node, partial(F.interpolate, mode="nearest"), exact=True)


@mil_op("upsample_bilinear")
def upsample_bilinear(node: Node) -> Kernel:
    """The scale is recomputed from the output size (PyTorch's recompute_scale_factor=True)."""
    if node.const("half_pixel_centers", None) is not None:
        raise Unsupported("half_pixel_centers")
    corners = node.const("align_corners", True)
    return _resized(node, partial(F.interpolate, mode="bilinear", align_corners=corners), exact=False)
