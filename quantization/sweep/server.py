"""The process that a sweep's points are forked from: it has imported the libraries that they need.

As a program (`python -m quantization.sweep.server MODULE:FUNCTION`), started by `sweep_point`, which sends it for each
point a connection and a file for the log. On the connection comes the task, and back go the error and the exit code;
its end, in whatever way, ends the point and all that it started.
"""

import errno
import gc
import importlib
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvlm.common.cli import one_line
from fastvlm.common.errors import CheckFailed
from fastvlm.common.staging import write_file

NO_SPACE = 3  # exit code of a point that found the disk full: no other point would fare better
_FORKS = sys.platform == "linux"  # with libraries loaded; those of macOS must not be used in a fork


def result_path(work: Path, key: str) -> Path:
    """The file of a point's result."""
    return work / "points" / f"{key}.json"


def apart(act: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a process of its own, so that its memory is not this one's: in a fork where that is
    safe, which has imported everything already. Raises what that raised; CheckFailed where it was killed."""
    safe = _FORKS and threading.active_count() == 1
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork" if safe else "spawn")) as pool:
        try:
            return pool.submit(act, *arguments).result()
        except BrokenProcessPool:
            raise CheckFailed(f"{act.__name__}: its process was killed, most likely for want of memory") from None


def _serve(measure: str) -> int:
    """Fork for each connection that comes on stdin, a socket, until that ends."""
    with suppress(Exception):  # a point that imports it again says what is wrong
        module = importlib.import_module(measure.partition(":")[0])
        if _FORKS and hasattr(module, "prepare"):
            module.prepare()
    gc.freeze()  # collections in the forks would copy all pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    tasks = socket.socket(fileno=0)
    while files := socket.recv_fds(tasks, 1, 2)[1]:
        if os.fork() == 0:
            tasks.detach()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _keep(*files)
        for file in files:
            os.close(file)
    return 0


def _keep(line: int, log: int) -> None:
    """Be the head of a point's process group: have it measured in a fork, say how that ended, end what is left."""
    os.setsid()
    os.dup2(log, 1)  # whatever is printed goes to the log
    os.dup2(log, 2)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection = socket.socket(fileno=line)
    if task := connection.makefile().readline():
        child = os.fork()
        if child == 0:
            os._exit(_measured(json.loads(task), connection))
        threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(OSError):
            connection.sendall(f"\n{code}".encode())
    os.killpg(0, signal.SIGKILL)  # us, too


def _end_with_parent(connection: socket.socket) -> None:
    connection.recv(1)  # returns when the other end is closed, whatever way the parent ended
    os.killpg(0, signal.SIGKILL)


def _measured(task: Mapping[str, Any], connection: socket.socket) -> int:
    """Measure the point and write its result -> exit code; an error is sent."""
    try:
        module, _, name = task["measure"].partition(":")
        start = time.perf_counter()
        result = _plain(getattr(importlib.import_module(module), name)(task["point"], task["settings"]))
        result["timings"] |= {"seconds": time.perf_counter() - start, "peak_bytes": _peak_bytes()}
        document = json.dumps({"key": task["key"], **result}, allow_nan=False)
        write_file(result_path(Path(task["work"]), task["key"]), document.encode())
    except Exception as error:
        traceback.print_exc()
        connection.sendall(one_line(error).encode())
        return NO_SPACE if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


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
    sys.exit(_serve(sys.argv[1]))
