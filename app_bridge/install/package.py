"""A Core AI bundle as a resource of a Swift package, and the code that loads it (templates/load.swift)."""

import json
from pathlib import Path

from app_bridge.app.engine import TABLE
from fastvlm.common.errors import UserError
from model_export.coreai import contract

_SUFFIXES = (contract.SUFFIX, f"{contract.SUFFIX}c")
_MANIFEST, _SOURCES = "Package.swift", ("Sources", "Source", "src", "srcs")  # where Swift's package manager looks


def check_name(target: Path) -> None:
    """Raise UserError for a folder that the engine would take for a single asset."""
    if target.suffix in _SUFFIXES:
        raise UserError(f"--output-dir {target}: the engine takes {target.suffix} for one asset: choose another name")


def snippet(target: Path) -> str:
    """The lines of Package.swift and the code for a bundle in `target`, a folder of a package's target or any other."""
    name, path = _place(target)
    commit = json.loads(TABLE.read_text(encoding="utf-8"))["source"]["commit"]
    text = (Path(__file__).parent / "templates" / "load.swift").read_text(encoding="utf-8")
    for word, value in (("REVISION", commit), ("TARGET", name), ("PATH", path), ("FOLDER", target.name)):
        text = text.replace(word, value)
    return text


def _place(target: Path) -> tuple[str, str]:
    """The package's target that the folder is in and the folder's path in it; its name alone where there is none."""
    for package in target.parents:
        parts = target.relative_to(package).parts
        if (package / _MANIFEST).is_file() and len(parts) > 2 and parts[0] in _SOURCES:
            return parts[1], "/".join(parts[2:])
    return "App", target.name
