"""A point of `fastvlm ttft`: its runners cold and warm, in interleaved rounds, within memory and a budget."""

import contextlib
import ctypes
import math
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ttft.process import Process, RunnerError, Specification, processes
from benchmarks.ttft.runner import totals
from benchmarks.ttft.yardstick import Yardstick

_SETTLE = 0.005  # s before a round, in which the last runner's threads go to sleep
_SHARE_OF_MEMORY = 0.8  # of what is available may be taken by all runners at once
_COLD = 0.05  # of a file may stay in the page cache: what others have mapped does


@dataclass(frozen=True)
class Effort:
    """Processes started of each runner, rounds in each after a warm-up, seconds that a runner may take for all rounds,
    and for its cold pass: one that isn't through by then is stopped."""

    launches: int
    rounds: int
    budget: float


def drop_from_cache(folder: Path) -> bool:
    """Drop a folder's files from the system's page cache; whether they are gone (False where that can't be known)."""
    if not hasattr(os, "posix_fadvise"):
        return False
    dropped = True
    for path in (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            dropped &= cached(file.fileno()) < _COLD
    return dropped


def cached(descriptor: int) -> float:
    """The share of a file's pages that are in the page cache (mincore(2)); 1 where the system doesn't say."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        address, length = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped))
        failed = ctypes.CDLL(None).mincore(address, length, pages)
        del start  # or the map can't be closed
    return 1.0 if failed else sum(page & 1 for page in pages) / len(pages)


def measure(
    specifications: Sequence[Specification], effort: Effort, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], bool]:
    """Measure every runner in interleaved rounds; returns a record of each, and whether they had to take turns.

    A record: {"name", "settings", "cold": {...}, "launches": [{"load_s", "rounds"}], "peak_bytes", "note"}, or {"name",
    "error"}; a round is {"stages", "waited", "yardstick_s"}. A specification with "absent" only says why it can't run.
    """
    records: dict[str, dict[str, Any]] = {}
    for runner in specifications:
        if "absent" in runner:
            records[runner["name"]] = {"name": runner["name"], "error": runner["absent"]}
        else:
            say(f"{runner['name']}: cold")
            records[runner["name"]] = {"name": runner["name"], **_cold(runner, effort.budget)}
    going = {runner["name"]: runner for runner in specifications if "error" not in records[runner["name"]]}
    shares = {name: share(records[name]["cold"], effort) for name in going}
    for name, (launches, rounds) in shares.items():
        cold = records[name]["cold"]["round"]
        pace = f"takes {sum(cold['stages'].values()):.0f} s, and the budget is {effort.budget:.0f} s"
        if not launches:  # so slow that its cold round is all there is
            records[name] |= {"launches": [{"load_s": None, "rounds": [cold]}], "note": f"one round, cold: it {pace}"}
        elif (launches, rounds) != (effort.launches, effort.rounds):
            records[name]["note"] = f"{launches} × {rounds} rounds: one {pace}"
    memory = sum(records[name]["peak_bytes"] for name in going)
    turns = memory > _SHARE_OF_MEMORY * psutil.virtual_memory().available
    for launch in range(effort.launches):
        block = [runner for name, runner in going.items() if launch < shares[name][0] and "error" not in records[name]]
        random.Random(launch).shuffle(block)
        say(f"block {launch + 1} of {effort.launches}: {', '.join(runner['name'] for runner in block) or 'nothing'}")
        for together in [[runner] for runner in block] if turns else [block]:
            _block(together, {name: rounds for name, (_, rounds) in shares.items()}, launch, records, effort.budget)
    return list(records.values()), turns


def trial(specification: Specification, rounds: int, enough: float) -> float:
    """One process: the fastest of some rounds behind a first one, by ttft_paper, in seconds.

    Raises RunnerError, also when the first round takes more than `enough` seconds.
    """
    with processes() as start:
        process = start({**specification, "until": "prefill"})
        process.limit(enough, f"given up after {enough:.3g} s")
        process.round()
        process.limit(math.inf)
        times = [totals(process.round()["stages"])["ttft_paper"] for _ in range(rounds)]
        process.close()
    return min(times)


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
        return error.record
    ready = process.ready
    cold = {"dropped": dropped, "load_s": ready["load_s"], "import_s": ready["import_s"], "process_s": took}
    return {
        "settings": ready["settings"], "delay": ready["delay"], "answer": answered.get("answer"),
        "cold": cold | {"round": _times(answered, None)}, "launches": [], "peak_bytes": peak, "note": "",
    }  # fmt: skip


def share(cold: Mapping[str, Any], effort: Effort) -> tuple[int, int]:
    """The launches, and rounds in each, that a runner's budget allows. (0, 0): only its cold round."""
    load = cold["load_s"] + cold["import_s"]
    pace = sum(cold["round"]["stages"].values())
    if load + 2 * pace > effort.budget:
        return 0, 0
    launches = min(effort.launches, int(effort.budget / (load + 2 * pace)))
    return launches, max(1, min(effort.rounds, int((effort.budget / launches - load) / pace) - 1))


def _block(
    specifications: Sequence[Specification], rounds: Mapping[str, int], launch: int,
    records: dict[str, dict[str, Any]], budget: float,
) -> None:  # fmt: skip
    """Start these runners anew, warm them up, and let them do their rounds in an order that changes."""
    limit = budget, f"stopped after {budget:.3g} s, the budget, in a round: the cold one was faster"
    yardstick = Yardstick()
    with processes() as start:
        running: dict[str, Process] = {}
        for runner in specifications:
            name = runner["name"]
            with _recorded(records[name]):
                running[name] = start({key: value for key, value in runner.items() if key != "keep"}, *limit)
                running[name].limit(*limit)
                running[name].round()
                records[name]["launches"].append({"load_s": running[name].ready["load_s"], "rounds": []})
        for number in range(max((rounds[name] for name in running), default=0)):
            order = [name for name in running if number < rounds[name] and "error" not in records[name]]
            random.Random(f"{launch} {number}").shuffle(order)
            for name in order:
                time.sleep(_SETTLE)
                before = yardstick()
                with _recorded(records[name]):
                    running[name].limit(*limit)
                    answered = running[name].round()
                    records[name]["launches"][-1]["rounds"].append(_times(answered, before))
                    records[name]["answer"] = answered.get("answer")
        for name, process in running.items():
            if "error" not in records[name]:
                with _recorded(records[name]):
                    process.limit(math.inf)
                    records[name]["peak_bytes"] = max(records[name]["peak_bytes"], process.close())


def _times(answered: Mapping[str, Any], yardstick: float | None) -> dict[str, Any]:
    return {"stages": answered["stages"], "waited": answered["waited"], "yardstick_s": yardstick}


@contextlib.contextmanager
def _recorded(record: dict[str, Any]) -> Iterator[None]:
    """The failure of a runner goes into its record, and the others go on."""
    try:
        yield
    except RunnerError as error:
        record |= error.record if "error" not in record else {}
