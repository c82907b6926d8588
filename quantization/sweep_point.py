"""One point of a sweep in a process of its own: a crash, or the system's killing it for memory, is its failure alone.

`run_point` runs in a thread of the sweep, or on a worker of a Dask cluster, and starts the child. As a program
(`python -m quantization.sweep_point`) it is the child, which ends when whoever started it ends, in whatever way.
"""

import errno
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastvlm import threads
from fastvlm.cli import one_line
from fastvlm.staging import write_file

ROOT = Path(__file__).resolve().parent.parent
NO_SPACE = 3  # exit code of a child that found the disk full: no other point would fare better

_turn = threading.Condition()
_children: dict["subprocess.Popen[str]", str] = {}  # -> the run that it belongs to
_used = 0  # bytes, as estimated, of what this process' children need
_stopped: set[str] = set()  # runs


def result_path(work: Path, key: str) -> Path:
    """Where a point's result is, or will be."""
    return work / "points" / f"{key}.json"


def run_point(task: Mapping[str, Any]) -> tuple[int, str]:
    """Measure one point in a child process: its exit code (0: the result is written), and its error in a line.

    task (JSON): "run", an id that `stop` takes; "measure", as "module:function"; "point" and "settings", its arguments;
    "work" and "key", where the result goes; "bytes", what it may need, of "limit" bytes in all (None: the Dask
    worker's); "threads" (None: as the environment says).
    """
    with _room(task) as admitted:
        if not admitted:
            return 1, "stopped"
        logged = Path(task["work"]) / "logs" / f"{task['key']}.log"
        logged.parent.mkdir(parents=True, exist_ok=True)
        with logged.open("w") as errors, _child_of(task, errors) as child:
            assert child.stdin and child.stdout
            with suppress(BrokenPipeError):  # died at once: its exit code tells
                child.stdin.write(json.dumps(task) + "\n")
                child.stdin.flush()  # and stays open: its end tells the child that we are gone
            said = child.stdout.read().strip()
            code = child.wait()
            _kill(child)  # whatever it started and left
    if code == 0:
        logged.unlink(missing_ok=True)
        return 0, ""
    if code < 0:
        why = ", most likely for want of memory: lower --jobs" if -code == signal.SIGKILL else ""
        return code, f"killed by {signal.Signals(-code).name}{why}"
    return code, said or f"exit {code}"


def stop(run: str) -> None:
    """End every point of a run that this process has started, and start no more."""
    with _turn:
        _stopped.add(run)
        for child, owner in _children.items():
            if owner == run:
                _kill(child)
        _turn.notify_all()


def _kill(child: "subprocess.Popen[str]") -> None:
    """End a point's child and all that it started: they are a group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def _room(task: Mapping[str, Any]) -> Iterator[bool]:
    """Wait until the point's estimate fits beside what runs here, or nothing runs; False when its run was stopped."""
    global _used
    need, limit = task["bytes"], task["limit"] or _worker_limit()
    with _turn:
        _turn.wait_for(lambda: task["run"] in _stopped or _used == 0 or _used + need <= limit)
        _used += need
    try:
        yield task["run"] not in _stopped
    finally:
        with _turn:
            _used -= need
            _turn.notify_all()


def _worker_limit() -> float:
    """The memory limit in bytes of the Dask worker that runs this; infinite where it has none."""
    from distributed import get_worker

    return get_worker().memory_manager.memory_limit or math.inf  # type: ignore[attr-defined]


@contextmanager
def _child_of(task: Mapping[str, Any], errors: Any) -> Iterator["subprocess.Popen[str]"]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    number = threads.environment(task["threads"]) if task["threads"] else {}
    with subprocess.Popen(
        [sys.executable, "-m", "quantization.sweep_point"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env=os.environ | {"PYTHONPATH": paths} | number,
        start_new_session=True,  # a group of its own: Ctrl-C is for the sweep, which then ends it
    ) as child:  # fmt: skip
        with _turn:
            _children[child] = task["run"]
            if task["run"] in _stopped:
                _kill(child)
        try:
            yield child
        finally:
            with _turn:
                del _children[child]


def _child() -> int:
    """Measure the point on stdin's first line and write its result; an error goes to stdout."""
    channel = os.dup(1)
    os.dup2(2, 1)  # whatever is printed goes to the log
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        module, _, name = task["measure"].partition(":")
        start = time.perf_counter()
        result = _plain(getattr(importlib.import_module(module), name)(task["point"], task["settings"]))
        result["timings"] |= {"seconds": time.perf_counter() - start, "peak_bytes": _peak_bytes()}
        document = json.dumps({"key": task["key"], **result}, allow_nan=False)
        write_file(result_path(Path(task["work"]), task["key"]), document.encode())
    except Exception as error:
        traceback.print_exc()
        os.write(channel, one_line(error).encode())
        return NO_SPACE if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) else 1
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the other end is closed, whatever way the parent ended
    os.killpg(0, signal.SIGKILL)  # us, and what we started


def _plain(value: Any) -> Any:
    """Mappings and sequences copied for JSON; figures that are not finite as None."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _peak_bytes() -> int:
    """The largest resident memory of this process; getrusage would count its parent's in on Linux."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    sys.exit(_child())
