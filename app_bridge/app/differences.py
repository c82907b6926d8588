"""The differences between an app, or Apple's engine, and our table: a line for each value, then each declaration."""

import json
from dataclasses import fields
from typing import Any

from app_bridge.app.engine import EngineFacts
from app_bridge.app.facts import AppFacts


def differences(read: AppFacts | EngineFacts, table: AppFacts | EngineFacts) -> list[str]:
    """One line for each value that differs: where, as read, as in the table; then the declarations that differ."""
    reader = "app" if isinstance(read, AppFacts) else "engine"
    lines = []
    for name in (field.name for field in fields(table) if field.name != "changed"):
        ours, theirs = getattr(read, name), getattr(table, name)
        if name == "api":  # without what both have
            ours, theirs = sorted({*ours} - {*theirs}), sorted({*theirs} - {*ours})
        app, published = _entries(name, ours), _entries(name, theirs)
        for entry in sorted({*app, *published}):
            ours, theirs = app.get(entry), published.get(entry)
            if isinstance(ours, dict) and isinstance(theirs, dict):
                lines += [
                    _line(reader, f"{entry}: {key}", value, theirs[key])
                    for key, value in ours.items()
                    if value != theirs[key]
                ]
            elif ours != theirs:
                lines.append(
                    _line(reader, entry, *("it" if isinstance(side, dict) else side for side in (ours, theirs)))
                )
    return lines + [each.line(reader) for each in read.changed]


def _entries(name: str, value: Any) -> dict[str, Any]:
    """A fact by its name, or each of its parts where it has several."""
    if name == "deployment":
        return {f"{name} {key}": each for key, each in value.items()}
    if name in ("config", "preprocessor", "layers", "metadata", "packages"):
        return {f"{name} {getattr(part, 'path', '') or part.name}": vars(part) for part in value}
    return {name: value}


def _line(reader: str, entry: str, *sides: Any) -> str:
    words = (
        "nothing" if side is None else "it" if side == "it" else json.dumps(side, ensure_ascii=False) for side in sides
    )
    return "{}: the {} has {}, the table {}".format(entry, reader, *words)
