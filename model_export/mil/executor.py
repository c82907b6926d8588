"""Running one function of an ML program in PyTorch, from the package's bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .allocator import kept_buffers, returned_buffers
from .dtypes import POLICIES, STORAGE, Policy
from .plan import make_plan
from .program import MOST_BYTES, Function, MILError, Operation, Program, TensorType, reason
from .reader import read_package
from .rounding import TILE, InPlace, rounder, tiled
from .step import Step
from .types import NUMPY

Watch = Callable[[Operation, Mapping[str, torch.Tensor]], None]


class MILExecutor:
    """One function, resolved and with its weights prepared. Not to be run from two threads at a time.

    inputs, outputs: name -> TensorType as the package declares them. operations: the non-constant ones, in order.
    """

    def __init__(
        self,
        program: Program,
        compute: str = "as-typed",
        function_name: str | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """Resolve a function and prepare its weights.

        Args:
            program: the package (`read_package`).
            compute: a policy of `dtypes.POLICIES`.
            function_name: None: the package's default function.
            most_bytes: the limit on values that are alive at once.

        Raises:
            MILError: an unknown function or policy, a description that contradicts the program, damaged weights, values
                beyond `most_bytes`, or unsupported operations, all of which it lists.
        """
        if compute not in POLICIES:
            raise MILError(f"unknown compute policy {compute!r}, expected one of {', '.join(POLICIES)}")
        name = function_name or program.default_function
        if name not in program.functions:
            raise MILError(f"{program.path}: no function {name!r}, it has {sorted(program.functions)}")
        self.program = program
        self.function = program.functions[name]
        self.policy = POLICIES[compute]
        if others := self.function.other_features:
            listed = ", ".join(f"{key!r} is of type {kind}" for key, kind in others.items())
            raise MILError(f"{program.path}: function {name!r}: {listed}: expected multi-arrays")
        self.inputs = _checked_types(program, self.function)
        try:
            with returned_buffers():
                self._plan = make_plan(program, self.function, self.policy, most_bytes)
            self.outputs = self._checked_outputs()
        except (MILError, MemoryError):
            raise
        except Exception as error:  # a program made to break it; what is known to go wrong has its own line
            raise MILError(f"{program.path}: function {name!r}: malformed ({reason(error)})") from error
        self.operations = tuple(step.operation for step in self._plan.steps)

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the program.

        Args:
            inputs: an array for each of `self.inputs`, of its shape and element type.

        Returns:
            An array for each of `self.outputs`.

        Raises:
            MILError: other names, shapes or element types, or an operation that fails.
        """
        return self.run(inputs)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, np.ndarray], watch: Watch | None = None) -> dict[str, np.ndarray]:
        """Run the program as `predict` does, watched.

        Args:
            inputs: as `predict` takes them.
            watch: called with every non-constant operation right after it ran, and its outputs {name: tensor}: floats
                as the policy holds them, rounded to their MIL type where it rounds. Watching changes no number, except
                where the policy fuses; it takes longer and more memory, since nothing is written over.

        Returns:
            As `predict`.

        Raises:
            MILError: as `predict`.
        """
        values: dict[str, torch.Tensor] = {**self._plan.constants, **self._input_tensors(inputs)}
        with kept_buffers():
            for operation, outputs in self._walk(values, keep=watch is not None):
                if watch is not None:
                    watch(operation, outputs)
                del outputs
            return {name: self._array(values[name], type) for name, type in self.outputs.items()}

    def watched(self, inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[Operation, Mapping[str, torch.Tensor]]]:
        """Each operation with its outputs, as `run` passes them to `watch`; it runs when it is asked for, so that two
        executors may take turns."""
        return self._walk({**self._plan.constants, **self._input_tensors(inputs)}, keep=True)

    @torch.inference_mode()
    def _walk(
        self, values: dict[str, torch.Tensor], keep: bool
    ) -> Iterator[tuple[Operation, Mapping[str, torch.Tensor]]]:
        """Run step by step; `values` are those in use. `keep`: one operation at a time, and write over nothing."""
        for step in self._plan.steps if keep else self._plan.merged:
            outputs = self._run_step(step, values, keep)
            yield step.operation, outputs
            values.update(outputs)
            del outputs
            for name in step.frees:
                values.pop(name, None)

    def in_float32(self) -> MILExecutor:
        """One as typed, by the policy "float32": it has the same kernels and weights, and nothing is rounded."""
        if self.policy != POLICIES["as-typed"]:
            raise ValueError(f"the policy {self.policy.name} has kernels of its own")
        made = copy.copy(self)
        made.policy = POLICIES["float32"]
        steps, merged = (tuple(map(_unrounded, steps)) for steps in (self._plan.steps, self._plan.merged))
        made._plan = replace(self._plan, steps=steps, merged=merged)
        return made

    def _input_tensors(self, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        if set(inputs) != set(self.inputs):
            raise MILError(f"inputs named {sorted(inputs)}, expected {sorted(self.inputs)}")
        tensors = {}
        for name, type in self.inputs.items():
            array = inputs[name]
            if not isinstance(array, np.ndarray):
                raise MILError(f"input {name!r}: {array.__class__.__name__}, expected a numpy array")
            if array.dtype != NUMPY[type.dtype] or not type.accepts(array.shape):
                shape = ", ".join(map(str, array.shape))
                raise MILError(
                    f"input {name!r}: {array.dtype}[{shape}], expected {type} ({NUMPY[type.dtype].__name__})"
                )
            # Negative strides and read-only arrays are unknown to torch.
            tensors[name] = torch.tensor(np.ascontiguousarray(array)).to(self.policy.holds(type.dtype))
        return tensors

    def _run_step(self, step: Step, values: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
        """One step's checked and rounded outputs; `keep`: write over nothing."""
        kernel = step.kernel
        try:
            args = [_value(argument, values) for argument in kernel.args]
            if step.overwrites and kernel.inplace is not None:
                # Kept or not, by the same function in the same way: PyTorch's may differ in the last bit otherwise.
                target = args[0].clone() if keep else args[0]
                result = (
                    kernel.inplace(target, *args[1:]) if args[1:] else tiled(target, [kernel.inplace], target.numel())
                )
            else:
                result = kernel.run(*args)
            results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
            outputs = dict(zip(step.names, results, strict=True))
            for (name, tensor), type in zip(outputs.items(), step.types):
                _check(step.operation, name, tensor, type, self.policy)
                if step.then or (step.rounds and type.dtype == "fp16"):
                    outputs[name] = _finish(tensor.clone() if kernel.view else tensor, step)
        except (MILError, MemoryError):
            raise
        except Exception as error:
            failed = f"operation {step.operation.name!r} ({step.operation.type}) failed"
            raise MILError(f"{failed}: {reason(error)}") from error
        if step.then:
            outputs = {step.then[-1].names[0]: outputs[step.names[0]]}
        return outputs

    def _checked_outputs(self) -> dict[str, TensorType]:
        types = {name: type for step in self._plan.steps for name, type in zip(step.names, step.types)}
        types.update({item.name: item.type for item in self.function.inputs if item.type is not None})
        for operation in self.function.block.operations:
            types.update({item.name: item.type for item in operation.outputs if item.type is not None})
        missing = [name for name in self.function.block.outputs if name not in types]
        if missing:
            raise MILError(f"{self.program.path}: function {self.function.name!r} returns undefined values {missing}")
        outputs = {name: types[name] for name in self.function.block.outputs}
        _compare(self.program.path, "output", self.function.described_outputs, outputs)
        return outputs

    @staticmethod
    def _array(tensor: torch.Tensor, type: TensorType) -> np.ndarray:
        # A copy of its own: the tensor may be a constant, an input or part of a larger one.
        return tensor.to(STORAGE[type.dtype]).contiguous().numpy().copy()


def load(path: Path | str, compute: str = "as-typed", function_name: str | None = None) -> MILExecutor:
    """Load a saved .mlpackage, to be run in PyTorch.

    Args:
        path: the package's folder.
        compute: the arithmetic, one of `dtypes.POLICIES`: "as-typed" rounds to the declared type after every operation,
            "strict-fp16" inside composite operations as well, "float32" never; "bfloat16", "int8" and "int8-float32"
            are for speed.
        function_name: one of the package's functions; None: its default.

    Returns:
        The executor: `predict({"images": array})` gives the outputs by name, NumPy in and out.

    Raises:
        MILError: the package is unreadable or malformed, has no such function, takes more than 4 GiB at once, or has
            unsupported operations, all of which it lists.
    """
    return MILExecutor(read_package(path), compute, function_name)


def _checked_types(program: Program, function: Function) -> dict[str, TensorType]:
    unusable = [item.name for item in function.inputs if item.type is None or item.type.dtype not in NUMPY]
    if unusable:
        raise MILError(f"{program.path}: function {function.name!r} has inputs that are not tensors: {unusable}")
    actual = {item.name: item.type for item in function.inputs if item.type is not None}
    _compare(program.path, "input", function.described_inputs, actual)
    return actual


def _compare(path: Path, kind: str, described: Mapping[str, TensorType], actual: Mapping[str, TensorType]) -> None:
    """The model description and the program must agree on names, element types and, where both know them, shapes."""
    if set(described) != set(actual):
        raise MILError(f"{path}: the description has {kind}s {sorted(described)}, the program {sorted(actual)}")
    for name, type in actual.items():
        promised = described[name]
        known = None not in type.shape and None not in promised.shape and promised.shape
        if promised.dtype != type.dtype or (known and promised.shape != type.shape):
            raise MILError(f"{path}: {kind} {name!r} is described as {promised}, the program has {type}")
        if type.dtype not in NUMPY:
            raise MILError(f"{path}: {kind} {name!r} has type {type}, which NumPy does not have")


def _value(argument: Any, values: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(argument, tuple):
        return tuple(_value(item, values) for item in argument)
    return values[argument] if isinstance(argument, str) else argument


def _check(operation: Operation, name: str, tensor: torch.Tensor, type: TensorType, policy: Policy) -> None:
    if not type.accepts(tuple(tensor.shape)) or tensor.dtype != policy.holds(type.dtype):
        shape = ", ".join(map(str, tensor.shape))
        came = f"{tensor.dtype}[{shape}]".removeprefix("torch.")
        raise MILError(f"operation {operation.name!r} ({operation.type}): {name!r} came out as {came}, declared {type}")


def _unrounded(step: Step) -> Step:
    return replace(step, rounds=False, then=tuple(map(_unrounded, step.then)))


def _finish(tensor: torch.Tensor, step: Step) -> torch.Tensor:
    """Round the tensor and apply the operations that follow, each rounded, in place, tile by tile."""
    functions: list[InPlace] = []
    to_fp16 = rounder(tensor.numel())
    if step.rounds:
        functions.append(to_fp16)
    for follower in step.then:
        assert follower.kernel.inplace is not None
        functions.append(follower.kernel.inplace)
        if follower.rounds:
            functions.append(to_fp16)
    return tiled(tensor, functions, TILE if to_fp16 in functions else tensor.numel())
