"""Shared by every command line of the project: exit codes, --json, --debug and progress."""

import argparse
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from itertools import islice
from typing import Any, NoReturn

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.start import EXIT_INTERRUPTED, EXIT_UNUSABLE, interrupted
from fastvlm.common.terminal import Console, neutral, plain_streams
from fastvlm.common.units import format_bytes, format_duration

EXIT_CHECK_FAILED = 1
EXIT_NO_READER = 141  # as a shell says of a program that SIGPIPE ended
LINE_EVERY = 10.0  # seconds between the lines that say how far a step is, where stderr is no terminal
LONG = 2.0  # seconds from which on a step is worth a line: one then, and one at its end
TICK = 1.0  # seconds between looks whether a line is due
ROOMS = ("fastvlm", "quantization", "model_export", "benchmarks", "app_bridge")
EXTRAS = {  # packages that only an extra of pyproject.toml brings: module -> extra
    "accelerate": "finetune",
    "dask": "cluster",
    "distributed": "cluster",
    "openstep_parser": "app",
    "peft": "finetune",
    "tree_sitter": "app",
    "tree_sitter_swift": "app",
}
clock = time.monotonic
_stopped: list[int] = []  # signals that came during `run`


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every verb has."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout, and everything else on stderr"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and library logs")


def run(build_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None = None) -> int:
    """Parse, run the verb (`args.run(args) -> document or None`), and return the exit code (0, 1, 2, 130 or 141)."""
    signal.signal(signal.SIGTERM, _terminate)  # so that `finally` blocks clean up after a kill, as after Ctrl-C
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a job in the background
        signal.signal(signal.SIGINT, _terminate)
    if sys.stderr is None:  # closed (2>&-): print would take stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with plain_streams():
        return _run(build_parser, sys.argv[1:] if argv is None else argv)


def _run(build_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str]) -> int:
    as_json, debug, _stopped[:] = "--json" in argv, "--debug" in argv, []
    try:
        try:
            args = build_parser().parse_args(argv)
        finally:  # --help prints
            sys.stdout.flush()
        quiet_libraries(debug)
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            document = args.run(args)
        failed = isinstance(document, dict) and document.get("passed") is False
        if as_json:
            _print(document)
        sys.stdout.flush()
        return EXIT_CHECK_FAILED if failed else 0
    except (Exception, KeyboardInterrupt) as error:
        if _stopped or isinstance(error, KeyboardInterrupt):  # imports make other exceptions of an interrupt
            print("interrupted", file=sys.stderr)
            if as_json:
                with suppress(OSError):
                    _print(interrupted)
            return EXIT_INTERRUPTED
        if isinstance(error, BrokenPipeError) and not debug:
            return EXIT_NO_READER
        missing = _missing(error)
        if debug or not (missing or isinstance(error, (UserError, CheckFailed, OSError, MemoryError))):
            raise
        line, code = missing or one_line(error), EXIT_CHECK_FAILED if isinstance(error, CheckFailed) else EXIT_UNUSABLE
        print(f"error: {line}", file=sys.stderr)
        if as_json:
            _print({**(getattr(error, "document", None) or {}), "error": line, "exit_code": code})
        return code


def _print(document: Any) -> None:
    print(json.dumps(document, default=str, allow_nan=False), flush=True)


def _missing(error: BaseException) -> str:
    """The message about a package that a verb needs and that isn't installed, "" for any other error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not name or name in ROOMS:
        return ""
    extra = EXTRAS.get(name)
    return (
        f"{name}: isn't installed in {sys.prefix}: run `pip install '.{f'[{extra}]' if extra else ''}'` in the project"
    )


def main(build_parser: Callable[[], argparse.ArgumentParser]) -> NoReturn:
    """Call `run` and end the process."""
    code = run(build_parser)
    try:
        sys.stdout.flush()  # of what was printed before an error
    except BrokenPipeError:
        code = EXIT_NO_READER
    # Python itself would end by the signal that an import was stopped by, or try to write again
    if code in (EXIT_INTERRUPTED, EXIT_NO_READER):
        if multiprocessing := sys.modules.get("multiprocessing.util"):
            multiprocessing._run_finalizers()  # named semaphores would be left
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    gc.disable()  # the interpreter's last collections would walk through all of PyTorch: 0.4 s and 0.1 GB
    gc.freeze()
    sys.exit(code)


def _terminate(signum: int, frame: Any) -> None:
    _stopped.append(signum)
    raise KeyboardInterrupt


def one_line(error: BaseException) -> str:
    """The error's message on one line (an OSError as `what: where`)."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory: free some, or choose a smaller image size"
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


