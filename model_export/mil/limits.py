"""The memory that a program would take: a few bytes of a package can ask for all there is.

Before it runs, the declared types are added up. An operation whose result may be larger than its operands is held to
its declared type when it is built (`registry.Node.expects`); any other one can only fail, with a result that its
operands bound. Where sizes are known only at run time, values are added up as they are made, and `Guard` looks at
each of PyTorch's results before it is computed.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .dtypes import Policy
from .program import ListType, MILError, NamedType, OtherType, StateType, TensorType
from .registry import StateCell, TensorList
from .step import Plan


def size(type: TensorType | None, policy: Policy, other: OtherType | None = None) -> int:
    """Bytes of a value while it is held; a size known only at run time counts as 1."""
    if isinstance(other, ListType):
        return (other.length or 1) * size(other.element, policy)
    if isinstance(other, StateType):
        return size(other.tensor, policy)
    if type is None:
        return 0
    return math.prod(1 if size is None else size for size in type.shape) * policy.holds(type.dtype).itemsize


def _sizes(items: tuple[NamedType, ...], policy: Policy) -> dict[str, int]:
    return {item.name: size(item.type, policy, item.other) for item in items}


def check_peak(where: str, plan: Plan, policy: Policy, most: int, around: int = 0) -> None:
    """Raise MILError for a program whose values, as declared, take more than `most` bytes at any moment; `around`:
    bytes that are in use around this block."""
    alive = _sizes(plan.inputs, policy)
    total = around + sum(alive.values())
    for step in plan.steps:
        made = _sizes(step.operation.outputs, policy)
        alive |= made
        total += sum(made.values())
        if total > most:
            operation = f"{step.operation.name!r} ({step.operation.type})"
            raise MILError(
                f"{where}: at {operation} its values take {total} bytes, expected at most {most} (most_bytes)"
            )
        for block in step.blocks:
            check_peak(where, block, policy, most, total)
        total -= sum(alive.pop(name, 0) for name in step.frees)


def held(value: Any) -> int:
    """Bytes of a value that there is."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, TensorList):
        return sum(map(held, value.items)) + 8 * len(value.items)
    return held(value.tensor) if isinstance(value, StateCell) else 0


def may_be_large(args: list[Any], most: int) -> bool:
    """Whether an operation on these values might make one of more than `most` bytes: they decide its size by their
    numbers, or there are so many of them."""
    product = 8
    for value in _tensors(args):
        if not value.is_floating_point():
            return True
        product *= max(value.numel(), 1)
    return product > most


def _tensors(args: list[Any]) -> Iterator[torch.Tensor]:
    for item in args:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(list(item))


class Guard(TorchDispatchMode):
    """Inside it, a result of more than `most` bytes is a MILError before PyTorch computes it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = None
        try:
            on_meta = {key: _on_meta(value) for key, value in kwargs.items()}
            if any(argument.name == "device" for argument in func._schema.arguments):  # it makes a tensor of numbers
                on_meta["device"] = torch.device("meta")
            result = func(*map(_on_meta, args), **on_meta)
        except Exception:  # sizes that depend on the numbers, which are no larger than what they come from; real faults
            pass
        results = result if isinstance(result, (list, tuple)) else (result,)
        # A view's storage is its base's.
        total = sum(item.untyped_storage().nbytes() for item in results if isinstance(item, torch.Tensor))
        if total > self._most:
            raise MILError(f"a result of {total} bytes, expected at most {self._most} (most_bytes)")
        return func(*args, **kwargs)


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_meta, value))
    return value
