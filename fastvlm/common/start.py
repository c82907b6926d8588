"""The first thing that a `__main__.py` does, before its other imports. Standard library only, and little of it."""

import json
import os
import runpy
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from fastvlm.common import threads

EXIT_UNUSABLE, EXIT_INTERRUPTED = 2, 130
interrupted = {"error": "interrupted", "exit_code": EXIT_INTERRUPTED}  # with --json
OLDEST = (3, 11)
NEEDED = ("rich", "numpy", "torch")  # of all dependencies: where one of these is missing, none was installed


def command() -> None:
    """The entry point of the command `fastvlm`."""
    runpy.run_module("fastvlm", run_name="__main__")


def begin() -> None:
    """End with one line where no command can work, and from here on at a signal, until `cli.run` takes over.

    A KeyboardInterrupt inside an import is a traceback, or is lost in a library that catches it; and nothing needs
    cleaning up yet. A signal that is ignored, as in a job in the background, stays so.
    """
    if sys.version_info < OLDEST:
        got, oldest = (".".join(map(str, version)) for version in (sys.version_info[:3], OLDEST))
        _end(f"error: {sys.executable} is Python {got}, expected {oldest} or newer", EXIT_UNUSABLE)
    if absent := [name for name in NEEDED if find_spec(name) is None]:
        line = f"error: {sys.executable} has no {', '.join(absent)}: run `make setup` and then .venv/bin/python, or"
        _end(f"{line} `pip install .` with this one", EXIT_UNUSABLE)
    os.environ.update(threads.defaults(os.environ))
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    if sys.stdout is None:
        _end("error: stdout is closed: redirect it to a file, or to /dev/null", EXIT_UNUSABLE)
    try:
        os.getcwd()
    except OSError as error:  # the libraries of PyTorch abort there
        line = f"error: the current folder can't be used ({error.strerror}): was it deleted? cd to another one"
        _end(line, EXIT_UNUSABLE)


def _leave(signum: int, frame: Any) -> None:
    if "--json" in sys.argv:
        with suppress(OSError):
            os.write(1, f"{json.dumps(interrupted)}\n".encode())
    _end("interrupted", EXIT_INTERRUPTED)


def _end(line: str, code: int) -> None:
    with suppress(OSError):  # stderr may be closed
        os.write(2, f"{line}\n".encode())
    os._exit(code)
