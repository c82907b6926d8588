"""Run a command and write its exit code, wall time and peak memory: `python peak.py RESULT COMMAND...`.

The process between `children.run` and the child that it measures. Linux counts the memory of a parent into that of a
child that it forks, so a large parent would measure itself: this one imports the standard library only, and little.
"""

import json
import resource
import subprocess
import sys
import time


def main(result: str, *command: str) -> None:
    """Write {"returncode", "seconds", "peak_bytes"} to the file `result`; a negative code is the number of a signal."""
    start = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    with open(result, "w") as file:
        json.dump({"returncode": code, "seconds": seconds, "peak_bytes": peak * unit}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
