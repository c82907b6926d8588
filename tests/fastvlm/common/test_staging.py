"""Publishing: a staging folder, one rename, and the old or the new folder whole, killed at any moment."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fastvlm.common import staging
from fastvlm.common.staging import clean, exchange, own, staged


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_publishes_whole_or_not_at_all(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "model") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "model").exists()
    assert contents(tmp_path / "deep") == {"model/a": "1"}
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
    assert contents(tmp_path) == {"model/new": "new"}


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
    assert contents(tmp_path) == {"model/a": "new"}


def test_half_a_replacement_is_undone(tmp_path: Path) -> None:
    """What a run leaves that died between the two renames."""
    for _ in range(2):  # the second time, the target is there
        left = tmp_path / ".model.staging-x1"
        own(left)
        (left / "old").mkdir()
        (left / "old" / "a").write_text("old")
        clean(tmp_path / "model")
        assert contents(tmp_path) == {"model/a": "old"} and not left.exists()


def test_live_staging_is_left_alone_and_dead_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".model.staging-dead"
    dead.mkdir()
    (tmp_path / ".other.staging-x").mkdir()
    with staged(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
        assert not dead.exists()
        with staged(tmp_path / "model", replace=True) as second:  # cleans at its start
            (second / "a").write_text("2")
        assert contents(folder) == {"a": "1"}
        clean(tmp_path / "model")
        assert contents(folder) == {"a": "1"}
        for path in (tmp_path / "model").iterdir():
            path.unlink()
    assert contents(tmp_path) == {"model/a": "1"} and (tmp_path / ".other.staging-x").exists()


# For each (n, text) read, a child writes the target and kills itself before the nth line of ours, or of shutil's.
WRITER = """
import os, shutil, signal, sys
from pathlib import Path
from fastvlm.common import staging
def child(moment, text):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename not in ("<string>", staging.__file__, shutil.__file__):
            return None
        if event == "line":
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    with staging.staged(Path(sys.argv[1]), replace=True) as folder:
        for i in range(3):
            (folder / f"{i}").write_text(text)
    os._exit(0)
if sys.argv[2] == "two-renames":
    staging.exchange = lambda a, b: False
if sys.argv[2] == "copy":
    staging._publish = lambda folder, target, replace: shutil.copytree(folder, target, dirs_exist_ok=True)
for line in sys.stdin:
    moment, text = line.split()
    pid = os.fork() or child(int(moment), text)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def swaps(folder: Path) -> bool:
    """Whether the file system can exchange names."""
    with TemporaryDirectory(dir=folder) as a, TemporaryDirectory(dir=folder) as b:
        return exchange(Path(a), Path(b))


def published(target: Path, how: str) -> list[bool]:
    """Kill a writer at each moment in turn; for each whether the new folder was there, whole, and not the old one."""
    found, code = [], -int(signal.SIGKILL)
    in_steps = how == "two-renames" or not swaps(target.parent)
    if how != "new":
        with staged(target) as folder:
            for name in "012":
                (folder / name).write_text("old")
    command = [sys.executable, "-c", WRITER, str(target), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        while code == -signal.SIGKILL:
            if how == "new":
                shutil.rmtree(target, ignore_errors=True)
            print(len(found) + 1, f"text{len(found)}", file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            if in_steps:
                clean(target)  # what the next run does first: the old folder may be waiting under its other name
            if target.exists() or how != "new":
                assert set(contents(target)) == set("012") and len(set(contents(target).values())) == 1, "torn"
            found.append(f"text{len(found)}" in contents(target).values())
    assert code == 0
    return found


@pytest.mark.parametrize("how", ["new", "exchange", "two-renames"])
def test_killed_at_any_moment_leaves_old_or_new_whole(tmp_path: Path, how: str) -> None:
    target = tmp_path / "model"
    outcomes = published(target, how)
    assert outcomes.count(False) > 20 and outcomes.count(True) > 5
    with staged(target, replace=True) as folder:
        (folder / "last").touch()
    assert os.listdir(tmp_path) == ["model"], "remains of killed runs"


def test_the_kill_test_sees_what_is_not_atomic(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="torn"):
        published(tmp_path / "model", "copy")
