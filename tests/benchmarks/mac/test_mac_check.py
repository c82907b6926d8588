"""What a check's process does, and how it is judged."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mac import check as mac_check
from benchmarks.mac import report
from benchmarks.mac.check import Check, Done

FIELDS = {"part": "p", "title": "t", "establishes": "e", "needs": ["Core ML"], "passes": "it is so"}
JSON = "print('{\"passed\": true}', flush=True)"


def check(**fields: Any) -> Check:
    return Check(**{"name": "one", **FIELDS, "command": "python -m x", **fields})


def judged(one: Check, document: dict | None, ended: str | None = None, stderr: str = "") -> str | None:
    return mac_check.judge(one, Done(1.0, ended, "", stderr, document))


def test_a_comparison_is_judged() -> None:
    document = {"a": {"b": [{"c": 1, "t": "MLX GPU"}, {"c": 3, "t": "MLX CPU"}]}, "n": None}

    def fault(*required: Any) -> str | None:
        return judged(check(require=required), document)

    assert fault(["a.b.*.c", ">=", 1], ["a.b.*.c", "<=", 3], ["a.b.#", "is", 2], ["x.*.y", "absent", ""]) is None
    assert fault(["a.b.*.t", "contains", "GPU"]) == "a.b.*.t: got MLX GPU, MLX CPU, expected contains GPU"
    assert fault(["a.b.*.c", ">=", 2]) == "a.b.*.c: got 1, 3, expected >= 2"
    assert fault(["a.b.*.missing", ">=", 0]) == "a.b.*.missing: got nothing, expected >= 0"
    assert fault(["n", "<=", 5]) and fault(["n.#", "<=", 5]) and fault(["a.b.*.c", "absent", ""])


# Processes


def python(code: str, seconds: float = 60) -> Done:
    return mac_check.run([sys.executable, "-S", "-c", code], seconds)


@pytest.mark.parametrize(
    "code, reason",
    [
        (JSON, None),
        (f"{JSON}; print('coremlcompiler says something behind it')", None),
        ("print('{\"passed\": false}'); raise SystemExit(1)", "passed: got False, expected True"),
        (f"{JSON}; raise SystemExit(3)", "ended with exit code 3"),
        ("import sys; sys.exit('error: no such device')", "ended with exit code 1: error: no such device"),
        (f"import os; {JSON}; os.kill(os.getpid(), 9)", "ended by signal 9 ("),
        ("import os, sys; print('libc++abi: x', file=sys.stderr, flush=True); os.abort()", "libc++abi: x"),
        ("print('{\"passed\": ')", "ended well, but printed no JSON document"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)) * 9)", "ended well, but printed no JSON document"),
        ("print('[1]'); print('{' * 100000)", "ended well, but printed no JSON document"),
        ("pass", "ended well, but printed no JSON document"),
        ("print('{\"passed\": NaN}')", "passed: got None, expected True"),
    ],
)
def test_whatever_a_process_does_is_an_outcome(code: str, reason: str | None) -> None:
    fault = mac_check.judge(check(require=[["passed", "is", True]]), python(code))
    assert fault is None if reason is None else reason in str(fault)


def test_a_process_that_hangs_is_stopped_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child holds a pipe open: the time runs from then on, and the pipe ends when the child is gone."""
    os.mkfifo(pipe := tmp_path / "pipe")
    child = f"import time; pipe = open({str(pipe)!r}, 'w'); time.sleep(60); pipe.write('survived')"
    code = f"import subprocess, sys, time; {JSON}; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    opened, original = [], mac_check.subprocess.Popen.wait

    def wait(self: Any, timeout: float | None = None) -> int:
        if not opened:
            opened.append(pipe.open())  # returns when the child opens it, too
        return original(self, timeout)

    monkeypatch.setattr(mac_check.subprocess.Popen, "wait", wait)
    done = python(code, 0.5)
    with opened[0] as held:
        assert held.read() == ""
    assert done.ended == "stopped after 0.5 s" and done.document == {"passed": True}
    assert "stopped after" in str(mac_check.judge(check(require=[["passed", "is", True]]), done))


def test_a_huge_output_is_read_from_its_end() -> None:
    done = python(f"for _ in range(50): print('x' * (1 << 20))\n{JSON}")
    assert done.document == {"passed": True} and len(done.stdout) <= 4000


def test_a_command_that_is_not_there() -> None:
    assert mac_check.run(["/no/such/program"], 1).ended == "the command did not start: No such file or directory"


@pytest.mark.parametrize(
    "line, counts",
    [
        ("3 passed in 2.10s", {"passed": 3}),
        (
            "==== 1 failed, 12 passed, 2 skipped, 4 warnings in 75.00s (0:01:15) ====",
            {"failed": 1, "passed": 12, "skipped": 2},
        ),
        ("no tests ran in 0.01s", None),
        ("finished in 3.00s", None),
    ],
)
def test_pytests_last_line(line: str, counts: dict | None) -> None:
    document = python(f"print('....'); print({line!r})").document
    assert document == (None if counts is None else {"tests": counts})
    known = {one.name: one for one in report.load()}
    if counts:  # a skipped test is no pass
        assert (judged(known["tests-coreml"], document) is None) == (counts == {"passed": 3})
