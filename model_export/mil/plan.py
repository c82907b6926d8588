"""The list of steps that an executor runs, made of a function's operations: everything is resolved here, once."""

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from . import limits
from . import ops as ops  # registers the operations
from .blob import WeightFile, immediate
from .dtypes import STORAGE, Policy
from .passes import fused, merged, paired, updating, with_lifetimes
from .program import (
    MOST_DEPTH,
    BlobRef,
    Block,
    Constant,
    Function,
    MILError,
    NamedType,
    Operation,
    OtherType,
    Program,
    TensorType,
    reason,
)
from .registry import OPSETS, Builder, Kernel, Node, Runtime, Unsupported, lookup
from .step import Plan, Step, value_of

Stored = torch.Tensor | str | tuple[str, ...]


class _Scope:
    """The values of a block, and of those around it: their types, and what is known at load in its storage type, read
    at its first use."""

    def __init__(self, outer: "_Scope | None" = None) -> None:
        self.types: ChainMap[str, TensorType | None] = outer.types.new_child() if outer else ChainMap()
        self.others: ChainMap[str, OtherType] = outer.others.new_child() if outer else ChainMap()
        self._declared: ChainMap[str, Constant] = outer._declared.new_child() if outer else ChainMap()
        self._values: ChainMap[str, Stored] = outer._values.new_child() if outer else ChainMap()
        self._files: dict[Any, WeightFile] = outer._files if outer else {}

    def add(self, items: Iterable[NamedType]) -> None:
        """Make values known to the operations that follow."""
        for item in items:
            self.types[item.name] = item.type
            if item.other is not None:
                self.others[item.name] = item.other

    def declare(self, name: str, constant: Constant) -> None:
        self._declared[name] = constant

    def set(self, values: Mapping[str, torch.Tensor]) -> None:
        self._values.update(values)

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._values.maps[0].pop(name, None)

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
    planner = _Planner(where, function.opset, policy, most_bytes)
    planner.refuse_unsupported(function.block)
    plan = planner.block(replace(function.block, inputs=function.inputs), _Scope(), 0)
    planner.refuse_unsupported(function.block)
    limits.check_peak(where, plan, policy, most_bytes)
    return plan


