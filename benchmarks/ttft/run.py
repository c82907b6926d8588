"""The runners' processes: started cold and warm, in interleaved rounds, within memory and a budget of time."""

import contextlib
import ctypes
import json
import math
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.ttft.runner import totals
from fastvlm.common import threads
from fastvlm.common.children import ROOT

# glibc keeps freed buffers: no block is a mapping of its own, and the heap isn't trimmed (mallopt(3)).
KEEP_BUFFERS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}
_YARDSTICK = {"kind": "yardstick", "name": "yardstick"}
_SETTLE = 0.005  # s before a round, in which the last runner's threads go to sleep
_SHARE_OF_MEMORY = 0.8  # of what is available may be taken by all runners at once
_COLD = 0.05  # of a file may stay in the page cache: what others have mapped does
Specification = Mapping[str, Any]


class RunnerError(Exception):
    """A runner could not be opened, or a round failed: one line. `failed`: its model computed what isn't finite."""

    def __init__(self, line: str, failed: bool = False) -> None:
        super().__init__(line)
        self.failed = failed

    def record(self) -> dict[str, Any]:
        """What is written down of the runner; "passed" false makes the run's exit code."""
        return {"error": str(self)} | ({"passed": False} if self.failed else {})


@dataclass(frozen=True)
class Effort:
    """Processes started of each runner, rounds in each after a warm-up, seconds that a runner may take for all rounds,
    and for its cold pass: one that isn't through by then is stopped."""

    launches: int = 3
    rounds: int = 5
    budget: float = 120.0


