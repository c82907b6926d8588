"""Child processes: one runs to its end, what it logs is relayed, and its result is one JSON document.

A child keeps the contract of every command of the project: the result is the last line of stdout that is a JSON object,
an error is one line on stderr with exit code 1 (a check failed) or 2 (unusable input). `answer` is the child's side.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.common.cli import EXIT_CHECK_FAILED, one_line
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.start import EXIT_UNUSABLE

ROOT = Path(__file__).resolve().parents[2]  # where Python finds our packages
_GRACE = 5.0  # seconds from SIGTERM to SIGKILL
_READ = 32 << 20  # bytes at the end of stdout that are read
_ERROR = "error: "


class ChildFailed(CheckFailed):
    """A child process that gave no result: it crashed, was killed, ran out of time, or printed something else."""


@dataclass(frozen=True)
class Finished:
    """How a child process ended.

    Attributes:
        returncode: the exit code; negative for the number of the signal that ended it.
        seconds: wall time. peak_bytes: resident memory of the largest process at its peak.
        stdout, last_line: the end of stdout, and the last line of stderr that is not empty.
        timed_out: whether it was ended because its time was up.
    """

    returncode: int
    seconds: float
    peak_bytes: int
    stdout: str
    last_line: str = ""
    timed_out: bool = False

    @property
    def peak_gb(self) -> float:
        """The peak in GB (10^9 bytes)."""
        return self.peak_bytes / 1e9

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        if self.timed_out:
            return f"was stopped after {self.seconds:.0f} s"
        if self.returncode >= 0:
            return f"ended with exit code {self.returncode}"
        names = {number.value: number.name for number in signal.Signals}
        return f"was ended by {names.get(-self.returncode, f'signal {-self.returncode}')}"

    def document(self, child: str) -> dict[str, Any]:
        """The child's result. Raises what the child raised: UserError or CheckFailed; ChildFailed, which names `child`,
        where it gave neither."""
        if self.returncode in (EXIT_CHECK_FAILED, EXIT_UNUSABLE) and self.last_line.startswith(_ERROR):
            raised = UserError if self.returncode == EXIT_UNUSABLE else CheckFailed
            raise raised(self.last_line.removeprefix(_ERROR))
        if self.returncode:
            raise ChildFailed(f"{child} {self.ending}" + (f": {self.last_line}" if self.last_line else ""))
        # Core ML's compiler, whose output C buffers, may print behind it.
        for line in reversed(self.stdout.splitlines()):
            with suppress(ValueError, RecursionError):
                if line.startswith("{"):
                    document: dict[str, Any] = json.loads(line)
                    return document
        last = (self.stdout.strip().splitlines() or [""])[-1]
        raise ChildFailed(f"{child} printed {last[:80]!r}, expected a JSON object")


def run(
    command: Sequence[str],
    say: Callable[[str], None] | None = None,
    *,
    stdin: bytes = b"",
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run a command to its end, in a process group of its own that ends with this call, whatever way that ends.

    Args:
        say: called with each line of stderr as it comes, but an error's, which is `Finished.last_line`.
        timeout: seconds until it is stopped; None waits forever.
        environment: variables beside ours; PYTHONPATH leads to our packages.

    Raises ChildFailed where the command can't be started.
    """
    if shutil.which(command[0]) is None:
        raise ChildFailed(f"{command[0]}: can't be started: no such program")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as printed,
    ):
        given.write(stdin)
        given.seek(0)
        result = Path(folder, "result.json")
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("peak.py")), str(result), *command],
            stdin=given, stdout=printed, stderr=subprocess.PIPE, env=variables, start_new_session=True,
        )  # fmt: skip
        assert process.stderr is not None
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            _end(process)

        timer = threading.Timer(timeout or 0, stop)
        try:
            if timeout is not None:
                timer.start()
            last = ""
            for raw in process.stderr:
                line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]  # of a progress bar, its last state
                last = line or last
                if say is not None and not line.startswith(_ERROR):
                    say(line)
            process.wait()
        finally:
            timer.cancel()
            _end(process)
            process.stderr.close()
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - _READ))
        figures: dict[str, Any] = {"returncode": process.returncode, "seconds": timeout or 0.0, "peak_bytes": 0}
        with suppress(OSError, ValueError):  # none where it was stopped
            figures = json.loads(result.read_text())
        return Finished(
            **figures, stdout=printed.read().decode(errors="replace"), last_line=last, timed_out=stopped.is_set()
        )


def answer(act: Callable[[], Mapping[str, Any]]) -> int:
    """The child's side: print what `act` returns as JSON, or the error that it raises; returns the exit code."""
    try:
        print(json.dumps(act(), allow_nan=False), flush=True)
    except (UserError, CheckFailed, OSError, MemoryError) as error:
        print(f"{_ERROR}{one_line(error)}", file=sys.stderr, flush=True)
        return EXIT_CHECK_FAILED if isinstance(error, CheckFailed) else EXIT_UNUSABLE
    return 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End every process of the group."""
    for number, grace in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
