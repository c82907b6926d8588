"""A sweep: points of a grid, each measured once, in parallel within a memory budget; killed, it resumes.

The engine knows no artefact: `Sweep.measure(point, settings)`, a module's function, is handed to it and gives
{"figures", "timings", "answers"}. The result is WORK/points/KEY.json, KEY a hash of everything that determines it, so
nothing is measured twice. Threads here and a Dask cluster's workers run the same function (`point.run_point`) through
the same interface, concurrent.futures'.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm.common import staging, threads
from fastvlm.common.children import ROOT
from fastvlm.common.cli import log, one_line, progress
from fastvlm.common.documents import Unreadable, load_object
from fastvlm.common.errors import UserError
from fastvlm.common.memory import available_memory
from quantization.recipe import Recipe, load_recipe
from quantization.sweep.cluster import cluster
from quantization.sweep.point import end_children, result_path, run_point

FORMAT = 1  # of a point's result; part of its key
UNCOMPRESSED = "fp16"  # the form that leaves the encoder's weights as they are
_SOURCES = ("fastvlm", "quantization", "model_export", "benchmarks")  # whose code decides a result
_SHARE = 0.8  # of the memory that is available

Point = Mapping[str, Any]  # "name", "recipe" (its document), "vision_quant" (a form), "resolution" (pixels per side)
Measure = Callable[[Point, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """A sweep's measurement, its inputs and its work folder.

    `settings` (JSON) goes to `measure` as it is. `inputs` (JSON) is what else decides a result: hashes of all that
    `settings` name. `identity()`, a module's function, identifies a process's code and packages, which decide, too.
    `need(point)` estimates a point's memory in bytes. `libraries` are the modules that all points import. `tidy()` is
    called at the end, before `work` is released.
    """

    measure: Measure
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    identity: Callable[[], Mapping[str, Any]]
    need: Callable[[Point], int]
    work: Path
    libraries: Sequence[str] = ()
    tidy: Callable[[], None] = lambda: None


@dataclass
class Outcome:
    """By point name: its key, and its result or its one-line error. `reused` counts the results of earlier runs."""

    keys: dict[str, str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    reused: int = 0
    seconds: float = 0.0


def grid(recipes: Sequence[str], forms: Sequence[str], resolutions: Sequence[int]) -> list[Point]:
    """Every combination. UserError with every recipe that is unusable, and whatever is given twice."""
    faults: list[str] = []
    read: list[Recipe] = []
    for text in dict.fromkeys(recipes):
        try:
            read.append(load_recipe(text))
        except UserError as error:
            faults.append(str(error))
    for flag, given in (("--quant", recipes), ("--vision-quant", forms), ("--resolutions", resolutions)):
        faults += [f"{flag} {value}: given twice" for value in dict.fromkeys(given) if given.count(value) > 1]
    names = [recipe.name for recipe in read]
    same = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    faults += [f"--quant: {names.count(name)} recipes have the name {name}" for name in same]
    if faults:
        raise UserError("; ".join(faults))
    return [
        {
            "name": f"{recipe.name} {form} {resolution}",
            "recipe": recipe.to_json(),
            "vision_quant": form,
            "resolution": resolution,
        }
        for recipe, form, resolution in itertools.product(read, forms, resolutions)
    ]


def run(
    sweep: Sweep,
    points: Sequence[Point],
    jobs: int | None = None,
    memory: float | None = None,
    scheduler: str | None = None,
) -> Outcome:
    """Measure the points that have no result yet.

    `jobs` points at a time (None: one a core), each with its share of the cores, while their estimates stay within
    `memory` bytes (None: 80 % of what is available); one that can never fit runs alone. `scheduler` is the address of a
    Dask cluster whose machines see the same files: its workers do it instead, each with its own OMP_NUM_THREADS and (by
    default) as many points at a time as it has threads.

    Raises UserError for a work folder in use, a full disk, and a scheduler that does not answer or goes away. Finished
    points are kept then, and after KeyboardInterrupt, when those that run here are ended.
    """
    identity = dict(sweep.identity())
    outcome = Outcome({point["name"]: key(sweep, identity, point) for point in points})
    busy = f"--work-dir {sweep.work}: another sweep runs there: wait for it, or choose another"
    with staging.held(sweep.work, busy):
        for name, digest in outcome.keys.items():
            if (result := _read(sweep.work, digest)) is not None:
                outcome.results[name] = result
        outcome.reused = len(outcome.results)
        missing = [point for point in points if point["name"] not in outcome.results]
        if missing:
            start = time.monotonic()
            _measure_all(sweep, missing, outcome, jobs, memory, scheduler)
            outcome.seconds = time.monotonic() - start
        sweep.tidy()
        for left in sweep.work.rglob(staging.PARTIAL):
            left.unlink(missing_ok=True)
    return outcome


def key(sweep: Sweep, identity: Mapping[str, Any], point: Point) -> str:
    """sha256 of everything that determines the point's result."""
    decisive = {name: value for name, value in point.items() if name != "name"}
    measure = f"{sweep.measure.__module__}:{sweep.measure.__qualname__}"
    whole = [FORMAT, measure, decisive, dict(sweep.inputs), dict(identity)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def sources_sha256() -> str:
    """sha256 over the project's own code and tables."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".json")):
            if not {"demo_checkpoint", "recipes"} & set(path.parts):  # they are inputs, hashed as such
                content = path.read_bytes()
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _measure_all(
    sweep: Sweep,
    points: Sequence[Point],
    outcome: Outcome,
    jobs: int | None,
    memory: float | None,
    scheduler: str | None,
) -> None:
    """Run the points and put what comes of them into `outcome`."""
    jobs = jobs or (len(points) if scheduler else min(threads.cores(), len(points)))
    memory = memory or (math.inf if scheduler else _SHARE * available_memory())
    need = {point["name"]: sweep.need(point) for point in points}
    if large := [size for size in need.values() if size > memory]:
        most, budget = f"{max(large) / 1e9:.1f} GB", f"{memory / 1e9:.1f} GB"
        log(f"warning: {len(large)} points may need up to {most} of {budget}: each of them will run alone")
    environment = {} if scheduler else threads.environment(max(1, threads.cores() // jobs))
    os.environ.update(environment)  # the libraries read it when they are loaded, in what all points are forked from
    common = {
        "measure": sweep.measure, "settings": dict(sweep.settings), "work": sweep.work, "libraries": sweep.libraries,
        "environment": environment,
    }  # fmt: skip
    waiting, running = [*points], dict[Future[None], str]()
    with ExitStack() as stack:
        pool: Executor = ThreadPoolExecutor(jobs)
        check: Callable[[], None] = lambda: None  # noqa: E731  threads do not go away
        if scheduler:
            pool, check = stack.enter_context(cluster(scheduler, sweep.work, sweep.identity))
        else:
            stack.callback(_end, pool, running)
        advance = stack.enter_context(progress("sweep (points)", len(points)))
        while waiting or running:
            used = sum(need[name] for name in running.values())
            if waiting and len(running) < jobs and (not running or used + need[waiting[0]["name"]] <= memory):
                point = waiting.pop(0)
                task = {**common, "point": dict(point), "key": outcome.keys[point["name"]]}
                running[pool.submit(run_point, task)] = point["name"]
                continue
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            check()
            for future in done:
                name = running.pop(future)
                _settle(future, name, sweep.work, outcome)
                advance()
                log(f"{name}: {'FAILED: ' + outcome.errors[name] if name in outcome.errors else 'done'}")


def _settle(future: "Future[None]", name: str, work: Path, outcome: Outcome) -> None:
    """Take a point's result or its error. UserError for an error that all other points would have as well."""
    error = future.exception()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        finished = f"{len(outcome.results)} finished points are kept in {work}"
        raise UserError(f"{one_line(error)}: free some and sweep again: {finished}")
    result = None if error else _read(work, outcome.keys[name])
    if result is not None:
        outcome.results[name] = result
    else:
        outcome.errors[name] = (
            one_line(error) if error else f"no result in {work}: does the worker see the same folder?"
        )


def _end(pool: Executor, running: Mapping["Future[None]", str]) -> None:
    """End the processes of the points that still run, and the threads that wait for them."""
    while wait(running, timeout=0.1).not_done:
        end_children()
    pool.shutdown()


def _read(work: Path, digest: str) -> dict[str, Any] | None:
    """A finished point's result; None where there is none that can be read."""
    try:
        result = load_object(result_path(work, digest))
    except Unreadable:
        return None
    return result if result.get("key") == digest else None
