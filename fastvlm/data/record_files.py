"""Files of records, JSON, JSONL and CSV: each record with its place, whatever is in it."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlm.common.documents import LFS_MAGIC, Unreadable, lfs_pointer, loads
from fastvlm.common.errors import UserError
from fastvlm.common.files import read_text

SUFFIXES = (".json", ".jsonl", ".csv")
_LARGEST = 2 << 30  # bytes; LLaVA's own file, of 665,000 questions, has 1 GB


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record with its place ("line 3", "record 3", from 1); one that can't be read as its ValueError."""
    try:
        text = read_text(path, _LARGEST, "utf-8-sig")
    except ValueError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    if text.startswith(LFS_MAGIC.decode()):
        raise UserError(str(lfs_pointer(path).finding(str(path))))
    if path.suffix == ".csv":
        yield from _table(path, text)
    elif path.suffix == ".jsonl":
        # not splitlines(), which parts at U+2028 too, which JSON allows inside a string
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parsed(line)
    else:
        records = _parsed(text)
        if isinstance(records, Unreadable):
            raise UserError(str(records.finding(str(path))))
        if not isinstance(records, list):
            raise UserError(f"{path}: got {kind_of(records)}, expected a list of records")
        for number, record in enumerate(records, 1):
            yield f"record {number}", record


def _table(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file, by column."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if not header:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header):
                    raise UserError(f"{path}: line 1: a column's name twice: {', '.join(header)}")
            elif row and len(row) != len(header):
                yield f"line {line}", ValueError(f"{len(row)} columns, expected {len(header)}, as line 1 has")
            elif row:
                yield f"line {line}", dict(zip(header, row))
            line = reader.line_num + 1
    except csv.Error as error:  # nothing behind it can be told apart
        yield f"line {line}", ValueError(f"no CSV ({error})")


def _parsed(text: str) -> Any:
    try:
        return loads(text)
    except Unreadable as error:
        return error


def kind_of(value: Any) -> str:
    """What a value of a record is, in words."""
    names = {dict: "an object", list: "a list", str: "text" if value else "no text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")
