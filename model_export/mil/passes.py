"""What is done to the steps of a block once all of them are resolved: lifetimes, and operations that run as one."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from . import int8
from .program import TensorType
from .registry import Kernel, StateCell
from .step import Step


def with_lifetimes(steps: list[Step], inputs: list[str], outputs: tuple[str, ...]) -> list[Step]:
    """Fill in `frees` and `overwrites`: what dies where, and whose memory nobody else looks at by then."""
    never = len(steps)
    last = {name: index for index, step in enumerate(steps) for name in (*step.names, *step.values)}
    last.update({name: never for name in outputs})
    root, types = _roots(steps, inputs), _types(steps)
    kept = set(inputs)  # roots that are never written over: these belong to the caller
    for step in steps:
        if step.kernel.keeps or step.blocks:
            kept |= {root[name] for name in (*step.names, *step.values)}
    used_until = {name: -1 for name in root}
    for name in root.keys() & last.keys():  # the rest are constants that the function returns
        index = last[name]
        used_until[root[name]] = max(used_until[root[name]], index)
    finished = []
    for index, step in enumerate(steps):
        first, values = _first(step), step.values
        overwrites = (
            step.kernel.inplace is not None
            and first != ""
            and root[first] not in kept
            and all(root[name] != root[first] for name in values - {first})
            and used_until[root[first]] == index
            and _same_type(types[first], step.types[0])
        )
        frees = tuple(name for name in {*step.names, *values} if last[name] == index)
        finished.append(replace(step, overwrites=overwrites, frees=frees))
    return finished


def _roots(steps: list[Step], inputs: Iterable[str] = ()) -> dict[str, str]:
    """Values that may share memory have one root, which is in use as long as any of them is."""
    root = {name: name for name in inputs}
    for step in steps:
        first = _first(step)
        for name in step.made:
            root[name] = root.get(first, first) if step.kernel.view and first else name
    return root


def _types(steps: list[Step]) -> dict[str, TensorType | None]:
    return {name: type for step in steps for name, type in zip(step.names, step.types)}


def _first(step: Step) -> str:
    """The name of the value that is its first argument, "" where it has none."""
    first = step.kernel.args[0] if step.kernel.args else None
    return first if isinstance(first, str) else ""


def _same_type(type: TensorType | None, other: TensorType | None) -> bool:
    """Whether two values have one type, whose sizes are known."""
    return type is not None and type == other and None not in type.shape


def merged(steps: list[Step], outputs: tuple[str, ...]) -> list[Step]:
    """The steps with each in-place unary operation moved onto the step whose only output it alone reads."""
    readers: dict[str, int] = {}
    for step in steps:
        for name in step.values:
            readers[name] = readers.get(name, 0) + 1
    result: list[Step] = []
    position: dict[str, int] = {}
    for step in steps:
        first = step.kernel.args[0] if len(step.kernel.args) == 1 else None
        home = position.get(first) if isinstance(first, str) and step.overwrites else None
        if home is not None and isinstance(first, str) and readers[first] == 1 and first not in outputs:
            target = result[home]
            result[home] = replace(target, then=(*target.then, step), frees=(*target.frees, *step.frees))
        else:
            result.append(step)
            home = len(result) - 1
        if len(step.names) == 1 and not step.kernel.view:
            position[step.names[0]] = home
    return result


def updating(steps: list[Step], outputs: tuple[str, ...]) -> list[Step]:
    """The steps with each update of a state (read, written over, written back) done in the state's own memory: else a
    whole cache would be copied for each token.

    Not where a value that shares the memory is read later or kept, where the state is read before it is written back,
    or where a block sees the state.
    """
    last = {name: index for index, step in enumerate(steps) for name in step.values}
    last |= dict.fromkeys(outputs, len(steps))
    root, types = _roots(steps), _types(steps)
    fresh: set[str] = set()
    kept: Counter[str] = Counter()
    for step in steps:
        if step.kernel.keeps or step.blocks:
            kept.update(root.get(name, name) for name in step.values if step.operation.type != "read_state")
        elif not step.kernel.view:
            fresh.update(step.made)
    until: dict[str, int] = {}
    for name, index in last.items():
        until[root.get(name, name)] = max(index, until.get(root.get(name, name), -1))
    in_blocks = {name for step in steps for block in step.blocks for name in block.captures}
    result = list(steps)
    for state in {_first(step) for step in steps if step.operation.type == "write_state"} - in_blocks:
        memory: dict[str, int] = {}  # the roots of what the state holds, and how often each may be kept
        pending = -1  # the place of what was done to it and is not written back yet
        for index, step in enumerate(steps):
            first = _first(step)
            if step.operation.type == "read_state" and first == state:
                memory[step.names[0]], pending = 0, -1
            elif step.operation.type == "write_state" and first == state:
                data = step.kernel.args[1]
                held = root.get(data, data) if isinstance(data, str) else ""
                own = held in fresh and kept[held] == 1
                memory = {held: 1 if own else -1} if held else {}
                if own:
                    result[index] = replace(step, kernel=replace(step.kernel, run=_write_owned))
                if own and pending >= 0 and held in steps[pending].names:
                    kernel = steps[pending].kernel
                    run = partial(_update, kernel)
                    kernel = replace(kernel, run=run, args=(*kernel.args, state), inplace=None)
                    result[pending] = replace(steps[pending], kernel=kernel, overwrites=False)
                pending = -1
            elif step.kernel.inplace is not None and not step.then and first and root.get(first) in memory:
                others = {root.get(name, name) for name in step.values - {first}}
                free = all(until[name] <= index and kept[name] == most for name, most in memory.items())
                if free and not others & memory.keys() and _same_type(types.get(first), step.types[0]):
                    pending = index
    return result


def _write_owned(state: StateCell, data: torch.Tensor) -> tuple[()]:
    state.tensor, state.owned = data, True
    return ()


def _update(kernel: Kernel, *arguments: Any) -> Any:
    *own, state = arguments
    function = kernel.inplace if state.owned and kernel.inplace is not None else kernel.run
    return function(*own)


def paired(steps: list[Step], outputs: tuple[str, ...]) -> list[Step]:
    """The steps with each two layers of 8-bit operands that only an activation stands between made one."""
    reads = Counter(name for step in steps for name in step.values)
    reader = {name: step for step in steps for name in step.values}
    taken: set[str] = set()
    result: list[Step] = []
    for step in steps:
        if not step.names or step.names[0] in taken:
            result += [step] if not step.names else []
            continue
        hidden = step.then[-1].names[0] if step.then else step.names[0]
        after, activation = reader.get(hidden), step.then[0].kernel.activation if len(step.then) == 1 else None
        first, second = step.kernel.pointwise, after.kernel.pointwise if after is not None else None
        if first and second and after and activation and reads[hidden] == 1 and hidden not in outputs:
            taken.add(after.names[0])
            kernel = replace(after.kernel, run=int8.pair(first, second, activation), args=step.kernel.args)
            step = replace(after, kernel=kernel, frees=(*step.frees, *after.frees))
        result.append(step)
    return result


def fused(step: Step) -> Step:
    """The step with the first of the operations that follow done inside its kernel, if that one can."""
    activation = step.then[0].kernel.activation if step.then else None
    if activation is None or step.kernel.fused is None:
        return step
    inside, *rest = step.then
    kernel = replace(step.kernel, run=step.kernel.fused(activation), fused=None)
    return replace(step, kernel=kernel, names=inside.names, types=inside.types, then=tuple(rest))
