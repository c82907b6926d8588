"""One point of a sweep in a process of its own: a crash, or the system's killing it for memory, is its failure alone.

`run_point` runs in a thread of the sweep, or on a worker of a Dask cluster. The first point of a run starts the server
(`sweep_server`) that has them measured, here and on each worker; all of it ends when this process ends.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastvlm.common import threads

ROOT = Path(__file__).resolve().parents[2]

_turn = threading.Condition()
_points: dict[socket.socket, str] = {}  # the connections to points -> the run that they belong to
_servers: dict[str, tuple["subprocess.Popen[bytes]", socket.socket]] = {}  # of each run
_used = 0  # bytes, as estimated, of what this process' points need
_stopped: set[str] = set()  # runs


def run_point(task: Mapping[str, Any]) -> tuple[int, str]:
    """Measure one point in a process of its own: its exit code (0: the result is written), and its error in a line.

    task (JSON): "run", an id that `stop` takes; "measure", as "module:function"; "point" and "settings", its arguments;
    "work" and "key", where the result goes; "bytes", what it may need, of "limit" bytes in all (None: the Dask
    worker's); "threads" (None: as the environment says).
    """
    with _room(task) as admitted:
        if not admitted:
            return 1, "stopped"
        logged = Path(task["work"]) / "logs" / f"{task['key']}.log"
        logged.parent.mkdir(parents=True, exist_ok=True)
        with logged.open("w") as errors, _connected(task, errors) as connection:
            with suppress(OSError):  # ended at once: its exit code tells
                connection.sendall(json.dumps(task).encode() + b"\n")
            error, _, code = connection.makefile().read().rpartition("\n")
    return _outcome(int(code or -signal.SIGKILL), error, logged)  # none: nobody was left to say it


def _outcome(code: int, error: str, logged: Path) -> tuple[int, str]:
    if code == 0:
        logged.unlink(missing_ok=True)
        return 0, ""
    if code < 0:
        why = ", most likely for want of memory: lower --jobs" if -code == signal.SIGKILL else ""
        return code, f"killed by {signal.Signals(-code).name}{why}"
    return code, error or f"exit {code}"


def stop(run: str) -> None:
    """End a run here: every point that this process has had started, and what starts them; start no more."""
    with _turn:
        _stopped.add(run)
        for connection, owner in _points.items():
            if owner == run:
                _hang_up(connection)
        if run in _servers:
            server, tasks = _servers.pop(run)
            server.kill()
            server.wait()
            tasks.close()
        _turn.notify_all()


def _hang_up(connection: socket.socket) -> None:
    """End a point: its process group does so when the connection ends."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


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
def _connected(task: Mapping[str, Any], errors: Any) -> Iterator[socket.socket]:
    """A connection to a new process for the point, which ends with it."""
    ours, theirs = socket.socketpair()
    with ours:
        with _turn, theirs:
            _points[ours] = task["run"]
            if task["run"] in _stopped:
                _hang_up(ours)
            else:
                socket.send_fds(_server(task), [b"."], [theirs.fileno(), errors.fileno()])
        try:
            yield ours
        finally:
            with _turn:
                del _points[ours]


def _server(task: Mapping[str, Any]) -> socket.socket:
    """The connection to the run's server, which is started where there is none, or no longer."""
    server, tasks = _servers.get(task["run"], (None, None))
    if server is None or tasks is None or server.poll() is not None:
        tasks, theirs = socket.socketpair()
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        number = threads.environment(task["threads"]) if task["threads"] else {}
        with theirs:
            server = subprocess.Popen(
                [sys.executable, "-m", "quantization.sweep.server", task["measure"]],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths} | number,
                start_new_session=True,  # Ctrl-C is for the sweep, which then ends it
            )  # fmt: skip
        _servers[task["run"]] = server, tasks
    return tasks
