"""The Swift files of an app: what names in them stand for, as far as it is written."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import tree_sitter
import tree_sitter_swift
from tree_sitter import Node

from app_bridge.app.swift import (
    Name,
    Unclear,
    arguments,
    bound,
    called,
    child,
    enclosing_types,
    is_subscript,
    kind_of,
    last_name,
    names,
    parameters,
    peel,
    result_of,
    result_type,
    shorten,
    string,
    text,
    type_name,
    walk,
    written_type,
)

_LANGUAGE = tree_sitter.Language(tree_sitter_swift.language())
_TYPES = ("class", "struct", "enum", "actor")
_DEPTH = 20  # of names that stand for other names; more is a circle


class Program:
    """All Swift files of an app. paths are relative to the app's folder."""

    def __init__(self, sources: Mapping[str, bytes]) -> None:
        parser = tree_sitter.Parser(_LANGUAGE)
        self.roots = {path: parser.parse(source).root_node for path, source in sources.items()}
        self._paths = {root.id: path for path, root in self.roots.items()}
        self._used: dict[int, Node] = {}
        self._nodes: dict[str, list[Node]] = {}
        for root in self.roots.values():
            for node in walk(root):
                self._nodes.setdefault(node.type, []).append(node)

    def nodes(self, kind: str) -> list[Node]:
        """Every node of a kind, in the order of the files and lines."""
        return self._nodes.get(kind, [])

    def path(self, node: Node) -> str:
        """The file that a node is in."""
        while node.parent is not None:
            node = node.parent
        return self._paths[node.id]

    def where(self, node: Node) -> str:
        """ "FastVLM/FastVLM.swift:219"."""
        return f"{self.path(node)}:{node.start_point.row + 1}"

    def unclear(self, what: str, node: Node, expected: str) -> Unclear:
        """The exception to raise about a node."""
        return Unclear(f"{what}: {self.where(node)}: got {shorten(node)}, expected {expected}")

    def use(self, node: Node) -> Node:
        """The node; `faults` will say what doesn't parse around it, since a fact comes from here."""
        outer = node
        while outer.parent is not None and outer.parent.parent is not None:
            outer = outer.parent
        self._used[outer.id] = outer
        return node

    def faults(self, everywhere: bool = False) -> list[str]:
        """Where the outermost declarations that facts come from don't parse, one line each file; or any file."""
        used = self.roots.values() if everywhere else self._used.values()
        roots = [self.roots[path] for path in dict.fromkeys(map(self.path, used))]
        searched = [*used, *(child for root in roots for child in root.children if child.is_error)]
        broken = [n for node in searched if node.has_error for n in walk(node) if n.is_error or n.is_missing]
        first = {self.path(node): node for node in sorted(broken, key=lambda n: n.start_byte, reverse=True)}
        what = "isn't Swift as the grammar here knows it, so what stands there may have been missed"
        return [f"{self.where(node)}: {shorten(node)} {what}" for _, node in sorted(first.items())]

    def calls(self, *names: str) -> list[Node]:
        """Calls of a function, method or type by its last name."""
        return [call for call in self.nodes("call_expression") if not is_subscript(call) and called(call) in names]

    def one(self, what: str, found: list[Any], expected: str) -> Any:
        """The only one. Unclear for none, and for several that differ."""
        nodes = [each for each in found if isinstance(each, Node)]
        different = {text(each) if isinstance(each, Node) else str(each) for each in found}
        if len(different) != 1:
            where = f" ({', '.join(map(self.where, nodes))})" if nodes else ""
            raise Unclear(f"{what}: Swift sources: got {len(different)}{where}, expected one {expected}")
        for node in nodes:
            self.use(node)
        return found[0]

    def mentioned(self) -> set[str]:
        """Names of types, members and variables; `f(a:b:)` of calls, `await f`, and `A.b` of members. `let f(a:b:)`
        where a call alone says what type a name has: elsewhere Swift takes the overload of the type that is asked for.
        """
        found = {text(node) for kind in ("simple_identifier", "type_identifier") for node in self.nodes(kind)}
        for node in self.nodes("navigation_expression"):
            found.add(".".join(text(node).split(".")[-2:]))
        for call in self.nodes("call_expression"):
            if not is_subscript(call) and (name := called(call)):
                found.add(_signature(call))
                if call.parent is not None and call.parent.type == "await_expression":
                    found.add(f"await {name}")
        inferred = (n for d in self.nodes("property_declaration") for n in names(d, "local") if not n.type)
        values = (peel(n.value) for n in inferred if n.value and n.value.type != "as_expression")
        return found | {f"let {_signature(n)}" for n in values if n.type == "call_expression" and not is_subscript(n)}

    @cached_property
    def _types(self) -> list[Node]:
        return [node for node in self.nodes("class_declaration") if kind_of(node) in _TYPES]

    @cached_property
    def _extensions(self) -> list[Node]:
        return [node for node in self.nodes("class_declaration") if kind_of(node) == "extension"]

    def type_named(self, name: str, at: Node) -> Node | None:
        """The declaration of a type of this (dotted) name, as seen from a node; None if the app doesn't declare it."""
        first, *rest = name.split(".")
        scopes = [enclosing.id for enclosing in enclosing_types(at)]
        candidates = [node for node in self._types if type_name(node) == first]
        seen = [node for scope in scopes for node in candidates if self._owner(node) == scope]
        outermost = [node for node in candidates if self._owner(node) is None]
        seen += [n for n in outermost if self.path(n) == self.path(at)] or outermost
        for nested in rest:
            seen = [n for n in self._types if seen and type_name(n) == nested and self._owner(n) == seen[0].id]
        return seen[0] if seen else None

    def _owner(self, node: Node) -> int | None:
        outer = enclosing_types(node.parent) if node.parent else []
        if outer and kind_of(outer[0]) == "extension":
            extended = next((t for t in self._types if type_name(t) == type_name(outer[0])), None)
            return extended.id if extended else outer[0].id
        return outer[0].id if outer else None

    def members(self, declared: Node) -> Iterator[Node]:
        """What is declared in a type and its extensions."""
        if kind_of(declared) == "extension":
            declared = next((node for node in self._types if type_name(node) == type_name(declared)), declared)
        extensions = [node for node in self._extensions if type_name(node) == type_name(declared)]
        for each in dict.fromkeys([declared, *extensions]):
            body = each.child_by_field_name("body")
            yield from body.named_children if body else ()

    def properties(self, declared: Node) -> list[Name]:
        """Of a type, with those of its extensions."""
        found = (member for member in self.members(declared) if member.type == "property_declaration")
        return [name for member in found for name in names(member, "property")]

    def definition(self, name: str, at: Node) -> Name | None:
        """What a simple identifier stands for at a node; None if it isn't declared in the app."""
        node: Node | None = at
        while node is not None:
            found: list[Name] = []
            if node.type in ("statements", "source_file"):
                locals_ = [c for c in node.named_children if c.type == "property_declaration"]
                found = [n for c in locals_ if c.start_byte < at.start_byte for n in names(c, "local")]
                found += [n for c in node.named_children if c.type == "guard_statement" for n in bound(c)]
            elif node.type == "if_statement":
                found = bound(node)  # seen in its else as well, where Swift wouldn't; such a name has no constant
            elif node.type in ("function_declaration", "init_declaration"):
                found = parameters(node)
            elif node.type == "class_declaration":
                found = self.properties(node)
            # `let image = image`, `if let model = model`: the value is about an outer name
            same = [n for n in found if n.name == name and not (n.kind == "local" and _inside(at, n.node))]
            if same:
                return self._only(same)
            node = node.parent
        outermost = (n for root in self.roots.values() for c in root.named_children for n in names(c, "local"))
        return next((each for each in outermost if each.name == name), None)

    def member(self, node: Node) -> Name | None:
        """What a navigation expression `a.b` stands for; None if that isn't declared in the app."""
        target, name = peel(child(node, "target")), last_name(node)
        declared: Node | None = None
        if text(target) in ("self", "Self"):
            declared = next(iter(enclosing_types(node)), None)
        else:
            type_ = self.type_of(target)
            declared = self.type_named(type_, node) if type_ else None
        return self._only([p for p in self.properties(declared) if p.name == name]) if declared else None

    def _only(self, found: list[Name]) -> Name | None:
        """Unclear for several, as under #if."""
        if len(found) > 1:
            raise self.unclear(f"the value of {found[1].name}", found[1].node, "one declaration")
        return found[0] if found else None

    def type_of(self, node: Node, depth: int = 0) -> str | None:
        """The name of an expression's type, as far as it is written; None if it isn't."""
        node = peel(node)
        found: Name | None = None
        if depth > _DEPTH:
            return None
        if node.type == "simple_identifier":
            found = self.definition(text(node), node)
            if found is None and self.type_named(text(node), node):
                return text(node)  # Type.member
        elif node.type == "navigation_expression":
            found = self.member(node)
        elif node.type == "call_expression" and not is_subscript(node):
            callee = peel(node.children[0])
            if (function := self._function(callee)) is not None:
                return written_type(result_type(function))[0]
            return text(callee)
        if found is None:
            return None
        return (
            written_type(found.type)[0] if found.type else self.type_of(found.value, depth + 1) if found.value else None
        )

    def _function(self, callee: Node) -> Node | None:
        """The declaration of a function called by its name or by self.name."""
        if callee.type == "navigation_expression" and text(child(callee, "target")) != "self":
            return None
        name = last_name(callee) if callee.type == "navigation_expression" else text(callee)
        for declared in enclosing_types(callee):
            for member in self.members(declared):
                if member.type == "function_declaration" and text(child(member, "name")) == name:
                    return member
        return None

    def trace(self, node: Node) -> Node:
        """The expression that a name stands for, through `let b = a` and computed properties; else the node itself."""
        for _ in range(_DEPTH):
            node = peel(node)
            found = None
            if node.type == "simple_identifier":
                found = self.definition(text(node), node)
            elif node.type == "navigation_expression":
                found = self.member(node)
            following = found and (found.value or (found.computed and result_of(found.computed)))
            if not following:
                return node
            node = following
        return node

    def integer(self, node: Node, what: str) -> int:
        """A constant that is one."""
        value = self.constant(node, what)
        if not isinstance(value, int):
            raise self.unclear(what, node, "an integer")
        return value

    def words(self, node: Node, what: str) -> str:
        """A constant that is a string."""
        value = self.constant(node, what)
        if not isinstance(value, str):
            raise self.unclear(what, node, "a string")
        return value

    def constant(self, node: Node, what: str) -> Any:
        """A literal, or arithmetic of literals and of names that stand for some. Unclear for what is none."""
        node = self.trace(node)
        if node.type in ("additive_expression", "multiplicative_expression", "bitwise_operation"):
            left, right = (self.constant(child(node, side), what) for side in ("lhs", "rhs"))
            operator = text(child(node, "op"))
            if operator in _ARITHMETIC and all(isinstance(side, int | float) for side in (left, right)):
                return _ARITHMETIC[operator](left, right)
        if node.type == "call_expression" and called(node) in ("NSNumber", "Int", "Float", "Double"):
            values = arguments(node)
            if len(values) == 1:
                return self.constant(values[0][1], what)
        return self.literal(self.use(node), what)

    def literal(self, node: Node, what: str) -> Any:
        """A Swift literal as JSON has it; of a case with one value, that value. Unclear for what is none."""
        node = peel(node)
        kind = node.type
        if kind == "integer_literal":
            return int(text(node))
        if kind in ("hex_literal", "bin_literal", "oct_literal"):
            return int(text(node), 0)
        if kind == "real_literal":
            return float(text(node).replace("_", ""))
        if kind == "boolean_literal":
            return text(node) == "true"
        if text(node) == "nil":
            return None
        if kind == "prefix_expression" and text(child(node, "operation")) == "-":
            return -self.literal(child(node, "target"), what)
        if kind in ("line_string_literal", "raw_string_literal") and (said := string(node)) is not None:
            return said
        if kind == "array_literal":
            return [self.literal(each, what) for each in node.children_by_field_name("element")]
        if kind == "dictionary_literal":
            sides = (node.children_by_field_name("key"), node.children_by_field_name("value"))
            return {self.literal(key, what): self.literal(value, what) for key, value in zip(*sides)}
        if kind == "call_expression" and not is_subscript(node) and node.children[0].type == "prefix_expression":
            values = arguments(node)
            if len(values) == 1:
                return self.literal(values[0][1], what)
        raise self.unclear(what, node, "a literal")


_ARITHMETIC = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "<<": lambda a, b: a << b,
}


def _signature(call: Node) -> str:
    labels = "".join(f"{label or '_'}:" for label, _ in arguments(call))
    return f"{called(call)}({labels})"


def _inside(node: Node, outer: Node) -> bool:
    return outer.start_byte <= node.start_byte and node.end_byte <= outer.end_byte
