"""The small JSON files: read, and every value that is used checked once for its type and range (settings.json).

A value that its row does not allow is a fault with the names of the file and the key, and then not there for whoever
reads on; so is `null`, which is the same as no value, but no fault.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.common.files import read_text

LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
_SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True)
class Fault:
    """Something that makes the input unusable: one line, and where it applies the whole list of names.

    Names in it come from files: what a terminal would not print as it is, is escaped here.
    """

    line: str
    details: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "line", _printable(self.line))
        object.__setattr__(self, "details", tuple(map(_printable, self.details)))

    def __str__(self) -> str:
        if not self.details:
            return self.line
        shown, rest = ", ".join(self.details[:20]), len(self.details) - 20
        more = f" and {rest} more (`python -m fastvlm doctor` lists all)" if rest > 0 else ""
        return f"{self.line}: {shown}{more}"


def _printable(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git-LFS pointer instead of its content."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_MAGIC)) == LFS_MAGIC
    except OSError:
        return False


def lfs_fault(path: Path) -> Fault:
    """The fault for a pointer file."""
    return Fault(f"Git-LFS pointer: {path.name} is a pointer, not the file; run `git lfs pull` in {path.parent}")


def parse_json(text: str, **hooks: Any) -> Any:
    """`json.loads`, which lets halves of surrogate pairs pass: they are no characters, nothing can print or write them.

    Raises ValueError for them, too, and RecursionError for what is nested too deeply.
    """
    document = json.loads(text, **hooks)
    if "\\ud" in text.lower():
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


def read_json(path: Path, faults: list[Fault]) -> Any:
    """The JSON document in `path`, or None and a fault."""
    if is_lfs_pointer(path):
        faults.append(lfs_fault(path))
        return None
    try:
        return parse_json(read_text(path))
    except OSError as error:
        faults.append(Fault(f"{path.name}: cannot be read: {error.strerror or error}"))
    except (ValueError, RecursionError) as error:
        faults.append(Fault(f"{path.name}: not JSON ({error})"))
    return None


def read_settings(path: Path, faults: list[Fault]) -> dict[str, Any]:
    """The usable settings of a file that has a table in settings.json; {} if it is not there or not an object."""
    document = read_json(path, faults) if path.is_file() else None
    return {} if document is None else checked(document, path.name, faults)


def checked(document: Any, file: str, faults: list[Fault], table: str | None = None) -> dict[str, Any]:
    """The settings of a document that `table` (default: `file`'s) knows and allows, with a fault for each other one."""
    lines: list[str] = []
    found = _object(document, {"table": table or file}, "", lines)
    faults += [Fault(f"{file}: {line}") for line in lines]
    return found


def shown(value: Any) -> str:
    """A value of a JSON file in one short printable piece."""
    text = json.dumps(value)  # ASCII
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


@functools.cache
def _tables() -> dict[str, Any]:
    """settings.json: by file or part, its keys' rows. A `closed` one allows no others, an
    `open` one any others unchecked, `with` adds another's keys, and
    a row that is a `table` is an object with that one's."""
    tables: dict[str, Any] = json.loads(Path(__file__).with_name("settings.json").read_text(encoding="utf-8"))
    for table in tables.values():
        table["keys"] |= tables[table["with"]]["keys"] if "with" in table else {}
    return tables


def _object(document: Any, row: dict[str, Any], where: str, lines: list[str]) -> dict[str, Any]:
    rule = _tables()[row["table"]] if "table" in row else row
    if not isinstance(document, dict):
        lines.append(f"{where[:-1] or 'the document'} is {shown(document)}, expected a JSON object")
        return {}
    keys = rule["keys"]
    unknown = sorted(set(document) - set(keys)) if rule.get("closed") else []
    if unknown:
        lines.append(f"unknown in {where[:-1]}: {shown(unknown)}, expected only {', '.join(sorted(keys))}")
    found = dict(document) if rule.get("open") else {}
    for key, row in keys.items():
        value = document.get(key)
        if value is None:
            continue
        if "table" in row or ("keys" in row and (isinstance(value, dict) or "or" not in row)):
            found[key] = _object(value, row, f"{where}{key}.", lines)
        elif _allows(row, value):
            found[key] = value
        else:
            lines.append(f"{where}{key} is {shown(value)}, expected {_words(row)}")
    return found


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
