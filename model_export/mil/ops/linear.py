"""Matrix products. Semantics: coremltools defs `linear.py`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .. import onednn
from ..registry import Kernel, Node, Unsupported, mil_op


@mil_op("linear")
def linear(node: Node) -> Kernel:
    """x (..., I) @ weight (O, I) transposed + bias (O); the accumulation is in float32."""
    weight, bias = node.weight("weight"), node.weight("bias")
    leading = [size for size in node.type_of("x").shape[:-1] if size is not None]
    constant = weight is not None and (bias is not None or not node.has("bias"))
    static = len(leading) == node.rank("x") - 1
    if onednn.AVAILABLE and constant and static and weight is not None and weight.is_floating_point():
        return node.kernel(onednn.linear(weight, bias, math.prod(leading)), "x")
    return node.kernel(F.linear, "x", "weight", "bias")


@mil_op("matmul")
def matmul(node: Node) -> Kernel:
    """NumPy's matmul, either operand with its last two dimensions swapped first."""
    # A vector has nothing to swap.
    swap_x = node.const("transpose_x", False) and node.rank("x") > 1
    swap_y = node.const("transpose_y", False) and node.rank("y") > 1

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.mT if swap_x else x, y.mT if swap_y else y)

    return node.kernel(run, "x", "y")


@mil_op("einsum")
def einsum(node: Node) -> Kernel:
    equation = node.const("equation")
    values = node.operands("values")
    if len(values) != 2:
        raise Unsupported(f"{len(values)} operands, expected two")
    return Kernel(lambda x, y: torch.einsum(equation, x, y), values)
