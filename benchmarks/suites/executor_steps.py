"""Steps of export.json that measure what loading and running a package takes; each in a process of its own."""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import checks
from fastvlm.common import children, memory
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import CheckFailed

ROUNDS = 5  # processes that load the package, of each kind


def load(package: str) -> dict[str, float]:
    """How long fresh processes take to `mil.load` a package: median seconds.

    "warm": with its bytes in the page cache; "cold": with none of them there; "cpu": of the processor, either way;
    "imports": what a process takes before, for PyTorch and the executor. "mb": of the package.
    """
    files = [path for path in Path(package).rglob("*") if path.is_file()]
    seconds: dict[str, list[float]] = {"warm": [], "cold": [], "imports": [], "cpu": []}
    with progress("loading", 2 * ROUNDS + 1) as advance:
        for number in range(2 * ROUNDS + 1):
            kind = "cold" if number % 2 else "warm"
            if kind == "cold":
                _forget(files)
            words = ("benchmarks.suites.step", "benchmarks.suites.executor_steps:load_once", package)
            done = children.run([sys.executable, "-m", *words], log)
            once = checks.result_in(done.stdout)[0]
            if done.returncode or once is None:
                raise CheckFailed(f"loading {package} {done.ending}: {done.last_line}")
            if number:  # the first one fills the page cache
                seconds[kind].append(once["load"])
                seconds["imports"].append(once["imports"])
                seconds["cpu"].append(once["cpu"])
            advance()
    size = sum(path.stat().st_size for path in files) / 1e6
    return {name: statistics.median(values) for name, values in seconds.items()} | {"mb": size}


def load_once(package: str) -> dict[str, float]:
    """Seconds of importing the executor, and of loading (its processor's, too)."""
    start = time.perf_counter()
    from model_export.mil import executor

    imported, cpu = time.perf_counter(), time.process_time()
    executor.load(package)
    return {
        "imports": imported - start, "load": time.perf_counter() - imported, "cpu": time.process_time() - cpu,
    }  # fmt: skip


def _forget(files: list[Path]) -> None:
    """Have Linux drop the files' pages, which are all on the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak(package: str, compute: str = "as-typed") -> dict[str, float]:
    """Memory, in GB, that loading a package and two predictions take beyond the interpreter with PyTorch imported.

    "peak": the largest resident size (VmHWM), less the size before; "weights" as the policy holds them; "live": the
    most that values hold at once, by the plan; "ratio": peak over these two.
    """
    import numpy as np

    from model_export.mil import executor

    before = memory.restarted_peak()
    model = executor.load(package, compute=compute)
    rng = np.random.default_rng(0)
    inputs = {name: rng.integers(0, 2, [size or 1 for size in kind.shape]) for name, kind in model.inputs.items()}
    for _ in range(2):
        model.predict(inputs)
    took = memory.peak_bytes() - before
    weights, live = weight_bytes(model), live_bytes(model)
    return {"peak": took / 1e9, "weights": weights / 1e9, "live": live / 1e9, "ratio": took / (weights + live)}


def transformer(target: str) -> None:
    """Write a package of a large text encoder with random weights in float16."""
    from benchmarks.suites import trips
    from benchmarks.suites.trip_models import LARGE

    assert LARGE is not None
    trips.convert(trips.built(LARGE), LARGE, Path(target), "float16")


def weight_bytes(model: Any) -> int:
    """Bytes of a function's constants of more than one number, each held once."""
    from model_export.mil import limits

    operations = model.function.block.operations
    constants = [item for item in operations if item.type == "const" or item.type.startswith("constexpr_")]
    kept = [item for item in operations if not item.type.startswith("constexpr_")]  # not what these decompress
    read = {binding for item in kept for bindings in item.inputs.values() for binding in bindings}
    kinds = [output.type for item in constants for output in item.outputs if output.name in read and output.type]
    return sum(limits.size(kind, model.policy) for kind in kinds if kind.dtype != "string" and kind.shape)


def live_bytes(model: Any) -> int:
    """The most that a function's values hold at once: a view or what is written over its operand takes nothing."""
    from model_export.mil import limits

    plan, policy = model._plan, model.policy
    holders: dict[str, str] = {item.name: item.name for item in plan.inputs}
    sizes = {item.name: limits.size(item.type, policy, item.other) for item in plan.inputs}
    most = sum(sizes.values())
    for step in plan.merged:
        first = step.kernel.args[0] if step.kernel.args else None
        shares = (step.kernel.view or step.overwrites) and isinstance(first, str)
        holder = holders.get(str(first)) if shares else None
        for name, kind in zip(step.made, step.types):
            holders[name] = holder or name
            sizes.setdefault(holders[name], limits.size(kind, policy))
        most = max(most, sum(sizes.values()))
        for name in step.frees:
            holder = holders.pop(name, "")
            if holder and holder not in holders.values():
                del sizes[holder]
    return most
