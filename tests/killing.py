"""Stops a function at each step that changes the disk, so that a test can look at what it leaves.

`stopper` starts a process that imports the function once and forks a child for each call. A step is a change of the
file system, as Python's audit hooks announce it, or the middle of a copied file.
"""

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.utime", "os.truncate", "fcntl.ioctl"}
_EXCHANGE = ("renameat2", "renamex_np")


@contextmanager
def stopper(target: str) -> Iterator[Callable[..., bool]]:
    """Yield `stopped(*arguments, step=, how="kill")`: call `target` ("module:function"), stop it at that step (counted
    from 1), and say whether it came to it; False: the call ended before, as always at step 0.

    The arguments travel as JSON, paths as text. `how`: "kill", "interrupt" (KeyboardInterrupt), "full disk" (OSError).
    """
    command = [sys.executable, "-m", "tests.killing", target]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        into, out = process.stdin, process.stdout
        assert into and out

        def stopped(*arguments: object, step: int, how: str = "kill") -> bool:
            print(json.dumps([arguments, step, how], default=str), file=into, flush=True)
            answer = out.readline().strip()
            assert answer in ("stopped", "ended"), f"{target}: {answer or 'the process ended'}"
            return answer == "stopped"

        yield stopped
        into.close()


class _Steps:
    """Counts the steps; `how` happens at number `step`."""

    def __init__(self, step: int, how: str) -> None:
        self.count, self.step, self.how = 0, step, how

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            counts = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        else:
            counts = event in _CHANGES or (event == "ctypes.dlsym" and arguments[1] in _EXCHANGE)
        if counts:
            self.reached()

    def reached(self) -> None:
        self.count += 1
        if self.count != self.step:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "interrupt":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def copyfile(self, source: Path, target: Path, **options: bool) -> Path:
        body = Path(source).read_bytes()
        with open(target, "wb", buffering=0) as file:
            file.write(body[: len(body) // 2])
            self.reached()
            file.write(body[len(body) // 2 :])
        return target


def _call(function: Callable[..., object], arguments: list[Any], step: int, how: str) -> str:
    """In a process that may die."""
    steps = _Steps(step, how)
    shutil.copyfile = steps.copyfile  # type: ignore[assignment]
    sys.addaudithook(steps.hook)
    try:
        function(*arguments)
    except BaseException as error:
        if not step or steps.count < step:
            return repr(error)
    return "stopped" if step and steps.count >= step else "ended"


def main(target: str) -> None:
    """Answer each line of stdin, [arguments, step, how], in a child."""
    module, _, name = target.partition(":")
    function, pipe = getattr(importlib.import_module(module), name), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        answer, into = os.pipe()
        if not (child := os.fork()):
            os.dup2(1, 2)
            os.write(into, f"{_call(function, *json.loads(line))}\n".encode())
            os._exit(0)
        killed = os.waitpid(child, 0)[1]  # only then are its locks free
        os.write(pipe, b"stopped\n" if killed else os.read(answer, 1 << 16))
        os.close(answer)
        os.close(into)


if __name__ == "__main__":
    main(sys.argv[1])
