"""The table of operations, and what an operation's builder sees and returns.

A builder is called once, when an executor is constructed: it reads the compile-time parameters, prepares the weights
and returns a Kernel. It raises Unsupported for a form that it cannot run, so that a program is refused before it runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .dtypes import Policy
from .int8 import Int8Linear
from .program import MOST_BYTES, Constant, ListType, Operation, OtherType, StateType, TensorType
from .rounding import round_fp16

# coremltools' names of the opsets of iOS 15, 16, 17, 18 and 26, oldest first; the last one has no operation of its own.
OPSETS = ("CoreML5", "CoreML6", "CoreML7", "CoreML8", "CoreML9")


@dataclass(frozen=True)
class Runtime:
    """A number or list of numbers that is known only at run time: `Kernel.run` gets it as Python's, not as a tensor."""

    name: str


Argument = str | torch.Tensor | None | Runtime | int | float | list[Any] | tuple["str | torch.Tensor", ...]
"""A value's name, a constant in compute precision, nothing, a number or a list of them, or several of the first two."""


class Unsupported(Exception):
    """A known operation in a form that cannot be run, which the message names."""


@dataclass(frozen=True)
class TensorList:
    """A list as a value: its elements, None for one that was never written."""

    items: tuple[torch.Tensor | None, ...]


@dataclass
class StateCell:
    """A state as a value: its tensor now, which is written over only where it is `owned`, by nothing else held, and
    where the plan knows that nobody reads it any more (`passes.updating`)."""

    tensor: torch.Tensor
    owned: bool = True


@dataclass(frozen=True)
class Kernel:
    """A resolved operation: `run(*args)` with names replaced by their values.

    exact: results are fp16 whenever the arguments are, so that rounding them is a no-op.
    view: the result may share memory with the first argument.
    keeps: a result, or a state, may hold on to the memory of any argument: nothing is written over it afterwards.
    inplace: the same as `run`, over the first argument (which has the result's shape and type).
    fused: `run` with an operation that follows done inside, by that one's `activation`.
    activation: what an operation of one argument is called in `fused`.
    pointwise: the layer, where the operation is a 1 x 1 convolution of 8-bit operands.
    """

    run: Callable[..., Any]
    args: tuple[Argument, ...]
    exact: bool = False
    view: bool = False
    keeps: bool = False
    inplace: Callable[..., Any] | None = None
    fused: Callable[[str], Callable[..., Any]] | None = None
    activation: str | None = None
    pointwise: Int8Linear | None = None


