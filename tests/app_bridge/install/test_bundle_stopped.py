"""A model into an app and back, stopped at each step that writes: the app has the old model or the new one, whole."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app_bridge.__main__ import build_parser
from app_bridge.app import facts, sources
from app_bridge.install import bundle
from app_bridge.validation import validate
from fastvlm.common import staging
from fastvlm.common.cli import run
from tests.app_bridge.models import Snapshot, make_artefact, make_foreign, model, previous, snapshot
from tests.helpers import contents
from tests.killing import stopper

pytestmark = pytest.mark.slow

Stopped = Callable[..., bool]
HERE = "tests.app_bridge.install.test_bundle_stopped"


def verb(words: list[str], two_steps: bool) -> int:
    """One command: what the app's sources say and what is found in artefacts is other tests' matter, and waiting for
    the disk is for power cuts, which aren't tested."""
    sources.read = lambda app: facts.table()
    bundle.validate.validate = lambda artefact, wanted: []
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    if two_steps:
        staging.exchange = lambda a, b: False
    return run(build_parser, words)


def naive(new: str, target: str) -> None:
    """What a shell script would do."""
    shutil.rmtree(target)
    shutil.copytree(new, target, copy_function=lambda source, target: shutil.copyfile(source, target))


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
def stopped() -> Iterator[Stopped]:
    with stopper(f"{HERE}:verb") as stop:
        yield stop


@pytest.fixture(autouse=True)
def as_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """`verb` may be called here, too: what it sets is put back."""
    for module, name in ((sources, "read"), (validate, "validate"), (os, "fsync"), (staging, "exchange")):
        monkeypatch.setattr(module, name, getattr(module, name))


def is_whole(app: Path, old: Snapshot | None, new: Path) -> str:
    """Which of the two the app has, "old" or "new"; it has nothing else below its folder. All else fails."""
    assert {path.name for path in (app / "FastVLM").iterdir()} <= {"FastVLM.swift", "model"}
    now = snapshot(model(app))
    if now == old:
        return "old"
    assert now is not None and contents(model(app)) == contents(new)
    return "new"


@pytest.fixture
def scenes(app: Path, tmp_path: Path) -> dict[str, Path]:
    """Apps with no model, with a foreign one, with one of ours that replaced another."""
    shutil.copytree(app, tmp_path / "nothing")
    make_foreign(model(app))
    shutil.copytree(app, tmp_path / "foreign")
    for seed in (2, 3):
        artefact = make_artefact(tmp_path / f"artefact-{seed}", seed)
        assert verb(["bundle", str(artefact), "--app", str(app)], False) == 0
    shutil.copytree(app, tmp_path / "ours")
    return {name: tmp_path / name for name in ("nothing", "foreign", "ours")}


@pytest.mark.parametrize(
    ("how", "before", "two_steps"),
    [
        ("kill", "nothing", False),
        ("kill", "foreign", False),
        ("interrupt", "ours", False),
        ("kill", "ours", True),
        ("full disk", "foreign", True),
    ],
)
def test_bundle_stopped_anywhere(
    scenes: dict[str, Path], app: Path, new: Path, stopped: Stopped, how: str, before: str, two_steps: bool
) -> None:
    ends = set()
    bundled, restored = ["bundle", str(new), "--app", str(app)], ["restore", "--app", str(app)]
    for step in range(1, 200):
        shutil.rmtree(app)
        shutil.copytree(scenes[before], app)
        old, other = snapshot(model(app)), snapshot(previous(app))
        if not stopped(bundled, two_steps, step=step, how=how):
            break
        if two_steps and not model(app).exists():
            ends.add("missing")  # no file system without an exchange can do better; the next run mends it
        else:
            ends.add(is_whole(app, old, new))
        if step % 2 and before != "nothing":  # `restore` meets two whole models, or has none to bring back
            code, now = verb(restored, two_steps), [snapshot(model(app)), snapshot(previous(app))]
            assert old in now and code == (2 if now == [old, None] else 0)
            rest = next(folder for folder in (previous(app), model(app)) if snapshot(folder) != old)
            assert code == 2 or snapshot(rest) == other or contents(rest) == contents(new)
            continue
        assert verb(bundled, two_steps) == 0 and contents(model(app)) == contents(new)
        placed = snapshot(model(app))
        assert verb(restored, two_steps) == (2 if before == "nothing" else 0)
        if before != "nothing":
            assert snapshot(model(app)) == old and snapshot(previous(app)) == placed
        left = {path.name for path in previous(app).parent.iterdir() if not path.name.startswith("kept-")}
        assert left - {"previous"} == {".gitignore", ".made-by-fastvlm", "model-folder"}
    ends.add(is_whole(app, old, new))  # the run that was not stopped
    assert {"old", "new"} <= ends <= {"old", "new", *(["missing"] if two_steps else [])} and 20 < step < 199
    apples = snapshot(scenes["foreign"] / "FastVLM" / "model")
    assert before == "nothing" or apples in map(snapshot, [previous(app), *previous(app).parent.glob("kept-*")])


@pytest.mark.parametrize("two_steps", [False, True])
def test_restore_killed_anywhere(scenes: dict[str, Path], app: Path, stopped: Stopped, two_steps: bool) -> None:
    restored = ["restore", "--app", str(app)]
    for step in range(1, 50):
        shutil.rmtree(app)
        shutil.copytree(scenes["ours"], app)
        both = [snapshot(model(app)), snapshot(previous(app))]
        if not stopped(restored, two_steps, step=step):
            break
        assert two_steps or snapshot(model(app)) in both
        assert verb(restored, two_steps) == 0
        assert [snapshot(model(app)), snapshot(previous(app))] in (both, both[::-1])
    assert 2 < step < 49


def test_a_naive_copy_fails_the_same_check(app: Path, new: Path) -> None:
    """The negative control of the tests above."""
    old = snapshot(make_foreign(model(app)))
    with stopper(f"{HERE}:naive") as stop, pytest.raises(AssertionError):
        for step in range(1, 50):
            assert stop(new, model(app), step=step)
            is_whole(app, old, new)
    assert 1 < step < 49
