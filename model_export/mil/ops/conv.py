"""Convolutions. Semantics: coremltools defs `conv.py`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from .. import int8, onednn
from ..dtypes import STORAGE
from ..program import MOST_BYTES, Constant, TensorType
from ..registry import Kernel, Node, Unsupported, mil_op, positive
from ._mixed import is_mixed, unmixed
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

    def around(sizes: Sequence[int | None]) -> tuple[list[int], list[int]]:
        return padding(pad_type, pad, sizes, kernel, strides, dilations)

    static = tuple(size for size in type.shape if size is not None)
    known = len(static) == len(type.shape) or not pad_type.startswith("same")
    before, after = around(type.shape[2:] if known else [1] * spatial)  # for other sizes: when they are known
    outer, inside, *_ = node.type_of("weight").shape
    unequal = None not in (inside, type.shape[1]) and type.shape[1] != (inside or 0) * groups
    if (
        unequal or (outer or 0) % groups or any(shape != (outer,) for shape in node.shapes("bias"))
    ):  # oneDNN doesn't ask
        raise Unsupported(f"x {type} for a weight {node.type_of('weight')} in {groups} groups and its bias")
    spread = zip(type.shape[2:], before, after, kernel, strides, dilations)
    node.expects(type.shape[0], outer, *(windows(*axis) if known else None for axis in spread))
    symmetric = known and before == after
    inner = before if symmetric else [0] * spatial

    weight, bias = node.weight("weight"), node.weight("bias")
    keys = ("x", "weight", "bias")
    constant = weight is not None and (bias is not None or not node.has("bias")) and not is_mixed(node, *keys)
    products = math.prod(size or 1 for size in node.type.shape) * math.prod(kernel) * (inside or 1)
    small = groups == 1 and products < onednn.LARGE_CONV and not node.policy.fuses
    packs = weight is not None and onednn.packs(weight.dtype) and not small
    if constant and weight is not None and packs and spatial == 2 and len(static) == 4:
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
        x = x if symmetric else pad_spatial(x, *((before, after) if known else around(x.shape[2:])))
        return function(x, weight, bias, strides, inner, dilations, groups)

    return node.kernel(unmixed(node, run, *keys), *keys)


@mil_op("conv_quantized")
def conv_quantized(node: Node) -> Kernel:
    """A `conv` with the weight scale * weight + shift, each a number or one for each output channel; the bias is bytes,
    too, but used as it is. Computed in float32 and stored in the type of x."""
    kind, bits = node.const("quantization_type"), node.const("nbits", 8)
    if kind != "linear":  # the definition has no parameter for the table of a "lut"
        raise Unsupported(f"quantization_type {kind!r}, expected 'linear'")
    weight, bias = node.raw("weight"), node.raw("bias")
    if not isinstance(weight, torch.Tensor) or weight.dtype != torch.uint8 or weight.ndim < 3 or not weight.numel():
        raise Unsupported("weight is not a constant of uint8")
    if not 1 <= bits <= 8 or int(weight.max()) >= 2**bits:
        raise Unsupported(f"a weight of up to {int(weight.max())} in {bits} bits")
    factors = []
    for key in ("quant_scale", "quant_bias"):
        value = node.raw(key)
        if not isinstance(value, torch.Tensor) or value.numel() not in (1, len(weight)):
            raise Unsupported(f"{key} is neither a constant number nor one for each of {len(weight)} channels")
        factors.append(value.float().reshape(-1, *[1] * (weight.ndim - 1)))
    dtype = node.type_of("x").dtype
    floats = {"weight": weight.float() * factors[0] + factors[1]}
    if isinstance(bias, torch.Tensor):
        floats["bias"] = bias.float()
    constants = {
        key: (Constant(TensorType(dtype, tuple(value.shape)), value.to(STORAGE[dtype]).numpy()),)
        for key, value in floats.items()
    }
    operation = replace(node.operation, inputs={**node.operation.inputs, **constants})
    return conv(replace(node, operation=operation))


def _is_pointwise(weight: torch.Tensor, groups: int, shape: tuple[int, ...], result: TensorType) -> bool:
    """Whether each pixel gives one, by itself. A single pixel gains nothing from 8 bits, and may gate all others."""
    alone = weight.shape[2:] == (1, 1) and groups == 1 and result.shape[2:] == shape[2:]
    return alone and shape[2] * shape[3] > 1


@mil_op("conv_transpose")
def conv_transpose(node: Node) -> Kernel:
    """x (N, C, *D), weight (C, O/groups, *K): of the full result, or zeros where it has none, what `pad` leaves, or
    `output_shape` from there; "same": stride times the size (or `output_shape`) in the middle. Then the bias."""
    spatial = node.rank("x") - 2
    strides, dilations, groups, pad_type, pad = _settings(node, spatial)
    kernel = [size or 0 for size in node.type_of("weight").shape[2:]]
    if pad_type == "same_lower":
        raise Unsupported("pad_type 'same_lower'")
    before, after = padding("valid" if pad_type == "same" else pad_type, pad, [1] * spatial, kernel, strides, dilations)
    wanted = node.const("output_shape", None)
    (batch, _, *old), (_, outer, *_) = node.shapes("x", "weight")

    def part(axis: int, size: int) -> tuple[int, int, int]:
        """The full size, and where its part starts and how long that is."""
        full = (size - 1) * strides[axis] + dilations[axis] * (kernel[axis] - 1) + 1
        if wanted is not None:
            length = wanted[axis + 2]
        else:
            length = size * strides[axis] if pad_type == "same" else full - before[axis] - after[axis]
        return full, max(0, full - length) // 2 if pad_type == "same" else before[axis], length

    parts = [None if size is None else part(axis, size) for axis, size in enumerate(old)]
    lengths = [wanted[axis + 2] if wanted else item and item[2] for axis, item in enumerate(parts)]
    node.expects(batch, None if outer is None else outer * groups, *lengths)
    if math.prod(item[0] for item in parts if item) * (batch or 1) * (outer or 1) * groups > MOST_BYTES:
        raise Unsupported(f"a full result of {[item and item[0] for item in parts]}")
    function = _CONV_TRANSPOSE[spatial]

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result: Any = function(x, weight, None, strides, 0, 0, groups, dilations)
        ends: list[int] = []
        for axis, size in enumerate(x.shape[2:]):
            full, start, length = part(axis, size)
            ends = [-start, start + length - full, *ends]
        result = F.pad(result, ends) if any(ends) else result
        return result if bias is None else result.add_(bias.reshape(-1, *[1] * spatial))

    keys = ("x", "weight", "bias")
    return node.kernel(unmixed(node, run, *keys), *keys)
