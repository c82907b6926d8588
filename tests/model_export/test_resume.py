"""Interrupted exports: what was finished is taken over, by the same command alone, and the bytes are the same."""

import dataclasses
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoders import hashes

from fastvlm.common import cli
from fastvlm.common.errors import UserError
from model_export import contract, resume
from model_export.__main__ import build_parser
from model_export.config import ExportConfig
from model_export.export import export, plan
from model_export.language import llm

pytestmark = pytest.mark.slow

SMALL = 6_000  # bytes of a shard here: the tiny model in int4 has more than ten


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "SHARD_BYTES", SMALL)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "SHARD_BYTES", SMALL)
        return exported(tiny_checkpoint, tmp_path_factory.mktemp("whole") / "model")


def exported(checkpoint: Path, target: Path, quant: str = "int4") -> dict[str, str]:
    export(plan(ExportConfig(checkpoint, target, quant=quant), ("llm",)))
    return hashes(target)


def resumable(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".model.resume/*.safetensors.*"))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are taken over from now on."""
    names: list[str] = []
    original = resume.FinishedFiles.take

    def take(self: resume.FinishedFiles, file: Path) -> bool:
        found = original(self, file)
        names.extend([file.name] if found else [])
        return found

    monkeypatch.setattr(resume.FinishedFiles, "take", take)
    return names


@pytest.fixture
def interrupted(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder where an export of a copy of the checkpoint to `model` was stopped after five files."""
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    finished: list[str] = []
    original = resume.FinishedFiles.keep

    def keep(self: resume.FinishedFiles, file: Path) -> None:
        if len(finished) == 5:
            raise KeyboardInterrupt
        finished.append(file.name)
        original(self, file)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume.FinishedFiles, "keep", keep)
        patch.setattr("model_export.language.llm.threads.count", lambda: 1)  # one after the other
        exported(source, tmp_path / "model")
    assert len(resumable(tmp_path)) == 5 and sorted(os.listdir(tmp_path)) == [".model.resume", "source"]
    return tmp_path


def test_the_same_command_goes_on(interrupted: Path, whole: dict[str, str], taken: list[str]) -> None:
    assert exported(interrupted / "source", interrupted / "model") == whole
    assert len(taken) == 5 and len([name for name in whole if name.startswith("model-")]) > 10
    assert sorted(os.listdir(interrupted)) == ["model", "source"]


def test_what_waits_counts_as_free(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, waits = ExportConfig(interrupted / "source", interrupted / "model", quant="int4"), resume.waiting
    needed = sum(plan(config, ("llm",)).sizes.values()) + (64 << 20)
    free = needed - waits(interrupted / "model")
    assert needed - free > 10_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, free))
    plan(config, ("llm",))
    with pytest.raises(UserError, match="GB free"):
        plan(dataclasses.replace(config, output_dir=interrupted / "other"), ("llm",))


@pytest.mark.parametrize("change", ["recipe", "checkpoint", "shards", "damage"])
def test_whatever_differs_starts_afresh(
    change: str, interrupted: Path, whole: dict[str, str], taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controls: nothing is taken over from a run that would have written something else."""
    weights = interrupted / "source" / "model.safetensors"
    if change == "checkpoint":  # one byte, with the old size and time of the content
        before, data = weights.stat(), bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(data)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "shards":
        monkeypatch.setattr(llm, "SHARD_BYTES", 2 * SMALL)
    elif change == "damage":
        for path in interrupted.glob(".model.resume/*.safetensors.*"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    written = exported(interrupted / "source", interrupted / "model", "int8" if change == "recipe" else "int4")
    assert taken == [] and (written == whole) == (change == "damage")
    assert sorted(os.listdir(interrupted)) == ["model", "source"]


def test_a_second_export_to_the_same_target_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with resume.finished_files(tmp_path / "model", {}):
        with pytest.raises(UserError, match="another export is writing it"):
            exported(tiny_checkpoint, tmp_path / "model")
        assert exported(tiny_checkpoint, tmp_path / "other")
    assert exported(tiny_checkpoint, tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["model", "other"]


def test_what_cannot_be_stored_leaves_nothing(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_fault", lambda weight, edges: f"{weight.name}: bad")
    with pytest.raises(UserError, match="bad"):
        exported(interrupted / "source", interrupted / "model")
    assert os.listdir(interrupted) == ["source"]


# --- real processes: a fork server that has imported everything once


def _command(checkpoint: str, target: str, limit: int | None, most: int | None, out: Any) -> None:
    """`model_export llm` in a process of its own, with files of at most `limit` bytes; stderr and the exit code.

    With `most` it is slow, and stops when about so many files are kept, until a signal comes.
    """
    os.environ["TERM"] = "dumb"
    llm.SHARD_BYTES = SMALL
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if most is not None:
        convert, terminate, ended = llm.Weight.convert, cli._terminate, threading.Event()

        def slow(*arguments: Any) -> Any:
            time.sleep(0.1)
            while len(resumable(Path(target).parent)) >= most and not ended.wait(0.05):
                pass
            return convert(*arguments)

        llm.Weight.convert = slow  # type: ignore[method-assign]
        cli._terminate = lambda *arguments: ended.set() or terminate(*arguments)  # type: ignore[func-returns-value]
    sys.stderr = io.StringIO()
    code = cli.run(build_parser, ["llm", "--checkpoint", checkpoint, "--output-dir", target, "--quant", "int4"])
    out.put((code, sys.stderr.getvalue()))


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers", "timm"])

    def start(checkpoint: Path, target: Path, limit: int | None = None, most: int | None = None) -> Any:
        results = context.Queue()
        process = context.Process(target=_command, args=(str(checkpoint), str(target), limit, most, results))
        process.start()
        return process, results

    return start


@pytest.mark.slow
def test_killed_at_random_moments(
    tiny_checkpoint: Path, tmp_path: Path, whole: dict[str, str], start: Callable[..., Any]
) -> None:
    dice, most = random.Random(5), 0
    for kill in range(5):
        before, deadline = len(resumable(tmp_path)), time.monotonic() + 300
        process, _ = start(tiny_checkpoint, tmp_path / "model", most=before + 1)
        while process.is_alive() and len(resumable(tmp_path)) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.05))
        os.kill(process.pid, dice.choice([signal.SIGKILL, signal.SIGTERM]))
        process.join()
        assert not (tmp_path / "model").exists(), "finished too early for this test"
        most = max(most, len(resumable(tmp_path)))
        assert len(resumable(tmp_path)) > before, kill
    process, results = start(tiny_checkpoint, tmp_path / "model")
    assert results.get(timeout=600)[0] == 0
    process.join()
    assert hashes(tmp_path / "model") == whole and os.listdir(tmp_path) == ["model"] and most > 3


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_goes_on_later(
    tiny_checkpoint: Path, tmp_path: Path, whole: dict[str, str], start: Callable[..., Any]
) -> None:
    process, results = start(tiny_checkpoint, tmp_path / "model", limit=25_000)
    code, lines = results.get(timeout=600)
    process.join()
    errors = [line for line in lines.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in lines
    assert errors[0].startswith("error: File too large: ") and errors[0].endswith(contract.PROJECTOR_WEIGHTS)
    assert resumable(tmp_path) and os.listdir(tmp_path) == [".model.resume"]
    process, results = start(tiny_checkpoint, tmp_path / "model")
    assert results.get(timeout=600)[0] == 0
    process.join()
    assert hashes(tmp_path / "model") == whole
