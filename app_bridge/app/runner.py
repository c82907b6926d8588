"""The facts of Apple's engine of a bundle, read from a checkout of coreai-models, as sources.py reads an app's."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tree_sitter import Node

from app_bridge.app.engine import EngineFacts, engine
from app_bridge.app.facts import Key
from app_bridge.app.project import read_text
from app_bridge.app.sources import Reading
from app_bridge.app.swift import Program, text, walk
from fastvlm.common.errors import UserError

PUBLISHED = Path(__file__).parent / "published_engine.json"
QUERIES = "engine.scm"
SOURCES = ("swift/Sources/CoreAIShared", "swift/Sources/CoreAILanguageModels")
_DEFINING = ("stop_token", "states")  # a checkout without either has no engine


@cache
def published() -> dict[str, Any]:
    """The published engine's declarations, in published.json's form."""
    document: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return document


def read(checkout: Path) -> EngineFacts:
    """Read the facts of the engine in a checkout; `changed` has every declaration that differs from the published one.

    Raises:
        UserError: the folder has no such engine, or a source that can't be read.
    """
    root = checkout.expanduser()
    paths = sorted(path for folder in SOURCES for path in (root / folder).rglob("*.swift"))
    names = [path.relative_to(root).as_posix() for path in paths]
    reading = EngineReading(Program({name: read_text(root, name).encode() for name in names}, QUERIES), published())
    if not any(reading.captures[name] for name in _DEFINING):
        raise UserError(f"--runner {checkout}: no engine in {' and '.join(SOURCES)}: expected apple/coreai-models")
    values = reading.facts()
    return replace(engine(), **values, changed=tuple(reading.compare()))


class EngineReading(Reading):
    """The engine's sources beside the published declarations."""

    def __init__(self, program: Program, published: Mapping[str, Any]) -> None:
        super().__init__(program, published, engine())

    def facts(self) -> dict[str, Any]:
        """Field of EngineFacts -> value."""
        values = {name: self._plain(name, getattr(self.table, name)) for name in self.captures}
        cases = self.program.cases(self.published["strategies"])
        strategies = tuple(sorted(value for value, _ in cases.values())) or self.table.strategies
        return values | {"metadata": self._keys("metadata", {}), "strategies": strategies}

    def _decoded(self, type_name: str, member: str, annotation: str, known: Key) -> tuple[str, bool, Any]:
        """As the type's own `init(from:)` decodes it, where there is one; else by the annotation."""
        made = self.program.members(type_name).get("init(from:)")
        if not made:
            return super()._decoded(type_name, member, annotation, known)
        for call in (node for node in walk(made[0].node) if node.type == "call_expression"):
            arguments = [node for node in call.children[-1].named_children if node.type == "value_arguments"]
            given = [
                text(node.child_by_field_name("value") or node) for node in (arguments or [call])[0].named_children
            ]
            decoder = text(call.children[0]).rpartition(".")[2]
            if given[1:] != [f".{member}"] or decoder not in ("decode", "decodeIfPresent"):
                continue
            whole, otherwise = _whole(call)
            self._masked[whole.id] = "metadata"
            default = None if otherwise is None else self._constant(otherwise, known)
            return given[0].removesuffix(".self"), decoder == "decode", default
        return super()._decoded(type_name, member, annotation, known)

    def _constant(self, node: Node, known: Key) -> Any:
        """A default's value: a literal, a case of an enum with a raw value, or a constant of the type; what isn't one
        is a difference."""
        written = text(node)
        cases = self.program.cases(self.published["strategies"])
        if written.startswith(".") and written[1:] in cases:
            return cases[written[1:]][0]
        written = self.program.constants.get(written.removeprefix("Self."), written)
        try:
            return json.loads(written.replace("_", ""))
        except ValueError:
            self._differs(node, known.path, ["metadata"])
            return known.default


def _whole(call: Node) -> tuple[Node, Node | None]:
    """The expression around a call with `try` and `??`, and what follows the latter."""
    whole, otherwise = call, None
    while (outer := whole.parent) is not None and outer.type in ("try_expression", "nil_coalescing_expression"):
        otherwise = outer.child_by_field_name("if_nil") or otherwise
        whole = outer
    return whole, otherwise
