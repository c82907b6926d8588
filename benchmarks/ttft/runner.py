"""A runner's process and the clock of `fastvlm ttft`: `python -m benchmarks.ttft.runner SPECIFICATION`.

It opens the runner that the specification (JSON) describes, prints a line {"ready": true, "name", "settings",
"import_s", "load_s", "delay"}, does one round for each line that it reads and prints {"stages": {name: seconds},
"waited": {...}, "answer"}, and at the end of its input {"peak_bytes"}. What goes wrong is a line {"error", "failed"},
the latter true where the model computed what isn't finite. Nothing else reaches stdout.

A runner is an object with `name`, `settings` and a method for each stage that it has, which takes the state of the
round; `bytes_beside`, if it has that, gives the peak memory of other processes that work for it. A stage's work is
finished when it returns: a library that computes lazily is synchronised inside it.

It imports the standard library only (`fastvlm.common.errors` and `memory` are no more), because the environment that
mlx-vlm lives in has no torch.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from fastvlm.common.errors import CheckFailed
from fastvlm.common.memory import peak_bytes

STAGES = ("preprocess", "encode", "project", "prefill", "first_token", "decode", "next_question")
# The paper: vision encoding and prefill. The app also counts preprocessing, and the token has to be text.
TOTALS = {
    "ttft_paper": ("encode", "project", "prefill"),
    "ttft_app": ("preprocess", "encode", "project", "prefill", "first_token"),
}
DELAY = "FASTVLM_TTFT_DELAY"  # "encode=0.5,prefill=x1.15": a stage held up by seconds, or stretched by a factor
# A specification's "kind" -> the module whose `open_runner(specification)` opens it. What only some of its runners
# need, its `prepare(specification)` imports before, if it has one.
OPENERS = {
    "checkpoint": "benchmarks.ttft.models",
    "artefact": "benchmarks.ttft.models",
    "mlx-vlm": "benchmarks.ttft.mlx_vlm",
}
State = dict[str, Any]  # of a round: what a stage leaves for those behind it
Stage = tuple[str, Callable[[State], None]]


def stages_of(runner: Any) -> list[Stage]:
    """The stages of a runner in order: its methods of their names."""
    return [(name, getattr(runner, name)) for name in STAGES if hasattr(runner, name)]


def parse_delays(text: str) -> dict[str, tuple[str, float]]:
    """`DELAY`'s value -> stage -> ("s", seconds) or ("x", factor). Raises ValueError naming every fault."""
    delays, faults = {}, []
    for entry in filter(None, text.split(",")):
        stage, _, amount = entry.partition("=")
        unit = "x" if amount.startswith("x") else "s"
        try:
            value = float(amount.removeprefix("x"))
        except ValueError:
            value = -1.0
        if stage not in STAGES or not (1 if unit == "x" else 0) <= value < float("inf"):
            faults.append(entry)
        delays[stage] = (unit, value)
    if faults:
        expected = f"STAGE=SECONDS or STAGE=xFACTOR (1 or more), stages {', '.join(STAGES)}"
        raise ValueError(f"{DELAY}: got {', '.join(faults)}, expected {expected}")
    return delays


def one_round(
    stages: Sequence[Stage],
    delays: Mapping[str, tuple[str, float]],
    state: dict[str, Any],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    waiting: Callable[[], float] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Run the stages in order -> stage -> seconds by `clock`, and of these waited for a processor (see `queued`).

    A delayed stage is longer by seconds slept, or stretched by a factor, busily.
    """
    waiting = waiting or queued
    spent, waited = {}, {}
    for name, act in stages:
        before = waiting()
        start = clock()
        act(state)
        unit, value = delays.get(name, ("s", 0.0))
        if unit == "x":
            until = start + (clock() - start) * value
            while clock() < until:
                pass
        elif value:
            sleep(value)
        spent[name] = clock() - start
        waited[name] = min(waiting() - before, spent[name])
    return spent, waited


@cache
def _schedstat() -> int | None:
    """The open file in which Linux counts what the calling thread does (Documentation/scheduler/sched-stats.rst)."""
    try:
        return os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        return None


def queued() -> float:
    """Seconds that this thread has been ready to run while others had the processors; 0 where nobody counts.

    It is read in microseconds, so that next to nothing is counted that isn't between two readings of the clock.
    """
    file = _schedstat()
    return int(os.pread(file, 100, 0).split()[1]) * 1e-9 if file is not None else 0.0


def totals(stages: Mapping[str, float]) -> dict[str, float]:
    """The totals of a round whose stages are there (a trial ends after the prefill)."""
    return {name: sum(stages[stage] for stage in parts) for name, parts in TOTALS.items() if set(parts) <= set(stages)}


def main(specification: dict[str, Any]) -> int:
    """The process: see the module's docstring."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints goes to stderr

    def say(**message: Any) -> None:
        print(json.dumps(message), file=channel, flush=True)

    try:
        delays = parse_delays(os.environ.get(DELAY, ""))
        start = time.perf_counter()
        opener = importlib.import_module(OPENERS[specification["kind"]])
        getattr(opener, "prepare", lambda specification: None)(specification)
        imported = time.perf_counter()
        runner = opener.open_runner(specification)
        loaded = time.perf_counter()
        stages = stages_of(runner)
        if last := specification.get("until"):  # a trial needs no more
            stages = stages[: [name for name, _ in stages].index(last) + 1]
        say(
            ready=True, name=specification.get("name", runner.name), settings=runner.settings,
            import_s=imported - start, load_s=loaded - imported, delay=os.environ.get(DELAY, ""),
        )  # fmt: skip
        for _ in sys.stdin:
            state: dict[str, Any] = {}
            spent, waited = one_round(stages, delays, state)
            if (path := specification.get("keep")) and "logits" in state:
                _keep(path, state)
                specification["keep"] = None
            say(stages=spent, waited=waited, answer=state.get("answer"))
        say(peak_bytes=peak_bytes() + getattr(runner, "bytes_beside", lambda: 0)())
    except Exception as error:
        if os.environ.get("FASTVLM_DEBUG"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        say(error="; ".join(lines[:3]) or type(error).__name__, failed=isinstance(error, CheckFailed))
        return 1
    return 0


def _keep(path: str, state: Mapping[str, Any]) -> None:
    """Write what the runner computed, for the comparison beside its times."""
    import numpy as np

    arrays: dict[str, Any] = {
        name: np.asarray(state[name], dtype=np.float32) for name in ("features", "projected", "logits") if name in state
    }
    np.savez(path, **arrays)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
