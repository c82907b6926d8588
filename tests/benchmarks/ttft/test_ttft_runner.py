"""The clock: a delay injected into a stage appears in that stage and its totals, and nowhere else. The processes."""

import subprocess
import sys

import pytest

from benchmarks.ttft import process, run, runner, search
from benchmarks.ttft.process import RunnerError, processes
from benchmarks.ttft.run import Effort
from benchmarks.ttft.runner import STAGES, one_round, parse_delays, totals
from fastvlm.common.children import ROOT

pytestmark = pytest.mark.slow

TAKES = {stage: 2.0**number for number, stage in enumerate(STAGES)}  # s by the fake clock; sums tell them apart
READY = 'echo \'{"ready": true, "load_s": 1, "import_s": 1, "settings": {}, "delay": ""}\''
ROUND = ["read line", 'echo \'{"stages": {"encode": 1}, "waited": {}}\'']
END = ["read line", "echo '{\"peak_bytes\": 7}'"]


class Clock:
    """Time that only the stages, sleeping, and reading it (ten microseconds) let pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-5
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def stages(self):
        return [(stage, lambda state, stage=stage: self.sleep(TAKES[stage])) for stage in STAGES]

    def round(self, delays, waiting=float):
        return one_round(self.stages(), parse_delays(delays), {}, self, self.sleep, waiting)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("delay, longer", [("0.5", lambda took: took + 0.5), ("x1.15", lambda took: took * 1.15)])
def test_a_delay_is_in_its_stage_and_its_totals_and_nowhere_else(stage, delay, longer):
    plain, _ = Clock().round("")
    slowed, _ = Clock().round(f"{stage}={delay}")
    assert plain == pytest.approx(TAKES, abs=1e-4)
    assert slowed == pytest.approx(TAKES | {stage: longer(TAKES[stage])}, abs=1e-4)
    for total, parts in (("ttft_paper", STAGES[1:4]), ("ttft_app", STAGES[:5])):
        extra = longer(TAKES[stage]) - TAKES[stage] if stage in parts else 0
        assert totals(slowed)[total] - totals(plain)[total] == pytest.approx(extra, abs=1e-4)


def test_totals_are_sums_and_need_all_their_stages():
    assert totals(TAKES) == {"ttft_paper": 2.0 + 4 + 8, "ttft_app": 1.0 + 2 + 4 + 8 + 16}
    assert totals({"encode": 1.0, "project": 1.0, "prefill": 1.0}) == {"ttft_paper": 3.0}
    assert totals({"encode": 1.0}) == {}


def test_waiting_for_a_processor_is_each_stages_own_and_never_longer_than_it():
    counts = iter([5.0, 5.25, *[6.0] * 10, 7.0, 1e6])
    _, waited = Clock().round("", lambda: next(counts))
    assert waited["preprocess"] == 0.25 and waited["encode"] == 0.0
    assert waited["next_question"] == pytest.approx(TAKES["next_question"], abs=1e-4)
    assert 0 <= runner.queued() <= runner.queued()


def test_delays_that_are_none_are_refused():
    wrong = ["encode", "encode=", "encode=-1", "encode=x0.9", "load=1", "encode=fast", "encode=nan", "encode=xinf"]
    for text in wrong:
        with pytest.raises(ValueError, match=f"{runner.DELAY}: got {text}, expected STAGE=SECONDS"):
            parse_delays(f"decode=1,{text}")
    assert parse_delays("encode=0.5,prefill=x1.15") == {"encode": ("s", 0.5), "prefill": ("x", 1.15)}


# Processes


def script(path, *lines):
    """A specification whose process is these lines of shell."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return {"kind": "checkpoint", "name": path.name, "python": str(path)}


def test_a_process_answers_in_rounds_and_ends_with_its_peak_memory(tmp_path):
    with processes() as start:
        process = start(script(tmp_path / "whole", READY, *ROUND, *ROUND, *END))
        assert process.ready["load_s"] == 1
        assert process.round() == process.round() == {"stages": {"encode": 1}, "waited": {}}
        assert process.close() == 7 and process.process.poll() == 0
        other = start(script(tmp_path / "other", READY, *ROUND))
    assert other.process.poll() is not None


def test_the_runners_side_of_the_protocol_and_its_own_peak(capfd):
    assert runner.main({"kind": "checkpoint", "name": "nobody"}) == 1
    assert capfd.readouterr().err == ""  # stdout was the channel
    assert 10e6 < runner.peak_bytes() < 100e9


@pytest.mark.parametrize(
    "lines, said",
    [
        (["exit 1"], r"its process ended \(exit 1\)$"),
        (["kill -9 $$"], "killed by the system .*out of memory"),
        (["echo theirs >&2", "exit 4"], r"its process ended \(exit 4\): theirs$"),
        (["printf '{\"ready\": tr'", "exit 3"], r"its process ended \(exit 3\)"),
        (["echo hello", "read line"], "what is no JSON: hello"),
        (['echo \'{"error": "no such checkpoint"}\''], "^no such checkpoint$"),
    ],
)
def test_a_process_that_fails_says_how(lines, said, tmp_path):
    with processes() as start:
        start(script(tmp_path / "loud", READY, "echo ours >&2", *ROUND))
        with pytest.raises(RunnerError, match=said):
            start(script(tmp_path / "fails", *lines))
        with pytest.raises(RunnerError, match=said):
            start(script(tmp_path / "later", READY, *lines)).round()
        with pytest.raises(RunnerError, match="/nowhere/python: can't be started: No such file"):
            start({"kind": "checkpoint", "python": "/nowhere/python"})


