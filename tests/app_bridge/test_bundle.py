"""A model into an app: kept, brought back, by clone or by copy; refused in one line."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app_bridge import kept
from app_bridge.app import facts, packages
from app_bridge.install import bundle, clone
from app_bridge.validation import validate
from fastvlm.common import staging
from fastvlm.common.findings import Finding
from tests.app_bridge.models import call, contents, make_artefact, make_foreign, model, previous, snapshot

# --- the two verbs


def test_into_an_app_without_a_model(app: Path, new: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bundle", new, "--app", app, "--json") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["changed"] and said["replaced"] is None and said["new"]["name"] == "FastVLM 0.5B"
    assert sum(said["bytes"].values()) == sum(len(body) for body in contents(new).values())
    assert contents(model(app)) == contents(new)
    assert (app / ".fastvlm-bundle" / ".gitignore").read_text() == "*\n"
    assert call("restore", "--app", app) == 2  # nothing was replaced


@pytest.mark.parametrize("inside", [[], [".DS_Store"]])
def test_an_empty_folder_is_no_model(app: Path, new: Path, inside: list[str]) -> None:
    model(app).mkdir()
    for name in inside:
        (model(app) / name).write_text("Finder was here")
    assert call("bundle", new, "--app", app) == 0
    assert contents(model(app)) == contents(new) and not previous(app).exists()


def test_a_link_is_kept_as_a_link(app: Path, new: Path, tmp_path: Path) -> None:
    elsewhere = make_foreign(tmp_path / "elsewhere")
    model(app).symlink_to("../../elsewhere")
    assert call("bundle", new, "--app", app) == 0
    assert not model(app).is_symlink() and contents(model(app)) == contents(new)
    assert call("restore", "--app", app) == 0
    assert model(app).resolve() == elsewhere and contents(model(app)) == contents(elsewhere)


def test_a_foreign_model_is_kept_and_brought_back_to_the_byte(
    app: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = snapshot(make_foreign(model(app)))
    assert call("bundle", new, "--app", app) == 0
    said = capsys.readouterr().out
    assert "FastVLM 0.5B, r1" in said and "replaced: FastVLM 1.5B, int8, no export.json" in said and "restore" in said
    assert contents(model(app)) == contents(new) and snapshot(previous(app)) == old
    placed = snapshot(model(app))
    assert call("restore", "--app", app) == 0
    assert snapshot(model(app)) == old and snapshot(previous(app)) == placed
    assert call("restore", "--app", app) == 0  # what restore replaced was kept in turn
    assert snapshot(model(app)) == placed and snapshot(previous(app)) == old
    assert sorted(path.name for path in (app / "FastVLM").iterdir()) == ["FastVLM.swift", "model"]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"hidden_size": [1], "quantization": {"bits": {}}}',
        "\x00",
        '{"hidden_size": NaN}',
        "[" * 100_000,
        '{"hidden_size": "\\ud800"}',
    ],
)
def test_whatever_was_there_can_be_described(
    app: Path, new: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And printed: `capsys` is as strict as a terminal about what is no text."""
    model(app).mkdir()
    for name in ("config.json", "export.json"):
        (model(app) / name).write_text(text)
    old = snapshot(model(app))
    for _ in range(2):
        assert call("bundle", new, "--app", app) == 0 and call("restore", "--app", app) == 0
        assert snapshot(model(app)) == old


def test_what_an_app_has_is_told_without_torch(new: Path) -> None:
    """Which takes two seconds: `restore` need not wait for it."""
    code = "import sys; from pathlib import Path; from app_bridge import __main__, bundle;"
    code += f"bundle.describe(Path({str(new)!r})); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_changed_is_said_and_nothing_written(app: Path, new: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("bundle", new, "--app", app)
    (model(app) / ".DS_Store").write_bytes(b"Finder was here")
    before, inode = snapshot(model(app)), model(app).stat().st_ino
    assert call("bundle", new, "--app", app, "--json") == 0
    out = capsys.readouterr().out
    assert "nothing changed" in out and json.loads(out.splitlines()[-1])["changed"] is False
    assert snapshot(model(app)) == before and model(app).stat().st_ino == inode and not previous(app).exists()


@pytest.mark.parametrize("change", ["a byte", "a file more", "a file less"])
def test_a_model_that_the_user_changed_is_replaced_and_kept(app: Path, new: Path, change: str) -> None:
    call("bundle", new, "--app", app)
    weights = model(app) / "model.safetensors"
    if change == "a byte":
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    elif change == "a file more":
        (model(app) / "notes.txt").write_text("mine")
    else:
        weights.unlink()
    changed = snapshot(model(app))
    assert call("bundle", new, "--app", app) == 0
    assert contents(model(app)) == contents(new) and snapshot(previous(app)) == changed


