"""Copies of an artefact to break: hard links, so that only what is changed takes room; whatever is written is new."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from app_bridge.app.facts import AppFacts, table
from app_bridge.validation.validate import validate
from fastvlm.checkpoint.checkpoint import open_checkpoint
from model_export import artefact as exported
from model_export.encoder.package import SPECIFICATION, read_specification
from model_export.language.llm import export_llm
from quantization.recipe import load_recipe

Change = Callable[[Any], object]


def linked(source: Path, target: Path) -> Path:
    """A copy that shares its files' bytes with the source: replace them, never write into them."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def replace(path: Path, content: bytes) -> None:
    """New bytes in a new file of the name."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def in_json(name: str, change: Change) -> Callable[[Path], None]:
    """Change a JSON file's document."""

    def broken(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        replace(folder / name, json.dumps(document, indent=2).encode())

    return broken


def without(name: str, key: str) -> Callable[[Path], None]:
    """Take a key out of a JSON file."""
    return in_json(name, lambda document: document.pop(key))


def in_text(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change a file's bytes."""
    return lambda folder: replace(folder / name, change((folder / name).read_bytes()))


def gone(name: str) -> Callable[[Path], None]:
    """Remove a file or a folder."""
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def in_tensors(change: Change, name: str = "model.safetensors") -> Callable[[Path], None]:
    """Change a safetensors file's arrays."""

    def broken(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        (folder / name).unlink()
        save_file(tensors, folder / name)

    return broken


def in_package(change: Change) -> Callable[[Path], None]:
    """Change the Core ML specification (a protobuf message)."""

    def broken(folder: Path) -> None:
        package = folder / "fastvithd.mlpackage"
        specification = read_specification(package)
        change(specification)
        replace(package / SPECIFICATION, specification.SerializeToString())

    return broken


def signed(folder: Path, **changes: Any) -> None:
    """A manifest that says of the folder what it now is: the fault is one of the export."""
    document = exported.read_manifest(folder)
    for key in ("files", "manifest_sha256"):
        document.pop(key, None)
    (folder / "export.json").unlink()
    exported.write_manifest(folder, document | changes)


def with_recipe(name: str, artefact: Path, checkpoint: Path, target: Path) -> Path:
    """The artefact with its language model by another recipe, exported from the checkpoint."""
    linked(artefact, target)
    for path in (*target.glob("*.safetensors"), target / "config.json"):
        path.unlink()
    signed(target, llm=export_llm(open_checkpoint(checkpoint), load_recipe(name), target))
    return target


# Parts of faults.
Fault = tuple[str, str, Callable[[Path], object]]  # the one rule, what its finding names, what breaks a copy


def put(name: str, key: str, value: Any) -> Callable[[Path], None]:
    """Set a key of a JSON file."""
    return in_json(name, lambda document: document.__setitem__(key, value))


def several(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """One change after the other."""

    def all_of_them(folder: Path) -> None:
        for change in changes:
            change(folder)

    return all_of_them


def rules(artefact: Path, facts: AppFacts) -> list[tuple[str, str]]:
    """(rule, what the finding names) of every error."""
    found = validate(artefact, facts)
    return [(one.rule, one.where + one.got) for one in found if one.severity == "error"]


def expect_one(found: list[tuple[str, str]], rule: str, names: str) -> None:
    """One error, of this rule, that names the place."""
    assert [found_rule for found_rule, _ in found] == [rule]
    assert names in found[0][1]


def expect_fault(fault: Fault, artefact: Path, folder: Path) -> None:
    """The fault, put into a copy of the artefact, is the one error of the copy."""
    rule, names, break_it = fault
    break_it(linked(artefact, folder))
    expect_one(rules(folder, table()), rule, names)
