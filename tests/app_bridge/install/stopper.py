"""Runs `app_bridge` commands and stops each at a chosen step. A process of its own, small enough to fork for each.

    python -m tests.app_bridge.install.stopper   <- {"arguments", "step", "how", "two_steps"}, one JSON a line
                                         -> "stopped" or "ended", one word a line

A step is a system call that writes, as Python's audit hooks announce it, or the middle of a copied file.
"""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from app_bridge.__main__ import build_parser
from app_bridge.app import facts, sources
from app_bridge.validation import validate
from fastvlm.common import staging
from fastvlm.common.cli import run

_WRITING = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.utime", "fcntl.ioctl"}
_EXCHANGE = ("renameat2", "renamex_np")


class Steps:
    """Counts them; `how` happens at number `step`."""

    def __init__(self, step: int, how: str) -> None:
        self.count, self.step, self.how = 0, step, how

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            counts = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        else:
            counts = event in _WRITING or (event == "ctypes.dlsym" and arguments[1] in _EXCHANGE)
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

    def copyfile(self, source: Path, target: Path) -> None:
        body = Path(source).read_bytes()
        with open(target, "wb", buffering=0) as file:
            file.write(body[: len(body) // 2])
            self.reached()
            file.write(body[len(body) // 2 :])


def naive(new: str, model: str) -> None:
    """What a shell script would do."""
    shutil.rmtree(model)
    shutil.copytree(new, model, copy_function=lambda source, target: shutil.copyfile(source, target))


def stop(job: dict[str, Any]) -> int:
    """In a process that may die; 0 if the command had fewer steps."""
    steps = Steps(job["step"], job["how"])
    shutil.copyfile = steps.copyfile  # type: ignore[assignment]
    if job["two_steps"]:
        staging.exchange = lambda a, b: False
    sys.addaudithook(steps.hook)
    if job["arguments"][0] == "naive":
        naive(*job["arguments"][1:])
    else:
        run(build_parser, job["arguments"])
    return int(steps.count >= steps.step)


def main() -> None:
    # What the app's sources say and what is found in artefacts is other tests' matter; waiting for the disk is for
    # power cuts, which aren't tested.
    sources.read = lambda app: facts.table()
    validate.validate = lambda artefact, wanted: []
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    for line in sys.stdin:
        child = os.fork()
        if not child:
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            status = 1
            try:
                status = stop(json.loads(line))
            finally:
                os._exit(status)
        print("stopped" if os.waitpid(child, 0)[1] else "ended", flush=True)


if __name__ == "__main__":
    main()