def test_what_takes_too_long_is_stopped_and_says_so(tmp_path):
    hangs = script(tmp_path / "hangs", READY, "read line", "exec sleep 600")
    with pytest.raises(RunnerError, match=r"given up after 0\.05 s"):
        run.trial(hangs, 1, 0.05)
    for slow in (hangs, script(tmp_path / "slow", "exec sleep 600")):
        (record,), _ = run.measure([slow], Effort(1, 1, 0.05), lambda line: None)
        assert record["error"].startswith("stopped after 0.05 s, the budget: loading and one round, cold")
    record = run._cold(script(tmp_path / "whole", READY, *ROUND, *END), 600.0)
    assert record["peak_bytes"] == 7 and "error" not in record


def test_each_kind_imports_what_it_needs_before_the_clock():
    code = """
import os, sys
from benchmarks.ttft import models
for kind in ("artefact", "checkpoint"):
    if not os.fork():
        models.prepare({"kind": kind})
        print(kind, *(name in sys.modules for name in ("timm", "model_export.runtime")), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["artefact False True", "checkpoint True False"]


@pytest.mark.parametrize(
    "load, pace, expected",
    [
        (1.0, 0.1, (3, 5)),
        (1.0, 6.0, (3, 5)),  # (1 + 6 rounds of 6 s) three times are 111 s
        (10.0, 8.0, (3, 2)),
        (10.0, 40.0, (1, 1)),
        (10.0, 134.0, (0, 0)),
    ],
)
def test_slow_runners_keep_to_the_budget(load, pace, expected):
    cold = {"load_s": load, "import_s": 0.0, "round": {"stages": {"encode": pace}}}
    launches, rounds = run.share(cold, Effort(3, 5, 120.0))
    assert (launches, rounds) == expected
    assert launches * (load + (rounds + 1) * pace) <= 120


class Fake:
    """A runner without a process."""

    started: list = []  # noqa: RUF012

    def __init__(self, specification):
        Fake.started.append(specification["name"])
        self.name, self.fails = specification["name"], specification.get("fails", 99)
        self.ready = {"settings": {}, "delay": "", "load_s": 0.1, "import_s": 0.1}
        self.rounds = 0

    def limit(self, *limit):
        pass

    def open(self):
        if not self.fails:
            raise RunnerError("no such checkpoint")

    def round(self):
        self.rounds += 1
        if self.rounds > self.fails:
            raise RunnerError("killed", failed=self.name == "hot")
        Fake.started.append(f"{self.name} round")
        return {"stages": {"encode": 0.1, "project": 0.1, "prefill": 0.1}, "waited": {}, "answer": [7]}

    def close(self):
        if self.rounds > self.fails:
            raise RunnerError("closed without a word")  # what a dead process's pipes make of it
        return 5 * 10**9

    def kill(self):
        pass


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(process, "Process", Fake)
    Fake.started.clear()
    return Fake.started


def specification(name, **keys):
    return {"kind": "checkpoint", "name": name, **keys}


def test_rounds_are_interleaved_and_one_failing_runner_is_a_line(fakes, monkeypatch):
    monkeypatch.setattr(run.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**12}))
    runners = [specification("a"), specification("b"), specification("dead", fails=0), specification("dies", fails=2)]
    runners += [specification("hot", fails=2)]
    runners += [{"kind": "mlx-vlm", "name": "absent", "absent": "not installed"}]
    records, turns = run.measure(runners, Effort(2, 4, 60.0), lambda line: None)
    by_name = {one["name"]: one for one in records}
    assert not turns
    assert [len(launch["rounds"]) for launch in by_name["a"]["launches"]] == [4, 4]
    assert by_name["dead"]["error"] == "no such checkpoint" and by_name["absent"]["error"] == "not installed"
    assert by_name["dies"]["error"] == by_name["hot"]["error"] == "killed"
    assert by_name["hot"]["passed"] is False and not any("passed" in by_name[name] for name in ("dead", "dies", "a"))
    assert set(by_name["b"]["launches"][0]["rounds"][0]) == {"stages", "waited", "yardstick_s"}
    rounds = [name for name in fakes if name in ("a round", "b round")][2:]  # without the cold ones
    for start in range(0, len(rounds), 2):
        assert {*rounds[start : start + 2]} == {"a round", "b round"}  # never two of one in a row of two
    assert len({tuple(rounds[start : start + 2]) for start in range(0, len(rounds), 2)}) == 2  # in either order


def test_runners_that_do_not_fit_together_take_turns(fakes, monkeypatch):
    monkeypatch.setattr(run.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 9 * 10**9}))
    records, turns = run.measure([specification("a"), specification("b")], Effort(2, 3, 60.0), lambda line: None)
    assert turns and all(len(one["launches"]) == 2 for one in records)
    assert fakes.count("a") == fakes.count("b") == 3  # cold, and anew for each block
    names = [name for name in fakes if name in ("a", "b", "a round", "b round")][4:]
    assert names[:5] in (["a", *["a round"] * 4], ["b", *["b round"] * 4])


def test_threads_that_were_asked_for_are_kept_in_the_search(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    for asked, tried in ((None, [4, 1]), (3, [])):
        options = search.options({"device": "cpu", "threads": asked})
        assert [value for name, value in options if name == "threads"] == tried


def test_what_is_in_the_page_cache_is_known(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    with (tmp_path / "weights").open("rb") as file:
        assert run.cached(file.fileno()) == 1
        dropped = run.drop_from_cache(tmp_path)  # False where it can't be done or known
        assert dropped == (run.cached(file.fileno()) < 0.05)
        file.read()
        assert run.cached(file.fileno()) == 1
