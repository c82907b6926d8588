"""Running one function of an ML program in PyTorch, from the package's bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import limits
from .allocator import kept_buffers, returned_buffers
from .checking import check_all
from .dtypes import POLICIES
from .features import Interface, State
from .package import read_specification
from .plan import make_plan
from .program import (
    MOST_BYTES,
    MOST_ITERATIONS,
    InputTypeError,
    MILError,
    NamedType,
    Operation,
    Program,
    reason,
)
from .reader import read_package
from .registry import Runtime
from .rounding import TILE, InPlace, rounder, tiled
from .step import Plan, Step, value_of

Watch = Callable[[Operation, Mapping[str, Any]], None]
Ran = tuple[Operation, Mapping[str, Any]]


@dataclass
class _Run:
    """One prediction. counts: the values' bytes are added up as they are made."""

    watch: Watch | None
    counts: bool
    iterations: int = 0
    alive: int = 0


class MILExecutor:
    """One function, resolved and with its weights prepared. Not to be run from two threads at a time.

    inputs, outputs: name -> TensorType as the program declares them, pictures included; `interface` has the rest.
    operations: the non-constant ones, in order, those in blocks included.
    """

    def __init__(
        self,
        program: Program,
        compute: str = "as-typed",
        function_name: str | None = None,
        most_bytes: int = MOST_BYTES,
        most_iterations: int = MOST_ITERATIONS,
    ) -> None:
        """Resolve a function and prepare its weights.

        Args:
            program: the package (`read_package`).
            compute: a policy of `dtypes.POLICIES`.
            function_name: None: the package's default function.
            most_bytes: the limit on values that are alive at once.
            most_iterations: the limit on iterations of a prediction, all of its loops together.

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
        self.function_name = name
        self.policy = POLICIES[compute]
        self.most_bytes, self.most_iterations = most_bytes, most_iterations
        try:
            self.interface = Interface(program.path, self.function, self._returned())
            with returned_buffers():
                self._plan = make_plan(program, self.function, self.policy, most_bytes)
        except (MILError, MemoryError):
            raise
        except Exception as error:  # a program made to break it; what is known to go wrong has its own line
            raise MILError(f"{program.path}: function {name!r}: malformed ({reason(error)})") from error
        self._dynamic = self._plan.dynamic
        self.inputs, self.outputs = self.interface.inputs, self.interface.outputs
        self.operations = tuple(step.operation for step in self._plan.all_steps())

    def predict(self, data: Any, state: State | None = None) -> Any:
        """Run the program, as `coremltools.models.MLModel.predict` does.

        Args:
            data: {name: value} for each of `input_description` that has no default: an array, a list or a torch tensor
                of the input's shape (its numbers are converted to the element type), for a picture a PIL image of mode
                RGB, L or F. Or a list of such dictionaries, of a function without states.
            state: what `make_state` returned, read and written; required where the function has states.

        Returns:
            {name: value} for each of `output_description`: an array of its type, a PIL image (RGBA, L or F), a
            classifier's label (str or int) and its probabilities ({label: float}). Or a list of them.

        Raises:
            MILError: other names (also a KeyError), kinds (also a TypeError) or shapes, or an operation that fails.
        """
        if type(data) is list:
            if state is not None:
                raise MILError("state: can only be used for one prediction, got a list of inputs")
            if not all(type(item) is dict for item in data):
                raise InputTypeError('"data" list must contain only dictionaries')
            return [self.run(item) for item in data]
        if not isinstance(data, Mapping):
            raise InputTypeError(f'"data" parameter must be either a dict or list of dict, but got {type(data)}.')
        return self.run(data, state=state)

    def make_state(self) -> State:
        """The function's states, all zero, to be given to one `predict` after the other."""
        return State(self.interface.states, self.policy)

    @property
    def input_description(self) -> dict[str, str]:
        """The inputs' names, with what the author says of them."""
        return {name: item.description for name, item in self.interface.input_features.items()}

    @property
    def output_description(self) -> dict[str, str]:
        """The outputs' names, with what the author says of them."""
        return {name: item.description for name, item in self.interface.output_features.items()}

    @property
    def user_defined_metadata(self) -> dict[str, str]:
        """What the package says of itself, by key."""
        return dict(self.program.metadata)

    def get_spec(self) -> Any:
        """The package's specification, a protobuf message, read again."""
        return read_specification(self.program.path)[1]

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Any], watch: Watch | None = None, state: State | None = None) -> dict[str, Any]:
        """Run the program as `predict` does, watched.

        Args:
            inputs: one dictionary, as `predict` takes it.
            watch: called with every non-constant operation right after it ran, and its outputs {name: tensor}: floats
                as the policy holds them, rounded to their MIL type where it rounds. An operation in a loop is seen in
                each iteration, before the loop itself. Watching changes no number, except where the policy fuses; it
                takes longer and more memory, since nothing is written over.
            state: as `predict` takes it.

        Returns:
            As `predict`.

        Raises:
            MILError: as `predict`.
        """
        values, run = self._start(inputs, state, watch)
        with kept_buffers():
            self._run_plan(self._plan, values, run)
            return self.interface.results(values)

    def watched(self, inputs: Mapping[str, Any], state: State | None = None) -> Iterator[Ran]:
        """Each operation with its outputs, as `run` passes them to `watch`; it runs when it is asked for, so that two
        executors may take turns. A loop runs whole, and what was seen in it is held until then."""
        ran: list[Ran] = []
        values, run = self._start(inputs, state, lambda *one: ran.append(one))
        for step in self._plan.steps:
            with torch.inference_mode():
                self._step(step, values, run, {})
            yield from ran
            ran.clear()

    def _start(
        self, inputs: Mapping[str, Any], state: State | None, watch: Watch | None
    ) -> tuple[dict[str, Any], _Run]:
        """The values before the first operation, and the prediction."""
        cells = self.interface.cells(state)
        values = {**self._plan.constants, **cells, **self.interface.tensors(inputs, self.policy)}
        return values, _Run(watch, self._dynamic, alive=sum(map(limits.held, values.values())) if self._dynamic else 0)

    def _run_plan(self, plan: Plan, values: dict[str, Any], run: _Run) -> None:
        """Run step by step; `values` are those in use. Watched, one operation at a time, writing over nothing."""
        counted: dict[str, int] = {}
        for step in plan.steps if run.watch else plan.merged:
            self._step(step, values, run, counted)

    def _step(self, step: Step, values: dict[str, Any], run: _Run, counted: dict[str, int]) -> None:
        """Run one step, put its results among the values and free those not needed any more; `counted`: their bytes."""
        results = self._control(step, values, run) if step.blocks else self._computed(step, values, run)
        made = step.made
        if run.counts:
            counted |= zip(made, map(limits.held, results))
            run.alive += sum(counted[name] for name in made)
            if run.alive > self.most_bytes:
                failed = f"operation {step.operation.name!r} ({step.operation.type})"
                raise MILError(
                    f"{failed}: values take {run.alive} bytes, expected at most {self.most_bytes} (most_bytes)"
                )
        values.update(zip(made, results))
        if run.watch is not None:
            run.watch(step.operation, dict(zip(made, results)))
        for name in step.frees:
            values.pop(name, None)
            run.alive -= counted.pop(name, 0)

    def _control(self, step: Step, values: dict[str, Any], run: _Run) -> Sequence[Any]:
        """Run a branch or a loop: its results."""
        args = [value_of(argument, values) for argument in step.kernel.args]
        if step.operation.type == "cond":
            results = self._block(step, 0 if _truth(step, args[0]) else 1, (), values, run)
        else:
            results = args
            while _truth(step, self._block(step, 0, results, values, run)[0]):
                run.iterations += 1
                if run.iterations > self.most_iterations:
                    raise MILError(
                        f"operation {step.operation.name!r} (while_loop): the program's loops ran"
                        f" {self.most_iterations} times, expected an end (most_iterations)"
                    )
                results = self._block(step, 1, results, values, run)
        check_all(step.operation, results, step.operation.outputs, self.policy)
        return results

    def _block(self, step: Step, place: int, given: Sequence[Any], around: dict[str, Any], run: _Run) -> list[Any]:
        """Run a block of a step with values for its inputs, and those around it: its outputs."""
        block, before = step.blocks[place], run.alive
        check_all(step.operation, given, block.inputs, self.policy)
        values = {**block.constants, **{name: around[name] for name in block.captures}}
        values.update(zip((item.name for item in block.inputs), given))
        self._run_plan(block, values, run)
        results = [values[name] for name in block.outputs]
        run.alive = before + (sum(map(limits.held, results)) if run.counts and step.operation.type != "cond" else 0)
        return results

    def in_float32(self) -> MILExecutor:
        """One as typed, by the policy "float32": it has the same kernels and weights, and nothing is rounded."""
        if self.policy != POLICIES["as-typed"]:
            raise ValueError(f"the policy {self.policy.name} has kernels of its own")
        made = copy.copy(self)
        made.policy = POLICIES["float32"]
        made._plan = _unrounded_plan(self._plan)
        return made

    def _computed(self, step: Step, values: Mapping[str, Any], run: _Run) -> Sequence[Any]:
        """One step's checked and rounded results."""
        kernel = step.kernel
        try:
            args = [values[item] if item.__class__ is str else value_of(item, values) for item in kernel.args]
            if step.overwrites and kernel.inplace is not None:
                # Watched or not, by the same function in the same way: PyTorch's may differ in the last bit otherwise.
                target = args[0].clone() if run.watch else args[0]
                result = (
                    kernel.inplace(target, *args[1:]) if args[1:] else tiled(target, [kernel.inplace], target.numel())
                )
            elif step.dynamic and self._may_be_large(kernel.args, args):
                with limits.Guard(self.most_bytes):
                    result = kernel.run(*args)
            else:
                result = kernel.run(*args)
            results = result if isinstance(result, (tuple, list)) else (result,)
            check_all(step.operation, results, step.operation.outputs, self.policy)
            if step.finishes:
                results = [
                    _finish(value.clone() if kernel.view else value, step) if finishes else value
                    for value, finishes in zip(results, step.finishes)
                ]
        except (MILError, MemoryError):
            raise
        except Exception as error:
            failed = f"operation {step.operation.name!r} ({step.operation.type}) failed"
            raise MILError(f"{failed}: {reason(error)}") from error
        return results

    def _may_be_large(self, arguments: Sequence[Any], values: list[Any]) -> bool:
        read = any(isinstance(argument, Runtime) for argument in arguments)
        return read or limits.may_be_large(values, self.most_bytes)

    def _returned(self) -> dict[str, NamedType]:
        """What the function returns, by name."""
        items = {item.name: item for item in self.function.inputs}
        for operation in self.function.block.operations:
            items.update({item.name: item for item in operation.outputs})
        if missing := [name for name in self.function.block.outputs if name not in items]:
            raise MILError(f"{self.program.path}: function {self.function.name!r} returns undefined values {missing}")
        return {name: items[name] for name in self.function.block.outputs}


