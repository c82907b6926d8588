"""JSON files, which may come from anybody: read strictly, with one exception for all that can be wrong with them."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from fastvlm.common.files import SMALL, read_small
from fastvlm.common.findings import Finding

LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
_SHOWN = 60  # characters of a wrong value


class Unreadable(ValueError):
    """A file that is not there, can't be read, or is no JSON document; the message is a reason on one line.

    `rule` is "file-missing", "file-unreadable", "git-lfs-pointer", "duplicate-key", "not-json" or
    "not-an-object".
    """

    def __init__(self, rule: str, got: str, expected: str = "JSON in UTF-8", remedy: str = "") -> None:
        super().__init__(" ".join(got.split()))
        self.rule, self.got, self.expected, self.remedy = rule, str(self), expected, remedy

    def finding(self, where: str) -> Finding:
        """The exception as a finding about the file `where`."""
        return Finding(self.rule, where, self.got, self.expected, self.remedy)


def loads(raw: str | bytes) -> Any:
    """The document in `raw`, where `json.loads` is lenient: no key twice, no NaN or infinity, no half of a surrogate
    pair (nothing can print or write it), no nesting beyond Python's stack. Raises Unreadable."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        document = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
        if "\\ud" in text.lower():
            json.dumps(document, ensure_ascii=False).encode()
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable("not-json", "a document nested too deeply") from None
    except ValueError as error:
        raise Unreadable("not-json", f"no JSON ({error})") from None
    return document


def load(path: str | PathLike[str], limit: int = SMALL) -> Any:
    """The document in a file of at most `limit` bytes. Raises Unreadable."""
    try:
        raw = read_small(path, limit)
    except FileNotFoundError:
        raise Unreadable("file-missing", "no such file", "a file") from None
    except OSError as error:
        raise Unreadable("file-unreadable", error.strerror or str(error), "a plain file") from None
    if raw.startswith(LFS_MAGIC):
        raise lfs_pointer(path)
    return loads(raw)


def load_object(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file. Raises Unreadable, also for another kind of document."""
    document = load(path)
    if not isinstance(document, dict):
        raise Unreadable("not-an-object", shown(document), "a JSON object")
    return document


def object_or_empty(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, whatever the reason."""
    try:
        return load_object(path)
    except Unreadable:
        return {}


def dump(path: Path, document: Any) -> None:
    """Write a JSON document that people read, too."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git-LFS pointer instead of its content."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_MAGIC)) == LFS_MAGIC
    except OSError:
        return False


def lfs_pointer(path: str | PathLike[str]) -> Unreadable:
    """The exception for a pointer file."""
    remedy = f"run `git lfs pull` in {Path(path).parent}"
    return Unreadable("git-lfs-pointer", "a Git-LFS pointer", "the file that it stands for", remedy)


def shown(value: Any) -> str:
    """A value of a JSON file in one short printable piece."""
    text = json.dumps(value)  # ASCII
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = ", ".join(sorted({shown(key) for key in keys if keys.count(key) > 1}))
        raise Unreadable("duplicate-key", f"the key {twice} twice", "each key once", "remove one of them")
    return document


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON's")
