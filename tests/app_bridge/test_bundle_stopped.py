"""A model into an app and back, stopped at each step that writes: the app has the old model or the new one, whole."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm.common import staging
from tests.app_bridge.models import Snapshot, call, contents, make_artefact, make_foreign, model, previous, snapshot

Stopper = Callable[..., bool]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: thousands of small files are made and removed here."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


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
    for step in range(1, 200, 1 if how == "kill" else 3):
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
