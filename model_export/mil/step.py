"""One operation of a function, resolved: what an executor runs."""

from __future__ import annotations

from dataclasses import dataclass

from .program import Operation, TensorType
from .registry import Kernel


@dataclass(frozen=True)
class Step:
    """One operation ready to run.

    names, types: its outputs. frees: values not needed after it. rounds: outputs are rounded to fp16 after it.
    overwrites: its first argument is not needed any more and may be written over.
    then: operations that follow on the (only) output, element by element, before anything else sees it.
    """

    operation: Operation
    kernel: Kernel
    names: tuple[str, ...]
    types: tuple[TensorType, ...]
    rounds: bool
    frees: tuple[str, ...] = ()
    overwrites: bool = False
    then: tuple[Step, ...] = ()