def load(path: Path | str, function_name: str | None = None, compute: str = "as-typed") -> MILExecutor:
    """Load a saved .mlpackage, to be run in PyTorch.

    Args:
        path: the package's folder.
        function_name: one of the package's functions; None: its default.
        compute: the arithmetic, one of `dtypes.POLICIES`: "as-typed" rounds to the declared type after every operation,
            "strict-fp16" inside composite operations as well, "float32" never; "bfloat16", "int8" and "int8-float32"
            are for speed.

    Returns:
        The executor: `predict({"images": array})` gives the outputs by name, as `coremltools.models.MLModel` does.

    Raises:
        MILError: the package is unreadable or malformed, has no such function, takes more than 4 GiB at once, or has
            unsupported operations, all of which it lists.
    """
    return MILExecutor(read_package(path), compute, function_name)


def _truth(step: Step, value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.numel() != 1:
        raise MILError(f"operation {step.operation.name!r} ({step.operation.type}): the condition is no single bool")
    return bool(value)


def _unrounded_plan(plan: Plan) -> Plan:
    steps, merged = (tuple(map(_unrounded, steps)) for steps in (plan.steps, plan.merged))
    return replace(plan, steps=steps, merged=merged)


def _unrounded(step: Step) -> Step:
    blocks = tuple(map(_unrounded_plan, step.blocks))
    return replace(step, rounds=False, then=tuple(map(_unrounded, step.then)), blocks=blocks)


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
