"""The tree of an app's MLX modules: which weights it looks for, of which shapes."""

from collections.abc import Iterator
from dataclasses import dataclass

from tree_sitter import Node

from app_bridge.app.facts import Key, Layer
from app_bridge.app.swift import (
    Name,
    argument,
    arguments,
    assigned_name,
    called,
    child,
    inherits,
    is_subscript,
    last_name,
    outwards,
    parameters,
    peel,
    result_of,
    string,
    text,
    type_name,
    walk,
    written_type,
)
from app_bridge.app.swift_codable import PLAIN, Record
from app_bridge.app.swift_program import Program

LAYERS_KEY = "num_hidden_layers"  # what {layer} counts, see facts.Layer
# The modules of MLXNN without weights (mlx-swift 0.21.2 to 0.31.6, Source/MLXNN).
_WITHOUT_WEIGHTS = (
    "ALiBi", "AvgPool1d", "AvgPool2d", "AvgPool3d", "CELU", "Dropout", "Dropout2d", "Dropout3d", "ELU", "GELU",
    "GLU", "HardShrink", "HardSwish", "HardTanh", "Identity", "LeakyReLU", "LogSigmoid", "LogSoftMax", "LogSoftmax",
    "MaxPool1d", "MaxPool2d", "MaxPool3d", "Mish", "ReLU", "ReLU6", "ReLUSquared", "RoPE", "SELU", "SiLU",
    "Sigmoid", "SinusoidalPositionalEncoding", "SoftMax", "SoftPlus", "SoftSign", "Softmax", "Softmin", "Softplus",
    "Softshrink", "Softsign", "Step", "Tanh", "Upsample",
)  # fmt: skip


@dataclass(frozen=True)
class Scope:
    """What a class's initializer was called with: parameter -> (expression, where it was written)."""

    declared: Node
    bound: dict[str, "tuple[Node, Scope] | Record"]


@dataclass(frozen=True)
class Size:
    """An integer expression over keys of config.json, in Python. level: 0 a sum, 1 a product, 2 a name or number."""

    said: str
    level: int = 2

    def at(self, level: int) -> str:
        return self.said if self.level >= level else f"({self.said})"


