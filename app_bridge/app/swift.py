"""Swift's syntax tree: what a node says. `swift_program.py` knows what names stand for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tree_sitter import Node

from app_bridge.subject import shortened

SIDES = ("lhs", "rhs")  # of an operator
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\0": "\0", "\\\\": "\\", '\\"': '"', "\\'": "'"}


class Unclear(Exception):
    """Something in the app that can't be read: one line, what and where, got, expected."""


@dataclass(frozen=True)
class Name:
    """What a name stands for; type, value and computed as far as they are written.

    kind: "property", "parameter" or "local".
    """

    name: str
    kind: str
    node: Node
    type: Node | None = None
    value: Node | None = None
    computed: Node | None = None
    attributes: tuple[Node, ...] = ()
    static: bool = False


def walk(node: Node) -> Iterator[Node]:
    """A node and all below it, in the order of the text."""
    left = [node]
    while left:
        node = left.pop()
        yield node
        left.extend(reversed(node.children))


def text(node: Node) -> str:
    """As it is written."""
    return (node.text or b"").decode("utf-8", "replace")


def shorten(node: Node) -> str:
    """As it is written, in one short line."""
    return repr(shortened(" ".join(text(node).split()), 60))


def child(node: Node, field: str) -> Node:
    """A field that the grammar says is there."""
    found = node.child_by_field_name(field)
    if found is None:
        raise Unclear(f"line {node.start_point.row + 1}: got {shorten(node)}, expected a {field}")
    return found


def peel(node: Node) -> Node:
    """Without `try`, `await`, `!`, `as …` and parentheses around it."""
    while True:
        if node.type in ("try_expression", "await_expression", "as_expression"):
            inner = node.child_by_field_name("expr")
        elif node.type == "postfix_expression" and text(node).endswith("!"):
            inner = node.child_by_field_name("target")
        elif node.type == "tuple_expression" and len(node.named_children) == 1:
            inner = node.named_children[0]
        else:
            return node
        if inner is None:
            return node
        node = inner


def string(node: Node) -> str | None:
    """A string literal's value; None if it isn't one, or is interpolated."""
    if node.type == "raw_string_literal" and text(node).startswith('#"') and text(node).endswith('"#'):
        return text(node)[2:-2]
    parts = pieces(node)
    return None if parts is None or any(isinstance(part, Node) for part in parts) else "".join(map(str, parts))


def pieces(node: Node) -> list[str | Node] | None:
    """A string literal's texts and interpolated expressions, in order; None for other nodes and unknown escapes."""
    if node.type != "line_string_literal":
        return None
    parts: list[str | Node] = []
    for part in node.named_children:
        if part.type == "line_str_text":
            parts.append(text(part))
        elif part.type == "interpolated_expression":
            parts.append(child(part, "value"))
        elif part.type == "str_escaped_char" and text(part) in _ESCAPES:
            parts.append(_ESCAPES[text(part)])
        elif part.type == "str_escaped_char" and text(part).startswith("\\u{"):
            parts.append(chr(int(text(part)[3:-1], 16)))
        else:
            return None
    return parts


def last_name(node: Node) -> str:
    """`c` of `a.b.c`."""
    suffix = child(node, "suffix")
    return text(suffix.child_by_field_name("suffix") or suffix)


def is_subscript(call: Node) -> bool:
    """`a[b]` is a call in this grammar."""
    return any(n.type == "value_arguments" and text(n).startswith("[") for n in call.children[-1].children)


def called(call: Node) -> str:
    """The last name of what is called: `set` of `MLX.GPU.set(…)`; empty for what has none."""
    callee = call.children[0]
    if callee.type == "navigation_expression":
        return last_name(callee)
    return text(callee) if callee.type == "simple_identifier" else ""


def arguments(call: Node) -> list[tuple[str | None, Node]]:
    """(label, expression) of a call's or subscript's arguments, a trailing closure left out."""
    given = next((n for n in call.children[-1].named_children if n.type == "value_arguments"), None)
    found = []
    for argument in given.named_children if given else ():
        value = argument.child_by_field_name("value")
        if argument.type == "value_argument" and value is not None:
            label = argument.child_by_field_name("name")
            found.append((text(label) if label else None, value))
    return found


def argument(call: Node, label: str) -> Node | None:
    """The argument of this label."""
    return next((value for name, value in arguments(call) if name == label), None)


