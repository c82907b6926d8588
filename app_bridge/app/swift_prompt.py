"""The prompt that the app builds: how messages become text, and what stands for a picture."""

from typing import Any

from tree_sitter import Node

from app_bridge.app.swift import (
    SIDES,
    argument,
    arguments,
    called,
    child,
    last_name,
    outwards,
    peel,
    pieces,
    string,
    text,
    walk,
)
from app_bridge.app.swift_program import Program


def prompt(program: Program) -> dict[str, Any]:
    """How messages become text."""
    literals = program.nodes("line_string_literal")
    turns = [(node, turn) for node in literals if (turn := _turn(program, node))]
    turns = [(program.use(node), turn) for node, turn in turns]
    node, turn = program.one("the prompt's turn", turns, "a string with the role and the content of a message")
    mapped = next((n for n in outwards(node) if n.type == "call_expression" and called(n) == "map"), None)
    joins = (n for n in program.calls("joined") if n.children[0].type == "navigation_expression")
    joined = next((n for n in joins if program.trace(child(n.children[0], "target")) == mapped), None)
    outer = joined.parent if joined else None
    separator = argument(joined, "separator") if joined else None
    if outer is None or separator is None or outer.type != "additive_expression" or child(outer, "lhs") != joined:
        raise program.unclear("the prompt", node, "messages.map { turn }.joined(separator: …) + end")
    said = [program.words(each, "the prompt") for each in (separator, child(outer, "rhs"))]
    return {
        "turn": turn,
        "turn_separator": said[0],
        "prompt_end": said[1],
        "system_prompt": _system_prompt(program, node),
    }


def _turn(program: Program, node: Node) -> str | None:
    parts = [part if isinstance(part, str) else _part(program, part) for part in pieces(node) or ()]
    found = [part for part in parts if part in ("{role}", "{content}")]
    return "".join(map(str, parts)) if sorted(found) == ["{content}", "{role}"] and None not in parts else None


def _part(program: Program, node: Node) -> str | None:
    """{role} or {content}, of `$0["role"] ?? …`, `message.role`, or a name that stands for it; a constant's text."""
    traced = program.trace(node)
    said = {text(n) for n in walk(traced) if n.type in ("line_str_text", "simple_identifier")}
    found = [name for name in ("role", "content") if name in said]
    return f"{{{found[0]}}}" if len(found) == 1 else string(traced)


def _system_prompt(program: Program, near: Node) -> str:
    """The content of the system's message that the app puts first, of the type that makes the prompt."""
    inside = next((n for n in outwards(near) if n.type == "class_declaration"), near)
    found = []
    for node in (n for n in walk(inside) if n.type == "dictionary_literal"):
        said = {string(k): v for k, v in zip(node.children_by_field_name("key"), node.children_by_field_name("value"))}
        if {"role", "content"} <= {*said} and string(peel(said["role"])) == "system":
            found.append(program.words(said["content"], "the system prompt"))
    return str(program.one("the system prompt", found, '["role": "system", "content": …]'))


def image_tokens(program: Program) -> dict[str, Any]:
    """What stands for a picture in the prompt, and how often: (height / patch) * (width / patch) + additional."""
    calls = [
        c for c in program.calls("Array", "String") if [label for label, _ in arguments(c)] == ["repeating", "count"]
    ]
    made = (n for registered in program.calls("registerProcessorType") for n in walk(registered))
    types = (program.type_named(text(n.children[0]), n) for n in made if n.type == "call_expression")
    processors = {declared.id for declared in types if declared}
    calls = [c for c in calls if any(n.id in processors for n in outwards(c))]
    call = program.one("the image tokens", calls, "Array(repeating: token, count: …) in the processor")
    token, count = (value for _, value in arguments(call))
    patch, additional = _patches(program, count, call)
    _unchanged(program, token, "the image token")
    return {
        "image_token": program.words(token, "the image token"),
        "patch_size": patch,
        "additional_image_tokens": additional,
    }


def _patches(program: Program, count: Node, call: Node) -> tuple[int, int]:
    """(patch size, additional tokens)."""
    additional = _adjusted(program, count, call)
    node = program.trace(count)
    if node.type == "additive_expression" and text(child(node, "op")) == "+":
        additional += _fixed(program, child(node, "rhs"), "the additional image tokens")
        node = program.trace(child(node, "lhs"))
    sides = [program.trace(child(node, side)) for side in SIDES] if node.type == "multiplicative_expression" else []
    if [text(child(n, "op")) if n.type == "multiplicative_expression" else "" for n in sides] == ["/", "/"]:
        patches = {_fixed(program, child(side, "rhs"), "the patch size") for side in sides}
        if len(patches) == 1 and min(patches) > 0:
            return patches.pop(), additional
    raise program.unclear("the image tokens", count, "(height / patch) * (width / patch) + additional")


def _adjusted(program: Program, count: Node, call: Node) -> int:
    """What later statements add: `if config.strategy == .default { count -= 1 }`."""
    function = next((n for n in outwards(call) if n.type == "function_declaration"), call)
    total = 0
    for node in (n for n in walk(function) if n.type == "assignment" and text(child(n, "target")) == text(count)):
        outer = next((n for n in outwards(node) if n.type == "if_statement"), None)
        condition = outer.child_by_field_name("condition") if outer else None
        if (
            condition is None
            or condition.type != "equality_expression"
            or text(child(node, "operator")) not in ("-=", "+=")
        ):
            raise program.unclear("the image tokens", node, "count -= 1, under a comparison with a constant")
        strategy = child(condition, "lhs")
        found = program.member(strategy)
        if found is None:
            raise program.unclear("the image tokens", condition, "a property of the app's")
        _unchanged(program, strategy, "the image tokens")
        said = text(found.value) if found.value else "nil"
        if said.rpartition(".")[2] == text(child(condition, "rhs")).rpartition(".")[2]:
            step = program.integer(child(node, "result"), "the image tokens")
            total += step if text(child(node, "operator")) == "+=" else -step
    return total


def _fixed(program: Program, node: Node, what: str) -> int:
    """A constant, or a property's first value that nothing in the app changes."""
    _unchanged(program, node, what)
    return program.integer(node, what)


def _unchanged(program: Program, node: Node, what: str) -> None:
    """Unclear if a member's first value is replaced: by an assignment, or as its type is constructed."""
    node = peel(node)
    while node.type == "simple_identifier" and (found := program.definition(text(node), node)) and found.value:
        node = peel(found.value)
    if node.type != "navigation_expression":
        return
    name, type_ = last_name(node), program.type_of(child(node, "target")) or ""
    for assigned in program.nodes("assignment"):
        target = next(iter(child(assigned, "target").named_children), None)
        if target and target.type == "navigation_expression" and last_name(target) == name:
            raise program.unclear(what, assigned, "a constant")
    for call in program.calls(type_.rpartition(".")[2]):
        if argument(call, name) is not None:
            raise program.unclear(what, call, "a constant")
