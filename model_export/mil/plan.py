"""The list of steps that an executor runs, made of a function's operations: everything is resolved here, once."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import int8, limits
from . import ops as ops  # registers the operations
from .blob import WeightFile, immediate
from .dtypes import STORAGE, Policy
from .program import BlobRef, Constant, Function, MILError, Operation, Program, TensorType, reason
from .registry import OPSETS, Node, Unsupported, lookup
from .step import Step

Stored = torch.Tensor | str | tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The steps one operation each, the same with element-wise followers merged, and the outputs that are constants."""

    steps: tuple[Step, ...]
    merged: tuple[Step, ...]
    constants: Mapping[str, torch.Tensor]


class _Constants:
    """The values known at load, in their storage types, read at their first use."""

    def __init__(self) -> None:
        self._files: dict[Any, WeightFile] = {}
        self._declared: dict[str, Constant] = {}
        self._values: dict[str, Stored] = {}

    def declare(self, name: str, constant: Constant) -> None:
        self._declared[name] = constant

    def set(self, values: Mapping[str, torch.Tensor]) -> None:
        self._values.update(values)

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._values.pop(name, None)

    def load(self, constant: Constant) -> Stored:
        if not isinstance(constant.data, BlobRef):
            return immediate(constant)
        if constant.data.file not in self._files:
            self._files[constant.data.file] = WeightFile(constant.data.file)
        return self._files[constant.data.file].read(constant.data.offset, constant.type)

    def get(self, name: str) -> Stored | None:
        if name not in self._values and name in self._declared:
            self._values[name] = self.load(self._declared[name])
        return self._values.get(name)


def make_plan(program: Program, function: Function, policy: Policy, most_bytes: int) -> Plan:
    """Resolve every operation of the function; raises MILError with the whole list of what is not supported, and for
    values that take more than `most_bytes` at once."""
    where = f"{program.path}: function {function.name!r}"
    if function.opset not in OPSETS:
        raise MILError(f"{where}: opset {function.opset} is not supported, expected one of {', '.join(OPSETS)}")
    _refuse_unsupported(where, function, {})
    constants = _Constants()
    types: dict[str, TensorType | None] = {item.name: item.type for item in function.inputs}
    steps: list[Step] = []
    faults: dict[str, str] = {}
    unpacked = 0  # bytes of constants that are computed
    dying = _last_uses(function)
    for index, operation in enumerate(function.block.operations):
        for output in operation.outputs:
            if output.name in types:
                raise MILError(f"{where}: operation {operation.name!r} defines {output.name!r} a second time")
        if operation.type == "const":
            value = _const_value(where, operation)
            constants.declare(operation.outputs[0].name, value)
        else:
            unknown = [b for item in operation.inputs.values() for b in item if isinstance(b, str) and b not in types]
            if unknown:
                raise MILError(f"{where}: operation {operation.name!r} uses undefined values {unknown}")
            try:
                step = _resolve(operation, function.opset, types, constants, policy)
            except Unsupported as error:
                faults[operation.name] = str(error)
            else:
                if operation.type.startswith("constexpr_"):
                    unpacked += sum(limits.size(type, policy) for type in step.types)
                    if unpacked > most_bytes:
                        raise MILError(f"{where}: its weights take {unpacked} bytes, expected at most {most_bytes}")
                    constants.set(_folded(where, step))
                else:
                    steps.append(step)
            # Kernels hold what they need; a whole package's unpacked weights at once would take several times its size.
            constants.forget(dying.get(index, ()))
        types.update({output.name: output.type for output in operation.outputs})
    _refuse_unsupported(where, function, faults)
    outputs = function.block.outputs
    finished = _with_lifetimes(steps, [item.name for item in function.inputs], outputs)
    inputs = {item.name: item.type for item in function.inputs if item.type is not None}
    limits.check_peak(where, finished, inputs, policy, most_bytes)
    merged = _merged(finished, outputs)
    if policy.fuses:
        merged = [_fused(step) for step in (_paired(merged, outputs) if policy.int8 else merged)]
    return Plan(tuple(finished), tuple(merged), _constant_outputs(outputs, types, constants, policy))


