"""The keys that the app's `Codable` structs decode."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tree_sitter import Node

from app_bridge.app.facts import Key
from app_bridge.app.swift import (
    Name,
    arguments,
    assigned_name,
    child,
    kind_of,
    parameters,
    peel,
    result_of,
    string,
    text,
    type_name,
    walk,
    written_type,
)
from app_bridge.app.swift_program import Program

PLAIN = ("Bool", "CGFloat", "Double", "Float", "Int", "String")
_DICTIONARY = "[String: StringOrNumber]"


@dataclass
class Record:
    """A `Codable` struct at a place of the JSON file. fields: property -> where it comes from."""

    declared: Node
    prefix: str = ""
    fields: dict[str, "Field"] = field(default_factory=dict)


@dataclass
class Field:
    """A stored property. path: dotted, in the JSON file. record: what is there, for a struct of the app's own."""

    path: str
    type: str
    optional: bool
    node: Node
    default: object = None
    record: Record | None = None


def record(program: Program, declared: Node, prefix: str = "") -> Record:
    """The struct, with the structs in it. Unclear for a way of decoding that isn't known."""
    found = Record(program.use(declared), prefix)
    stored = [name for name in program.properties(declared) if not (name.static or name.computed)]
    decoder = _decoder(program, declared)
    if decoder is not None:
        _overlaid(program, found, decoder, {name.name: name for name in stored})
        return found
    keys = _coding_keys(program, declared)
    for name in stored:
        constant = name.value is not None and any(text(n) == "let" for n in name.node.children)
        if constant or (keys is not None and name.name not in keys):
            continue  # not decoded
        if name.attributes:
            raise program.unclear(f"decoding {name.name}", name.node, "a property without an attribute")
        key = name.name if keys is None else keys[name.name]
        type_, optional = written_type(name.type)
        if not type_:
            raise program.unclear(f"the type of {name.name}", name.node, "a written type")
        nested = program.type_named(type_, declared)
        entry = Field(prefix + key, type_, optional, name.node, _default(program, declared, name.name))
        if nested is not None and kind_of(nested) == "struct":
            entry.record = record(program, nested, f"{entry.path}.")
        elif type_.strip("[]") not in PLAIN and type_ != _DICTIONARY:
            expected = f"a struct, {', '.join(PLAIN)}, a list of them, or {_DICTIONARY}"
            raise program.unclear(f"the type of {name.name}", name.node, expected)
        found.fields[name.name] = entry
    return found


def keys(found: Record) -> Iterator[Key]:
    """Every key that is decoded, a struct's own only where it may be absent."""
    for entry in found.fields.values():
        if entry.record is None or entry.optional:
            yield Key(entry.path, entry.type, not entry.optional, entry.default)
        if entry.record is not None:
            yield from keys(entry.record)


def _decoder(program: Program, declared: Node) -> Node | None:
    """A hand-written `init(from decoder:)`."""
    for member in program.members(declared):
        if member.type == "init_declaration" and parameters(member):
            label = next(n for n in member.named_children if n.type == "parameter").child_by_field_name("external_name")
            if label is not None and text(label) == "from":
                return member
    return None


def _overlaid(program: Program, found: Record, decoder: Node, stored: dict[str, Name]) -> None:
    """Structs that all read the same level: `self.text = try Text(from: decoder)`."""
    body = child(decoder, "body")
    for statement in (n for n in walk(body) if n.parent and n.parent.type == "statements" and n.type != "comment"):
        value = peel(child(statement, "result")) if statement.type == "assignment" else statement
        target = assigned_name(statement) if statement.type == "assignment" else None
        whole = value.type == "call_expression" and [label for label, _ in arguments(value)] == ["from"]
        nested = program.type_named(text(value.children[0]), decoder) if whole else None
        if nested is None or target not in stored:
            raise program.unclear("decoding", statement, "self.x = try T(from: decoder), T a struct of the app's")
        entry = Field(found.prefix, type_name(nested), False, statement, record=record(program, nested, found.prefix))
        found.fields[str(target)] = entry


def _coding_keys(program: Program, declared: Node) -> dict[str, str] | None:
    """property -> key of the JSON file, of `enum CodingKeys`; None if the struct has none."""
    body = next(
        (n for n in program.members(declared) if n.type == "class_declaration" and type_name(n) == "CodingKeys"), None
    )
    if body is None:
        return None
    found: dict[str, str] = {}
    for entry in (n for n in walk(body) if n.type == "enum_entry"):
        name = ""
        for index, part in enumerate(entry.children):
            if entry.field_name_for_child(index) == "name":
                name = text(part).strip("`")
                found[name] = name
            elif entry.field_name_for_child(index) == "raw_value":
                said = string(part)
                if said is None:
                    raise program.unclear(f"the key of {name}", entry, "a string")
                found[name] = said
    return found


def _default(program: Program, declared: Node, name: str) -> object:
    """`value` of a computed property `name ?? value`."""
    found = [p for p in program.properties(declared) if p.computed is not None]
    chosen = [result_of(p.computed) for p in found if p.computed is not None]
    values = [n for n in chosen if n is not None and n.type == "nil_coalescing_expression"]
    same = [n for n in values if text(peel(child(n, "value"))) in (name, f"self.{name}")]
    return program.constant(child(same[0], "if_nil"), f"the default of {name}") if same else None
