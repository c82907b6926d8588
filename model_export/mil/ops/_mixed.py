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
    if not dtype.is_floating_point and not all(_whole(node, key) for key in keys if node.has(key)):
        raise Unsupported(f"operands {', '.join(str(node.type_of(key)) for key in keys if node.has(key))}")
    return True


def _whole(node: Node, key: str) -> bool:
    """Whether the operand is of integers, or a constant of whole numbers: how others are rounded is not specified."""
    if not node.policy.holds(node.type_of(key).dtype).is_floating_point:
        return True
    values = node.weight(key)
    return values is not None and bool(((values == values.trunc()) & (values.abs() < 2**31)).all())


def unmixed(node: Node, function: Function, *keys: str) -> Function:
    """The function of these operands, which converts them to the result's type where they are of several."""
    if not is_mixed(node, *keys):
        return function
    dtype = node.policy.holds(node.type.dtype)
    return lambda *operands: function(*(None if x is None else x.to(dtype) for x in operands))