def _refuse_unsupported(where: str, function: Function, faults: Mapping[str, str]) -> None:
    """Raise MILError naming every operation without a builder, or else every one whose builder refused it."""
    lines = []
    for operation in function.block.operations:
        known = operation.type == "const" or lookup(operation.type, function.opset) is not None
        if operation.blocks or (not known and not faults):
            lines.append(f"{operation.name} ({operation.type}, {function.opset})")
        elif operation.name in faults:
            lines.append(f"{operation.name} ({operation.type}, {function.opset}): {faults[operation.name]}")
    if lines:
        raise MILError(f"{where}: {len(lines)} unsupported operation(s): {'; '.join(lines)}")


def _const_value(where: str, operation: Operation) -> Constant:
    value = operation.attributes.get("val")
    if value is None or len(operation.outputs) != 1 or operation.outputs[0].type != value.type:
        raise MILError(f"{where}: constant {operation.name!r} has no value of its declared type")
    return value


def _resolve(
    operation: Operation,
    opset: str,
    types: dict[str, TensorType | None],
    constants: _Constants,
    policy: Policy,
) -> Step:
    builder = lookup(operation.type, opset)
    if builder is None:
        raise Unsupported("no such operation in this opset")
    node = Node(operation, types, constants.get, constants.load, policy)
    try:
        kernel = builder(node)
    except (Unsupported, MILError, MemoryError):
        raise
    except Exception as error:  # parameters of a wrong kind: Python and torch raise whatever they trip over
        raise Unsupported(f"unusable parameters ({reason(error)})") from None
    ignored = sorted(set(operation.inputs) - node.used)
    if ignored:
        raise Unsupported(f"parameters not understood: {', '.join(ignored)}")
    if any(output.type is None for output in operation.outputs):
        raise Unsupported("a result that is not a tensor")
    outputs = tuple(output.type for output in operation.outputs if output.type is not None)
    rounds = policy.rounds and not kernel.exact and any(type.dtype == "fp16" for type in outputs)
    return Step(operation, kernel, tuple(output.name for output in operation.outputs), outputs, rounds)


def _folded(where: str, step: Step) -> dict[str, torch.Tensor]:
    """A constexpr operation's results, in their storage types."""
    result = step.kernel.run()
    values = result if isinstance(result, tuple) else (result,)
    for value, type in zip(values, step.types, strict=True):
        if not type.accepts(tuple(value.shape)) or value.dtype != STORAGE[type.dtype]:
            came = f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
            raise MILError(f"{where}: {step.operation.name!r} gives {came}, declared {type}")
    return dict(zip(step.names, values))


def _last_uses(function: Function) -> dict[int, list[str]]:
    """By operation's index: the values that no later operation reads and the function does not return."""
    last: dict[str, int] = {}
    for index, operation in enumerate(function.block.operations):
        names = {b for item in operation.inputs.values() for b in item if isinstance(b, str)}
        last.update(dict.fromkeys(names - set(function.block.outputs), index))
    dying: dict[int, list[str]] = {}
    for name, index in last.items():
        dying.setdefault(index, []).append(name)
    return dying


def _constant_outputs(
    outputs: tuple[str, ...], types: Mapping[str, TensorType | None], constants: _Constants, policy: Policy
) -> dict[str, torch.Tensor]:
    values = {}
    for name in outputs:
        value, type = constants.get(name), types.get(name)
        if isinstance(value, torch.Tensor) and type is not None:
            values[name] = value.to(policy.holds(type.dtype))
    return values


def _values(step: Step) -> set[str]:
    """The names of the values that a step reads."""
    items = (
        item for argument in step.kernel.args for item in (argument if isinstance(argument, tuple) else [argument])
    )
    return {item for item in items if isinstance(item, str)}