def kind_of(declared: Node) -> str:
    """ "class", "struct", "enum", "actor" or "extension"."""
    kind = declared.child_by_field_name("declaration_kind")
    return text(kind) if kind else ""


def type_name(declared: Node) -> str:
    """The last part of a declaration's name."""
    return text(child(declared, "name")).rpartition(".")[2]


def enclosing_types(node: Node | None) -> list[Node]:
    """The type declarations around a node, the innermost first; itself too, if it is one."""
    found = []
    while node is not None:
        if node.type == "class_declaration":
            found.append(node)
        node = node.parent
    return found


def inherits(declared: Node) -> list[str]:
    """The names after the colon."""
    listed = (n for n in declared.named_children if n.type == "inheritance_specifier")
    return [text(child(each, "inherits_from")) for each in listed]


def written_type(node: Node | None) -> tuple[str, bool]:
    """(a type as it is written, without its `?`; whether it is optional)."""
    if node is None:
        return "", False
    if node.type == "type_annotation":
        node = child(node, "name")
    if node.type == "optional_type":
        return " ".join(text(child(node, "wrapped")).split()), True
    said = " ".join(text(node).split())
    if said.startswith("Optional<") and said.endswith(">"):
        return said[len("Optional<") : -1], True
    return said, False


def names(declaration: Node, kind: str) -> list[Name]:
    """The names that a property declaration declares."""
    if declaration.type != "property_declaration":
        return []
    modifiers = next((n for n in declaration.named_children if n.type == "modifiers"), None)
    listed = modifiers.named_children if modifiers else []
    attributes = tuple(n for n in listed if n.type == "attribute")
    static = any(text(n) in ("static", "class") for n in listed)
    found: list[dict[str, Any]] = []
    for index, part in enumerate(declaration.children):
        field = declaration.field_name_for_child(index)
        if field == "name":
            found.append({"name": text(part).strip("`")})
        elif part.type == "type_annotation":
            for each in reversed(found):  # `let a, b: Int`: of both
                if each.keys() & {"type", "value"}:
                    break
                each["type"] = part
        elif found and field == "value":
            found[-1]["value"] = part
        elif found and field == "computed_value":
            found[-1]["computed"] = part
    return [Name(kind=kind, node=declaration, attributes=attributes, static=static, **each) for each in found]


def parameters(function: Node) -> list[Name]:
    """Of a function or initializer."""
    listed = [n for n in function.named_children if n.type == "parameter"]
    return [Name(text(child(n, "name")), "parameter", n, n.children_by_field_name("name")[-1]) for n in listed]


def bound(statement: Node) -> list[Name]:
    """The names of `if let a = b` and `guard let a = b`."""
    found, conditions = [], statement.children
    for index, part in enumerate(conditions):
        if statement.field_name_for_child(index) == "bound_identifier":
            given = index + 2 < len(conditions) and text(conditions[index + 1]) == "="
            found.append(Name(text(part), "local", statement, value=conditions[index + 2] if given else None))
    return found


def result_of(body: Node) -> Node | None:
    """The one expression of a computed property, function or closure; None if there is more to it."""
    statements = next((n for n in body.named_children if n.type == "statements"), None)
    inner = [n for n in statements.named_children if n.type != "comment"] if statements else []
    if len(inner) == 2 and text(inner[0]) == "return":  # `return` at a line's end
        inner = inner[1:]
    if len(inner) != 1:
        return None
    return inner[0].child_by_field_name("result") if inner[0].type == "control_transfer_statement" else inner[0]


def result_type(function: Node) -> Node | None:
    """A function's result type: the grammar calls it `name`, after the arrow."""
    arrow = next((i for i, n in enumerate(function.children) if text(n) == "->"), None)
    return function.children[arrow + 1] if arrow is not None else None


def assigned_name(assignment: Node) -> str | None:
    """`x` of `x = …`, `self.x = …`, `_x.wrappedValue = …` and `self._x.wrappedValue = …`."""
    said = text(child(assignment, "target")).removeprefix("self.")
    if said.startswith("_") and said.endswith(".wrappedValue"):
        return said[1:].removesuffix(".wrappedValue")
    return said if "." not in said and "[" not in said else None


def outwards(node: Node) -> Iterator[Node]:
    """What a node is in, the innermost first."""
    outer = node.parent
    while outer is not None:
        yield outer
        outer = outer.parent
