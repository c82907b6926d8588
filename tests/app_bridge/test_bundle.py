"""A model into an app: whole or not at all whenever it is stopped, kept, brought back, by clone or by copy."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app_bridge import bundle, clone, facts, kept, packages, validate
from app_bridge.__main__ import build_parser
from fastvlm import staging
from fastvlm.cli import run
from model_export.artefact import write_manifest

Snapshot = dict[str, tuple[Any, ...]]


def call(*arguments: object) -> int:
    try:
        return run(build_parser, [str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse's way
        return int(str(stopped.code))


def make_artefact(folder: Path, seed: int) -> Path:
    """An artefact in form; what is in its files decides nothing here."""
    for name in ("model.safetensors", "fastvithd.mlpackage/Data/model.mlmodel"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes((seed + 7 * index) % 251 for index in range(3000)))
    (folder / "config.json").write_text(json.dumps({"hidden_size": 896, "num_hidden_layers": 24, "seed": seed}))
    write_manifest(folder, {"config": {"vision_quant": "fp16"}, "llm": {"recipe": {"name": f"r{seed}"}}})
    return folder


def make_foreign(folder: Path) -> Path:
    """A model as a user put it there: Apple's download has no manifest; odd permissions and times."""
    (folder / "fastvithd.mlpackage" / "Data").mkdir(parents=True)
    (folder / "fastvithd.mlpackage" / "Data" / "model.mlmodel").write_bytes(b"apple's program")
    (folder / "model.safetensors").write_bytes(b"apple's weights" * 100)
    (folder / "config.json").write_text('{"hidden_size": 1536, "num_hidden_layers": 28, "quantization": {"bits": 8}}')
    (folder / "model.safetensors").chmod(0o640)
    for name in ("config.json", "fastvithd.mlpackage/Data", "."):
        os.utime(folder / name, ns=(10**18, 10**18 + 12345))
    return folder


def snapshot(folder: Path) -> Snapshot | None:
    """Every file and folder with its permissions, time and bytes; by nothing of the project's."""
    if not folder.exists():
        return None
    found = {}
    for path in (folder, *folder.rglob("*")):
        stat, body = path.lstat(), b"" if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(folder))] = (stat.st_mode, stat.st_mtime_ns, hashlib.sha256(body).hexdigest())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: thousands of small files are made and removed here."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the app has its sources; what they say and what is found in artefacts is other tests' matter."""
    monkeypatch.setattr(bundle, "_facts", lambda app: facts.table())
    monkeypatch.setattr(validate, "validate", lambda artefact, wanted: [])
    folder = tmp_path / "app"
    (folder / "FastVLM").mkdir(parents=True)
    (folder / "FastVLM" / "FastVLM.swift").write_text("// sources")
    return folder


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return make_artefact(tmp_path / "new", 1)


def model(app: Path) -> Path:
    return app / "FastVLM" / "model"


def previous(app: Path) -> Path:
    return app / ".fastvlm-bundle" / "previous"


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
    "text", ["[]", '{"hidden_size": [1], "quantization": {"bits": {}}}', "\x00", '{"hidden_size": NaN}']
)
def test_whatever_was_there_can_be_described(app: Path, new: Path, text: str) -> None:
    model(app).mkdir()
    for name in ("config.json", "export.json"):
        (model(app) / name).write_text(text)
    old = snapshot(model(app))
    for _ in range(2):
        assert call("bundle", new, "--app", app) == 0 and call("restore", "--app", app) == 0
        assert snapshot(model(app)) == old


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


