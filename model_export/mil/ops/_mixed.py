"""Operands of several element types, which operations of weights take since iOS 17."""

from collections.abc import Callable

import torch

from ..registry import Node, Unsupported

Function = Callable[..., torch.Tensor]


def is_mixed(node: Node, *keys: str) -> bool:
    """Whether these operands are held in several types while running."""
    dtype = node.policy.holds(node.type.dtype)
    held = {node.policy.holds(node.type_of(key).dtype) for key in keys if node.has(key)}
    if len(held) < 2:
        return False
    if not dtype.is_floating_point:
        raise Unsupported(f"operands {', '.join(str(node.type_of(key)) for key in keys if node.has(key))}")
    return True


def unmixed(node: Node, function: Function, *keys: str) -> Function:
    """The function of these operands, which converts them to the result's type where they are of several."""
    if not is_mixed(node, *keys):
        return function
    dtype = node.policy.holds(node.type.dtype)
    return lambda *operands: function(*(None if x is None else x.to(dtype) for x in operands))
