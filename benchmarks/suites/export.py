"""`python -m benchmarks export`: what exporting costs and how faithful the artefact is, each figure beside its bar."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.suites import steps, suite
from benchmarks.suites.suite import DEMO, Run, call, export, run_step, synthetic

RECIPES = {"fp16": 0.99, "int8": 0.97, "int4": None}  # and the share of answers that each has to keep
BUSY = 4  # processes beside an export


def add_parser(subparsers: Any) -> None:
    """Add the verb `export`."""
    suite.add_suite(
        subparsers, SUITE,
        description="Measure export, executor and parity on the demo checkpoint and on the real shape with random"
        " weights.",
    )  # fmt: skip


def _demo_export(run: Run) -> None:
    done = run_step("exporting the demo checkpoint", export("all", DEMO, run.work / "demo"))
    with busy(BUSY):
        beside = run_step("the same beside busy processes", export("all", DEMO, run.work / "demo-busy"))
    run.add_cost("demo", "`model_export all`, demo checkpoint, parity included", done, 10)
    ratio = beside.seconds / done.seconds
    run.add("busy_seconds_ratio", "  the same beside four busy processes / alone", ratio, "x", most=2.5)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute all the time, until the end of the block."""
    loads = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for load in loads:
            load.kill()
            load.wait()


def _whole(run: Run) -> None:
    checkpoint, artefact = synthetic(run.store), run.work / "whole"
    # Random weights in 4 bit may leave a tolerance; what is measured is the way there.
    done = run_step("exporting 0.5B, whole", export("all", checkpoint, artefact, "--quant", "int4"), check=False)
    sides = ["--reference", str(checkpoint), "--candidate", str(artefact), "--output", str(run.work / "page.html")]
    alone = run_step("parity of it alone", [sys.executable, "-m", "benchmarks", "parity", *sides], check=False)
    run.add_cost("whole", "`model_export all --quant int4`, 0.5B at 1024 x 1024, parity included", done, 80, peak=3)
    run.add_cost("parity", "  `benchmarks parity` alone, four pictures", alone, 45)


def _whole_7b(run: Run) -> None:
    checkpoint = synthetic(run.store, "7b")
    alone = run_step("exporting 7B's language model", export("llm", checkpoint, run.work / "llm", "--quant", "int4"))
    shutil.rmtree(run.work / "llm")
    done = run_step("exporting 7B", export("all", checkpoint, run.work / "large", "--quant", "int4"), check=False)
    run.add_cost("large", "`model_export all --quant int4`, 7B at 1024 x 1024, parity included", done, peak=8)
    run.add("large_llm_seconds", "  its language model alone (`model_export llm`)", alone.seconds, "s")


def _encoder_export(run: Run) -> None:
    checkpoint = synthetic(run.store)
    ours = run_step("exporting the real encoder at 1024 x 1024", export("vision", checkpoint, run.work / "encoder"))
    command = suite.step.command(steps.plain_export, checkpoint, run.work / "plain.mlpackage")
    plain = run_step("the same by a plain script", command)
    run.add_cost("encoder", "real encoder at 1024 x 1024, exported", ours, 18, peak=2)
    run.add_cost("plain", "  a plain script (jit.trace, gradients on)", plain)
    run.add("encoder_seconds_ratio", "  time, ours / plain", ours.seconds / plain.seconds, "x")
    run.add("encoder_peak_ratio", "  peak memory, ours / plain", ours.peak_gb / plain.peak_gb, "x")


def _executor(run: Run) -> None:
    checkpoint, package = _real_package(run, "float16")
    seconds = call("timing the executor against PyTorch", steps.executor, checkpoint, package)
    for policy, bar in (("float32", 0.7), ("typed", 1.2)):
        label = f"executor {policy.replace('typed', 'as typed')} / plain PyTorch module"
        ratio = seconds[policy] / seconds["plain"]
        run.add(f"executor_{policy}_ratio", label, ratio, "x", most=bar)
    for name, label in (
        ("plain", "plain PyTorch module"),
        ("float32", "executor float32"),
        ("typed", "executor as typed"),
    ):
        key = "plain_median" if name == "plain" else f"executor_{name}_median"
        run.add(key, f"  {label}, median", seconds[name], "s")


def _encoder_parity(run: Run) -> None:
    checkpoint, half = _real_package(run, "float16")
    single = _real_package(run, "float32")[1]
    snr = call("comparing the real encoder with PyTorch", steps.encoder_parity, checkpoint, half, single)
    run.add("snr_typed", "real encoder against PyTorch, fp16 package as typed", snr[0], "dB", least=50)
    run.add("snr_float32", "real encoder against PyTorch, float32 package", snr[1], "dB", least=100)


def _answers(run: Run) -> None:
    artefacts = {recipe: str(run.work / f"demo-{recipe}") for recipe in RECIPES}
    for recipe, bar in RECIPES.items():
        command = export("all", DEMO, Path(artefacts[recipe]), "--quant", recipe)
        run_step(f"exporting the demo checkpoint, {recipe}", command, check=bar is not None)
    found = call("asking 500 demo questions, four times", steps.answers, DEMO, artefacts)
    for recipe, bar in RECIPES.items():
        label = f"same answer as PyTorch, 500 demo questions, {recipe}"
        run.add(f"answers_{recipe}", label, found["same"][recipe], least=bar)
    for name, share in found["exact"].items():
        run.add(f"exact_{name}", f"  right answers, {'PyTorch' if name == 'reference' else name}", share)


def _real_package(run: Run, precision: str) -> tuple[Path, Path]:
    """The checkpoint of the real shape and its encoder's package in `precision`, exported if this run has not yet."""
    checkpoint, folder = synthetic(run.store), run.work / ("encoder" if precision == "float16" else "encoder-float32")
    if not folder.is_dir():
        units = ["--compute-precision", precision, *(["--compute-units", "ALL"] if precision == "float32" else [])]
        run_step(f"exporting the real encoder in {precision}", export("vision", checkpoint, folder, *units))
    return checkpoint, next(folder.rglob("*.mlpackage"))


SUITE = suite.Suite(
    "export",
    {
        "demo-export": _demo_export,
        "whole-0.5b": _whole,
        "whole-7b": _whole_7b,
        "encoder-export": _encoder_export,
        "executor": _executor,
        "encoder-parity": _encoder_parity,
        "answers": _answers,
    },
)