def test_a_dry_run_writes_nothing(app: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_foreign(model(app))
    before = snapshot(tmp_path)
    assert call("bundle", new, "--app", app, "--dry-run") == 0
    assert "would become" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_errors_refuse_and_warnings_do_not(
    app: Path, new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [bundle.Finding(f"rule-{index}", "config.json", "1", "2", "mend it", "warning") for index in range(2)]
    monkeypatch.setattr(validate, "validate", lambda artefact, wanted: found)
    assert call("bundle", new, "--app", app) == 0
    assert "warning: rule-1" in capsys.readouterr().err
    found.append(bundle.Finding("rule-2", "config.json", "1", "2", "mend it"))
    (new / "extra").write_text("so that there would be something to do")
    before = snapshot(app)
    assert call("bundle", new, "--app", app) == 1
    err = capsys.readouterr().err
    assert "warning: rule-0" in err and "error: rule-2" in err and "1 error" in err
    assert snapshot(app) == before


def test_only_what_the_manifest_lists_goes_in(app: Path, new: Path) -> None:
    (new / ".DS_Store").write_bytes(b"Finder")
    assert call("bundle", new, "--app", app) == 0
    assert not (model(app) / ".DS_Store").exists()


def test_names_that_collide_in_the_framework_are_refused(
    app: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = app / "FastVLM" / "model-old"
    (old / "fastvithd.mlpackage").mkdir(parents=True)
    for name in ("Config.json", "other.safetensors", "harmless.txt", ".hidden.safetensors", "fastvithd.mlpackage/x"):
        (old / name).write_text("")
    assert call("bundle", new, "--app", app) == 1
    lines = capsys.readouterr().err.splitlines()
    rules = {line.split(": ")[1]: line for line in lines if line.startswith("error: resource")}
    assert [line.split(": ")[1] for line in lines if line.startswith("error")] == [
        "resource-stray-weights", "resource-collision", "resource-collision",
    ]  # fmt: skip
    assert "other.safetensors" in rules["resource-stray-weights"]
    assert not model(app).exists()


# --- stopped at any moment

Stopper = Callable[..., bool]


@pytest.fixture(scope="module")
def stopped() -> Iterator[Stopper]:
    """`stopped(*arguments, step=, how=, two_steps=False)`: False if the command ended before that step."""
    command = [sys.executable, "-m", "tests.app_bridge.stopper"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        into, out = process.stdin, process.stdout

        def stop(*arguments: object, step: int, how: str = "kill", two_steps: bool = False) -> bool:
            job = {"arguments": [str(argument) for argument in arguments], "step": step, "how": how}
            into.write(json.dumps(job | {"two_steps": two_steps}) + "\n")
            into.flush()
            return {"stopped": True, "ended": False}[out.readline().strip()]

        yield stop
        into.close()


def prepare(app: Path, scene: Path) -> None:
    """The app as it was set up, its model's permissions and times included."""
    shutil.rmtree(app)
    shutil.copytree(scene, app)


def is_whole(app: Path, old: Snapshot | None, new: Path) -> str:
    """Which of the two the app has, "old" or "new"; it has nothing else below its folder. All else fails."""
    assert {path.name for path in (app / "FastVLM").iterdir()} <= {"FastVLM.swift", "model"}
    now = snapshot(model(app))
    if now == old:
        return "old"
    assert now is not None and contents(model(app)) == contents(new)
    return "new"


@pytest.fixture
def scenes(app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Apps with no model, with a foreign one, with one of ours that replaced another.

    Nothing waits for the disk: that is for power cuts, which aren't tested.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    shutil.copytree(app, tmp_path / "nothing")
    make_foreign(model(app))
    shutil.copytree(app, tmp_path / "foreign")
    for seed in (2, 3):
        assert call("bundle", make_artefact(tmp_path / f"artefact-{seed}", seed), "--app", app) == 0
    shutil.copytree(app, tmp_path / "ours")
    return {name: tmp_path / name for name in ("nothing", "foreign", "ours")}


@pytest.mark.parametrize(
    ("how", "before", "exchange"),
    [
        *(("kill", before, "exchange") for before in ("nothing", "foreign", "ours")),
        *(("kill", before, "two steps") for before in ("foreign", "ours")),
        *((how, "ours", "exchange") for how in ("interrupt", "full disk")),
        *((how, "foreign", "two steps") for how in ("interrupt", "full disk")),
    ],
)
def test_bundle_stopped_anywhere(
    scenes: dict[str, Path], app: Path, new: Path, stopped: Stopper, how: str, before: str, exchange: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ends = set()
    if exchange == "two steps":
        monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    for step in range(1, 200):
        prepare(app, scenes[before])
        old, kept_before = snapshot(model(app)), snapshot(previous(app))
        if not stopped("bundle", new, "--app", app, step=step, how=how, two_steps=exchange == "two steps"):
            break
        if exchange == "two steps" and not model(app).exists() and before != "nothing":
            assert call("restore", "--app", app) in (0, 2)  # no file system can do better; the next run mends it
            assert snapshot(model(app)) == (old if kept_before is None else kept_before)
            ends.add("mended")
            continue
        end = is_whole(app, old, new)
        ends.add(end)
        if end == "old" and step % 2 and before == "ours":  # what was kept is not confused with what never got in
            assert call("restore", "--app", app) == 0
            assert snapshot(model(app)) == kept_before and snapshot(previous(app)) == old
            continue
        if end == "old":
            assert call("bundle", new, "--app", app) == 0
        if before == "nothing":
            assert call("restore", "--app", app) == 2
            continue
        placed = snapshot(model(app))
        assert call("restore", "--app", app) == 0
        assert snapshot(model(app)) == old and snapshot(previous(app)) == placed
        left = {path.name for path in previous(app).parent.iterdir() if not path.name.startswith("kept-")}
        assert left == {".gitignore", "model-folder", "previous"}
    ends.add(is_whole(app, old, new))  # the one that was not stopped
    assert {"old", "new"} <= ends and 20 < step < 199


@pytest.mark.parametrize("exchange", ["exchange", "two steps"])
def test_restore_killed_anywhere(
    scenes: dict[str, Path], app: Path, stopped: Stopper, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exchange == "two steps":
        monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    for step in range(1, 50):
        prepare(app, scenes["ours"])
        both = [snapshot(model(app)), snapshot(previous(app))]
        if not stopped("restore", "--app", app, step=step, two_steps=exchange == "two steps"):
            break
        if exchange == "exchange":
            assert snapshot(model(app)) in both
        assert call("restore", "--app", app) == 0
        now = [snapshot(model(app)), snapshot(previous(app))]
        assert now in (both, both[::-1])
    assert 2 < step < 49


def test_a_naive_copy_fails_the_same_check(app: Path, new: Path, stopped: Stopper) -> None:
    """The negative control of the tests above."""
    old = snapshot(make_foreign(model(app)))
    with pytest.raises(AssertionError):
        for step in range(1, 50):
            assert stopped("naive", new, model(app), step=step)
            is_whole(app, old, new)
    assert 1 < step < 49


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
