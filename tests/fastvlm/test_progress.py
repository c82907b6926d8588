"""A step says how far it is: bars on a terminal, else a line each ten seconds, and nothing once it has ended."""

import io
import sys
import threading
from collections.abc import Callable

import pytest

from fastvlm.common import cli
from fastvlm.common.terminal import Console, plain_streams


class Clock:
    """Time passes only when someone waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cli, "clock", clock)
    return clock


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> cli._Display:
    """One that starts no thread."""
    display = cli._Display()
    monkeypatch.setattr(cli, "_display", display)
    monkeypatch.setattr(display, "_show_lines", lambda: lambda: None)
    return display


def passing(clock: Clock, seconds: float) -> Callable[[float], bool]:
    """What `beat` waits with: true once `seconds` more have passed."""
    end = clock.now + seconds

    def wait(timeout: float) -> bool:
        clock.now += timeout
        return clock.now >= end

    return wait


def test_a_line_after_two_seconds_and_then_each_ten(
    clock: Clock, display: cli._Display, capsys: pytest.CaptureFixture[str]
) -> None:
    with cli.progress("parity (pictures)", 40) as advance:
        display.beat(passing(clock, 23))  # nothing advances, and still it says that it is alive
        advance(12)
        display.beat(passing(clock, 10))
        with cli.progress("hash", 3e9, sized=True) as inner:
            inner(1.5e9)
            display.beat(passing(clock, 10))
            inner(1.5e9)
        with cli.progress("a short one"):
            display.beat(passing(clock, 1))
        advance(28)
        clock.now = 150
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "parity (pictures): 0 of 40, 2 s",
        "parity (pictures): 0 of 40, 12 s",
        "parity (pictures): 0 of 40, 22 s",
        "parity (pictures): 12 of 40, 32 s, about 75 s left",
        "parity (pictures): 12 of 40, 35 s, about 82 s left; hash: 1.50 GB of 3.00 GB, 750 MB/s, 2 s, about 2 s left",
        "hash: 3.00 GB of 3.00 GB, 300 MB/s, 10 s",
        "parity (pictures): 40 of 40, 2 min",
    ]
    with pytest.raises(ValueError), cli.progress("a failing one"):
        clock.now += 100
        raise ValueError
    display.beat(passing(clock, 100))
    assert capsys.readouterr().err == ""  # no step, no line


def test_what_was_there_before_is_not_its_speed(clock: Clock) -> None:
    step = cli.Step("model.zip", None, sized=True)
    step.at(8e9, 10e9)
    clock.now = 10
    step.at(9e9, 10e9)
    assert step.state() == "9.00 GB of 10.00 GB, 100 MB/s, 10 s, about 10 s left"


class Watched(io.StringIO):
    """A stderr that says when the third line is written."""

    def __init__(self) -> None:
        super().__init__()
        self.third = threading.Event()

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.getvalue().count("\n") >= 3:
            self.third.set()
        return count


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_thread_ends_with_the_step(monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None) -> None:
    stderr, threads = Watched(), threading.active_count()
    monkeypatch.setattr(sys, "stderr", stderr)
    for name in ("LINE_EVERY", "LONG", "TICK"):
        monkeypatch.setattr(cli, name, 0.0)

    def work() -> None:
        with cli.progress("outer"), cli.progress("inner"):
            assert stderr.third.wait(60) and threading.active_count() == threads + 1
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert threading.active_count() == threads and cli._display.steps == []


def terminal(monkeypatch: pytest.MonkeyPatch, kind: str) -> io.StringIO:
    """stderr as a terminal of this kind."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", kind)
    return stream


def test_bars_inside_bars_and_lines_above_them(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    screen, out = terminal(monkeypatch, "xterm-256color"), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    bars = Console(file=io.StringIO(), width=100)
    with plain_streams(), cli.progress("outer", 3) as advance:
        for number in range(3):
            with cli.progress(f"inner {number}"):
                cli.log(f"line {number}")
                print(f"result {number}")
                clock.now += 2
                bars.print(cli._display._bars())
            advance()
    shown = screen.getvalue()
    assert shown.partition("line 1")[0].endswith("\x1b[2K")  # the bars are wiped first
    assert shown.endswith("outer: 3 of 3, 6 s\n")
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # one live display; the cursor is there again
    assert out.getvalue() == "result 0\nresult 1\nresult 2\n"
    lines = [" ".join(line.replace("━", " ").split()) for line in bars.file.getvalue().splitlines()]  # type: ignore
    assert lines[2:4] == ["outer 1 of 3, 4 s, about 8 s left", "inner 1 2 s"]


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, clock: Clock, display: cli._Display) -> None:
    stream = terminal(monkeypatch, "dumb")
    with cli.progress("step"):
        display.beat(passing(clock, 3))
    assert stream.getvalue() == "step: 2 s\nstep: 3 s\n"
