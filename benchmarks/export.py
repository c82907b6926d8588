"""`python -m benchmarks export`: what exporting costs and what the artefact keeps, each figure beside its bar.

Every step runs in a process of its own, so that its time and its peak memory are its own.
"""

from pathlib import Path
from typing import Any

from benchmarks import suite
from benchmarks.suite import DEMO, Bar, Figures, export, result, run_step, step, synthetic

RECIPES = ("fp16", "int8", "int4")

# key -> bar (issue 3, "What it must show"); the sections fill them in.
BARS = {
    "demo_seconds": Bar("`model_export all`, demo checkpoint, parity included", "<=", 60, "s"),
    "demo_peak": Bar("  its peak memory", "<=", None, "GB"),
    "encoder_seconds": Bar("real encoder at 1024 x 1024, exported", "<=", 30, "s"),
    "encoder_peak": Bar("  its peak memory", "<=", 2.5, "GB"),
    "plain_seconds": Bar("  a plain script (jit.trace, gradients on)", "<=", None, "s"),
    "plain_peak": Bar("  its peak memory", "<=", None, "GB"),
    "encoder_seconds_ratio": Bar("  time, ours / plain", "<=", None, "x"),
    "encoder_peak_ratio": Bar("  peak memory, ours / plain", "<=", None, "x"),
    "executor_float32_ratio": Bar("executor float32 / plain PyTorch module", "<=", 0.7, "x"),
    "executor_typed_ratio": Bar("executor as typed / plain PyTorch module", "<=", 1.2, "x"),
    "plain_median": Bar("  plain PyTorch module, float32, median", "<=", None, "s"),
    "executor_float32_median": Bar("  executor float32, median", "<=", None, "s"),
    "executor_typed_median": Bar("  executor as typed, median", "<=", None, "s"),
    "snr_typed": Bar("real encoder against PyTorch, fp16 package as typed", ">=", 50, "dB"),
    "snr_float32": Bar("real encoder against PyTorch, float32 package", ">=", 100, "dB"),
    "answers_fp16": Bar("same answer as PyTorch, 500 demo questions, fp16", ">=", 0.99, ""),
    "answers_int8": Bar("same answer as PyTorch, 500 demo questions, int8", ">=", 0.97, ""),
    "answers_int4": Bar("same answer as PyTorch, 500 demo questions, int4", ">=", None, ""),
    "exact_reference": Bar("  right answers, PyTorch", ">=", None, ""),
    "exact_fp16": Bar("  right answers, fp16", ">=", None, ""),
    "exact_int8": Bar("  right answers, int8", ">=", None, ""),
    "exact_int4": Bar("  right answers, int4", ">=", None, ""),
}


def add_parser(subparsers: Any) -> None:
    """Add the verb `export`."""
    suite.add_suite(
        subparsers,
        SUITE,
        help="what exporting costs: time, memory, executor speed, parity, answers",
        description="Measure export, executor and parity on the demo checkpoint and on the real shape with random"
        " weights. Exit 1 when a bar is missed.",
    )


def _demo_export(store: Path, work: Path) -> Figures:
    done = run_step("exporting the demo checkpoint", export("all", DEMO, work / "demo"))
    return {"demo_seconds": done.seconds, "demo_peak": done.peak_gb}


def _encoder_export(store: Path, work: Path) -> Figures:
    checkpoint = synthetic(store)
    ours = run_step("exporting the real encoder at 1024 x 1024", export("vision", checkpoint, work / "encoder"))
    plain = run_step("the same by a plain script", step("steps", "plain_export", checkpoint, work / "plain.mlpackage"))
    return {
        "encoder_seconds": ours.seconds, "encoder_peak": ours.peak_gb,
        "plain_seconds": plain.seconds, "plain_peak": plain.peak_gb,
        "encoder_seconds_ratio": ours.seconds / plain.seconds, "encoder_peak_ratio": ours.peak_gb / plain.peak_gb,
    }  # fmt: skip


def _executor(store: Path, work: Path) -> Figures:
    checkpoint, package = _real_package(store, work, "float16")
    return result("timing the executor against PyTorch", step("steps", "executor", checkpoint, package))


def _encoder_parity(store: Path, work: Path) -> Figures:
    checkpoint, half = _real_package(store, work, "float16")
    single = _real_package(store, work, "float32")[1]
    return result("comparing the real encoder with PyTorch", step("steps", "encoder_parity", checkpoint, half, single))


def _answers(store: Path, work: Path) -> Figures:
    artefacts = []
    for recipe in RECIPES:
        artefacts.append(work / f"demo-{recipe}")
        run_step(
            f"exporting the demo checkpoint, {recipe}",
            export("all", DEMO, artefacts[-1], "--quant", recipe),
            check=recipe != "int4",
        )
    return result("asking 500 demo questions, four times", step("steps", "answers", DEMO, *artefacts))


def _real_package(store: Path, work: Path, precision: str) -> tuple[Path, Path]:
    """The checkpoint of the real shape and its encoder's package in `precision`, exported if this run has not yet."""
    checkpoint, folder = synthetic(store), work / ("encoder" if precision == "float16" else "encoder-float32")
    if not folder.is_dir():
        units = ["--compute-precision", precision, *(["--compute-units", "ALL"] if precision == "float32" else [])]
        run_step(f"exporting the real encoder in {precision}", export("vision", checkpoint, folder, *units))
    return checkpoint, next(folder.rglob("*.mlpackage"))


SUITE = suite.Suite(
    "export",
    BARS,
    {
        "demo-export": _demo_export,
        "encoder-export": _encoder_export,
        "executor": _executor,
        "encoder-parity": _encoder_parity,
        "answers": _answers,
    },
)
