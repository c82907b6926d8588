"""Apple's runtime, in a child process: what it does wrong, an abort included, is an error here."""

import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.common.children import ROOT
from fastvlm.common.errors import CheckFailed, UserError
from model_export import artefact
from model_export.config import INTERPRETER
from model_export.coreai import contract, wire
from model_export.coreai.packages import check_installed

_MACOS = 27  # whose Core AI is part of the system
_RUNNING: "weakref.WeakSet[Runtime]" = weakref.WeakSet()


class RuntimeEnded(CheckFailed):
    """The runtime's process ended in the middle of a request, as it does on bytes that it doesn't understand."""


class Runtime:
    """Apple's runtime over one child process, which ends with this object.

    Args:
        units: one of `config.COREAI_UNITS`: the interpreter in coreai-core, or of the system's runtime "CPU" alone,
            "GPU" or "NE" preferred, or "ALL"; None: "ALL" on macOS 27, elsewhere the interpreter.

    Raises:
        UserError: Core AI's packages are not installed, or this system has no runtime of its own.
    """

    def __init__(self, units: str | None = None) -> None:
        check_installed()
        self.units = units or ("ALL" if has_system_runtime() else INTERPRETER)
        if self.units != INTERPRETER and not has_system_runtime():
            raise UserError(
                f"--compute-units {units}: only macOS 27 runs Core AI on its compute units: leave it out, and"
                " coreai-core's interpreter runs the bundle"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="fastvlm-coreai-")
        self._log = Path(self._folder.name, "stderr")
        ours, theirs = socket.socketpair()
        local = self.units == INTERPRETER
        backing = {"USE_LOCAL_COREAI": "1"} if local else {"USE_OS_COREAI": "1", "FASTVLM_COREAI_UNITS": self.units}
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with theirs, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "model_export.coreai.server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                env={**os.environ, "PYTHONPATH": paths, "TMPDIR": self._folder.name, **backing}, start_new_session=True,
            )  # fmt: skip
        self._connection = Connection(ours.detach())
        self._states = 0
        _RUNNING.add(self)
        self.close = weakref.finalize(self, _end, self._connection, self._process, self._folder)

    def load(
        self, role: str, asset: Path, function: str = contract.FUNCTION
    ) -> tuple[list[str], contract.Function | None]:
        """Load an asset's function, after the hash is checked.

        Returns:
            The names of its functions, and the interface of `function` (None: it has none).

        Raises:
            UserError: the asset is not what was exported. RuntimeEnded: it made the runtime crash.
        """
        check_hash(asset)
        request = {"do": "load", "role": role, "path": str(asset.resolve()), "function": function}
        answer, _ = self._ask(request, what=f"{asset}: loading it")
        if "inputs" not in answer:
            return answer["functions"], None
        kinds = ("inputs", "outputs", "states")
        tensors = [
            tuple(contract.Tensor(name, dtype, tuple(shape)) for name, dtype, shape in answer[kind]) for kind in kinds
        ]
        return answer["functions"], contract.Function(*tensors)

    def call(self, role: str, inputs: Mapping[str, np.ndarray], states: "States | None" = None) -> np.ndarray:
        """The one output of a loaded function; `states` are updated."""
        number = None if states is None else states.number
        _, outputs = self._ask({"do": "call", "role": role, "states": number}, inputs, f"running {role}")
        (output,) = outputs.values()
        return output

    def states(self, tensors: tuple[contract.Tensor, ...], context: int) -> "States":
        """States of zeros; an open axis gets `context` positions."""
        self._states += 1
        shapes = {
            tensor.name: [tensor.dtype, [context if size == contract.OPEN else size for size in tensor.shape]]
            for tensor in tensors
        }
        self._ask({"do": "new", "number": self._states, "shapes": shapes}, what="making a KV cache")
        return States(self, self._states)

    def peak_bytes(self) -> int:
        """The largest resident memory of the child process."""
        return int(self._ask({"do": "peak"}, what="asking for its memory")[0]["bytes"])

    def events(self) -> dict[str, int]:
        """What the system's runtime has logged since it loaded the functions: an event's name -> how often."""
        answer, _ = self._ask({"do": "events"}, what="reading the profile")
        return answer["events"]

    def drop(self, number: int) -> None:
        """Free states."""
        if self.close.alive:
            self._ask({"do": "drop", "number": number}, what="freeing a KV cache")

    def _ask(
        self, request: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None, what: str = ""
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            wire.send(self._connection, request, arrays)
            answer, results = wire.receive(self._connection)
        except (EOFError, OSError):
            raise RuntimeEnded(f"{what}: Apple's runtime {self._ending()}") from None
        if "error" in answer:
            raise UserError(f"{what}: Apple's runtime refuses it: {answer['error']}")
        return answer, results

    def _ending(self) -> str:
        """How the child ended, with the last line of its stderr."""
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{how}: {lines[-1][:200]}" if lines else how


class States:
    """States that the runtime keeps, freed with this object."""

    def __init__(self, runtime: Runtime, number: int) -> None:
        self.number = number
        weakref.finalize(self, runtime.drop, number)


def peak_bytes() -> int:
    """The largest resident memory of all child processes that runtimes of this process have now, together."""
    return sum(runtime.peak_bytes() for runtime in _RUNNING if runtime.close.alive)


def has_system_runtime() -> bool:
    """Whether this is macOS 27 or later."""
    return sys.platform == "darwin" and int(platform.mac_ver()[0].partition(".")[0] or 0) >= _MACOS


def check_hash(asset: Path) -> None:
    """Raise UserError where an asset's program is not what its main.hash says; the runtime doesn't look."""
    program, stored = asset / contract.PROGRAM, asset / contract.PROGRAM_HASH
    for path in (program, stored):
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: missing: expected an asset with {contract.PROGRAM}: export again")
    digest = artefact.hash_file(program)["sha256"]
    if stored.read_bytes() != bytes.fromhex(digest):
        raise UserError(f"{program}: changed: its sha256 is not that of {contract.PROGRAM_HASH}: export again")


def _end(connection: Connection, process: "subprocess.Popen[bytes]", folder: tempfile.TemporaryDirectory[str]) -> None:
    connection.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    folder.cleanup()