@dataclass(frozen=True)
class Node:
    """One operation as its builder sees it. `types` has every earlier value (None: no tensor, but one of `others`),
    `constants` the ones known at load."""

    operation: Operation
    types: Mapping[str, TensorType | None]
    constants: Callable[[str], torch.Tensor | str | tuple[str, ...] | None]
    load: Callable[[Constant], torch.Tensor | str | tuple[str, ...]]
    policy: Policy
    others: Mapping[str, OtherType] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @property
    def type(self) -> TensorType:
        """The first output's type."""
        declared = self.operation.outputs[0].type
        if declared is None:
            raise Unsupported("a result that is not a tensor")
        return declared

    def expects(self, *shape: int | None, output: int = 0) -> None:
        """Raise Unsupported unless a result, of this shape (None: known only at run time), is declared so.

        For every operation whose parameters or operands can make its result larger than an operand: before it runs,
        nothing else holds them to the declared type, whose bytes have been counted.
        """
        type = self.operation.outputs[output].type
        declared = () if type is None else type.shape
        fits = len(shape) == len(declared) and all(a == b for a, b in zip(shape, declared) if None not in (a, b))
        known = [size for size in shape if size is not None]
        if (
            not (fits or (type is not None and type.variadic))
            or min(known, default=0) < 0
            or math.prod(known) > MOST_BYTES
        ):
            sizes = ", ".join("?" if size is None else str(size) for size in shape)
            raise Unsupported(f"gives [{sizes}], declared {type}")

    def allowed(self, *shape: int) -> tuple[int, ...]:
        """The first result's shape, known since a moment ago at run time; ValueError for one that `expects` refuses."""
        size = self.policy.holds(self.type.dtype).itemsize
        if min(shape, default=0) < 0 or not self.type.accepts(shape) or math.prod(shape) * size > MOST_BYTES:
            raise ValueError(f"gives {list(shape)}, declared {self.type}")
        return shape

    def shapes(self, *keys: str) -> list[tuple[int | None, ...]]:
        """The given tensor parameters' shapes."""
        return [self.type_of(key).shape for key in keys if self.has(key)]

    @property
    def decomposes(self) -> bool:
        """Whether a composite operation is computed as its chain, each intermediate rounded to fp16."""
        return self.policy.decomposes and self.type.dtype == "fp16"

    @property
    def step(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The rounding of a composite operation's intermediate results: to fp16, or none."""
        return round_fp16 if self.decomposes else lambda x: x

    def has(self, key: str) -> bool:
        """Whether the parameter is given."""
        return bool(self.operation.inputs.get(key)) or (key != "name" and key in self.operation.attributes)

    def _bindings(self, key: str) -> tuple[str | Constant, ...]:
        self.used.add(key)
        if self.operation.inputs.get(key):
            return self.operation.inputs[key]
        # constexpr operations before iOS 18 keep their operands among the attributes.
        return (self.operation.attributes[key],) if key != "name" and key in self.operation.attributes else ()

    def _binding(self, key: str) -> str | Constant | None:
        bindings = self._bindings(key)
        if len(bindings) > 1:
            raise Unsupported(f"{key} has {len(bindings)} values, expected one")
        return bindings[0] if bindings else None

    def type_of(self, key: str) -> TensorType:
        """A given tensor parameter's type."""
        binding = self._binding(key)
        known = self.types.get(binding) if isinstance(binding, str) else binding.type if binding else None
        if known is None:
            raise Unsupported(f"{key} is not a tensor")
        return known

    def list_type(self, key: str) -> ListType:
        """A given list parameter's type."""
        binding = self._binding(key)
        known = self.others.get(binding) if isinstance(binding, str) else None
        if not isinstance(known, ListType):
            raise Unsupported(f"{key} is not a list")
        return known

    def state_type(self, key: str) -> TensorType:
        """The type of the tensor in a given state parameter."""
        binding = self._binding(key)
        known = self.others.get(binding) if isinstance(binding, str) else None
        if not isinstance(known, StateType):
            raise Unsupported(f"{key} is not a state")
        return known.tensor

    def rank(self, key: str) -> int:
        """A given tensor parameter's rank."""
        return len(self.type_of(key).shape)

    def raw(self, key: str) -> torch.Tensor | str | tuple[str, ...] | None:
        """A parameter's compile-time value in its storage type; None when it is not given or only known at run time."""
        binding = self._binding(key)
        if binding is None:
            return None
        return self.constants(binding) if isinstance(binding, str) else self.load(binding)

    def const(self, key: str, default: Any = ...) -> Any:
        """A parameter's compile-time value in Python: text, number, bool or list. Without a default: required."""
        value = self.raw(key)
        if value is None:
            if self.has(key):
                raise Unsupported(f"{key} is not a constant")
            if default is ...:
                raise Unsupported(f"{key} is missing")
            return default
        return value.tolist() if isinstance(value, torch.Tensor) else value

    def known(self, key: str, default: Any = ...) -> Any:
        """As `const`, but None for a value that is only known at run time: `operand` is its name then."""
        return None if self.has(key) and self.raw(key) is None else self.const(key, default)

    def typed(self, key: str, default: float) -> float:
        """A number as the operation has it: where intermediates are rounded, so is a default (1e-12 is 0)."""
        value: float = self.const(key, default)
        return float(torch.tensor(value, dtype=torch.float16)) if self.decomposes else value

    def value(self, key: str, default: Any = ...) -> Any:
        """As `const`; but a value that is known only at run time is a Runtime, to be passed on among a Kernel's args:

        begin = node.value("begin")
        return node.kernel(run, "x", values=(begin,))  # run(x, begin): begin is a list of int in both cases
        """
        binding = self._binding(key)
        return Runtime(binding) if isinstance(binding, str) and self.raw(key) is None else self.const(key, default)

    def weight(self, key: str) -> torch.Tensor | None:
        """A constant tensor in compute precision; None when it is not given or not a constant."""
        value = self.raw(key)
        if not isinstance(value, torch.Tensor):
            return None
        return value.to(self.policy.holds(self.type_of(key).dtype))

    def operand(self, key: str) -> Argument:
        """A tensor argument for a Kernel: a constant, a value's name, or None when it is not given."""
        constant = self.weight(key)
        binding = self._binding(key)
        return constant if constant is not None else binding if isinstance(binding, str) else None

    def operands(self, key: str) -> tuple[str | torch.Tensor, ...]:
        """A list-valued parameter's tensors."""
        tensors: list[str | torch.Tensor] = []
        for binding in self._bindings(key):
            value = self.constants(binding) if isinstance(binding, str) else self.load(binding)
            dtype = self.types.get(binding) if isinstance(binding, str) else binding.type
            if isinstance(value, torch.Tensor) and dtype is not None:
                tensors.append(value.to(self.policy.holds(dtype.dtype)))
            elif isinstance(binding, str):
                tensors.append(binding)
            else:
                raise Unsupported(f"{key} holds text")
        return tuple(tensors)

    def kernel(self, run: Callable[..., Any], *keys: str, values: Sequence[Any] = (), **more: Any) -> Kernel:
        """A Kernel with these fields whose arguments are these parameters, then the `values` (results of `value`).

        The first parameter is required.
        """
        args = tuple(self.operand(key) for key in keys)
        if args[0] is None:
            raise Unsupported(f"{keys[0]} is missing")
        return Kernel(run, (*args, *values), **more)


def broadcast(*shapes: Sequence[int | None]) -> list[int | None]:
    """The shape of tensors that are broadcast together, as NumPy does it; Unsupported where they can't be."""
    result: list[int | None] = []
    for place in range(1, max(map(len, shapes), default=0) + 1):
        sizes = {shape[-place] for shape in shapes if len(shape) >= place} - {1}
        if len(sizes - {None}) > 1:
            raise Unsupported(f"operands of shapes {', '.join(str(list(shape)) for shape in shapes)}")
        result.insert(0, next(iter(sizes - {None}), None) if sizes else 1)
    return result


def positive(node: Node, **values: Sequence[int] | int) -> None:
    """Unsupported unless these parameters are numbers from 1: native code divides by them."""
    for name, value in values.items():
        if min([value] if isinstance(value, int) else value, default=1) < 1:
            raise Unsupported(f"{name} {value}, expected numbers from 1")


Builder = Callable[[Node], Kernel]
_TABLE: dict[str, list[tuple[int, Builder]]] = {}


def mil_op(*names: str, since: str = "CoreML5") -> Callable[[Builder], Builder]:
    """Register a builder for operations of these types, from the given opset until one registered for a later one."""

    def register(builder: Builder) -> Builder:
        for name in names:
            _TABLE.setdefault(name, []).append((OPSETS.index(since), builder))
            _TABLE[name].sort(key=lambda entry: entry[0])
        return builder

    return register


def lookup(type: str, opset: str) -> Builder | None:
    """The builder of an operation in an opset, or None."""
    level = OPSETS.index(opset)
    builders = [builder for since, builder in _TABLE.get(type, []) if since <= level]
    return builders[-1] if builders else None


def table() -> dict[str, list[str]]:
    """Every operation with the opsets that it is supported in."""
    return {
        name: [opset for level, opset in enumerate(OPSETS) if any(since <= level for since, _ in _TABLE[name])]
        for name in sorted(_TABLE)
    }


def supported() -> Sequence[str]:
    """The types of all operations that some opset can run."""
    return sorted(_TABLE)
