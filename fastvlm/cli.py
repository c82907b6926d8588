"""What every command line of the project shares: exit codes, --json, --debug and progress."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fastvlm.errors import CheckFailed, UserError
from fastvlm.files import flag_faults, some_path
from fastvlm.start import EXIT_INTERRUPTED, EXIT_UNUSABLE
from fastvlm.terminal import Console, neutral, plain_streams

EXIT_CHECK_FAILED = 1
_stopped: list[int] = []  # signals that came during `run`


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors are one line, exit 2, like every other unusable input."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.register("type", Path, some_path)  # of every `type=Path`: what is read; see files.Output for what isn't

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found = super().parse_known_args(args, namespace)
        if faults := flag_faults(self, found[0]):
            raise UserError("; ".join(faults))
        return found

    def error(self, message: str) -> Any:
        self.exit(EXIT_UNUSABLE, f"error: {message} (see `{self.prog} --help`)\n")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every verb has."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON document, the last line of stdout"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and library logs")


def run(build_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None = None) -> int:
    """Parse, run the verb (`args.run(args) -> document or None`), and return the exit code (0, 1, 2 or 130)."""
    signal.signal(signal.SIGTERM, _terminate)  # so that `finally` blocks clean up after a kill, as after Ctrl-C
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a job in the background
        signal.signal(signal.SIGINT, _terminate)
    if sys.stderr is None:  # closed (2>&-): print would take stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with plain_streams():
        return _run(build_parser, argv)


def _run(build_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None) -> int:
    debug, _stopped[:] = False, []
    try:
        args = build_parser().parse_args(argv)
        debug = getattr(args, "debug", False)
        quiet_libraries(debug)
        document = args.run(args)
        failed = isinstance(document, dict) and document.get("passed") is False
        if getattr(args, "json", False):
            print(json.dumps(document, default=str, allow_nan=False), flush=True)
        sys.stdout.flush()
        return EXIT_CHECK_FAILED if failed else 0
    except (Exception, KeyboardInterrupt) as error:
        if _stopped or isinstance(error, KeyboardInterrupt):  # imports make other exceptions of an interrupt
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        if debug or not isinstance(error, (UserError, CheckFailed, OSError, MemoryError)):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_CHECK_FAILED if isinstance(error, CheckFailed) else EXIT_UNUSABLE


def main(build_parser: Callable[[], argparse.ArgumentParser], at_once: bool = False) -> NoReturn:
    """`run`, and then the end of the process; `at_once` without taking down what was imported."""
    code = run(build_parser)
    if at_once or code == EXIT_INTERRUPTED:  # Python itself would end by the signal that an import was stopped by
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _terminate(signum: int, frame: Any) -> None:
    _stopped.append(signum)
    raise KeyboardInterrupt


def one_line(error: BaseException) -> str:
    """The error's message on one line (an OSError as `what: where`)."""
    if isinstance(error, BrokenPipeError):
        return "the reader of this output went away"
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
    """One line of what is happening, on stderr."""
    print(neutral(message), file=sys.stderr, flush=True)  # also in a child that `run` didn't start


def wide_console(width: int) -> Console:
    """A console for tables on stdout, at least `width` characters wide where no terminal says otherwise."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console


@contextmanager
def progress(description: str, total: float | None = None, sized: bool = False) -> Iterator[Callable[..., None]]:
    """Show progress on stderr; yields `advance(n=1)`. Without a terminal it prints one line at the start.

    `sized`: what advances is bytes, and their rate is shown.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        log(f"{description} …")
        yield lambda n=1: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if sized else (MofNCompleteColumn(),)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n=1: bar.advance(task, n)
