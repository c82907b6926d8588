"""The memory that a program would take, known before it runs: a few bytes of a package can ask for all there is.

The declared types are added up. An operation whose result may be larger than its operands is held to its declared type
when it is built (`registry.Node.expects`); any other one can only fail, with a result that its operands bound.
"""

import math
from collections.abc import Mapping, Sequence

from .dtypes import Policy
from .program import MILError, TensorType
from .step import Step


def size(type: TensorType, policy: Policy) -> int:
    """Bytes of a value while it is held; a size known only at run time counts as 1."""
    return math.prod(1 if size is None else size for size in type.shape) * policy.holds(type.dtype).itemsize


def check_peak(where: str, steps: Sequence[Step], inputs: Mapping[str, TensorType], policy: Policy, most: int) -> None:
    """Raise MILError for a program whose values, as declared, take more than `most` bytes at any moment."""
    alive = {name: size(type, policy) for name, type in inputs.items()}
    total = sum(alive.values())
    for step in steps:
        made = {name: size(type, policy) for name, type in zip(step.names, step.types)}
        alive |= made
        total += sum(made.values())
        if total > most:
            operation = f"{step.operation.name!r} ({step.operation.type})"
            raise MILError(
                f"{where}: at {operation} its values take {total} bytes, expected at most {most} (most_bytes)"
            )
        total -= sum(alive.pop(name, 0) for name in step.frees)
