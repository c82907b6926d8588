"""One point of a sweep in a process of its own: a crash, or the system's killing it for memory, is its failure alone.

The processes are forks of one that has imported the libraries (multiprocessing's "forkserver"); each ends with the
process that started it, in whatever way that ends.
"""

import importlib
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from fastvlm.common.errors import CheckFailed
from fastvlm.common.staging import write_file

_server = multiprocessing.get_context("forkserver")
_context: multiprocessing.context.BaseContext = _server


def apart(act: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a process of its own, so that its memory is not this one's. Raises what that raised;
    CheckFailed where it was killed."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # as Dask's workers are
    if _context is _server:
        _start_server()
    with ProcessPoolExecutor(1, _context, _begin) as pool:
        try:
            return pool.submit(act, *arguments).result()
        except BrokenProcessPool:
            raise CheckFailed(f"{act.__name__}: its process was killed, most likely for want of memory") from None
        except KeyboardInterrupt:
            end_children()
            raise


def end_children() -> None:
    """End all processes that this one has started by `apart`, and the one that they are forks of."""
    for child in multiprocessing.active_children():
        child.kill()
    if server := forkserver._forkserver._forkserver_pid:  # type: ignore[attr-defined]
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


def run_point(task: Mapping[str, Any]) -> None:
    """Measure one point apart and write its result. Raises what that raised; then "WORK/logs/KEY.log" stays.

    task: "measure", a module's function; "point" and "settings", its arguments; "work" and "key", where the result
    goes; "libraries", modules to import once for all points; "environment", variables.
    """
    if sys.platform == "linux":  # the libraries of macOS must not be used in a fork
        _server.set_forkserver_preload([*task["libraries"]])
    apart(_measure, task)


def result_path(work: Path, key: str) -> Path:
    """The file of a point's result."""
    return work / "points" / f"{key}.json"


def _start_server() -> None:
    """Start the process that points are forked from, deaf to Ctrl-C: while it imports, that would be its traceback."""
    resource_tracker.ensure_running()  # it changes the mask itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    global _context
    os.setsid()  # Ctrl-C is for the sweep, which then ends this process
    if sys.platform == "linux":
        _context = multiprocessing.get_context("fork")  # what a point has exported apart needs the same libraries
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _measure(task: Mapping[str, Any]) -> None:
    os.environ.update(task["environment"])
    logged = task["work"] / "logs" / f"{task['key']}.log"
    logged.parent.mkdir(parents=True, exist_ok=True)
    with logged.open("w") as log:
        os.dup2(log.fileno(), 1)  # whatever is printed goes to the log
        os.dup2(log.fileno(), 2)
    try:
        for name in task["libraries"]:
            importlib.import_module(name)
        start = time.perf_counter()
        result = _plain(task["measure"](task["point"], task["settings"]))
        timings = result["timings"]
        peak = peak_bytes() + timings.pop("peak_beside", 0)  # and of processes that the measurement has had beside it
        timings |= {"seconds": time.perf_counter() - start, "peak_bytes": peak}
        document = json.dumps({"key": task["key"], **result}, allow_nan=False)
        write_file(result_path(task["work"], task["key"]), document.encode())
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        raise
    logged.unlink()


def _plain(value: Any) -> Any:
    """Mappings and sequences copied for JSON; figures that are not finite as None."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_bytes() -> int:
    """The largest resident memory of this process. Of a fork that has executed no other program it is its own."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