class _Planner:
    """What the blocks of one function have in common while they are resolved."""

    def __init__(self, where: str, opset: str, policy: Policy, most_bytes: int) -> None:
        self.where, self.opset, self.policy, self.most_bytes = where, opset, policy, most_bytes
        self.faults: dict[int, str] = {}  # by operation, whose names need not differ between blocks
        self.unpacked = 0  # bytes of constants that are computed

    def block(self, block: Block, scope: _Scope, depth: int) -> Plan:
        """Resolve a block, whose own scope this is."""
        if depth > MOST_DEPTH:
            raise MILError(f"{self.where}: blocks in blocks more than {MOST_DEPTH} deep")
        self._define("a block's input", block.inputs, scope)
        steps: list[Step] = []
        dying = _last_uses(block)
        for index, operation in enumerate(block.operations):
            if step := self._operation(operation, scope, depth):
                steps.append(step)
            # Kernels hold what they need; a whole package's unpacked weights at once would take several times its size.
            scope.forget(dying.get(index, ()))
        made = {name for step in steps for name in step.names} | {item.name for item in block.inputs}
        constants = _constant_outputs(block.outputs, scope, self.policy)
        if missing := [name for name in block.outputs if name not in scope.types]:
            raise MILError(f"{self.where} returns undefined values {missing}")
        read = {name for step in steps for name in step.values} | set(block.outputs)
        captures = tuple(sorted(read - made - constants.keys()))
        if texts := [name for name in captures if scope.get(name) is not None]:
            raise MILError(f"{self.where}: {texts} are texts, which are used as tensors")
        inputs = [*(item.name for item in block.inputs), *captures]
        finished = with_lifetimes(steps, inputs, block.outputs)
        merged_steps = merged(finished, block.outputs)
        if not depth:
            merged_steps = updating(merged_steps, block.outputs)
        if self.policy.fuses:
            merged_steps = [
                fused(step) for step in (paired(merged_steps, block.outputs) if self.policy.int8 else merged_steps)
            ]
        return Plan(block.inputs, block.outputs, tuple(finished), tuple(merged_steps), constants, captures)

    def _operation(self, operation: Operation, scope: _Scope, depth: int) -> Step | None:
        """The step of an operation; None for what is known at load, which the scope gets, and for a fault, noted."""
        if operation.type == "const":
            value = _const_value(self.where, operation)
            self._define(f"operation {operation.name!r}", operation.outputs, scope)
            scope.declare(operation.outputs[0].name, value)
            return None
        unknown = [b for b in _reads(operation) if b not in scope.types]
        if unknown:
            raise MILError(f"{self.where}: operation {operation.name!r} uses undefined values {unknown}")
        step = None
        try:
            step = self._resolve(operation, scope)
        except Unsupported as error:
            self.faults[id(operation)] = str(error)
        if step is not None and operation.blocks:
            step = self._with_blocks(step, scope, depth)
        elif step is not None and operation.type.startswith("constexpr_"):
            self.unpacked += sum(limits.size(type, self.policy) for type in step.types)
            if self.unpacked > self.most_bytes:
                raise MILError(
                    f"{self.where}: its weights take {self.unpacked} bytes, expected at most {self.most_bytes}"
                )
            scope.set(_folded(self.where, step))
            step = None
        self._define(f"operation {operation.name!r}", (step.operation if step else operation).outputs, scope)
        return step

    def _with_blocks(self, step: Step, scope: _Scope, depth: int) -> Step:
        """The step of a branch or a loop with its blocks, whose types have to be those of its own values."""
        operation = step.operation
        scopes = [_Scope(scope) for _ in operation.blocks]
        blocks = tuple(self.block(*pair, depth + 1) for pair in zip(operation.blocks, scopes))
        returned = [_named(block.outputs, inner) for block, inner in zip(blocks, scopes)]
        if operation.type == "cond":
            pairs = [(items, operation.outputs) for items in returned]
        else:
            variables = blocks[1].inputs
            pairs = [(returned[1], variables), (variables, operation.outputs), (blocks[0].inputs, variables)]
        for items, others in pairs:
            for one, other in zip(items, others):
                if not _compatible(one, other):
                    text = f"{one.name!r} is {one.type or one.other}, {other.name!r} {other.type or other.other}"
                    self.faults[id(operation)] = text
        return replace(step, blocks=blocks)

    def _define(self, maker: str, items: Iterable[NamedType], scope: _Scope) -> None:
        for item in items:
            if item.name in scope.types:
                raise MILError(f"{self.where}: {maker} defines {item.name!r} a second time")
            scope.add([item])

    def _resolve(self, operation: Operation, scope: _Scope) -> Step:
        builder = lookup(operation.type, self.opset)
        if builder is None:
            raise Unsupported("no such operation in this opset")
        if operation.blocks and operation.type not in ("cond", "while_loop"):
            raise Unsupported("blocks")
        late = not operation.blocks and any(type and type.variadic for type in map(scope.types.get, _reads(operation)))
        if late:  # coremltools declares what follows from a value of unknown rank as if that were 1
            operation = replace(operation, outputs=tuple(map(_of_any_shape, operation.outputs)))
        node = Node(operation, scope.types, scope.get, scope.load, self.policy, scope.others)
        kernel = _late(builder, node) if late else _built(builder, node)
        if any(output.type is None and output.other is None for output in operation.outputs):
            raise Unsupported("a result of unknown type")
        types = tuple(output.type for output in operation.outputs)
        rounds = self.policy.rounds and not kernel.exact and any(type and type.dtype == "fp16" for type in types)
        names = tuple(output.name for output in operation.outputs)
        dynamic = (
            late
            or any(type is None or None in type.shape for type in types)
            or any(isinstance(argument, Runtime) for argument in kernel.args)
        )
        return Step(operation, kernel, names, types, rounds, dynamic=dynamic)

    def refuse_unsupported(self, block: Block) -> None:
        """Raise MILError naming every operation without a builder, or else every one whose builder refused it."""
        lines = []
        for operation in _flat(block, 0):
            known = operation.type == "const" or lookup(operation.type, self.opset) is not None
            if not known and not self.faults:
                lines.append(f"{operation.name} ({operation.type}, {self.opset})")
            elif id(operation) in self.faults:
                lines.append(f"{operation.name} ({operation.type}, {self.opset}): {self.faults[id(operation)]}")
        if lines:
            raise MILError(f"{self.where}: {len(lines)} unsupported operation(s): {'; '.join(lines)}")


