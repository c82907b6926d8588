"""A model into an app: kept, brought back, by clone or by copy; refused in one line."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app_bridge.install import clone
from app_bridge.install.place import Place, locked
from app_bridge.validation import validate
from fastvlm.common import staging
from fastvlm.common.findings import Finding
from tests.app_bridge.models import make_artefact, make_foreign, model, previous, snapshot
from tests.helpers import contents

Cli = Callable[..., Any]


# --- the two verbs


@pytest.mark.parametrize("inside", [None, [], [".DS_Store"]])
def test_into_an_app_without_a_model(app: Path, new: Path, inside: list[str] | None, cli: Cli) -> None:
    if inside is not None:
        model(app).mkdir()
    for name in inside or ():
        (model(app) / name).write_text("Finder was here")
    found = cli("bundle", new, "--app", app, "--json").document
    assert found["changed"] and found["replaced"] is None and found["new"]["name"] == "FastVLM 0.5B"
    assert sum(found["bytes"].values()) == sum(len(body) for body in contents(new).values())
    assert contents(model(app)) == contents(new) and not previous(app).exists()
    assert (app / ".fastvlm-bundle" / ".gitignore").read_text() == "*\n"
    assert cli("restore", "--app", app).code == 2  # nothing was replaced


def test_a_foreign_model_is_kept_and_brought_back_to_the_byte(app: Path, new: Path, cli: Cli) -> None:
    old = snapshot(make_foreign(model(app)))
    found = cli("bundle", new, "--app", app, "--json").document
    assert found["new"]["recipe"] == "r1, encoder fp16" and found["kept"] == str(previous(app))
    assert (found["replaced"]["name"], found["replaced"]["recipe"]) == ("FastVLM 1.5B", "int8, no export.json")
    assert contents(model(app)) == contents(new) and snapshot(previous(app)) == old
    placed = snapshot(model(app))
    for now, kept in ((old, placed), (placed, old)):  # what restore replaces is kept in turn
        assert cli("restore", "--app", app).code == 0
        assert snapshot(model(app)) == now and snapshot(previous(app)) == kept
    assert sorted(path.name for path in (app / "FastVLM").iterdir()) == ["FastVLM.swift", "model"]


def test_a_link_is_kept_as_a_link(app: Path, new: Path, tmp_path: Path, cli: Cli) -> None:
    elsewhere = make_foreign(tmp_path / "elsewhere")
    before = snapshot(elsewhere)
    model(app).symlink_to("../../elsewhere")
    assert cli("bundle", new, "--app", app).code == 0
    assert not model(app).is_symlink() and contents(model(app)) == contents(new)
    assert cli("restore", "--app", app).code == 0 and model(app).resolve() == elsewhere
    for seed in (2, 3):  # the second finds the link as the previous model
        assert cli("bundle", make_artefact(tmp_path / f"artefact-{seed}", seed), "--app", app).code == 0
    assert snapshot(elsewhere) == before
    assert [path.resolve() for path in previous(app).parent.glob("kept-*") if path.is_symlink()] == [elsewhere]


@pytest.mark.parametrize(
    "text",
    ["[]", '{"hidden_size": [1], "quantization": {"bits": {}}}', "\x00", '{"hidden_size": NaN}', "[" * 100_000,
     '{"hidden_size": "\\ud800"}', None],
)  # fmt: skip
def test_whatever_was_there_can_be_described(app: Path, new: Path, text: str | None, cli: Cli) -> None:
    """And printed: `capsys` is as strict as a terminal about what is no text. None: folders of these names."""
    model(app).mkdir()
    for name in ("config.json", "export.json"):
        (model(app) / name).mkdir() if text is None else (model(app) / name).write_text(text)
    old = snapshot(model(app))
    for _ in range(2):
        assert cli("bundle", new, "--app", app).code == 0 and cli("restore", "--app", app).code == 0
        assert snapshot(model(app)) == old


def test_the_same_model_again_writes_nothing(app: Path, new: Path, cli: Cli) -> None:
    (new / ".DS_Store").write_bytes(b"Finder")  # goes nowhere: the manifest does not list it
    cli("bundle", new, "--app", app)
    assert not (model(app) / ".DS_Store").exists()
    (model(app) / ".DS_Store").write_bytes(b"Finder was here")
    before, inode = snapshot(model(app)), model(app).stat().st_ino
    assert cli("bundle", new, "--app", app, "--json").document["changed"] is False
    assert snapshot(model(app)) == before and model(app).stat().st_ino == inode and not previous(app).exists()


@pytest.mark.parametrize("change", ["a byte", "README.md", ".gitattributes", ".cache/notes.txt", "a file less"])
def test_a_model_that_the_user_changed_is_replaced_and_never_lost(
    app: Path, new: Path, tmp_path: Path, change: str, cli: Cli
) -> None:
    """Even by a file that `verify` passes over, because a hub adds files of these names to what was published."""
    cli("bundle", new, "--app", app)
    weights = model(app) / "model.safetensors"
    if change == "a byte":
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    elif change == "a file less":
        weights.unlink()
    else:
        (model(app) / change).parent.mkdir(exist_ok=True)
        (model(app) / change).write_text("mine")
    changed = snapshot(model(app))
    assert cli("bundle", new, "--app", app).code == 0
    assert contents(model(app)) == contents(new) and snapshot(previous(app)) == changed
    second, third = make_artefact(tmp_path / "second", 2), make_artefact(tmp_path / "third", 3)
    for artefact in (second, third):
        assert cli("bundle", artefact, "--app", app).code == 0
    assert contents(model(app)) == contents(third) and contents(previous(app)) == contents(second)
    left = [path for path in previous(app).parent.iterdir() if path.is_dir() and path != previous(app)]
    assert [snapshot(path) for path in left] == [changed]  # `new` is gone: an export can make it again


@pytest.mark.parametrize("target", ["--app", "--output-dir"])
def test_a_dry_run_writes_nothing(app: Path, app_artefact: Path, tmp_path: Path, target: str, cli: Cli) -> None:
    make_foreign(model(app))
    before = snapshot(tmp_path)
    where = app if target == "--app" else tmp_path / "own"
    assert "would become" in cli("bundle", app_artefact, target, where, "--dry-run").out
    assert snapshot(tmp_path) == before


def test_errors_refuse_and_warnings_do_not(app: Path, new: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    found = [Finding(f"rule-{index}", "config.json", "1", "2", "mend it", "warning") for index in range(2)]
    monkeypatch.setattr(validate, "validate", lambda artefact, wanted: found)
    answer = cli("bundle", new, "--app", app)
    assert answer.code == 0 and "rule-1" in answer.err
    found.append(Finding("rule-2", "config.json", "1", "2", "mend it"))
    (new / "extra").write_text("so that there would be something to do")
    before = snapshot(app)
    answer = cli("bundle", new, "--app", app)
    assert answer.code == 1 and "1 error, 2 warnings\n" in answer.err
    assert "rule-0" in answer.err and "rule-2" in answer.err
    assert snapshot(app) == before


# --- what stops it


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk full: got"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: Permission denied: x"),
    ],
)
@pytest.mark.parametrize("where", ["copy", "exchange"])
def test_a_failure_is_one_line_and_leaves_the_old_model(
    app: Path, new: Path, failure: BaseException, code: int, message: str, where: str,
    monkeypatch: pytest.MonkeyPatch, cli: Cli,
) -> None:  # fmt: skip
    def fail(*_: object) -> bool:
        raise failure

    old = snapshot(make_foreign(model(app)))
    monkeypatch.setattr(*((clone, "clone_or_copy") if where == "copy" else (staging, "exchange")), fail)
    answer = cli("bundle", new, "--app", app)
    last = answer.err.splitlines()[-1]
    assert answer.code == code
    assert (where == "exchange" and code == 2 and last.startswith("error: ")) or message in last
    assert snapshot(model(app)) == old and not list(previous(app).parent.glob("*staging*"))


@pytest.mark.parametrize("folder", ["FastVLM", ".fastvlm-bundle"])
def test_the_folder_that_is_not_writable_is_named(
    app: Path, new: Path, folder: str, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    (app / ".fastvlm-bundle").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != app / folder)
    assert f"error: {app / folder}: is not writable" in cli("bundle", new, "--app", app).err
    assert not model(app).exists()


@pytest.mark.parametrize("kind", ["a file", "a link", "somebody's folder"])
def test_a_home_of_somebody_else_is_not_touched(app: Path, new: Path, tmp_path: Path, kind: str, cli: Cli) -> None:
    home = app / ".fastvlm-bundle"
    if kind == "a file":
        home.write_text("mine")
    elif kind == "a link":
        home.symlink_to(tmp_path / "new")
    else:
        home.mkdir()
        (home / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert cli("bundle", new, "--app", app).code == 2
    assert snapshot(tmp_path) == before


def test_two_at_once(app: Path, new: Path, cli: Cli) -> None:
    make_foreign(model(app))
    assert cli("bundle", new, "--app", app).code == 0
    before = [snapshot(model(app)), snapshot(previous(app))]
    with locked(Place(app, "FastVLM/model")):
        for verb in (("restore",), ("bundle", new)):
            answer = cli(*verb, "--app", app)
            assert answer.code == 2 and "another bundle or restore is at work" in answer.err
    assert [snapshot(model(app)), snapshot(previous(app))] == before


# --- clone or copy


def test_a_clone_is_reported(app: Path, new: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    def ficlone(made: int, request: int, origin: int) -> None:
        os.write(made, os.pread(origin, 1 << 20, 0))

    monkeypatch.setattr(fcntl, "ioctl", ficlone)
    sizes = cli("bundle", new, "--app", app, "--json").document["bytes"]
    assert sizes["cloned"] > 0 and sizes["copied"] == 0
    assert contents(model(app)) == contents(new)


@pytest.mark.parametrize("cloned", [True, False])
def test_an_artefact_that_changes_meanwhile_is_refused(
    app: Path, new: Path, cloned: bool, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    def change_then_clone(source: Path, target: Path) -> bool:
        if source.name == "model.safetensors":
            source.write_bytes(b"other weights")
        shutil.copyfile(source, target)
        return cloned

    old = snapshot(make_foreign(model(app)))
    monkeypatch.setattr(clone, "clone_or_copy", change_then_clone)
    answer = cli("bundle", new, "--app", app)
    assert answer.code == 2 and "model.safetensors: changed while it was bundled" in answer.err
    assert snapshot(model(app)) == old


# --- a bundle for an app of one's own


def test_a_stand_alone_bundle_replaces_nothing_but_another(
    app: Path, app_artefact: Path, tmp_path: Path, cli: Cli
) -> None:
    own = tmp_path / "own"
    assert cli("bundle", app_artefact, "--output-dir", own).code == 0
    assert contents(own / "model") == contents(app_artefact)
    found = json.loads((own / "bundle.json").read_text())
    assert found["core_ml"]["functions"]["main"] == {
        "input": {"name": "images", "dtype": "float32", "shape": [1, 3, 1024, 1024]},
        "output": {"name": "image_features", "dtype": "float32", "shape": [1, 256, 3072]},
    }
    config = json.loads((app_artefact / "config.json").read_text())
    assert found["prompt"]["image_token_index"] == config["image_token_index"]
    assert found["prompt"]["text"].count("<image>") == 1 and found["prompt"]["image_tokens"] == 256
    assert cli("bundle", app_artefact, "--output-dir", own).code == 2  # without --overwrite
    assert cli("bundle", app_artefact, "--output-dir", own, "--overwrite").code == 0
    for place in (own / "notes.txt", own / "model" / "notes.txt"):
        place.write_text("mine")
        assert cli("bundle", app_artefact, "--output-dir", own, "--overwrite").code == 2 and place.exists()
        place.unlink()
    assert cli("bundle", app_artefact, "--output-dir", app).code == 2  # no bundle of ours


# --- wrong input


@pytest.mark.parametrize(
    "arguments",
    [
        ("bundle", "nothing", "--app", "app"), ("bundle", "new/config.json", "--app", "app"), ("bundle", "new"),
        ("bundle", "new", "--app", "app", "--output-dir", "own"), ("bundle", "new", "--app", "app", "--overwrite"),
        ("bundle", "new", "--app", "nothing"), ("bundle", "new", "--app", "loop"), ("bundle", "loop", "--app", "app"),
        ("bundle", "new", "--output-dir", "new/inside"), ("bundle", "new", "--output-dir", "new"),
        ("bundle", "", "--app", "app"), ("restore", "--app", "app"), ("restore", "--app", "nothing"),
        ("restore", "--app", ""), ("restore", "--app", "new/config.json"), ("restore", "--app", "loop"), ("restore",),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    app: Path, new: Path, tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    answer = cli(*arguments)
    assert (answer.code, answer.err.count("\n")) == (2, 1) and answer.err.startswith("error: ")
    assert not model(app).exists()


@pytest.mark.parametrize("damage", ["../../elsewhere", "/etc", "", "\x00"])
def test_a_damaged_note_of_ours_leads_nowhere(app: Path, new: Path, tmp_path: Path, damage: str, cli: Cli) -> None:
    make_foreign(model(app))
    cli("bundle", new, "--app", app)
    (app / ".fastvlm-bundle" / "model-folder").write_text(damage)
    before = snapshot(tmp_path)
    assert cli("restore", "--app", app).code == 2
    assert snapshot(tmp_path) == before
    assert cli("bundle", new, "--app", app).code == 0 and cli("restore", "--app", app).code == 0  # written anew
