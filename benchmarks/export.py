"""`python -m benchmarks export`: what exporting costs and what the artefact keeps, each figure beside its bar.

Every step runs in a process of its own, so that its time and its peak memory are its own.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import environment
from benchmarks.measure import ROOT, measure
from fastvlm.cli import add_common, progress
from fastvlm.errors import CheckFailed

DEMO = ROOT / "fastvlm" / "demo_checkpoint"
RECIPES = ("fp16", "int8", "int4")


@dataclass(frozen=True)
class Bar:
    """What a figure must reach (issue 3, "What it must show"); None: reported."""

    figure: str
    sense: str
    bound: float | None
    unit: str


# key -> bar; the sections fill them in.
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
Figures = dict[str, float]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="what exporting costs: time, memory, executor speed, parity, answers",
        description="Measure export, executor and parity on the demo checkpoint and on the real shape with random"
        " weights. Exit 1 when a bar is missed.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--work-dir",
        default="build/benchmarks",
        metavar="DIR",
        help="where the 1.3 GB synthetic checkpoint is kept (default: %(default)s)",
    )
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sections, print the table."""
    store = Path(args.work_dir).resolve()
    store.mkdir(parents=True, exist_ok=True)
    before = environment.load()
    measured: Figures = {}
    with tempfile.TemporaryDirectory(dir=store, prefix="run.") as work:
        for section in SECTIONS:
            if section in args.only:
                measured |= SECTIONS[section](store, Path(work))
    figures = {key: _judge(bar, measured[key]) for key, bar in BARS.items() if key in measured}
    known = environment.describe() | {"torch_threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count()}
    document = {
        "passed": all(figure["passed"] is not False for figure in figures.values()),
        "figures": figures,
        "environment": known,
        "load_before": before,
        "load_after": environment.load(),
    }
    if not args.json:
        print_table(document)
    return document


def _judge(bar: Bar, value: float) -> dict[str, Any]:
    passed = None if bar.bound is None else value <= bar.bound if bar.sense == "<=" else value >= bar.bound
    return {**asdict(bar), "value": float(f"{value:.4g}"), "passed": passed}


def print_table(document: dict[str, Any]) -> None:
    """Figure, value, bar and mark, then the machine."""
    table = Table(title="export", title_justify="left")
    for column, justify in (("figure", "left"), ("measured", "right"), ("bar", "right"), ("", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for figure in document["figures"].values():
        bar = (
            ""
            if figure["bound"] is None
            else f"{'≤' if figure['sense'] == '<=' else '≥'} {figure['bound']:g} {figure['unit']}"
        )
        mark = {True: "[green]✓[/]", False: "[red]✗[/]"}.get(figure["passed"], "")
        table.add_row(figure["figure"].replace("[", "\\["), f"{figure['value']:g} {figure['unit']}", bar, mark)
    console = Console(highlight=False)
    console.print(table)
    load = document["load_before"]["1min"]
    console.print(environment.machine_line(document["environment"]) + f", load before {load:.1f}", markup=False)
    console.print(
        f"{platform.python_implementation()} {document['environment']['python']}, "
        + ", ".join(f"{k} {v}" for k, v in document["environment"]["packages"].items()),
        markup=False,
    )


def _demo_export(store: Path, work: Path) -> Figures:
    done = _run("exporting the demo checkpoint", _export("all", DEMO, work / "demo"))
    return {"demo_seconds": done.seconds, "demo_peak": done.peak_gb}


def _encoder_export(store: Path, work: Path) -> Figures:
    checkpoint = _synthetic(store)
    ours = _run("exporting the real encoder at 1024 x 1024", _export("vision", checkpoint, work / "encoder"))
    plain = _run("the same by a plain script", _step("plain_export", checkpoint, work / "plain.mlpackage"))
    return {
        "encoder_seconds": ours.seconds, "encoder_peak": ours.peak_gb,
        "plain_seconds": plain.seconds, "plain_peak": plain.peak_gb,
        "encoder_seconds_ratio": ours.seconds / plain.seconds, "encoder_peak_ratio": ours.peak_gb / plain.peak_gb,
    }  # fmt: skip


def _executor(store: Path, work: Path) -> Figures:
    checkpoint, package = _real_package(store, work, "float16")
    return _result("timing the executor against PyTorch", _step("executor", checkpoint, package))


def _encoder_parity(store: Path, work: Path) -> Figures:
    checkpoint, half = _real_package(store, work, "float16")
    single = _real_package(store, work, "float32")[1]
    return _result("comparing the real encoder with PyTorch", _step("encoder_parity", checkpoint, half, single))


def _answers(store: Path, work: Path) -> Figures:
    artefacts = []
    for recipe in RECIPES:
        artefacts.append(work / f"demo-{recipe}")
        _run(
            f"exporting the demo checkpoint, {recipe}",
            [*_export("all", DEMO, artefacts[-1]), "--quant", recipe],
            check=recipe != "int4",
        )
    return _result("asking 500 demo questions, four times", _step("answers", DEMO, *artefacts))


SECTIONS: dict[str, Callable[[Path, Path], Figures]] = {
    "demo-export": _demo_export,
    "encoder-export": _encoder_export,
    "executor": _executor,
    "encoder-parity": _encoder_parity,
    "answers": _answers,
}


def _export(verb: str, checkpoint: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "model_export", verb, "--checkpoint", str(checkpoint), "--output-dir", str(target)]


def _step(name: str, *paths: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.steps", name, *map(str, paths)]


def _run(description: str, command: Sequence[str], check: bool = True) -> Any:
    with progress(description, 1) as advance:
        done = measure(command)
        advance()
    if done.returncode and check:
        raise CheckFailed(f"{description}: exit {done.returncode}: {' '.join(command)}")
    return done


def _result(description: str, command: Sequence[str]) -> Figures:
    return json.loads(_run(description, command).stdout.splitlines()[-1])


def _synthetic(store: Path) -> Path:
    """A checkpoint of the real 0.5B shape with random weights, made once."""
    target = store / "synthetic-0.5b"
    if not target.is_dir():
        _run("writing a random checkpoint of the real shape", _step("synthetic", target))
    return target


def _real_package(store: Path, work: Path, precision: str) -> tuple[Path, Path]:
    """The checkpoint of the real shape and its encoder's package in `precision`, exported if this run has not yet."""
    checkpoint, folder = _synthetic(store), work / ("encoder" if precision == "float16" else "encoder-float32")
    if not folder.is_dir():
        units = ["--compute-precision", precision, *(["--compute-units", "ALL"] if precision == "float32" else [])]
        _run(f"exporting the real encoder in {precision}", [*_export("vision", checkpoint, folder), *units])
    return checkpoint, next(folder.rglob("*.mlpackage"))
