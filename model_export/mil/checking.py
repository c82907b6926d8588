"""Holding the values of a run to their declared types."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .dtypes import Policy
from .program import MILError, NamedType, Operation, TensorType
from .registry import TensorList


def check_all(operation: Operation, values: Mapping[str, Any], declared: Sequence[NamedType], policy: Policy) -> None:
    """Hold values to their declared types."""
    for (name, value), item in zip(values.items(), declared):
        if item.type is not None and item.type.dtype != "string":
            _check(operation, name, value, item.type, policy)
            continue
        kind = TensorList if item.other is not None else str
        if isinstance(value, torch.Tensor) or not isinstance(value, (kind, dict)):
            came = value.__class__.__name__
            raise MILError(
                f"operation {operation.name!r} ({operation.type}): {name!r} came out as {came},"
                f" declared {item.type or item.other}"
            )


def _check(operation: Operation, name: str, tensor: Any, type: TensorType, policy: Policy) -> None:
    if not isinstance(tensor, torch.Tensor):
        came = tensor.__class__.__name__
    elif type.accepts(tuple(tensor.shape)) and tensor.dtype == policy.holds(type.dtype):
        return
    else:
        came = f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]".removeprefix("torch.")
    raise MILError(f"operation {operation.name!r} ({operation.type}): {name!r} came out as {came}, declared {type}")
