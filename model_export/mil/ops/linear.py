"""Matrix products. Semantics: coremltools defs `linear.py`."""

import math

import torch
import torch.nn.functional as F

from .. import onednn
from ..registry import Kernel, Node, Unsupported, broadcast, mil_op
from ._mixed import is_mixed, unmixed


@mil_op("linear")
def linear(node: Node) -> Kernel:
    """x (..., I) @ weight (O, I) transposed + bias (O); the accumulation is in float32."""
    weight, bias = node.weight("weight"), node.weight("bias")
    leading = [size for size in node.type_of("x").shape[:-1] if size is not None]
    keys = ("x", "weight", "bias")
    constant = weight is not None and (bias is not None or not node.has("bias")) and not is_mixed(node, *keys)
    x, (rows, width) = node.type_of("x").shape, node.type_of("weight").shape
    if x[-1] not in (None, width) or any(shape != (rows,) for shape in node.shapes("bias")):  # oneDNN doesn't ask
        raise Unsupported(f"x {node.type_of('x')} for a weight of [{rows}, {width}] and its bias")
    node.expects(*x[:-1], rows)
    static = len(leading) == node.rank("x") - 1
    large = static and math.prod(leading) * (rows or 0) * (width or 0) >= onednn.LARGE_LINEAR
    if onednn.AVAILABLE and constant and large and weight is not None and weight.is_floating_point():
        return node.kernel(onednn.linear(weight, bias, math.prod(leading)), "x")
    return node.kernel(unmixed(node, F.linear, *keys), *keys)


@mil_op("matmul")
def matmul(node: Node) -> Kernel:
    """NumPy's matmul, either operand with its last two dimensions swapped first."""
    # A vector has nothing to swap.
    swap_x = node.const("transpose_x", False) and node.rank("x") > 1
    swap_y = node.const("transpose_y", False) and node.rank("y") > 1

    x_shape, y_shape = (list(shape) for shape in node.shapes("x", "y"))
    if swap_x:
        x_shape[-2:] = x_shape[:-3:-1]
    if swap_y:
        y_shape[-2:] = y_shape[:-3:-1]
    leading = broadcast(x_shape[:-2], y_shape[:-2])
    node.expects(*leading, *x_shape[-2:-1], *(y_shape[-1:] if len(y_shape) > 1 else []))

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.mT if swap_x else x, y.mT if swap_y else y)

    return node.kernel(unmixed(node, run, "x", "y"), "x", "y")


@mil_op("einsum")
def einsum(node: Node) -> Kernel:
    """Any equation of two operands with explicit letters; a size of 1 is broadcast."""
    equation = node.const("equation").replace(" ", "")
    values = node.operands("values")
    if len(values) != 2:
        raise Unsupported(f"{len(values)} operands, expected two")
    terms, _, result = equation.partition("->")
    types = [node.types.get(item) if isinstance(item, str) else item.type for item in node.operation.inputs["values"]]
    sizes: dict[str, int | None] = {}
    for term, type in zip(terms.split(","), types, strict=True):
        for letter, size in zip(term, type.shape if type else (), strict=True):
            sizes[letter] = broadcast([sizes.get(letter, 1)], [size])[0]
    node.expects(*(sizes[letter] for letter in result))
    return Kernel(lambda x, y: torch.einsum(equation, x, y), values)