def test_an_older_model_goes_only_if_an_export_can_make_it_again(app: Path, new: Path, tmp_path: Path) -> None:
    apples = snapshot(make_foreign(model(app)))
    second, third = make_artefact(tmp_path / "second", 2), make_artefact(tmp_path / "third", 3)
    for artefact in (new, second, third):
        assert call("bundle", artefact, "--app", app) == 0
    assert contents(model(app)) == contents(third) and contents(previous(app)) == contents(second)
    left = [path for path in previous(app).parent.iterdir() if path.is_dir() and path != previous(app)]
    assert [snapshot(path) for path in left] == [apples]  # `new` is gone, Apple's download is not


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".cache/notes.txt"])
def test_a_file_of_the_users_in_an_older_model_is_not_lost(app: Path, new: Path, tmp_path: Path, name: str) -> None:
    """Even one that `verify` passes over, because a hub adds files of these names to what was published."""
    call("bundle", new, "--app", app)
    (model(app) / name).parent.mkdir(exist_ok=True)
    (model(app) / name).write_text("mine")
    for seed in (2, 3):
        assert call("bundle", make_artefact(tmp_path / f"artefact-{seed}", seed), "--app", app) == 0
    (left,) = previous(app).parent.glob("kept-*")
    assert (left / name).read_text() == "mine"


