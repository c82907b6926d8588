"""Apple's runtime for tests of many broken bundles: each program is loaded once, and the answer can be changed."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app_bridge.app import facts
from model_export.coreai.contract import Function
from model_export.coreai.process import Runtime
from tests.app_bridge import broken

_RUNTIME: list[Runtime] = []
_SEEN: dict[tuple[str, str], tuple[list[str], Function | None]] = {}


def remembering(changes: dict[str, Callable[[Function], Function]] | None = None) -> Callable[[], Any]:
    """A class in the place of `Runtime`; `changes`: role -> what its function becomes."""

    class Remembering:
        def load(self, role: str, asset: Path, function: str = "main") -> tuple[list[str], Function | None]:
            key = (hashlib.sha256((asset / "main.mlirb").read_bytes()).hexdigest(), function)
            if key not in _SEEN:
                _RUNTIME[:] = _RUNTIME or [Runtime()]
                _SEEN[key] = _RUNTIME[0].load(role, asset, function)
            names, found = _SEEN[key]
            return names, (changes or {}).get(role, lambda same: same)(found) if found else None

    return Remembering


def errors(folder: Path) -> list[tuple[str, str]]:
    return broken.rules(folder, facts.table())
