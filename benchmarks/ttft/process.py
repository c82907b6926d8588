"""A runner's process, as the process that measures sees it (`runner.py` is the other side)."""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastvlm.common import threads
from fastvlm.common.children import ROOT

# glibc keeps freed buffers: no block is a mapping of its own, and the heap isn't trimmed (mallopt(3)).
KEEP_BUFFERS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}
Specification = Mapping[str, Any]


class RunnerError(Exception):
    """A runner could not be opened, or a round failed: one line. `failed`: its model computed what isn't finite."""

    def __init__(self, line: str, failed: bool = False) -> None:
        super().__init__(line)
        # the runner's record; "passed" false decides the run's exit code
        self.record: dict[str, Any] = {"error": line} | ({"passed": False} if failed else {})


class Process:
    """A runner in a process of its own. Whatever it does raises RunnerError where that fails or takes too long.

    Attributes:
        ready: the message of `open`: "settings", "import_s", "load_s", "delay".
    """

    def __init__(self, specification: Specification) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if specification.get("threads"):
            environment |= threads.environment(specification["threads"])
        if specification.get("keep_buffers"):
            environment |= KEEP_BUFFERS
        python = specification.get("python") or sys.executable
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed by `kill`
        try:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.ttft.runner", json.dumps(specification)],
                cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True,
            )  # fmt: skip
        except OSError as error:
            self.stderr.close()
            raise RunnerError(f"{python}: can't be started: {error.strerror}") from None
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready: dict[str, Any] = {}
        self.limit(math.inf)

    def limit(self, seconds: float, message: str = "") -> None:
        """Give it so much time from now on; then the process is ended, and RunnerError has the message."""
        self.deadline, self.message = time.perf_counter() + seconds, message

    def open(self) -> None:
        """Wait until the model is loaded."""
        self.ready = self._read()

    def round(self) -> dict[str, Any]:
        """One round: {"stages": {stage: seconds}, "waited": {stage: seconds}, "answer"}."""
        with contextlib.suppress(BrokenPipeError):  # reading the answer raises the reason
            self.stdin.write("round\n")
            self.stdin.flush()
        return self._read()

    def close(self) -> int:
        """End it; returns its peak memory in bytes."""
        with contextlib.suppress(BrokenPipeError):  # as above
            self.stdin.close()
        peak: int = self._read()["peak_bytes"]
        self.process.wait()
        return peak

    def kill(self) -> None:
        """End it at once, if it hasn't ended."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                pipe.close()

    def _read(self) -> dict[str, Any]:
        left = None if self.deadline == math.inf else max(0.0, self.deadline - time.perf_counter())
        if not select.select([self.stdout], [], [], left)[0]:
            self.process.kill()
            raise RunnerError(self.message)
        line = self.stdout.readline()
        if not line.endswith("\n"):  # it died, perhaps while it wrote
            raise RunnerError(self._ending())
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            raise RunnerError(f"its process wrote what is no JSON: {line.strip()[:80]}") from None
        if "error" in message:
            raise RunnerError(message["error"], message.get("failed", False))
        return message

    def _ending(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "killed by the system (SIGKILL): most likely out of memory"
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return f"its process ended ({name}){': ' + lines[-1].strip() if lines else ''}"


@contextlib.contextmanager
def processes() -> Iterator[Callable[..., Process]]:
    """Yields a function that starts a runner's process and opens it, within a limit as in `Process.limit` if one is
    given; no process is left when the block ends, however it ends."""
    started: list[Process] = []

    def start(specification: Specification, *limit: Any) -> Process:
        process = Process(specification)
        started.append(process)
        if limit:
            process.limit(*limit)
        process.open()
        return process

    try:
        yield start
    finally:
        for process in started:
            process.kill()
