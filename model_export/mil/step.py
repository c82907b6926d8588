"""Operations of a function, resolved: what an executor runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .program import NamedType, Operation, TensorType
from .registry import Kernel, Runtime


@dataclass(frozen=True)
class Step:
    """One operation ready to run.

    names, types: its outputs (the type of a list or a dictionary is None).
    frees: values not needed after it. rounds: outputs are rounded to fp16 after it.
    overwrites: its first argument is not needed any more and may be written over.
    then: operations that follow on the (only) output, element by element, before anything else sees it.
    blocks: of a branch or a loop. dynamic: how large a result is, is known only at run time.
    """

    operation: Operation
    kernel: Kernel
    names: tuple[str, ...]
    types: tuple[TensorType | None, ...]
    rounds: bool
    frees: tuple[str, ...] = ()
    overwrites: bool = False
    then: tuple[Step, ...] = ()
    blocks: tuple[Plan, ...] = ()
    dynamic: bool = False

    @cached_property
    def made(self) -> tuple[str, ...]:
        """The names of its results, once what follows on them is done."""
        return self.then[-1].names if self.then else self.names

    @cached_property
    def finishes(self) -> tuple[bool, ...]:
        """For each result, whether it is rounded or something follows on it; empty where nothing is to be done."""
        fp16 = [type is not None and type.dtype == "fp16" for type in self.types]
        return (True,) if self.then else tuple(fp16) if self.rounds and any(fp16) else ()

    @property
    def values(self) -> set[str]:
        """The names of the values that it reads, its blocks included."""
        names = {name for block in self.blocks for name in block.captures}
        for argument in self.kernel.args:
            for item in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(item, Runtime):
                    names.add(item.name)
                elif isinstance(item, str):
                    names.add(item)
        return names


def value_of(argument: Any, values: Mapping[str, Any]) -> Any:
    """What `Kernel.run` gets for one of its args."""
    if isinstance(argument, tuple):
        return tuple(value_of(item, values) for item in argument)
    if isinstance(argument, Runtime):
        return values[argument.name].tolist()
    return values[argument] if isinstance(argument, str) else argument


@dataclass(frozen=True)
class Plan:
    """A function or a block: its steps one operation each, the same with element-wise followers merged, and its
    outputs, of which some are `constants`. `captures`: the values from outside that it reads."""

    inputs: tuple[NamedType, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    merged: tuple[Step, ...]
    constants: Mapping[str, torch.Tensor]
    captures: tuple[str, ...] = ()

    @property
    def dynamic(self) -> bool:
        """Whether some value's size is known only at run time."""
        open_input = any(item.type is not None and None in item.type.shape for item in self.inputs)
        return open_input or any(step.dynamic or any(b.dynamic for b in step.blocks) for step in self.steps)

    def all_steps(self) -> Iterator[Step]:
        """Its steps and those of the blocks in them."""
        for step in self.steps:
            for block in step.blocks:
                yield from block.all_steps()
            yield step
