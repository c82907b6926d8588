"""Child processes: what they log is relayed, their result or error comes through, and nothing of them is left."""

import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastvlm.common import children
from fastvlm.common.children import ChildFailed, Finished
from fastvlm.common.errors import CheckFailed, UserError

KILLED = (
    "import os, signal, sys; print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
)


def python(code: str, say=None, **options) -> Finished:
    return children.run([sys.executable, "-c", code], say, **options)


def ends(pid: int) -> bool:
    """Whether a process that was sent a signal ends of it: where nobody collects it, as a zombie."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.01)
    return time.monotonic() < deadline


def test_memory_and_time_are_the_childs():
    ballast = bytearray(300 << 20)  # of this process: must not count
    ballast[::4096] = b"x" * len(ballast[::4096])
    small, large = python("print('hello')"), python("x = b'x' * (200 << 20)")
    assert small.stdout == "hello\n" and small.returncode == 0 and small.seconds > 0
    assert small.peak_gb < 0.1 and 0.2 < large.peak_gb < 0.3


def test_stderr_is_relayed_as_it_comes(tmp_path):
    """Of a progress bar its last state; the child goes on only after its first line was relayed."""
    lines, go = [], tmp_path / "go"

    def say(line: str) -> None:
        lines.append(line)
        if line == "first":
            go.touch()

    done = python(
        "import os, sys, time\nprint('first', file=sys.stderr, flush=True)\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "sys.stderr.write('10 %\\r100 %\\n'); print('result'); sys.stderr.write('x' * 100_000)",
        say,
    )
    assert lines == ["first", "100 %", "x" * 100_000] and done.stdout == "result\n"


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import sys; print('error: no such folder', file=sys.stderr); sys.exit(2)", UserError, "^no such folder$"),
        ("import sys; print('error: NaN', file=sys.stderr); sys.exit(1)", CheckFailed, "^NaN$"),
        ("1 / 0", ChildFailed, "^the step ended with exit code 1: ZeroDivisionError: division by zero$"),
        (KILLED, ChildFailed, "^the step was ended by SIGKILL: last words$"),
        ("print('no JSON')", ChildFailed, "printed 'no JSON', expected a JSON object"),
        ("print('[1]')", ChildFailed, r"printed '\[1\]'"),
        ("pass", ChildFailed, "printed ''"),
        ("import sys; sys.stdout.buffer.write(bytes(range(128, 256)))", ChildFailed, "expected a JSON object"),
    ],
)
def test_a_child_without_a_result_raises_what_it_raised_or_why(code, error, message):
    relayed: list[str] = []
    with pytest.raises(error, match=message) as caught:
        python(code, relayed.append).document("the step")
    assert type(caught.value) is error
    assert not any(line.startswith("error: ") for line in relayed)  # it is told once, by whoever catches it


def test_the_result_is_the_last_line_that_is_an_object():
    done = python("print('noise'); print('{\"a\": 1}'); print('what a compiler prints behind it')")
    assert done.document("it") == {"a": 1}
    assert python("import sys, os; print('{\"in\": \"' + sys.stdin.read() + os.environ['X'] + '\"}')",
                  stdin=b"given ", environment={"X": "set"}).document("it") == {"in": "given set"}  # fmt: skip


def test_a_child_that_hangs_is_stopped_with_all_that_it_started():
    code = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    code += "print(child.pid, flush=True); child.wait()"
    done = python(code, timeout=2.0)
    with pytest.raises(ChildFailed, match="was stopped after 2 s"):
        done.document("it")
    assert ends(int(done.stdout))


def test_an_interrupt_ends_the_child():
    pids: list[int] = []

    def say(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        python("import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(600)", say)
    assert ends(pids[0])


def test_no_such_program():
    with pytest.raises(ChildFailed, match="no such program"):
        children.run(["/no/such/program"])


@pytest.mark.parametrize(
    ("raised", "code"), [(None, 0), (CheckFailed("a"), 1), (UserError("a"), 2), (OSError(2, "a"), 2)]
)
def test_the_childs_side(capsys, raised, code):
    def act() -> dict[str, int]:
        if raised:
            raise raised
        return {"x": 1}

    assert children.answer(act) == code
    out, err = capsys.readouterr()
    assert (json.loads(out) == {"x": 1}) if not code else err == "error: a\n"


def test_signals_without_a_name():
    assert Finished(-200, 0.0, 0, "").ending == "was ended by signal 200"
    assert Path(children.ROOT, "fastvlm").is_dir() and os.path.isabs(children.ROOT)
