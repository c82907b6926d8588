"""Operations on each element of one tensor. Semantics: coremltools defs `elementwise_unary.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..dtypes import STORAGE
from ..registry import Kernel, Node, Unsupported, mil_op
from ..rounding import round_fp16

Unary = Callable[[torch.Tensor], torch.Tensor]

# type: (function, the same in place or None, whether fp16 operands give fp16 results exactly)
_UNARY: dict[str, tuple[Unary, Unary | None, bool]] = {
    "abs": (torch.abs, torch.abs_, True),
    "acos": (torch.acos, torch.acos_, False),
    "asin": (torch.asin, torch.asin_, False),
    "atan": (torch.atan, torch.atan_, False),
    "atanh": (torch.atanh, torch.atanh_, False),
    "ceil": (torch.ceil, torch.ceil_, True),
    "cos": (torch.cos, torch.cos_, False),
    "cosh": (torch.cosh, torch.cosh_, False),
    "erf": (torch.erf, torch.erf_, False),
    "exp": (torch.exp, torch.exp_, False),
    "exp2": (torch.exp2, torch.exp2_, False),
    "floor": (torch.floor, torch.floor_, True),
    "logical_not": (torch.logical_not, None, True),
    "round": (torch.round, torch.round_, True),
    "sign": (torch.sign, None, True),
    "sin": (torch.sin, torch.sin_, False),
    "sinh": (torch.sinh, torch.sinh_, False),
    "sqrt": (torch.sqrt, torch.sqrt_, False),
    "square": (torch.square, torch.square_, False),
    "tan": (torch.tan, torch.tan_, False),
    "tanh": (torch.tanh, torch.tanh_, False),
}


@mil_op(*_UNARY)
def unary(node: Node) -> Kernel:
    function, inplace, exact = _UNARY[node.operation.type]
    return node.kernel(function, "x", exact=exact, inplace=inplace)


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
    function = _SHIFTED[node.operation.type]
    if node.decomposes:
        return node.kernel(lambda x: function(round_fp16(x + epsilon)), "x")
    return node.kernel(lambda x: function(x + epsilon), "x")


@mil_op("clip")
def clip(node: Node) -> Kernel:
    low, high = node.const("alpha"), node.const("beta")
    return node.kernel(
        lambda x: torch.clamp(x, low, high), "x", exact=True, inplace=lambda x: torch.clamp_(x, low, high)
    )


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