def _with_lifetimes(steps: list[Step], inputs: list[str], outputs: tuple[str, ...]) -> list[Step]:
    """Fill in `frees` and `overwrites`: what dies where, and whose memory nobody else looks at by then."""
    never = len(steps)
    last = {name: index for index, step in enumerate(steps) for name in (*step.names, *_values(step))}
    last.update({name: never for name in outputs})
    # Values that may share memory have one root; it is in use as long as any of them is.
    root = {name: name for name in inputs}
    types: dict[str, TensorType] = {}
    for step in steps:
        first = step.kernel.args[0] if step.kernel.args else None
        for name, type in zip(step.names, step.types):
            root[name] = root[first] if step.kernel.view and isinstance(first, str) else name
            types[name] = type
    used_until = {name: -1 for name in root}
    for name in root.keys() & last.keys():  # the rest are constants that the function returns
        index = last[name]
        used_until[root[name]] = max(used_until[root[name]], index)
    finished = []
    for index, step in enumerate(steps):
        first = step.kernel.args[0] if step.kernel.args else None
        overwrites = (
            step.kernel.inplace is not None
            and isinstance(first, str)
            and root[first] not in inputs  # those belong to the caller
            and all(root[name] != root[first] for name in _values(step) - {first})
            and used_until[root[first]] == index
            and types[first] == step.types[0]
            and None not in types[first].shape
        )
        frees = tuple(name for name in {*step.names, *_values(step)} if last[name] == index)
        finished.append(replace(step, overwrites=overwrites, frees=frees))
    return finished


def _merged(steps: list[Step], outputs: tuple[str, ...]) -> list[Step]:
    """The steps with each in-place unary operation moved onto the step whose only output it alone reads."""
    readers: dict[str, int] = {}
    for step in steps:
        for name in _values(step):
            readers[name] = readers.get(name, 0) + 1
    merged: list[Step] = []
    position: dict[str, int] = {}
    for step in steps:
        first = step.kernel.args[0] if len(step.kernel.args) == 1 else None
        home = position.get(first) if isinstance(first, str) and step.overwrites else None
        if home is not None and isinstance(first, str) and readers[first] == 1 and first not in outputs:
            target = merged[home]
            merged[home] = replace(target, then=(*target.then, step), frees=(*target.frees, *step.frees))
        else:
            merged.append(step)
            home = len(merged) - 1
        if len(step.names) == 1 and not step.kernel.view:
            position[step.names[0]] = home
    return merged


def _paired(steps: list[Step], outputs: tuple[str, ...]) -> list[Step]:
    """The steps with each two layers of 8-bit operands that only an activation stands between made one."""
    reads = Counter(name for step in steps for name in _values(step))
    reader = {name: step for step in steps for name in _values(step)}
    taken: set[str] = set()
    paired: list[Step] = []
    for step in steps:
        if step.names[0] in taken:
            continue
        hidden = step.then[-1].names[0] if step.then else step.names[0]
        after, activation = reader.get(hidden), step.then[0].kernel.activation if len(step.then) == 1 else None
        first, second = step.kernel.pointwise, after.kernel.pointwise if after is not None else None
        if first and second and after and activation and reads[hidden] == 1 and hidden not in outputs:
            taken.add(after.names[0])
            kernel = replace(after.kernel, run=int8.pair(first, second, activation), args=step.kernel.args)
            step = replace(after, kernel=kernel, frees=(*step.frees, *after.frees))
        paired.append(step)
    return paired


def _fused(step: Step) -> Step:
    """The step with the first of the operations that follow done inside its kernel, if that one can."""
    activation = step.then[0].kernel.activation if step.then else None
    if activation is None or step.kernel.fused is None:
        return step
    inside, *rest = step.then
    kernel = replace(step.kernel, run=step.kernel.fused(activation), fused=None)
    return replace(step, kernel=kernel, names=inside.names, types=inside.types, then=tuple(rest))
