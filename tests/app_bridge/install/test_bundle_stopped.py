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

pytestmark = pytest.mark.slow

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
    command = [sys.executable, "-m", "tests.app_bridge.install.stopper"]
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
    ("how", "before", "two_steps"),
    [
        *(("kill", before, False) for before in ("nothing", "foreign", "ours")),
        *(("kill", before, True) for before in ("foreign", "ours")),
        ("interrupt", "ours", False),
        ("full disk", "foreign", True),
    ],
)
def test_bundle_stopped_anywhere(
    scenes: dict[str, Path], app: Path, new: Path, stopped: Stopper, how: str, before: str, two_steps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ends = set()
    if two_steps:
        monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    for step in range(1, 200):
        shutil.rmtree(app)
        shutil.copytree(scenes[before], app)
        old, other = snapshot(model(app)), snapshot(previous(app))
        if not stopped("bundle", new, "--app", app, step=step, how=how, two_steps=two_steps):
            break
        if two_steps and not model(app).exists():
            ends.add("missing")  # no file system without an exchange can do better; the next run mends it
        else:
            ends.add(is_whole(app, old, new))
        if step % 2 and before != "nothing":  # `restore` meets two whole models, or has none to bring back
            code, now = call("restore", "--app", app), [snapshot(model(app)), snapshot(previous(app))]
            assert old in now and code == (2 if now == [old, None] else 0)
            rest = next(folder for folder in (previous(app), model(app)) if snapshot(folder) != old)
            assert code == 2 or snapshot(rest) == other or contents(rest) == contents(new)
            continue
        assert call("bundle", new, "--app", app) == 0 and contents(model(app)) == contents(new)
        placed = snapshot(model(app))
        assert call("restore", "--app", app) == (2 if before == "nothing" else 0)
        if before != "nothing":
            assert snapshot(model(app)) == old and snapshot(previous(app)) == placed
        left = {path.name for path in previous(app).parent.iterdir() if not path.name.startswith("kept-")}
        assert left - {"previous"} == {".gitignore", ".made-by-fastvlm", "model-folder"}
    ends.add(is_whole(app, old, new))  # the run that was not stopped
    assert {"old", "new"} <= ends <= {"old", "new", *(["missing"] if two_steps else [])} and 20 < step < 199
    apples = snapshot(scenes["foreign"] / "FastVLM" / "model")
    assert before == "nothing" or apples in map(snapshot, [previous(app), *previous(app).parent.glob("kept-*")])


@pytest.mark.parametrize("two_steps", [False, True])
def test_restore_killed_anywhere(
    scenes: dict[str, Path], app: Path, stopped: Stopper, two_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if two_steps:
        monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    for step in range(1, 50):
        shutil.rmtree(app)
        shutil.copytree(scenes["ours"], app)
        both = [snapshot(model(app)), snapshot(previous(app))]
        if not stopped("restore", "--app", app, step=step, two_steps=two_steps):
            break
        assert two_steps or snapshot(model(app)) in both
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
