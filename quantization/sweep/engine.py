"""A sweep: points of a grid, each measured once, in parallel within a memory budget; killed, it resumes.

The engine knows no artefact: `Sweep.measure(point, settings)`, a module's function, is handed to it and gives
{"figures", "timings", "answers"}. The result is WORK/points/KEY.json, KEY a hash of everything that determines it, so
nothing is measured twice. Threads here and a Dask cluster's workers run the same function (`sweep_point.run_point`)
through the same interface, concurrent.futures'.
"""

import hashlib
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm.common import staging, threads
from fastvlm.common.cli import log, one_line, progress
from fastvlm.common.documents import Unreadable, load_object
from fastvlm.common.errors import UserError
from quantization.coreml.compression import COMPRESSIONS
from quantization.recipe import Recipe, load_recipe
from quantization.sweep.cluster import cluster
from quantization.sweep.point import ROOT, run_point, stop
from quantization.sweep.server import NO_SPACE, result_path

FORMAT = 1  # of a point's result; part of its key
WIDE = "fp16"  # the form that leaves the encoder's weights as they are
_SOURCES = ("fastvlm", "quantization", "model_export", "benchmarks")  # whose code decides a result
_SHARE = 0.8  # of the memory that is available

Point = Mapping[str, Any]  # "name", "recipe" (its document), "vision_quant" (a form), "resolution" (pixels per side)
Measure = Callable[[Point, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """What is measured, and where.

    `settings` (JSON) goes to `measure` as it is. `inputs` (JSON) is what else decides a result: hashes of all that
    `settings` name. `identity()`, a module's function, says which code and packages a process has; that decides, too.
    `need(point)` estimates a point's memory in bytes. `tidy()` is called when all is done, before `work` is let go.
    """

    measure: Measure
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    identity: Callable[[], Mapping[str, Any]]
    need: Callable[[Point], int]
    work: Path
    tidy: Callable[[], None] = lambda: None


@dataclass
class Outcome:
    """By point name: its key, and its result or its one-line error. `found` results were there already."""

    keys: dict[str, str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    found: int = 0
    seconds: float = 0.0


def grid(recipes: Sequence[str], forms: Sequence[str], resolutions: Sequence[int]) -> list[Point]:
    """Every combination. UserError with every recipe and form that is unusable, and whatever is given twice."""
    faults: list[str] = []
    read: list[Recipe] = []
    for text in dict.fromkeys(recipes):
        try:
            read.append(load_recipe(text))
        except UserError as error:
            faults.append(str(error))
    legal = (WIDE, *COMPRESSIONS)
    unknown = [form for form in dict.fromkeys(forms) if form not in legal]
    faults += [f"--vision-quant {form}: expected one of {', '.join(legal)}" for form in unknown]
    for flag, given in (("--quant", recipes), ("--vision-quant", forms), ("--resolutions", resolutions)):
        faults += [f"{flag} {one}: given twice" for one in dict.fromkeys(given) if given.count(one) > 1]
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
    Dask cluster whose machines see the same files: its workers do it instead, as many points at a time as they have
    threads, each with the worker's OMP_NUM_THREADS, within `memory` or the worker's own limit.

    Raises UserError for a work folder in use, a full disk, and a scheduler that does not answer or goes away. Finished
    points are kept then, and after KeyboardInterrupt, when those that run are ended.
    """
    identity = dict(sweep.identity())
    outcome = Outcome({point["name"]: key(sweep, identity, point) for point in points})
    busy = f"--work-dir {sweep.work}: another sweep runs there: wait for it, or choose another"
    with staging.held(sweep.work, busy):
        for name, digest in outcome.keys.items():
            if (result := _read(sweep.work, digest)) is not None:
                outcome.results[name] = result
        outcome.found = len(outcome.results)
        missing = [point for point in points if point["name"] not in outcome.results]
        if missing:
            start = time.monotonic()
            _measure_all(sweep, missing, outcome, jobs or threads.cores(), memory, scheduler)
            outcome.seconds = time.monotonic() - start
        sweep.tidy()
        for left in sweep.work.rglob(staging.PARTIAL):
            left.unlink(missing_ok=True)
    return outcome


def key(sweep: Sweep, identity: Mapping[str, Any], point: Point) -> str:
    """sha256 of everything that determines the point's result."""
    decisive = {name: value for name, value in point.items() if name != "name"}
    whole = [FORMAT, _named(sweep.measure), decisive, dict(sweep.inputs), dict(identity)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def sources_sha256() -> str:
    """Of the project's own code and tables."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".json")):
            if not {"demo_checkpoint", "recipes"} & set(path.parts):  # they are inputs, hashed as such
                content = path.read_bytes()
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def available_memory() -> int:
    """Bytes that can be had now without swapping, within a container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control group, or "max"
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def _measure_all(
    sweep: Sweep, points: Sequence[Point], outcome: Outcome, jobs: int, memory: float | None, scheduler: str | None
) -> None:
    """Run the points and put what comes of them into `outcome`."""
    run_id, jobs = uuid.uuid4().hex, min(jobs, len(points))
    common: dict[str, Any] = {
        "run": run_id,
        "measure": _named(sweep.measure),
        "settings": dict(sweep.settings),
        "work": str(sweep.work),
        "limit": memory or (None if scheduler else _SHARE * available_memory()),
        "threads": None if scheduler else max(1, threads.cores() // jobs),
    }
    tasks = [
        {**common, "point": dict(point), "key": outcome.keys[point["name"]], "bytes": sweep.need(point)}
        for point in points
    ]
    _warn_of_large(tasks, common["limit"])
    with ExitStack() as stack:
        if scheduler:
            pool, check = stack.enter_context(cluster(scheduler, sweep.work, sweep.identity, run_id))
        else:
            pool, check = stack.enter_context(_threads(jobs, run_id)), _always_there
        advance = stack.enter_context(progress("sweep (points)", len(points)))
        pending = {pool.submit(run_point, task): str(task["point"]["name"]) for task in tasks}
        while pending:
            done, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            check()
            for future in done:
                name = pending.pop(future)
                _settle(future, name, sweep.work, outcome)
                advance()
                log(f"{name}: {'FAILED: ' + outcome.errors[name] if name in outcome.errors else 'done'}")


def _settle(future: "Future[tuple[int, str]]", name: str, work: Path, outcome: Outcome) -> None:
    """Take a point's result or its error. UserError for an error that all other points would have as well."""
    try:
        code, error = future.result()
    except Exception as failure:  # a worker that died, or that could not start the child
        code, error = 1, f"{type(failure).__name__}: {one_line(failure)}"
    if code == NO_SPACE:
        raise UserError(
            f"{error}: free some and sweep again: {len(outcome.results)} finished points are kept in {work}"
        )
    result = None if code else _read(work, outcome.keys[name])
    if result is not None:
        outcome.results[name] = result
    else:
        outcome.errors[name] = error or f"no result in {work}: does the worker see the same folder?"


def _warn_of_large(tasks: Sequence[Mapping[str, Any]], limit: float | None) -> None:
    large = [task["bytes"] for task in tasks if limit and task["bytes"] > limit]
    if large and limit:
        most, budget = f"{max(large) / 1e9:.1f} GB", f"{limit / 1e9:.1f} GB"
        log(f"warning: {len(large)} points may need up to {most} of {budget}: each of them will run alone")


def _always_there() -> None:
    """Threads do not go away."""


def _named(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _read(work: Path, digest: str) -> dict[str, Any] | None:
    """A finished point's result; None where there is none that can be read."""
    try:
        result = load_object(result_path(work, digest))
    except Unreadable:
        return None
    return result if result.get("key") == digest else None


@contextmanager
def _threads(jobs: int, run_id: str) -> Iterator[Executor]:
    """`jobs` threads; what they run is ended with the block."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield pool
        finally:
            stop(run_id)
            pool.shutdown(wait=False, cancel_futures=True)
