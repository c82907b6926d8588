"""Swift sources as syntax trees: the captures of a file's queries, and the fingerprints of declarations."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import tree_sitter
import tree_sitter_swift
from tree_sitter import Node

_LANGUAGE = tree_sitter.Language(tree_sitter_swift.language())
QUERIES = "facts.scm"  # of an app
# Nodes that change nothing of what a declaration does.
_IGNORED = ("comment", "multiline_comment", "visibility_modifier")
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\0": "\0", "\\\\": "\\", '\\"': '"', "\\'": "'"}


@dataclass(frozen=True)
class Member:
    """A declaration in a type: the whole node, and for a property its name's node."""

    node: Node
    name: Node | None = None

    @property
    def annotation(self) -> Node | None:
        """The type of a property, where it is written: `Int` of `let a, b: Int`."""
        following = self.name
        while following is not None and following.type != "type_annotation":
            following = following.next_sibling if text(following) != "=" else None
        return following.child_by_field_name("name") if following else None

    @property
    def computed(self) -> Node | None:
        """The body of a computed property."""
        return self.node.child_by_field_name("computed_value")


class Program:
    """All Swift files of an app.

    Args:
        sources: path relative to the app's folder -> bytes.
        queries: the file with the queries, beside this one.
    """

    def __init__(self, sources: Mapping[str, bytes], queries: str = QUERIES) -> None:
        self._query = _query(queries)
        parser = tree_sitter.Parser(_LANGUAGE)
        self._trees = {path: parser.parse(source) for path, source in sources.items()}
        self._paths = {tree.root_node.id: path for path, tree in self._trees.items()}
        self._nodes: dict[str, list[Node]] = {}
        for tree in self._trees.values():
            for node in walk(tree.root_node):
                self._nodes.setdefault(node.type, []).append(node)

    def captures(self) -> dict[str, list[Node]]:
        """Capture of the queries -> its nodes in all files; a capture that nothing matches has none."""
        names = map(self._query.capture_name, range(self._query.capture_count))
        nodes_of: dict[str, list[Node]] = {name: [] for name in names if not name.startswith("_")}
        for tree in self._trees.values():
            for name, nodes in tree_sitter.QueryCursor(self._query).captures(tree.root_node).items():
                if name in nodes_of:
                    nodes_of[name] += nodes
        return nodes_of

    def path(self, node: Node) -> str:
        """The file that a node is in."""
        while node.parent is not None:
            node = node.parent
        return self._paths[node.id]

    def where(self, node: Node) -> str:
        """A node's place, as in "FastVLM/FastVLM.swift:219"."""
        return f"{self.path(node)}:{node.start_point.row + 1}"

    @cached_property
    def types(self) -> dict[str, list[Node]]:
        """Dotted name of a type -> its declarations and extensions."""
        declarations: dict[str, list[Node]] = {}
        for node in self._nodes.get("class_declaration", ()):
            declarations.setdefault(enclosing_type(node), []).append(node)
        return declarations

    def members(self, type_name: str) -> dict[str, list[Member]]:
        """Name of a property, "init(labels:)" or "function(labels:)" -> its declarations in a type."""
        members: dict[str, list[Member]] = {}
        for declared in self.types.get(type_name, ()):
            body = declared.child_by_field_name("body")
            for node in body.named_children if body else ():
                if node.type in ("init_declaration", "function_declaration"):
                    members.setdefault(_signature(node), []).append(Member(node))
                for pattern in node.children_by_field_name("name") if node.type == "property_declaration" else ():
                    members.setdefault(text(pattern), []).append(Member(node, pattern))
        return members

    def cases(self, type_name: str) -> dict[str, tuple[str, Node | None]]:
        """Case of an enum -> its raw value (a case without one has its name) and the literal's node."""
        cases: dict[str, tuple[str, Node | None]] = {}
        for declared in self.types.get(type_name, ()):
            name = ""
            for entry in (node for node in walk(declared) if node.type == "enum_entry"):
                for index, part in enumerate(entry.children):
                    field = entry.field_name_for_child(index)
                    if field == "name":
                        name = text(part)
                        cases[name] = (name, None)
                    elif field == "raw_value" and part.type == "line_string_literal":
                        cases[name] = (string(part), part)
        return cases

    @cached_property
    def constants(self) -> dict[str, str]:
        """Name of a property -> the expression that is its value, where all of the name have the same."""
        values_of: dict[str, set[str]] = {}
        for node in self._nodes.get("property_declaration", ()):
            for name, value in zip(node.children_by_field_name("name"), node.children_by_field_name("value")):
                values_of.setdefault(text(name), set()).add(text(value))
        return {name: values.pop() for name, values in values_of.items() if len(values) == 1}

    def mentioned(self) -> set[str]:
        """The names that the sources use: of types, members and variables; `A.b` of members; `f(a:b:)` and `await f` of
        calls; `let f(a:b:)` where only a call says what type a constant has, so that Swift chooses the overload."""
        kinds = ("simple_identifier", "type_identifier")
        names = {text(node) for kind in kinds for node in self._nodes.get(kind, ())}
        names |= {".".join(text(node).split(".")[-2:]) for node in self._nodes.get("navigation_expression", ())}
        for call in self._nodes.get("call_expression", ()):
            if (called := _called(call)) is None:
                continue
            names.add(called)
            outer = call.parent
            if outer is not None and outer.type == "await_expression":
                names.add(f"await {called.partition('(')[0]}")
            while outer is not None and outer.type in ("try_expression", "await_expression", "tuple_expression"):
                outer = outer.parent
            typed = outer is None or any(child.type == "type_annotation" for child in outer.children)
            if outer is not None and outer.type == "property_declaration" and not typed:
                names.add(f"let {called}")
        return names


