"""Operations on each element of one tensor. Semantics: coremltools defs `elementwise_unary.py`."""

from collections.abc import Callable

import torch

from ..dtypes import STORAGE
from ..registry import Kernel, Node, Unsupported, mil_op

Unary = Callable[[torch.Tensor], torch.Tensor]

# Operations that PyTorch has under the same names: those that give fp16 exactly for fp16 operands, and the others.
_EXACT = ("abs", "ceil", "floor", "logical_not", "round")
_ROUNDED = (
    "acos", "asin", "atan", "atanh", "cos", "cosh", "erf", "exp", "sin", "sinh", "sqrt", "square", "tan", "tanh"
)  # fmt: skip


@mil_op(*_EXACT, *_ROUNDED)
def unary(node: Node) -> Kernel:
    name = node.operation.type
    return node.kernel(getattr(torch, name), "x", exact=name in _EXACT, inplace=getattr(torch, f"{name}_", None))


@mil_op("exp2")
def exp2(node: Node) -> Kernel:
    """Of integers, too, towards zero."""
    if node.type.dtype == "int32":
        return node.kernel(lambda x: x.to(torch.float64).exp2_().to(torch.int64).to(torch.int32), "x")
    return node.kernel(torch.exp2, "x", inplace=torch.exp2_)


@mil_op("sign")
def sign(node: Node) -> Kernel:
    """NaN stays NaN, which it doesn't in PyTorch."""
    if node.type.dtype == "int32":
        return node.kernel(torch.sign, "x")
    return node.kernel(lambda x: torch.sign(x).where(x == x, x), "x", exact=True)


# Defaults of epsilon, which is added to x.
_EPSILON = {"inverse": 1e-4, "log": 1e-45, "rsqrt": 1e-12}
_SHIFTED: dict[str, Unary] = {"inverse": torch.reciprocal, "log": torch.log, "rsqrt": torch.rsqrt}


@mil_op(*_SHIFTED)
def shifted(node: Node) -> Kernel:
    """f(x + epsilon), epsilon in its own type (1e-12 is 0 in fp16)."""
    epsilon = node.const("epsilon", None)
    if epsilon is None:
        default = torch.tensor(_EPSILON[node.operation.type])
        epsilon = default.to(STORAGE[node.type.dtype]).item()
    function, step = _SHIFTED[node.operation.type], node.step
    return node.kernel(lambda x: function(step(x + epsilon)), "x")


@mil_op("clip")
def clip(node: Node) -> Kernel:
    low, high = node.const("alpha"), node.const("beta")
    return node.kernel(
        lambda x: torch.clamp(x, low, high), "x", exact=True, inplace=lambda x: torch.clamp_(x, low, high)
    )


@mil_op("clip", since="CoreML7")
def clip_17(node: Node) -> Kernel:
    low, high = node.const("alpha"), node.const("beta")
    if low >= high:
        raise Unsupported(f"alpha {low}, expected less than beta {high}")
    return clip(node)


@mil_op("threshold")
def threshold(node: Node) -> Kernel:
    low = node.const("alpha")
    return node.kernel(lambda x: torch.clamp(x, min=low), "x", exact=True, inplace=lambda x: torch.clamp_(x, min=low))


@mil_op("cast")
def cast(node: Node) -> Kernel:
    """Floats stay in float32 (a cast to fp16 is the rounding that follows); integers go through their own width."""
    target = node.const("dtype")
    if target not in STORAGE or target != node.type.dtype:
        raise Unsupported(f"a cast to {target!r} with a result of type {node.type.dtype}")
    storage, compute = STORAGE[target], node.policy.holds(target)
    if storage.is_floating_point:
        return node.kernel(lambda x: x.to(compute), "x", view=True)
    return node.kernel(lambda x: x.to(storage).to(compute), "x", view=True)
