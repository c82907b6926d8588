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

from benchmarks.suites.suite import DEMO, Bar, Figures, result, run_step
from fastvlm.common.children import ROOT
from fastvlm.common.cli import log
from fastvlm.common.errors import CheckFailed

TEXT_MODEL = "FASTVLM_TEXT_MODEL"
RECIPES = (
    "fp16", "int8", "int6", "int5", "int4", "int4-awq", "int4-gptq", "int4-dwq", "int3", "int3-mixed", "mixed-4-8",
    "fit:5bpw",
)  # fmt: skip
UNIFORM = ("int3", "int4", "int5", "int6", "int8")  # whose line the mixed ones are held against
CALIBRATED = ("int4-awq", "int4-gptq", "int4-dwq")
_KLS = {"prefill": "prompt_kl_mean", "answers": "answer_kl_mean"}
_KILLS, _SEED = 10, 5

BARS = {
    "sweep_seconds": Bar("twelve recipes over the demo checkpoint swept", "<=", 120, "s"),
    "sweep_again_seconds": Bar("  the same sweep again", "<=", None, "s"),
    "int8_agreement": Bar("int8: answers as the reference's", ">=", 0.99, ""),
    "recovered_prefill": Bar("KL of int4 that the best calibration recovers, prefill", ">=", 0.5, ""),
    "recovered_answers": Bar("  over the reference's answers", ">=", 0.5, ""),
    **{
        f"{name}_{what}": Bar(f"  {name}: KL, {what}", "<=", None, "nats")
        for name in (*UNIFORM, *CALIBRATED, "int3-mixed", "mixed-4-8", "fit:5bpw")
        for what in _KLS
    },
    **{
        f"line_{name}": Bar(f"{name}: KL / on the line between its uniform neighbours, prefill", "<=", 1, "x")
        for name in ("int3-mixed", "mixed-4-8", "fit:5bpw")
    },
    "killed_differences": Bar("points that differ after ten kills", "<=", 0, ""),
    "killed_between": Bar("  kills after which some points were there, not all", ">=", 1, ""),
    "dask_differences": Bar("points that differ on two Dask workers", "<=", 0, ""),
    "text_recovered": Bar("trained text model: KL of int4 that the best calibration recovers", ">=", 0.5, ""),
    **{
        f"text_{name}_{what}": Bar(f"  {name}: {label}", sense, None, unit)
        for name in (*UNIFORM, "fit", "gptq", "awq", "dwq")
        for what, label, sense, unit in (("kl", "KL", "<=", "nats"), ("top1", "top-1 agreement", ">=", ""))
    },
}


def sweep(store: Path, work: Path) -> Figures:
    """Twelve recipes: time, and what their KL divergences say."""
    seconds = []
    for report in ("report", "again"):
        started = time.perf_counter()
        run_step("sweeping twelve recipes over the demo checkpoint", _command(work / "sweep", report))
        seconds.append(time.perf_counter() - started)
    found = {point["recipe"]: point["figures"] for point in _report(work / "sweep")["points"]}
    figures = {"sweep_seconds": seconds[0], "sweep_again_seconds": seconds[1]}
    figures["int8_agreement"] = found["int8"]["same_answers"]
    for what, key in _KLS.items():
        best = min(found[name][key] for name in CALIBRATED)
        figures[f"recovered_{what}"] = 1 - best / found["int4"][key]
        figures |= {f"{name}_{what}": each[key] for name, each in found.items() if f"{name}_{what}" in BARS}
    for name in ("int3-mixed", "mixed-4-8", "fit:5bpw"):
        figures[f"line_{name}"] = found[name]["prompt_kl_mean"] / _on_the_line(found, found[name]["bytes"])
    return figures


def killed(store: Path, work: Path) -> Figures:
    """SIGKILL to a sweep's process group ten times at random moments; then the report against an uninterrupted one."""
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
    return {
        "killed_differences": _differences(whole, _report(work / "killed")),
        "killed_between": float(between),
    }


def dask(store: Path, work: Path) -> Figures:
    """The same sweep on two local workers."""
    from distributed import LocalCluster

    whole = _whole(work)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        command = [*_command(work / "dask"), "--scheduler", cluster.scheduler_address]
        run_step("sweeping on two Dask workers", command)
    return {"dask_differences": _differences(whole, _report(work / "dask"))}


def text(store: Path, work: Path) -> Figures:
    """Calibration of a trained text model; see `benchmarks.suites.quantization_quality`."""
    folder = os.environ.get(TEXT_MODEL)
    if not folder:
        log(f"trained text model: skipped, no bar judged: {TEXT_MODEL} is not set (docs/BENCHMARKS.md)")
        return {}
    command = [sys.executable, "-m", "benchmarks.suites.quantization_quality", folder]
    return result("quantizing a trained text model nine ways", command)


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


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Points that are not the same in two reports, timings left out; CheckFailed when the rest differs."""
    points = [{point["name"]: point for point in report["points"]} for report in (one, other)]
    count = sum(points[0].get(name) != points[1].get(name) for name in points[0].keys() | points[1].keys())
    rest = [
        {key: value for key, value in report.items() if key not in ("points", "timings")} for report in (one, other)
    ]
    if not count and rest[0] != rest[1]:
        raise CheckFailed("two sweeps: the points are the same, the reports are not")
    return float(count)


def _on_the_line(found: Mapping[str, Mapping[str, float]], size: float) -> float:
    """The KL at a size on the straight line between the uniform recipes next to it."""
    ends = sorted((found[name]["bytes"], found[name]["prompt_kl_mean"]) for name in UNIFORM)
    below, above = next(pair for pair in itertools.pairwise(ends) if pair[0][0] <= size <= pair[1][0])
    share = (size - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])