def _built(builder: Builder, node: Node) -> Kernel:
    """The kernel of an operation all of whose parameters are understood, or Unsupported."""
    try:
        kernel = builder(node)
    except (Unsupported, MILError, MemoryError):
        raise
    except Exception as error:  # parameters of a wrong kind: Python and torch raise whatever they trip over
        raise Unsupported(f"unusable parameters ({reason(error)})") from None
    if ignored := sorted(set(node.operation.inputs) - node.used):
        raise Unsupported(f"parameters not understood: {', '.join(ignored)}")
    return kernel


def _of_any_shape(item: NamedType) -> NamedType:
    return item if item.type is None else replace(item, type=TensorType(item.type.dtype, (None,), variadic=True))


def _late(builder: Builder, node: Node) -> Kernel:
    """A kernel that is built each time it runs: until then, of some operand not even the rank is known."""
    names = dict.fromkeys(_reads(node.operation))
    constants = {name: value for name in names if (value := node.constants(name)) is not None}
    types = {name: node.types[name] for name in names}
    others = {name: node.others[name] for name in names if name in node.others}
    given = tuple(name for name in names if name not in constants)

    def run(*arguments: Any) -> Any:
        values = dict(zip(given, arguments))
        actual = {
            name: replace(type, shape=tuple(values[name].shape), variadic=False)
            for name, type in types.items()
            if type is not None and name in values
        }
        now = replace(node, types={**types, **actual}, others=others, constants=constants.get, used=set())
        kernel = _built(builder, now)
        return kernel.run(*(value_of(argument, values) for argument in kernel.args))

    return Kernel(run, given, view=True, keeps=True)


def _flat(block: Block, depth: int) -> Iterator[Operation]:
    """The operations of a block and of those in it."""
    for operation in block.operations:
        yield operation
        if depth <= MOST_DEPTH:
            for inner in operation.blocks:
                yield from _flat(inner, depth + 1)


def _reads(operation: Operation) -> list[str]:
    return [b for item in operation.inputs.values() for b in item if isinstance(b, str)]


def _const_value(where: str, operation: Operation) -> Constant:
    value = operation.attributes.get("val")
    if value is None or len(operation.outputs) != 1 or operation.outputs[0].type != value.type:
        raise MILError(f"{where}: constant {operation.name!r} has no value of its declared type")
    return value


def _folded(where: str, step: Step) -> dict[str, torch.Tensor]:
    """A constexpr operation's results, in their storage types."""
    result = step.kernel.run()
    values = result if isinstance(result, tuple) else (result,)
    for value, type in zip(values, step.types, strict=True):
        if type is None or not type.accepts(tuple(value.shape)) or value.dtype != STORAGE[type.dtype]:
            came = f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
            raise MILError(f"{where}: {step.operation.name!r} gives {came}, declared {type}")
    return dict(zip(step.names, values))


def _named(names: Iterable[str], scope: _Scope) -> tuple[NamedType, ...]:
    return tuple(NamedType(name, scope.types[name], scope.others.get(name)) for name in names)


def _compatible(one: NamedType, other: NamedType) -> bool:
    """Whether a value may be of both types, as far as their sizes are known."""
    if one.type is None or other.type is None:
        return one.type is other.type and type(one.other) is type(other.other)
    if one.type.variadic or other.type.variadic:
        return one.type.dtype == other.type.dtype
    known = (None not in pair and pair[0] != pair[1] for pair in zip(one.type.shape, other.type.shape))
    return one.type.dtype == other.type.dtype and len(one.type.shape) == len(other.type.shape) and not any(known)


def _last_uses(block: Block) -> dict[int, list[str]]:
    """By operation's index: the values that no later operation reads and the block does not return."""
    last: dict[str, int] = {}
    for index, operation in enumerate(block.operations):
        names = set(_reads(operation))
        for inner in operation.blocks:
            names |= {name for item in _flat(inner, 0) for name in _reads(item)} | set(inner.outputs)
        last.update(dict.fromkeys(names - set(block.outputs), index))
    dying: dict[int, list[str]] = {}
    for name, index in last.items():
        dying.setdefault(index, []).append(name)
    return dying


def _constant_outputs(outputs: tuple[str, ...], scope: _Scope, policy: Policy) -> dict[str, torch.Tensor]:
    values = {}
    for name in outputs:
        value, type = scope.get(name), scope.types.get(name)
        if isinstance(value, torch.Tensor) and type is not None:
            values[name] = value.to(policy.holds(type.dtype))
    return values