class Modules:
    """The module tree from a class and the configuration that it is constructed with."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layers: list[Layer] = []
        self.fatal: list[Key] = []  # keys without which an initializer ends the app

    def root(self, constructed: Node, configuration: Record) -> None:
        """A model as it is constructed in the factory's closure: its one argument is the configuration."""
        declared = self.program.type_named(text(constructed.children[0]), constructed)
        given = arguments(constructed)
        if declared is None or len(given) != 1:
            raise self.program.unclear("the model", constructed, "a class of the app's, of one configuration")
        start = self._initializer(declared, [label for label, _ in given])
        if start is None:
            raise self.program.unclear("the model", constructed, "a class with this initializer")
        self.walk(Scope(declared, {parameters(start)[0].name: configuration}), "", start, None)

    def walk(self, scope: Scope, prefix: str, start: Node | None, unless: str | None) -> None:
        """Every module that a class's properties hold."""
        self.program.use(scope.declared)
        bases = [self.program.type_named(base, scope.declared) for base in inherits(scope.declared)]
        if any(base is not None and self._is_module(base) for base in bases):
            raise self.program.unclear(type_name(scope.declared), scope.declared, "a class that inherits from Module")
        self._find_fatal(scope, start)
        for name in self.program.properties(scope.declared):
            if not (name.static or name.computed):
                self._property(scope, prefix, start, unless, name)

    def _property(self, scope: Scope, prefix: str, start: Node | None, unless: str | None, name: Name) -> None:
        type_, optional = written_type(name.type)
        attribute, key = self._info(name)
        if not type_ and name.value is not None and peel(name.value).type == "call_expression":
            type_ = text(peel(name.value).children[0])
        element = type_[1:-1] if type_.startswith("[") and ":" not in type_ else type_
        declared = self.program.type_named(element, name.node)
        module = declared is not None and self._is_module(declared)
        path = f"{prefix}{key or name.name}"
        if attribute == "ParameterInfo" or element == "MLXArray":
            raise self.program.unclear(f"the weight {path}", name.node, "weights of Linear, Embedding and RMSNorm only")
        weightless = declared is None and element in _WITHOUT_WEIGHTS
        layer = declared is None and element in _KINDS
        if weightless or not (module or layer or attribute == "ModuleInfo"):
            if not weightless and any(map(self._may_have_weights, self._mentioned(name))):
                expected = "Linear, Embedding, RMSNorm or what is known to have no weights"
                raise self.program.unclear(f"the module {path}", name.node, expected)
            return
        if name.attributes and not attribute:
            raise self.program.unclear(f"the module {path}", name.node, "no attribute but @ModuleInfo")
        made: list[tuple[Node, str | None]] = [(name.value, None)] if name.value else []
        made += self._assigned(start, name.name, scope)
        if not made and not optional:
            raise self.program.unclear(f"the module {path}", name.node, "a value in the initializer")
        for value, condition in made:
            if condition and unless:
                raise self.program.unclear(f"the module {path}", value, "one condition")
            self._module(scope, path, value, condition or unless)

    def _module(self, scope: Scope, path: str, value: Node, unless: str | None) -> None:
        value = peel(value)
        if value.type != "call_expression" or is_subscript(value):
            raise self.program.unclear(f"the module {path}", value, "a constructor")
        if called(value) == "map" and value.children[0].type == "navigation_expression":
            self._repeated(scope, path, value, unless)
            return
        kind = text(value.children[0])
        declared = self.program.type_named(kind, value)
        if declared is None and kind in _KINDS:
            self.layers.append(_KINDS[kind](self, scope, path, value, unless))
        elif declared is not None and self._is_module(declared):
            given = arguments(value)
            start = self._initializer(declared, [label for label, _ in given])
            if start is None and given:
                raise self.program.unclear(f"the module {path}", value, "an initializer with these labels")
            taken = parameters(start) if start else []
            bound: dict[str, tuple[Node, Scope] | Record] = {p.name: (v, scope) for p, (_, v) in zip(taken, given)}
            self.walk(Scope(declared, bound), f"{path}.", start, unless)
        elif declared is not None or kind not in _WITHOUT_WEIGHTS:
            raise self.program.unclear(
                f"the module {path}", value, "Linear, Embedding, RMSNorm or a class of the app's"
            )

    def _repeated(self, scope: Scope, path: str, value: Node, unless: str | None) -> None:
        """`(0 ..< count).map { _ in Layer(…) }`."""
        spread = peel(child(value.children[0], "target"))
        closure = next((n for n in value.children[-1].named_children if n.type == "lambda_literal"), None)
        made = result_of(closure) if closure else None
        expected = f"(0 ..< the configuration's {LAYERS_KEY}).map {{ … }}"
        if (
            made is None
            or spread.type != "range_expression"
            or text(child(spread, "op")) != "..<"
            or text(child(spread, "start")) != "0"
        ):
            raise self.program.unclear(f"the modules {path}", value, expected)
        if self._size(child(spread, "end"), scope).said != LAYERS_KEY:
            raise self.program.unclear(f"the modules {path}", spread, expected)
        self._module(scope, f"{path}.{{layer}}", made, unless)

    def linear(self, scope: Scope, path: str, value: Node, unless: str | None) -> Layer:
        """MLXNN's Linear(in, out, bias: true): its weight is [out, in]."""
        sizes = [each for label, each in arguments(value) if label is None]
        bias = argument(value, "bias")
        if len(sizes) != 2:
            raise self.program.unclear(f"the module {path}", value, "Linear(in, out, bias:)")
        said = self.program.constant(bias, f"the bias of {path}") if bias else True
        shape = tuple(self._size(each, scope).said for each in reversed(sizes))
        return Layer(path, "Linear", shape, bool(said), unless)

    def embedding(self, scope: Scope, path: str, value: Node, unless: str | None) -> Layer:
        """MLXNN's Embedding(embeddingCount:dimensions:)."""
        return self._labelled(scope, path, value, unless, ("embeddingCount", "dimensions"))

    def norm(self, scope: Scope, path: str, value: Node, unless: str | None) -> Layer:
        """MLXNN's RMSNorm(dimensions:eps:)."""
        return self._labelled(scope, path, value, unless, ("dimensions",))

    def _labelled(self, scope: Scope, path: str, value: Node, unless: str | None, labels: tuple[str, ...]) -> Layer:
        given = [argument(value, label) for label in labels]
        shape = tuple(self._size(each, scope).said for each in given if each is not None)
        if len(shape) != len(labels):
            raise self.program.unclear(f"the module {path}", value, f"{called(value)}({': '.join(labels)}:)")
        return Layer(path, called(value), shape, False, unless)

    def _info(self, name: Name) -> tuple[str, str | None]:
        """("ModuleInfo", its key if it has one) of a property's attribute; ("", None) without one."""
        for attribute in name.attributes:
            type_, *given = attribute.named_children
            if text(type_) in ("ModuleInfo", "ParameterInfo"):
                key = string(given[-1]) if given else None
                if given and (len(given) != 2 or text(given[0]) != "key" or key is None):
                    raise self.program.unclear("a module's key", attribute, '@ModuleInfo(key: "…")')
                return text(type_), key
        return "", None

    def _mentioned(self, name: Name) -> Iterator[Node]:
        """The types in a property's annotation; of one without, what is called for its value."""
        for node in walk(name.type or name.value or name.node):
            if node.type == ("type_identifier" if name.type else "call_expression"):
                yield node if name.type else node.children[0]

    def _may_have_weights(self, named: Node) -> bool:
        """Of a type of the app's that is a module, and of any other that isn't known to be none."""
        said = text(named).rpartition(".")[2]
        declared = self.program.type_named(text(named), named)
        if declared is not None:
            return self._is_module(declared)
        return said[:1].isupper() and said not in (*_WITHOUT_WEIGHTS, *PLAIN)

    def _is_module(self, declared: Node) -> bool:
        bases = inherits(declared)
        known = [self.program.type_named(base, declared) for base in bases]
        return (
            any(base in ("Module", "MLXNN.Module") for base in bases)
            or any(self._is_module(base) for base in known if base is not None)
            or any(self._info(name)[0] for name in self.program.properties(declared))
        )

    def _initializer(self, declared: Node, labels: list[str | None]) -> Node | None:
        """The class's initializer with these labels."""
        for member in self.program.members(declared):
            if member.type == "init_declaration" and [_label(n) for n in _listed(member)] == labels:
                return member
        return None

    def _assigned(self, start: Node | None, name: str, scope: Scope) -> Iterator[tuple[Node, str | None]]:
        """(expression, key of config.json that must be false) of the assignments to a property."""
        for node in walk(start) if start else ():
            if node.type != "assignment" or assigned_name(node) != name:
                continue
            outer, condition = node.parent, None
            while outer is not None and outer != start:
                if outer.type == "if_statement":
                    condition = self._condition(outer, node, scope)
                elif outer.type in ("lambda_literal", "for_statement", "while_statement", "switch_statement"):
                    raise self.program.unclear(f"the value of {name}", node, "an assignment, at most under one `if`")
                outer = outer.parent
            yield child(node, "result"), condition

    def _condition(self, statement: Node, assignment: Node, scope: Scope) -> str:
        """`if !key { … }`, or the else of `if key { … }`: the key."""
        condition = statement.child_by_field_name("condition") or statement
        otherwise = next((n for n in statement.children if n.type == "else"), None)
        in_else = otherwise is not None and assignment.start_byte > otherwise.start_byte
        negated = condition.type == "prefix_expression" and text(child(condition, "operation")) == "!"
        if negated == in_else or len(statement.children_by_field_name("condition")) != 1:
            raise self.program.unclear(
                "a module's condition", condition, "a key of the configuration that must be false"
            )
        return self._size(child(condition, "target") if negated else condition, scope).said

    # expressions
    def _size(self, node: Node, scope: Scope) -> Size:
        """An expression over keys of config.json. Unclear for any other."""
        value = self._evaluate(peel(node), scope)
        if not isinstance(value, Size):
            raise self.program.unclear("a size", node, "an expression over the configuration")
        return value

    def _evaluate(self, node: Node, scope: Scope) -> Size | Record:
        node = peel(node)
        if node.type == "integer_literal":
            return Size(str(self.program.literal(node, "a size")))
        if node.type == "additive_expression":
            left, right = (self._size(child(node, side), scope) for side in ("lhs", "rhs"))
            operator = text(child(node, "op"))
            return Size(f"{left.at(0)} {operator} {right.at(1)}", 0)
        if node.type == "multiplicative_expression":
            left, right = (self._size(child(node, side), scope) for side in ("lhs", "rhs"))
            operator = {"/": "//"}.get(text(child(node, "op")), text(child(node, "op")))
            return Size(f"{left.at(1)} {operator} {right.at(2)}", 1)
        if node.type == "simple_identifier" or (
            node.type == "navigation_expression" and text(child(node, "target")) == "self"
        ):
            return self._named(node, scope)
        if node.type == "navigation_expression":
            base = self._evaluate(child(node, "target"), scope)
            if isinstance(base, Record):
                return self._field(base, last_name(node), node)
        raise self.program.unclear("a size", node, "an expression over the configuration")

    def _named(self, node: Node, scope: Scope) -> Size | Record:
        """A parameter, a local constant or a property of the class."""
        name = last_name(node) if node.type == "navigation_expression" else text(node)
        found = self.program.definition(name, node) if node.type == "simple_identifier" else self.program.member(node)
        if found is not None and found.kind == "parameter" and name in scope.bound:
            given = scope.bound[name]
            return given if isinstance(given, Record) else self._evaluate(*given)
        value = found and (found.value or (found.computed and result_of(found.computed)))
        if found is not None and not value and found.kind == "property":
            start = next((outer for outer in outwards(node) if outer.type == "init_declaration"), None)
            assigned = [each for each, condition in self._assigned(start, name, scope) if condition is None]
            value = assigned[0] if len(assigned) == 1 else None
        if not value:
            raise self.program.unclear(f"the value of {name}", node, "a constant or a parameter of the initializer")
        return self._evaluate(value, scope)

    def _field(self, base: Record, name: str, node: Node) -> Size | Record:
        """A property of the configuration, stored or computed."""
        entry = base.fields.get(name)
        if entry is not None:
            return entry.record or Size(entry.path)
        for computed in self.program.properties(base.declared):
            result = result_of(computed.computed) if computed.name == name and computed.computed is not None else None
            if result is not None and result.type == "nil_coalescing_expression":
                result = peel(child(result, "value"))
            if result is not None and result.type == "simple_identifier" and text(result) in base.fields:
                return self._field(base, text(result), node)
        raise self.program.unclear(f"the configuration's {name}", node, "a key, or `key ?? default`")

    # what ends the app
    def _find_fatal(self, scope: Scope, start: Node | None) -> None:
        """`if let v = config.x?["key"], let ints = v.asInts() { … } else { fatalError() }`: x.key must be [Int].

        A guard always leaves, an `if` by fatalError or by throwing.
        """
        for node in walk(start) if start else ():
            thrown = node.type == "control_transfer_statement" and text(node).startswith("throw")
            if node.type == "guard_statement":
                outer: Node | None = node
            elif thrown or (node.type == "call_expression" and called(node) in _FATAL):
                outer = next((n for n in outwards(node) if n.type in ("if_statement", "guard_statement")), None)
            else:
                continue
            found = self._demanded(scope, outer or node)
            if found not in self.fatal:
                self.fatal.append(found)

    def _demanded(self, scope: Scope, statement: Node) -> Key:
        """The key that a statement's conditions ask for."""
        parts = [n for condition in statement.children_by_field_name("condition") for n in walk(condition)]
        calls = [n for n in parts if n.type == "call_expression"]
        subscript = next((n for n in calls if is_subscript(n)), None)
        types = [_AS[called(n)] for n in calls if not is_subscript(n) and called(n) in _AS]
        key = string(arguments(subscript)[0][1]) if subscript else None
        if subscript is None or key is None or len(types) != 1:
            raise self.program.unclear("what ends the app", statement, "a key of a dictionary that must have a type")
        return Key(f"{self._size(subscript.children[0], scope).said}.{key}", types[0], True)


_KINDS = {"Linear": Modules.linear, "Embedding": Modules.embedding, "RMSNorm": Modules.norm}
_FATAL = ("fatalError", "preconditionFailure")
_AS = {"asInts": "[Int]", "asInt": "Int", "asFloats": "[Float]", "asFloat": "Float", "asString": "String"}


def _listed(function: Node) -> list[Node]:
    return [n for n in function.named_children if n.type == "parameter"]


def _label(parameter: Node) -> str | None:
    outer = parameter.child_by_field_name("external_name") or child(parameter, "name")
    return None if text(outer) == "_" else text(outer)
