"""Sections of `benchmarks quantization`: a sweep over the demo checkpoint, what calibration and mixing bring there, and
the same report after kills and on a Dask cluster."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.suites.suite import DEMO, Run, call, run_step
from fastvlm.common.children import ROOT
from fastvlm.common.cli import log
from fastvlm.common.errors import CheckFailed

TEXT_MODEL = "FASTVLM_TEXT_MODEL"
RECIPES = (
    "fp16", "int8", "int6", "int5", "int4", "int4-awq", "int4-gptq", "int4-dwq", "int3", "int3-mixed", "mixed-4-8",
    "fit:5bpw",
)  # fmt: skip
UNIFORM = ("int3", "int4", "int5", "int6", "int8")  # whose line the mixed ones are held against
MIXED = ("int3-mixed", "mixed-4-8", "fit:5bpw")
CALIBRATED = ("int4-awq", "int4-gptq", "int4-dwq")
_KLS = {"prefill": "prompt_kl_mean", "answers": "answer_kl_mean"}
_KILLS, _SEED = 10, 5


def sweep(run: Run) -> None:
    """Twelve recipes: time, and what their KL divergences say."""
    seconds = []
    for report in ("report", "again"):
        started = time.perf_counter()
        run_step("sweeping twelve recipes over the demo checkpoint", _command(run.work / "sweep", report))
        seconds.append(time.perf_counter() - started)
    found = {point["recipe"]: point["figures"] for point in _report(run.work / "sweep")["points"]}
    run.add("sweep_seconds", "twelve recipes over the demo checkpoint swept", seconds[0], "s", most=120)
    run.add("sweep_again_seconds", "  the same sweep again", seconds[1], "s")
    run.add("int8_agreement", "int8: answers as the reference's", found["int8"]["same_answers"], least=0.99)
    label = "KL of int4 that the best calibration recovers, prefill"
    for what, key in _KLS.items():
        best = min(found[name][key] for name in CALIBRATED)
        run.add(f"recovered_{what}", label, 1 - best / found["int4"][key], least=0.5)
        label = "  over the reference's answers"
    for name in (*UNIFORM, *CALIBRATED, *MIXED):
        for what, key in _KLS.items():
            run.add(f"{name}_{what}", f"  {name}: KL, {what}", found[name][key], "nats")
    for name in MIXED:
        ratio = found[name]["prompt_kl_mean"] / _on_the_line(found, found[name]["bytes"])
        label = f"{name}: KL / on the line between its uniform neighbours, prefill"
        run.add(f"line_{name}", label, ratio, "x", most=1)


def killed(run: Run) -> None:
    """SIGKILL to a sweep's process group ten times at random moments; then the report against an uninterrupted one."""
    work = run.work
    whole = _whole(work)
    draw, between = random.Random(_SEED), 0
    for number in range(_KILLS):
        with subprocess.Popen(_command(work / "killed"), cwd=ROOT, start_new_session=True, env=_environment()) as child:
            delay = draw.uniform(2, whole["timings"]["sweep_seconds"] / 4)
            try:
                child.wait(delay)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
        done = len(list((work / "killed" / "work" / "points").glob("*.json")))
        between += 0 < done < len(RECIPES)
        log(f"kill {number + 1} of {_KILLS} after {delay:.1f} s: {done} points are there")
    run_step("the sweep after ten kills", _command(work / "killed"))
    differences = _differences(whole, _report(work / "killed"))
    run.add("killed_differences", "points that differ after ten kills", differences, most=0)
    run.add("killed_between", "  kills after which some points were there, not all", between, least=1)


def dask(run: Run) -> None:
    """The same sweep on two local workers."""
    from distributed import LocalCluster

    whole = _whole(run.work)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        command = [*_command(run.work / "dask"), "--scheduler", cluster.scheduler_address]
        run_step("sweeping on two Dask workers", command)
    differences = _differences(whole, _report(run.work / "dask"))
    run.add("dask_differences", "points that differ on two Dask workers", differences, most=0)


def text(run: Run) -> None:
    """Calibration of a trained text model; see `benchmarks.suites.quantization_quality`."""
    folder = os.environ.get(TEXT_MODEL)
    if not folder:
        log(f"trained text model: skipped, no bar judged: {TEXT_MODEL} is not set (docs/BENCHMARKS.md)")
        return
    from benchmarks.suites.quantization_quality import text_model  # torch comes with it

    found = call("quantizing a trained text model nine ways", text_model, folder)
    best = min(found[name]["kl"] for name in ("fit", "gptq", "awq", "dwq"))
    label = "trained text model: KL of int4 that the best calibration recovers"
    run.add("text_recovered", label, 1 - best / found["int4"]["kl"], least=0.5)
    for name, figures in found.items():
        run.add(f"text_{name}_kl", f"  {name}: KL", figures["kl"], "nats")
        run.add(f"text_{name}_top1", f"  {name}: top-1 agreement", figures["top1"])


SECTIONS = {"sweep": sweep, "sweep-killed": killed, "sweep-dask": dask, "text-model": text}


def _command(folder: Path, report: str = "report") -> list[str]:
    paths = ["--work-dir", str(folder / "work"), "--report", str(folder / report)]
    return [sys.executable, "-m", "quantization", "sweep", "--checkpoint", str(DEMO), "--quant", *RECIPES, *paths]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def _whole(work: Path) -> dict[str, Any]:
    """The report of an uninterrupted sweep; the `sweep` section's, where that has run."""
    if not (work / "sweep" / "report" / "report.json").is_file():
        run_step("sweeping without interruption", _command(work / "sweep"))
    return _report(work / "sweep")


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    return found


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Points that are not the same in two reports, timings left out; CheckFailed when the rest differs."""
    points = [{point["name"]: point for point in report["points"]} for report in (one, other)]
    count = sum(points[0].get(name) != points[1].get(name) for name in points[0].keys() | points[1].keys())
    rest = [
        {key: value for key, value in report.items() if key not in ("points", "timings")} for report in (one, other)
    ]
    if not count and rest[0] != rest[1]:
        raise CheckFailed("two sweeps: the points are the same, the reports are not")
    return count


def _on_the_line(found: Mapping[str, Mapping[str, float]], size: float) -> float:
    """The KL at a size on the straight line between the uniform recipes next to it."""
    ends = sorted((found[name]["bytes"], found[name]["prompt_kl_mean"]) for name in UNIFORM)
    below, above = next(pair for pair in itertools.pairwise(ends) if pair[0][0] <= size <= pair[1][0])
    share = (size - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])
