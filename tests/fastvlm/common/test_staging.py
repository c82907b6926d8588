"""Publishing: a staging folder, one rename, and the old or the new folder whole, killed at any moment."""

import os
import shutil
from pathlib import Path

import pytest

from fastvlm.common import staging
from fastvlm.common.staging import clean, exchange, own, staged
from tests.helpers import contents
from tests.killing import stopper


def test_publishes_whole_or_not_at_all(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "model") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "model").exists()
    assert contents(tmp_path / "deep") == {"model/a": b"1"}
    with pytest.raises(RuntimeError), staged(tmp_path / "other") as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["deep"]


def test_replaces_only_when_told(tmp_path: Path) -> None:
    for text, replace in (("old", False), ("new", True)):
        with staged(tmp_path / "model", replace) as folder:
            (folder / text).write_text(text)
    with pytest.raises(OSError), staged(tmp_path / "model") as folder:
        (folder / "third").write_text("third")
    assert contents(tmp_path) == {"model/new": b"new"}


def test_permissions_are_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "model") as folder:
            (folder / "a").write_text("1")
            (folder / "a").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "model" / "a").stat().st_mode & 0o777 == 0o640


def test_exchange_swaps_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()


def test_without_exchange_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    for text in ("old", "new"):
        with staged(tmp_path / "model", replace=True) as folder:
            (folder / "a").write_text(text)
    assert contents(tmp_path) == {"model/a": b"new"}


def test_half_a_replacement_is_undone(tmp_path: Path) -> None:
    """What a run leaves that died between the two renames."""
    for _ in range(2):  # the second time, the target is there
        left = tmp_path / ".model.staging-x1"
        own(left)
        (left / "old").mkdir()
        (left / "old" / "a").write_text("old")
        clean(tmp_path / "model")
        assert contents(tmp_path) == {"model/a": b"old"} and not left.exists()


def test_live_staging_is_left_alone_and_dead_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".model.staging-dead"
    dead.mkdir()
    (tmp_path / ".other.staging-x").mkdir()
    with staged(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
        assert not dead.exists()
        with staged(tmp_path / "model", replace=True) as second:  # cleans at its start
            (second / "a").write_text("2")
        assert contents(folder) == {"a": b"1"}
        clean(tmp_path / "model")
        assert contents(folder) == {"a": b"1"}
        for path in (tmp_path / "model").iterdir():
            path.unlink()
    assert contents(tmp_path) == {"model/a": b"1"} and (tmp_path / ".other.staging-x").exists()


def write(target: str, text: str, how: str) -> None:
    """What is killed: a folder replaced by one of `text`, `how`: by an exchange, two renames, or without any care."""
    if how == "two renames":
        staging.exchange = lambda a, b: False
    if how == "copy":
        staging.publish = lambda folder, target, replace: shutil.copytree(folder, target, dirs_exist_ok=True)
    with staged(Path(target), replace=True) as folder:
        for name in "012":
            (folder / name).write_text(text)


def published(target: Path, how: str) -> list[bool]:
    """Kill a writer at each step in turn; for each, whether the new folder was there, whole, and not the old one."""
    found: list[bool] = []
    if how != "new":
        write(str(target), "old", "exchange")
    with stopper("tests.fastvlm.common.test_staging:write") as stopped:
        going_on = True
        while going_on:
            if how == "new":
                shutil.rmtree(target, ignore_errors=True)
            going_on = stopped(target, text := f"text{len(found)}", how, step=len(found) + 1)
            clean(target)  # what the next run does first: the old folder may be waiting under its other name
            if target.exists() or how != "new":
                assert set(contents(target)) == set("012") and len(set(contents(target).values())) == 1, "torn"
            found.append(text.encode() in contents(target).values())
    return found


@pytest.mark.parametrize("how", ["new", "exchange", "two renames"])
def test_killed_at_any_moment_leaves_old_or_new_whole(tmp_path: Path, how: str) -> None:
    target = tmp_path / "model"
    outcomes = published(target, how)
    assert outcomes.count(False) > 10 and outcomes.count(True) > 2
    with staged(target, replace=True) as folder:
        (folder / "last").touch()
    assert os.listdir(tmp_path) == ["model"], "remains of killed runs"


def test_the_kill_test_sees_what_is_not_atomic(tmp_path: Path) -> None:
    """The negative control of this harness (tests/killing.py), for everything that is published through `staging`."""
    with pytest.raises(AssertionError, match="torn"):
        published(tmp_path / "model", "copy")
