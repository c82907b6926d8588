"""What Xcode makes of files in a framework's folder, and what of it would fail the build or the app."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app_bridge.app.facts import table
from app_bridge.app.resources import check, collisions, group, resource
from app_bridge.validation.validate import validate
from fastvlm.common.findings import errors
from tests.app_bridge import broken
from tests.app_bridge.app.conftest import VIEWER
from tests.app_bridge.models import model
from tests.helpers import contents

Cli = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/config.json", "config.json"),
        ("a/fastvithd.mlpackage/Data/weights.bin", "fastvithd.mlmodelc"),
        ("a/fastvithd.mlmodel", "fastvithd.mlmodelc"),
        ("Assets.xcassets/Icon.imageset/icon.png", "Assets.xcassets"),
        ("a/Some.bundle/fastvithd.mlmodelc/x", "Some.bundle"),
    ],
)
def test_a_resources_name(name: str, expected: str) -> None:
    assert resource(name) == expected


@pytest.mark.parametrize(
    ("names", "where"),
    [
        (["a/README.md", "b/readme.md"], "a/README.md and b/readme.md"),
        (["x.mlpackage/1", "x.mlpackage/2", "old/x.mlpackage/1", "other"], "old/x.mlpackage and x.mlpackage"),
        (["x.mlpackage/1", "x.mlmodel"], "x.mlmodel and x.mlpackage"),
        (["a/config.json", ".cache/config.json", "a/x.bundle/config.json", "b/.y/config.json"], None),
    ],
)
def test_two_of_one_name(names: list[str], where: str | None) -> None:
    assert [finding.where for finding in check(names)] == ([where] if where else [])


@pytest.mark.parametrize("name", ["notes.swift", "x/Kernel.metal", "NOTICE.H", "Icons.xcassets/1.png", "Info.plist"])
def test_what_xcode_builds_is_no_resource(name: str) -> None:
    assert [(one.rule, one.where) for one in check([name, "config.json"])] == [
        ("resource-built", name.partition("/1")[0])
    ]


def test_what_collides_in_the_framework(tmp_path: Path) -> None:
    framework = tmp_path / "FastVLM"
    old = framework / "model-old"
    (old / "fastvithd.mlpackage").mkdir(parents=True)
    (framework / "model").mkdir()
    for name in ("Config.json", "other.safetensors", "harmless.txt", ".hidden.safetensors", "fastvithd.mlpackage/x"):
        (old / name).write_text("")
    (framework / "model" / "config.json").write_text("what is replaced collides with nothing")
    files = ["config.json", "model.safetensors", "fastvithd.mlpackage/Data/model.mlmodel", "Info.plist"]
    assert [(one.rule, one.where) for one in collisions(files, framework / "model", framework)] == [
        ("resource-stray-weights", "FastVLM/model-old/other.safetensors"),
        ("resource-collision", "FastVLM: model-old/Config.json"),
        ("resource-collision", "FastVLM: model-old/fastvithd.mlpackage"),
        ("resource-collision", "FastVLM: the framework's own"),
    ]
    shutil.rmtree(old)
    assert collisions(files[:3], framework / "model", framework) == []


@pytest.mark.parametrize("verb", ["validate", "bundle"])
def test_what_collides_is_refused(app: Path, app_artefact: Path, verb: str, cli: Cli) -> None:
    (app / "FastVLM" / "config.json").write_text("{}")
    answer = cli(verb, app_artefact, "--app", app)
    assert answer.code == 1 and "error: resource-collision: FastVLM: config.json\n" in answer.err + answer.out
    assert not model(app).exists()


def test_a_bundle_of_its_own_collides_only_where_xcode_takes_it_in(app: Path, app_artefact: Path, cli: Cli) -> None:
    """Our own project's folder (viewer/), with a model in it."""
    shutil.copytree(VIEWER / "Viewer.xcodeproj", app / "Viewer.xcodeproj")
    assert group(app / "FastVLM" / "deep" / "own") == app / "FastVLM" and group(app / "out" / "own") is None
    for name in ("FastVLM", "out"):
        (app / name / "model").mkdir(parents=True)
        (app / name / "model" / "config.json").write_text("{}")
    assert cli("bundle", app_artefact, "--output-dir", app / "FastVLM" / "own").code == 1
    assert not (app / "FastVLM" / "own").exists()
    assert cli("bundle", app_artefact, "--output-dir", app / "out" / "own").code == 0


def test_what_a_hubs_client_adds_is_neither_a_fault_nor_bundled(app_artefact: Path, tmp_path: Path, cli: Cli) -> None:
    """`hf download --local-dir` writes notes about each file, in folders of the files' names."""
    folder = broken.linked(app_artefact, tmp_path / "downloaded")
    for name in [*contents(folder), "README.md", ".gitattributes"]:
        notes = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text("a commit, an etag, a time\n")
    (folder / "README.md").write_text("the card")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert errors(validate(folder, table())) == []
    assert not [one for one in validate(folder, table()) if one.rule in ("name-twice", "file-extra")]
    assert cli("bundle", folder, "--output-dir", tmp_path / "own").code == 0
    assert contents(tmp_path / "own" / "model") == contents(app_artefact)