def test_a_dry_run_writes_nothing(app: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_foreign(model(app))
    before = snapshot(tmp_path)
    assert call("bundle", new, "--app", app, "--dry-run") == 0
    assert "would become" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_errors_refuse_and_warnings_do_not(
    app: Path, new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding(f"rule-{index}", "config.json", "1", "2", "mend it", "warning") for index in range(2)]
    monkeypatch.setattr(validate, "validate", lambda artefact, wanted: found)
    assert call("bundle", new, "--app", app) == 0
    assert "warning: rule-1: config.json\n    got 1, expected 2\n    mend it\n" in capsys.readouterr().err
    found.append(Finding("rule-2", "config.json", "1", "2", "mend it"))
    (new / "extra").write_text("so that there would be something to do")
    before = snapshot(app)
    assert call("bundle", new, "--app", app) == 1
    err = capsys.readouterr().err
    assert "warning: rule-0" in err and "error: rule-2" in err and "1 error, 2 warnings\n" in err
    assert snapshot(app) == before


def test_only_what_the_manifest_lists_goes_in(app: Path, new: Path) -> None:
    (new / ".DS_Store").write_bytes(b"Finder")
    assert call("bundle", new, "--app", app) == 0
    assert not (model(app) / ".DS_Store").exists()


# --- stopped


def test_interrupted_is_said_and_leaves_nothing_staged(
    app: Path, new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(clone, "place", stop)
    assert call("bundle", new, "--app", app) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not list(previous(app).parent.glob("*next*")) and not model(app).exists()


def test_a_full_disk_is_one_line(
    app: Path, new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(clone, "place", fill)
    assert call("bundle", new, "--app", app) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {app}") and "disk full" in last and "expected" in last
    assert not list(previous(app).parent.glob("*next*"))


@pytest.mark.parametrize("where", ["artefact", "app"])
def test_no_permission_is_one_line(
    app: Path, new: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write everywhere, so the refusal is the system's own, put in its place."""

    def refuse(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    old = snapshot(make_foreign(model(app)))
    if where == "artefact":
        monkeypatch.setattr(shutil, "copyfile", refuse)
    else:
        monkeypatch.setattr(staging, "exchange", refuse)
    assert call("bundle", new, "--app", app) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: Permission denied: ")
    assert snapshot(model(app)) == old


@pytest.mark.parametrize("folder", ["FastVLM", ".fastvlm-bundle"])
def test_the_folder_that_is_not_writable_is_named(
    app: Path, new: Path, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (app / ".fastvlm-bundle").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != app / folder)
    assert call("bundle", new, "--app", app) == 2
    assert f"error: {app / folder}: is not writable" in capsys.readouterr().err
    assert not model(app).exists()


def test_no_such_app_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("restore", "--app", tmp_path / "none") == 2
    assert f"error: {tmp_path / 'none'}: no such folder" in capsys.readouterr().err


def test_two_at_once(app: Path, new: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_foreign(model(app))
    assert call("bundle", new, "--app", app) == 0
    before = [snapshot(model(app)), snapshot(previous(app))]
    with kept.opened(kept.Place(app, "FastVLM/model")):
        for verb in (("restore",), ("bundle", new)):
            assert call(*verb, "--app", app) == 2
            assert "another bundle or restore is at work" in capsys.readouterr().err
    assert [snapshot(model(app)), snapshot(previous(app))] == before


# --- clone or copy


def test_what_was_cloned_is_said(
    app: Path, new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ficlone(made: int, request: int, origin: int) -> int:
        assert request == 0x40049409  # linux/fs.h, FICLONE
        os.write(made, os.pread(origin, 1 << 20, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ficlone)
    assert call("bundle", new, "--app", app, "--json") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["bytes"]["cloned"] > 0 and said["bytes"]["copied"] == 0
    assert contents(model(app)) == contents(new)


@pytest.mark.parametrize("way", ["clone", "copy"])
def test_an_artefact_that_changes_meanwhile_is_refused(
    app: Path, new: Path, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change_then_clone(source: Path, target: Path) -> bool:
        if source.name == "model.safetensors":
            source.write_bytes(b"other weights")
        shutil.copyfile(source, target)
        return way == "clone"

    old = snapshot(make_foreign(model(app)))
    monkeypatch.setattr(clone, "place", change_then_clone)
    assert call("bundle", new, "--app", app) == 2
    assert "model.safetensors: changed while it was bundled" in capsys.readouterr().err
    assert snapshot(model(app)) == old


# --- a bundle of its own


def test_a_stand_alone_bundle(app: Path, app_artefact: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert call("bundle", app_artefact, "--output-dir", own) == 0
    assert contents(own / "model") == contents(app_artefact)
    said = json.loads((own / "bundle.json").read_text())
    assert said["core_ml"]["functions"]["main"] == {
        "input": {"name": "images", "dtype": "float32", "shape": [1, 3, 1024, 1024]},
        "output": {"name": "image_features", "dtype": "float32", "shape": [1, 256, 3072]},
    }
    config = json.loads((app_artefact / "config.json").read_text())
    assert said["prompt"]["image_token_index"] == config["image_token_index"]
    assert said["prompt"]["text"].count("<image>") == 1 and said["prompt"]["image_tokens"] == 256


def test_an_app_of_ones_own_may_have_the_newest_packages() -> None:
    """`validate` refuses weights that a loader can't read; the published app's is the oldest."""
    assert packages.loader(facts.table()).modes == ("affine",)
    assert "mxfp4" in packages.loader(bundle._own_app()).modes


def test_a_stand_alone_bundle_replaces_nothing_but_another(
    app: Path, app_artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    assert call("bundle", app_artefact, "--output-dir", own) == 0
    assert call("bundle", app_artefact, "--output-dir", own) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call("bundle", app_artefact, "--output-dir", own, "--overwrite") == 0
    (own / "notes.txt").write_text("mine")
    assert call("bundle", app_artefact, "--output-dir", own, "--overwrite") == 2
    assert (own / "notes.txt").exists()
    (own / "notes.txt").rename(own / "model" / "notes.txt")
    assert call("bundle", app_artefact, "--output-dir", own, "--overwrite") == 2
    assert (own / "model" / "notes.txt").exists()
    assert call("bundle", app_artefact, "--output-dir", tmp_path / "app") == 2  # no bundle of ours


# --- wrong input


@pytest.mark.parametrize(
    "arguments",
    [
        ("bundle", "nothing", "--app", "app"),
        ("bundle", "new/config.json", "--app", "app"),
        ("bundle", "new"),
        ("bundle", "new", "--app", "app", "--output-dir", "own"),
        ("bundle", "new", "--app", "app", "--overwrite"),
        ("bundle", "new", "--app", "nothing"),
        ("bundle", "new", "--app", "loop"),
        ("bundle", "loop", "--app", "app"),
        ("bundle", "new", "--output-dir", "new/inside"),
        ("bundle", "new", "--output-dir", "new"),
        ("restore", "--app", "app"),
        ("restore", "--app", "nothing"),
        ("restore", "--app", ""),
        ("bundle", "", "--app", "app"),
        ("restore", "--app", "new/config.json"),
        ("restore", "--app", "loop"),
        ("restore",),
    ],
)
def test_wrong_input_is_one_line(
    app: Path, new: Path, tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert not model(app).exists()


@pytest.mark.parametrize("damage", ["../../elsewhere", "/etc", "", "\x00"])
def test_a_damaged_note_of_ours_leads_nowhere(app: Path, new: Path, tmp_path: Path, damage: str) -> None:
    make_foreign(model(app))
    call("bundle", new, "--app", app)
    (app / ".fastvlm-bundle" / "model-folder").write_text(damage)
    before = snapshot(tmp_path)
    assert call("restore", "--app", app) == 2
    assert snapshot(tmp_path) == before
    assert call("bundle", new, "--app", app) == 0 and call("restore", "--app", app) == 0  # written anew
