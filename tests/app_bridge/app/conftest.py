"""Our own app (viewer/), which asks for the same things as the demo app, and stands for the published one."""

import json
from pathlib import Path
from typing import Any

import pytest

from app_bridge.app import sources
from app_bridge.app.swift import Program

VIEWER = Path(__file__).parent / "viewer"


def fingerprinted(app: Path) -> dict[str, Any]:
    """published.json for an app whose types are those of viewer.json."""
    published: dict[str, Any] = json.loads((VIEWER.parent / "viewer.json").read_text())
    swift = {str(path.relative_to(app)): path.read_bytes() for path in sorted(app.rglob("*.swift"))}
    reading = sources.Reading(Program(swift), published)
    reading.facts()
    for name, members in reading.fingerprints().items():
        published["types"][name]["members"] = members
    return published


@pytest.fixture(autouse=True)
def viewer_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    published = fingerprinted(VIEWER)
    monkeypatch.setattr(sources, "published", lambda: published)
