"""Quantization while the program runs. Semantics: coremltools defs `quantization_ops.py`."""

import torch

from ..registry import Argument, Kernel, Node, Unsupported, mil_op

_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def _along(node: Node, key: str) -> Argument:
    """A scale or zero point: one number, or a vector turned along the axis of `input`."""
    values = node.weight(key)
    if values is None and node.has(key):
        raise Unsupported(f"{key} is not a constant")
    if values is None or not values.ndim:
        return values
    rank = node.rank("input")
    return values.reshape(-1, *[1] * (rank - 1 - node.const("axis") % rank))


def _operands(node: Node) -> tuple[Argument, Argument, Argument]:
    node.const("axis", None)
    data, scale = node.operand("input"), _along(node, "scale")
    if data is None or scale is None:
        raise Unsupported("input or scale is missing")
    node.expects(*node.type_of("input").shape)
    return data, scale, _along(node, "zero_point")


@mil_op("quantize", since="CoreML7")
def quantize(node: Node) -> Kernel:
    """input / scale rounded to the nearest integer, ties to even, plus zero_point, within the type; NaN gives 0."""
    dtype = node.const("output_dtype")
    if dtype != node.type.dtype or dtype not in _RANGES:
        raise Unsupported(f"output_dtype {dtype!r} with a result of type {node.type.dtype}")
    low, high = _RANGES[dtype]

    def run(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        nearest = (x.float() / scale.float()).round_().nan_to_num_(0.0)
        if zero_point is not None:
            nearest.add_(zero_point)
        return nearest.clamp_(low, high).to(torch.int32)

    return Kernel(run, _operands(node))


@mil_op("dequantize", since="CoreML7")
def dequantize(node: Node) -> Kernel:
    """scale * (input - zero_point)."""
    dtype = node.policy.holds(node.type.dtype)

    def run(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        return (x if zero_point is None else x - zero_point).to(dtype) * scale

    return Kernel(run, _operands(node))
