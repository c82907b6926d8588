"""The artefact under examination, and what its checks share.

A check is a generator: it yields what is wrong and returns what later checks need of the file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app_bridge.app.facts import AppFacts
from app_bridge.rules import AGAIN
from fastvlm.common import documents
from fastvlm.common.findings import Finding, Steps


@dataclass
class Subject:
    """An artefact under examination.

    Args:
        folder: the artefact.
        facts: what the app expects.
        changed: files that differ from the manifest.
        weights: the files that the manifest says the weights are in.
        bundled: the files that go into an app.
        checked: what was compared, or left out and why, a line each.
    """

    folder: Path
    facts: AppFacts
    changed: frozenset[str]
    weights: frozenset[str] = frozenset()
    bundled: tuple[str, ...] = ()
    checked: list[str] = field(default_factory=list)

    def read_json(self, name: str) -> Steps[dict[str, Any] | None]:
        """Return the file's JSON object as a strict reader takes it; None after a finding."""
        try:
            return documents.load_object(self.folder / name)
        except documents.Unreadable as error:
            yield Finding(error.rule, name, error.got, error.expected, error.remedy or AGAIN)
            return None


@dataclass(frozen=True)
class Encoder:
    """The Core ML package's interface, as far as it is sound: pixels a side, image tokens, channels."""

    side: int | None = None
    tokens: int | None = None
    channels: int | None = None


def kind_of(value: Any) -> str:
    """A JSON value in a few words."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return documents.shown(value)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of the names and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