def quiet_libraries(debug: bool = False) -> None:
    """Keep the libraries' chatter from the user (`--debug` shows it)."""
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def log(message: str) -> None:
    """Print one line of progress on stderr."""
    # neutral also in a child that `run` didn't start; one write, so that two threads' lines don't run into each other
    print(neutral(message) + "\n", end="", file=sys.stderr, flush=True)


def shown(pieces: Iterator[str], quiet: bool = False) -> str:
    """Print an answer's pieces as they come, unless `quiet`; returns the whole."""
    with progress("answer"):  # up to its first piece, which takes prefill
        text = "".join(pieces if quiet else islice(pieces, 1))
    if not quiet:
        print(text, end="", flush=True)
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
        print(flush=True)
    return text


def wide_console(width: int) -> Console:
    """A console for tables on stdout, at least `width` characters wide where no terminal says otherwise."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, width)
    return console


class Step:
    """A step that is under way. Calling it says that `count` more are done."""

    def __init__(self, what: str, total: float | None, sized: bool) -> None:
        self.what, self.total, self.sized = what, total, sized
        self.began, self.done, self.before, self.shown = clock(), 0.0, 0.0, False
        self._lock = threading.Lock()

    def __call__(self, count: float = 1) -> None:
        with self._lock:
            self.done += count

    def at(self, done: float, total: float) -> None:
        """Set the amount done and the total. The amount of the first call was done before this step."""
        self.before = done if self.total is None else min(self.before, done)
        self.done, self.total = done, total

    @property
    def seconds(self) -> float:
        return clock() - self.began

    def state(self) -> str:
        """How much is done, and the time that it took and will take: "12 of 40, 35 s, about 82 s left"."""
        seconds, new, parts = self.seconds, self.done - self.before, []
        if self.total is not None:
            shown = format_bytes if self.sized else "{:.0f}".format
            parts.append(f"{shown(int(self.done))} of {shown(int(self.total))}")  # type: ignore[operator]
            if self.sized and new > 0 and seconds > 0:
                parts.append(f"{format_bytes(int(new / seconds))}/s")
        parts.append(format_duration(seconds))
        if self.total is not None and new > 0 and self.done < self.total:
            parts.append(f"about {format_duration(seconds / new * (self.total - self.done))} left")
        return ", ".join(parts)

    def line(self) -> str:
        return f"{self.what}: {self.state()}"


class _Display:
    """Shows all steps that are under way, outer steps first: bars on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._lock = threading.RLock()
        self._last = 0.0  # when the last line was
        self._stop: Callable[[], None] = lambda: None

    def begin(self, step: Step) -> None:
        with self._lock:
            self.steps.append(step)
            if len(self.steps) == 1:
                console = Console(stderr=True)
                bars = console.is_terminal and not console.is_dumb_terminal
                self._stop = self._show_bars(console) if bars else self._show_lines()

    def end(self, step: Step) -> None:
        with self._lock:
            self.steps.remove(step)
            if not self.steps:
                self._stop()

    def _show_bars(self, console: Console) -> Callable[[], None]:
        # rich would take stdout to the console of the bars, which is stderr
        live = Live(get_renderable=self._bars, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
        live.start()
        return live.stop

    def _bars(self) -> Table:
        rows = Table.grid(padding=(0, 1))
        for step in tuple(self.steps):
            rows.add_row(Text(step.what), ProgressBar(step.total, step.done, width=40), Text(step.state()))
        return rows

    def _show_lines(self) -> Callable[[], None]:
        self._last, ended = clock(), threading.Event()
        thread = threading.Thread(target=self.beat, args=[ended.wait], name="progress", daemon=True)
        thread.start()

        def stop() -> None:
            ended.set()
            thread.join()

        return stop

    def beat(self, wait: Callable[[float], bool]) -> None:
        """A line whenever one is due, until `wait(seconds)` says that all is done."""
        while not wait(TICK):
            steps = tuple(self.steps)
            due = any(not step.shown and step.seconds >= LONG for step in steps) or clock() >= self._last + LINE_EVERY
            if steps and due:
                with suppress(OSError, ValueError):  # a reader that left is for the next line of the command itself
                    log("; ".join(step.line() for step in steps))
                self._last = clock()
                for step in steps:
                    step.shown = True


_display = _Display()


@contextmanager
def progress(what: str, total: float | None = None, sized: bool = False) -> Iterator[Step]:
    """Show on stderr that a step is under way, how far it is and how long it will take; yields `advance(n=1)`.

    Where stderr is no terminal, that is a line after two seconds and then one every ten, whether or not anything
    advances. A step of two seconds that ends well leaves a line. Steps may be inside each other. `sized`: what
    advances is bytes, and their rate is shown.
    """
    step = Step(what, total, sized)
    _display.begin(step)
    try:
        yield step
    finally:
        _display.end(step)
    if step.seconds >= LONG:
        log(step.line())
