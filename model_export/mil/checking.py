"""Holding the values of a run to their declared types."""

from collections.abc import Sequence
from typing import Any

import torch

from .dtypes import Policy
from .program import MILError, NamedType, Operation
from .registry import TensorList


def check_all(operation: Operation, values: Sequence[Any], declared: Sequence[NamedType], policy: Policy) -> None:
    """Hold values, as many as are declared, to their declared types."""
    for value, item in zip(values, declared, strict=True):
        type = item.type
        if type is not None and type.dtype != "string":
            if isinstance(value, torch.Tensor):
                if value.dtype == policy.holds(type.dtype) and (value.shape == type.shape or type.accepts(value.shape)):
                    continue
                came = f"{value.dtype}[{', '.join(map(str, value.shape))}]".removeprefix("torch.")
            else:
                came = value.__class__.__name__
        elif isinstance(value, (TensorList if item.other is not None else str, dict)):
            continue
        else:
            came = value.__class__.__name__
        name = f"operation {operation.name!r} ({operation.type}): {item.name!r}"
        raise MILError(f"{name} came out as {came}, declared {type or item.other}")