@cache
def _query(name: str) -> tree_sitter.Query:
    """The queries of a file, which take half a second to compile."""
    return tree_sitter.Query(_LANGUAGE, (Path(__file__).parent / name).read_text(encoding="utf-8"))


def walk(node: Node) -> Iterator[Node]:
    """A node and all below it, in the order of the text."""
    left = [node]
    while left:
        node = left.pop()
        yield node
        left.extend(reversed(node.children))


def text(node: Node) -> str:
    """A node's source, with every run of white space as one blank."""
    return " ".join((node.text or b"").decode("utf-8", "replace").split())


def string(node: Node) -> str:
    """A string literal's value, `{role}` and `{content}` standing for interpolations of these.

    Raises:
        ValueError: for other nodes, interpolations and escapes.
    """
    if node.type != "line_string_literal":
        raise ValueError("not a string literal")
    parts = []
    for part in node.named_children:
        raw = (part.text or b"").decode()
        if part.type == "interpolated_expression":
            (name,) = {name for name in ("role", "content") if name in raw}
            parts.append(f"{{{name}}}")
        elif part.type == "str_escaped_char":
            parts.append(chr(int(raw[3:-1], 16)) if raw.startswith("\\u{") else _ESCAPES.get(raw, raw))
        else:
            parts.append(raw)
    return "".join(parts)


def enclosing_type(node: Node | None) -> str:
    """The dotted name of the type that a node is in or declares; "" outside of types."""
    parts: list[str] = []
    while node is not None:
        if node.type == "class_declaration" and (name := node.child_by_field_name("name")) is not None:
            parts.insert(0, text(name))
        node = node.parent
    return ".".join(parts)


def fingerprint(node: Node, masked: Mapping[int, str], names: Mapping[str, str]) -> str:
    """Sixteen hexadecimal digits of a declaration's syntax tree, without comments, white space and access modifiers.

    Args:
        node: the declaration.
        masked: id of a node that is a plain fact -> what stands for it.
        names: identifier that is a plain fact -> what stands for it.
    """

    def tokens(node: Node) -> Iterator[str]:
        if node.type in _IGNORED:
            return
        if (fact := masked.get(node.id)) is not None:
            yield fact
            inner = [child for child in node.children if child.type == "interpolated_expression"]
        elif node.children:
            inner = node.children
            yield f"({node.type}"
        else:
            inner = []
            yield names.get(text(node), (node.text or b"").decode("utf-8", "replace") or f"missing {node.type}")
        for child in inner:
            yield from tokens(child)
        if inner:
            yield ")"

    return hashlib.sha256("\n".join(tokens(node)).encode()).hexdigest()[:16]


def _signature(function: Node) -> str:
    name = function.child_by_field_name("name")
    labels = (
        text(outer)
        for each in function.named_children
        if each.type == "parameter"
        and (outer := each.child_by_field_name("external_name") or each.child_by_field_name("name"))
    )
    return f"{text(name) if name else ''}({''.join(f'{label}:' for label in labels)})"


def _called(call: Node) -> str | None:
    """`set(cacheLimit:)` of `MLX.GPU.set(cacheLimit: 1)`; None of a subscript, which is a call in this grammar."""
    callee, given = call.children[0], call.children[-1]
    arguments = next((child for child in given.named_children if child.type == "value_arguments"), None)
    if arguments is not None and text(arguments).startswith("["):
        return None
    name = text(callee).rpartition(".")[2] if callee.type in ("navigation_expression", "simple_identifier") else ""
    labels = (
        text(label) if (label := each.child_by_field_name("name")) else "_"
        for each in (arguments.named_children if arguments else ())
        if each.type == "value_argument" and each.child_by_field_name("value")
    )
    return f"{name}({''.join(f'{label}:' for label in labels)})" if name else None
