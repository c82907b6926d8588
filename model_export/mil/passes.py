"""What is done to the steps of a block once all of them are resolved: lifetimes, and operations that run as one."""

from collections import Counter
from dataclasses import replace

from . import int8
from .program import TensorType
from .step import Step


def with_lifetimes(steps: list[Step], inputs: list[str], outputs: tuple[str, ...]) -> list[Step]:
    """Fill in `frees` and `overwrites`: what dies where, and whose memory nobody else looks at by then."""
    never = len(steps)
    last = {name: index for index, step in enumerate(steps) for name in (*step.names, *step.values)}
    last.update({name: never for name in outputs})
    # Values that may share memory have one root; it is in use as long as any of them is.
    root = {name: name for name in inputs}
    kept = set(inputs)  # roots that are never written over: these belong to the caller
    types: dict[str, TensorType | None] = {}
    for step in steps:
        first = step.kernel.args[0] if step.kernel.args else None
        for name, type in zip(step.names, step.types):
            root[name] = root[first] if step.kernel.view and isinstance(first, str) else name
            types[name] = type
        if step.kernel.keeps or step.blocks:
            kept |= {root[name] for name in (*step.names, *step.values)}
    used_until = {name: -1 for name in root}
    for name in root.keys() & last.keys():  # the rest are constants that the function returns
        index = last[name]
        used_until[root[name]] = max(used_until[root[name]], index)
    finished = []
    for index, step in enumerate(steps):
        first = step.kernel.args[0] if step.kernel.args else None
        values = step.values
        overwrites = (
            step.kernel.inplace is not None
            and isinstance(first, str)
            and root[first] not in kept
            and all(root[name] != root[first] for name in values - {first})
            and used_until[root[first]] == index
            and (type := types[first]) is not None
            and type == step.types[0]
            and None not in type.shape
        )
        frees = tuple(name for name in {*step.names, *values} if last[name] == index)
        finished.append(replace(step, overwrites=overwrites, frees=frees))
    return finished


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
