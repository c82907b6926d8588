"""Convolutions. Semantics: coremltools defs `conv.py`."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from .. import int8, onednn
from ..program import MOST_BYTES, TensorType
from ..registry import Kernel, Node, Unsupported, mil_op, positive
from ._windows import pad_spatial, padding, windows

_CONV: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., torch.Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def _settings(node: Node, spatial: int) -> tuple[list[int], list[int], int, str, list[int]]:
    if spatial not in _CONV:
        raise Unsupported(f"a convolution over {spatial} dimensions")
    strides = node.const("strides", [1] * spatial)
    dilations = node.const("dilations", [1] * spatial)
    positive(node, strides=strides, dilations=dilations, groups=node.const("groups", 1))
    pad_type = node.const("pad_type", "valid")
    return strides, dilations, node.const("groups", 1), pad_type, node.const("pad", [0] * 2 * spatial)


@mil_op("conv")
def conv(node: Node) -> Kernel:
    """x (N, C, *D), weight (O, C/groups, *K); the accumulation is in float32."""
    type = node.type_of("x")
    spatial = len(type.shape) - 2
    strides, dilations, groups, pad_type, pad = _settings(node, spatial)
    kernel = [size or 0 for size in node.type_of("weight").shape[2:]]
    before, after = padding(pad_type, pad, type.shape[2:], kernel, strides, dilations)
    outer, inside, *_ = node.type_of("weight").shape
    unequal = None not in (inside, type.shape[1]) and type.shape[1] != (inside or 0) * groups
    if (
        unequal or (outer or 0) % groups or any(shape != (outer,) for shape in node.shapes("bias"))
    ):  # oneDNN doesn't ask
        raise Unsupported(f"x {type} for a weight {node.type_of('weight')} in {groups} groups and its bias")
    spread = zip(type.shape[2:], before, after, kernel, strides, dilations)
    node.expects(type.shape[0], outer, *(windows(*axis) for axis in spread))
    symmetric = before == after
    inner = before if symmetric else [0] * spatial

    weight, bias = node.weight("weight"), node.weight("bias")
    static = tuple(size for size in type.shape if size is not None)
    constant = weight is not None and (bias is not None or not node.has("bias"))
    if constant and weight is not None and onednn.packs(weight.dtype) and spatial == 2 and len(static) == 4:
        padded = (*static[:2], *(size if symmetric else size + b + a for size, b, a in zip(static[2:], before, after)))
        if node.policy.int8 and int8.AVAILABLE and _is_pointwise(weight, groups, static, node.type):
            rows = static[0] * static[2] * static[3]
            layer = int8.Int8Linear(weight.flatten(1), bias, rows, node.policy.holds(node.type.dtype))
            return replace(node.kernel(int8.pointwise(layer), "x"), pointwise=layer)
        packed = onednn.conv2d(weight, bias, strides, inner, dilations, groups, padded)

        def with_activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x: packed(x if symmetric else pad_spatial(x, before, after), name)

        return node.kernel(with_activation("none"), "x", fused=with_activation)

    function = _CONV[spatial]

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = x if symmetric else pad_spatial(x, before, after)
        return function(x, weight, bias, strides, inner, dilations, groups)

    return node.kernel(run, "x", "weight", "bias")


def _is_pointwise(weight: torch.Tensor, groups: int, shape: tuple[int, ...], result: TensorType) -> bool:
    """Whether each pixel gives one, by itself. A single pixel gains nothing from 8 bits, and may gate all others."""
    alone = weight.shape[2:] == (1, 1) and groups == 1 and result.shape[2:] == shape[2:]
    return alone and shape[2] * shape[3] > 1


@mil_op("conv_transpose")
def conv_transpose(node: Node) -> Kernel:
    """x (N, C, *D), weight (C, O/groups, *K): the full result, cropped by `pad` or to the declared output size."""
    spatial = node.rank("x") - 2
    strides, dilations, groups, pad_type, pad = _settings(node, spatial)
    node.const("output_shape", None)  # equals the declared type, which is checked
    sizes = node.type.shape[2:]
    if None in sizes:
        raise Unsupported("an output size known only at run time")
    full = [
        None if size is None else (size - 1) * stride + dilation * ((kernel or 1) - 1) + 1
        for size, kernel, stride, dilation in zip(
            *(sizes[2:] for sizes in node.shapes("x", "weight")), strides, dilations
        )
    ]
    if math.prod(size or 1 for size in full) > MOST_BYTES or any(size < 1 for size in sizes if size is not None):
        raise Unsupported(f"a full result of {full}")
    starts = pad[0::2] if pad_type == "custom" else [0] * spatial
    function = _CONV_TRANSPOSE[spatial]

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        full: Any = function(x, weight, bias, strides, 0, 0, groups, dilations)
        for axis, size in enumerate(sizes, start=2):
            start = starts[axis - 2]
            if pad_type == "same":
                start = max(0, full.shape[axis] - size) // 2
            full = full.narrow(axis, start, size)
        return full.contiguous()

    return node.kernel(run, "x", "weight", "bias")