class Process:
    """A runner in a process of its own. Raises RunnerError when it doesn't get ready."""

    def __init__(self, specification: Specification) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if specification.get("threads"):
            environment |= threads.environment(specification["threads"])
        if specification.get("keep_buffers"):
            environment |= KEEP_BUFFERS
        command = [specification.get("python") or sys.executable, "-m", "benchmarks.ttft.runner"]
        specification = {**specification, "name": specification["name"].removeprefix("peer:")}
        self.said = tempfile.NamedTemporaryFile(prefix="ttft-", suffix=".log")  # noqa: SIM115  closed by `kill`
        try:
            self.process = subprocess.Popen(
                [*command, json.dumps(specification)],
                cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
            )  # fmt: skip
        except OSError as error:
            self.said.close()
            raise RunnerError(f"{command[0]}: can't be started: {error.strerror}") from None
        self.ready: dict[str, Any] = {}
        self.within(math.inf)
        self.stopped = False

    def within(self, seconds: float, says: str = "") -> None:
        """From now on it has so long: then its process is ended, and a RunnerError says it."""
        self.deadline, self.says = time.perf_counter() + seconds, says

    def open(self) -> dict[str, Any]:
        """Wait until it is loaded."""
        self.ready = self._read()
        return self.ready

    def round(self) -> dict[str, Any]:
        """One round: {"stages": {stage: seconds}, "answer"}."""
        with contextlib.suppress(BrokenPipeError):  # the reading says why
            self._stdin.write("round\n")
            self._stdin.flush()
        return self._read()

    def close(self) -> int:
        """End it -> its peak memory in bytes."""
        with contextlib.suppress(BrokenPipeError):  # as above
            self._stdin.close()
        peak: int = self._read()["peak_bytes"]
        self.process.wait()
        return peak

    def kill(self) -> None:
        """End it at once, if it hasn't ended."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self.said.close()

    @property
    def _stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        left = max(0.0, self.deadline - time.perf_counter())
        watch = threading.Timer(min(left, threading.TIMEOUT_MAX), self._stop)
        watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        if self.stopped:
            raise RunnerError(self.says)
        if not line:
            raise RunnerError(self._why())
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            if not line.endswith("\n"):  # it died while it wrote
                raise RunnerError(self._why()) from None
            raise RunnerError(f"its process wrote what is no JSON: {line.strip()[:80]}") from None
        if "error" in message:
            raise RunnerError(message["error"], message.get("failed", False))
        return message

    def _stop(self) -> None:
        self.stopped = True
        self.process.kill()

    def _why(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "killed by the system (SIGKILL): most likely out of memory"
        said = Path(self.said.name).read_bytes().decode(errors="replace").strip().splitlines()
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return f"its process ended ({name}){': ' + said[-1].strip() if said else ''}"


@contextlib.contextmanager
def processes() -> Iterator[Callable[..., Process]]:
    """Yields what starts a runner's process, which may have a limit as in `Process.within`; none is left when the block
    ends, however it ends."""
    started: list[Process] = []

    def start(specification: Specification, *limit: Any) -> Process:
        process = Process(specification)
        started.append(process)
        if limit:
            process.within(*limit)
        process.open()
        return process

    try:
        yield start
    finally:
        for process in started:
            process.kill()


# Cold


def drop_from_cache(folder: Path) -> bool:
    """Drop a folder's files from the system's page cache; whether they are gone (False where that can't be known)."""
    if not hasattr(os, "posix_fadvise"):
        return False
    gone = True
    for path in (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            gone &= cached(file.fileno()) < _COLD
    return gone


def cached(descriptor: int) -> float:
    """The share of a file's pages that are in the page cache (mincore(2)); 1 where the system doesn't say."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        address, length = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped))
        failed = ctypes.CDLL(None).mincore(address, length, pages)
        del start  # or the map can't be closed
    return 1.0 if failed else sum(page & 1 for page in pages) / len(pages)


# A point


def measure(
    specifications: Sequence[Specification], effort: Effort, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], bool]:
    """Every runner in interleaved rounds -> what was measured of each, and whether they had to take turns.

    Each gets {"name", "settings", "cold": {...}, "launches": [{"load_s", "rounds": [{"stages", "yardstick"}]}],
    "peak_bytes", "note"}, or {"name", "error"}. A specification with "absent" only says why it can't run.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in specifications:
        if "absent" not in one:
            say(f"{one['name']}: cold")
        found[one["name"]] = {
            "name": one["name"],
            **({"error": one["absent"]} if "absent" in one else _cold(one, effort.budget)),
        }
    going = {one["name"]: one for one in specifications if "error" not in found[one["name"]]}
    plan = {name: share(found[name]["cold"], effort) for name in going}
    for name, (launches, rounds) in plan.items():
        found[name]["note"] = _note(found[name]["cold"], launches, rounds, effort)
        if not launches:  # so slow that its cold round is all there is
            found[name]["launches"] = [{"load_s": None, "rounds": [found[name]["cold"]["round"]]}]
    turns = sum(found[name]["peak_bytes"] for name in going) > _SHARE_OF_MEMORY * psutil.virtual_memory().available
    for launch in range(effort.launches):
        block = [one for name, one in going.items() if launch < plan[name][0] and "error" not in found[name]]
        random.Random(launch).shuffle(block)
        say(f"block {launch + 1} of {effort.launches}: {', '.join(one['name'] for one in block) or 'nothing'}")
        for together in [[one] for one in block] if turns else [block]:
            _block(together, {name: rounds for name, (_, rounds) in plan.items()}, launch, found, effort.budget)
    return list(found.values()), turns


def trial(specification: Specification, rounds: int, enough: float) -> dict[str, float]:
    """One process: the fastest of some rounds by ttft_paper, and the first one's, in seconds: {"ttft_paper", "first"}.

    Raises RunnerError, also when the first round takes more than `enough` seconds.
    """
    with processes() as start:
        process = start({**specification, "until": "prefill"})
        process.within(enough, f"given up after {enough:.3g} s")
        first = totals(process.round()["stages"])["ttft_paper"]
        process.within(math.inf)
        times = [totals(process.round()["stages"])["ttft_paper"] for _ in range(rounds)]
        process.close()
    return {"ttft_paper": min(times, default=first), "first": first}


def _cold(specification: Specification, budget: float) -> dict[str, Any]:
    """Load and answer once, alone, with the model's files out of the page cache."""
    late = f"stopped after {budget:.3g} s, the budget: loading and one round, cold, take longer: no figures"
    dropped = drop_from_cache(Path(specification["files"])) if specification.get("files") else False
    try:
        with processes() as start:
            begun = time.perf_counter()
            process = start(specification, budget, late)
            answered = process.round()
            took, peak = time.perf_counter() - begun, process.close()
    except RunnerError as error:
        return error.record()
    round_ = {**_kept(answered), "yardstick": None}
    cold = {"dropped": dropped, "load_s": process.ready["load_s"], "import_s": process.ready["import_s"]}
    cold |= {"round": round_, "process_s": took}
    return {
        "settings": process.ready["settings"], "delay": process.ready["delay"], "answer": answered.get("answer"),
        "cold": cold, "launches": [], "peak_bytes": peak, "note": "",
    }  # fmt: skip


def share(cold: Mapping[str, Any], effort: Effort) -> tuple[int, int]:
    """How many launches, and rounds in each, a runner gets so that it keeps to its budget. (0, 0): its cold round was
    all."""
    load = cold["load_s"] + cold["import_s"]
    pace = sum(cold["round"]["stages"].values())
    if load + 2 * pace > effort.budget:
        return 0, 0
    launches = min(effort.launches, int(effort.budget / (load + 2 * pace)))
    return launches, max(1, min(effort.rounds, int((effort.budget / launches - load) / pace) - 1))


def _note(cold: Mapping[str, Any], launches: int, rounds: int, effort: Effort) -> str:
    if (launches, rounds) == (effort.launches, effort.rounds):
        return ""
    pace = sum(cold["round"]["stages"].values())
    if not launches:
        return f"one round, cold: it takes {pace:.0f} s, and the budget is {effort.budget:.0f} s"
    return f"{launches} × {rounds} rounds: one takes {pace:.0f} s, and the budget is {effort.budget:.0f} s"


def _block(
    specifications: Sequence[Specification], rounds: Mapping[str, int], launch: int,
    found: dict[str, dict[str, Any]], budget: float,
) -> None:  # fmt: skip
    """Start these runners anew, warm them up, and let them do their rounds in an order that changes; add to `found`."""
    limit = budget, f"stopped after {budget:.3g} s, the budget, in a round: the cold one was faster"
    with processes() as start:
        yardstick = start(_YARDSTICK)
        yardstick.round()
        running: dict[str, Process] = {}
        for one in specifications:
            name = one["name"]
            with _failing(found[name]):
                running[name] = start({key: value for key, value in one.items() if key != "keep"}, *limit)
                running[name].within(*limit)
                running[name].round()
                found[name]["launches"].append({"load_s": running[name].ready["load_s"], "rounds": []})
        for number in range(max((rounds[name] for name in running), default=0)):
            order = [name for name in running if number < rounds[name] and "error" not in found[name]]
            random.Random(f"{launch} {number}").shuffle(order)
            for name in order:
                time.sleep(_SETTLE)
                before = _kept(yardstick.round())
                with _failing(found[name]):
                    running[name].within(*limit)
                    answered = running[name].round()
                    found[name]["launches"][-1]["rounds"].append({**_kept(answered), "yardstick": before})
                    found[name]["answer"] = answered.get("answer")
        for name, process in running.items():
            if "error" in found[name]:
                continue
            with _failing(found[name]):
                process.within(math.inf)
                found[name]["peak_bytes"] = max(found[name]["peak_bytes"], process.close())


def _kept(answered: Mapping[str, Any]) -> dict[str, Any]:
    return {"stages": answered["stages"], "waited": answered["waited"]}


@contextlib.contextmanager
def _failing(record: dict[str, Any]) -> Iterator[None]:
    """What goes wrong with one runner is written down, and the others go on."""
    try:
        yield
    except RunnerError as error:
        record |= error.record() if "error" not in record else {}
