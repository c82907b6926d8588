"""Run a command in a process of its own and report its wall time and peak memory.

As a program (`python -m benchmarks.measure RESULT COMMAND...`) it is the small process in between. Linux counts the
parent's memory into a child that it starts, so a large parent would measure itself; this one imports nothing of ours.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measured:
    """Wall time in s, peak resident memory of the largest process in GB (1e9 bytes), exit code, and stdout."""

    seconds: float
    peak_gb: float
    returncode: int
    stdout: str


def measure(command: Sequence[str], say: Callable[[str], None]) -> Measured:
    """Run `command` from the repository's root; `say` gets each line of its stderr as it comes."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "stdout"), "w+") as printed:
        result = Path(folder, "result.json")
        between = [sys.executable, "-m", "benchmarks.measure", str(result), *command]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(between, cwd=ROOT, stdout=printed, stderr=subprocess.PIPE, env=environment) as child:
            try:
                for line in child.stderr or ():
                    say(line.decode(errors="replace").rstrip().rpartition("\r")[2])  # of a bar what is seen last
            except BaseException:
                child.kill()
                raise
        figures = json.loads(result.read_text())
        printed.seek(0)
        return Measured(figures["seconds"], figures["peak_bytes"] / 1e9, child.returncode, printed.read())


def _main(result: str, *command: str) -> int:
    start = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    Path(result).write_text(json.dumps({"seconds": seconds, "peak_bytes": peak * unit}))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
