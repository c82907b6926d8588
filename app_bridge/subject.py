"""What the checks of an artefact share: where it is, the app's facts, and the list that their findings go into."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app_bridge.app.facts import AppFacts
from app_bridge.findings import Finding
from fastvlm.common.files import read_small

if TYPE_CHECKING:  # two seconds
    from torch import Tensor

AGAIN = "export again"
NUMBERS = "numbers: one NaN makes every answer nonsense"


@dataclass
class Subject:
    """An artefact under examination.

    changed: names of files that differ from the manifest. weights: the files that it says the weights are in. bundled:
    the files that go into an app. checked: what was compared, or left out and why, a line each.
    """

    folder: Path
    facts: AppFacts
    changed: frozenset[str]
    weights: frozenset[str] = frozenset()
    bundled: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)

    def error(self, rule: str, where: str, got: str, expected: str, remedy: str = AGAIN) -> None:
        """Something that keeps the app from working."""
        self.findings.append(Finding(rule, where, got, expected, remedy))

    def warning(self, rule: str, where: str, got: str, expected: str, remedy: str = AGAIN) -> None:
        """Something that may keep it from working, or from working as well as it could."""
        self.findings.append(Finding(rule, where, got, expected, remedy, "warning"))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The file's JSON object as a strict reader takes it; None after a finding."""
        path = self.folder / name
        try:
            raw = read_small(path)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError) and not path.is_symlink()
            rule, got = (
                ("file-missing", "no such file") if missing else ("file-unreadable", error.strerror or str(error))
            )
            self.error(rule, name, got, "a file that the app reads")
            return None
        try:
            document = json.loads(raw, object_pairs_hook=_once, parse_constant=_refuse)
            json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except _RepeatedError as error:
            expected = "each key once: which of the values the app would take is undefined"
            self.error("duplicate-key", name, str(error), expected, "remove one of them")
            return None
        except (ValueError, RecursionError) as error:
            self.error("not-json", name, " ".join(str(error).split()), "JSON in UTF-8")
            return None
        if not isinstance(document, dict):
            self.error("not-json", name, kind_of(document), "a JSON object")
            return None
        return document


@dataclass(frozen=True)
class Encoder:
    """What the Core ML package's interface is, as far as it is sound: pixels a side, image tokens, channels."""

    side: int | None = None
    tokens: int | None = None
    channels: int | None = None


class _RepeatedError(ValueError):
    """A key given twice in one object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedError(f"{', '.join(sorted({repr(key) for key in keys if keys.count(key) > 1}))} given twice")
    return document


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def is_finite(tensor: "Tensor") -> bool:
    """Whether all values are; `aminmax` reads 4 GB/s, not-a-number spreads into both ends."""
    if tensor.itemsize == 1:  # aminmax has no float8
        tensor = tensor.float()
    return not tensor.numel() or all(math.isfinite(edge) for edge in tensor.aminmax())


def kind_of(value: Any) -> str:
    """A JSON value in a few words."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return shortened(json.dumps(value, ensure_ascii=False))


def shortened(text: str, most: int = 80) -> str:
    """The text, or its beginning."""
    return text if len(text) <= most else text[: most - 1] + "…"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of the names and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
