"""The settings of a checkpoint's small JSON files: every value that is used is checked once, by settings.json.

A value that its row does not allow is a finding that names the file and the key, and is left out of the settings; so is
`null`, which is the same as no value, but no finding.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

from fastvlm.common.documents import Unreadable, load, shown
from fastvlm.common.findings import Finding, Steps


def read_settings(path: Path) -> Steps[dict[str, Any]]:
    """The valid settings of a file that has a table in settings.json; yields a finding about each other one.

    A file that is not there has none.
    """
    if not path.is_file():
        return {}
    try:
        document = load(path)
    except Unreadable as error:
        yield error.finding(path.name)
        return {}
    return (yield from checked(document, path.name))


def checked(document: Any, file: str, table: str | None = None) -> Steps[dict[str, Any]]:
    """The settings of a document that `table` (default: `file`'s) knows and allows; yields a finding about each other
    one."""
    return (yield from _object(document, {"table": table or file}, file))


@functools.cache
def _tables() -> dict[str, Any]:
    """settings.json: by file or part, its keys' rows. A `closed` one allows no others, an
    `open` one any others unchecked, `with` adds another's keys, and
    a row that is a `table` is an object with that one's."""
    tables: dict[str, Any] = json.loads(Path(__file__).with_name("settings.json").read_text(encoding="utf-8"))
    for table in tables.values():
        table["keys"] |= tables[table["with"]]["keys"] if "with" in table else {}
    return tables


def _object(document: Any, row: dict[str, Any], where: str) -> Steps[dict[str, Any]]:
    rule = _tables()[row["table"]] if "table" in row else row
    if not isinstance(document, dict):
        yield Finding("setting-invalid", where, shown(document), "a JSON object")
        return {}
    keys = rule["keys"]
    if rule.get("closed") and (unknown := sorted(set(document) - set(keys))):
        yield Finding("setting-unknown", where, shown(unknown), f"only {', '.join(sorted(keys))}")
    settings = dict(document) if rule.get("open") else {}
    for key, row in keys.items():
        value, place = document.get(key), f"{where}.{key}" if ": " in where else f"{where}: {key}"
        if value is None:
            continue
        if "table" in row or ("keys" in row and (isinstance(value, dict) or "or" not in row)):
            settings[key] = yield from _object(value, row, place)
        elif _allows(row, value):
            settings[key] = value
        else:
            yield Finding("setting-invalid", place, shown(value), _words(row))
    return settings


def _allows(row: dict[str, Any], value: Any) -> bool:
    if "or" in row and _allows(row["or"], value):
        return True
    kind = row.get("is")
    if kind in (None, "anything"):
        return kind is not None
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "text":
        return isinstance(value, str) and value in row.get("of", [value])
    if kind == "list":
        length = row.get("length", len(value) if isinstance(value, list) else 0)
        return isinstance(value, list) and len(value) == length and all(_allows(row["of"], item) for item in value)
    if kind == "integer":
        return type(value) is int and bool(row["from"] <= value <= row["to"])
    return type(value) in (int, float) and math.isfinite(value) and bool(row["from"] <= value <= row["to"])


def _words(row: dict[str, Any]) -> str:
    kind = row.get("is", "object")
    if kind in ("integer", "number"):
        words = f"a {'whole number' if kind == 'integer' else 'number'} from {row['from']:,} to {row['to']:,}"
    elif kind == "list":
        words = f"a list of {row.get('length', '')} values, each {_words(row['of'])}".replace("of  values", "of values")
    elif kind == "text" and "of" in row:
        words = "one of " + ", ".join(row["of"])
    else:
        words = {"flag": "true or false", "text": "text", "object": "a JSON object", "anything": "anything"}[kind]
    return words + (f", or {_words(row['or'])}" if "or" in row else "")
