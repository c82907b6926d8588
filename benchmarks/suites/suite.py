"""What the benchmarks with bars share: sections of steps, each in a process of its own; figures beside their bars."""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import environment
from fastvlm.common import children, threads
from fastvlm.common.children import ROOT
from fastvlm.common.cli import add_common, log, progress
from fastvlm.common.errors import CheckFailed
from fastvlm.common.files import Output
from fastvlm.common.terminal import mark, print_table

DEMO = ROOT / "fastvlm" / "demo_checkpoint"
_SIGNS = {"<=": "≤", ">=": "≥", "<": "<"}
Figures = dict[str, float]
Section = Callable[[Path, Path], Figures]  # (store, work): what is kept between runs, and this run's own folder


@dataclass(frozen=True)
class Bar:
    """What a figure must reach (an issue's "What it must show"); None: reported."""

    figure: str
    sense: str
    bound: float | None
    unit: str


@dataclass(frozen=True)
class Suite:
    """A benchmark: `sections` by name fill in figures by the keys of `bars`."""

    name: str
    bars: Mapping[str, Bar]
    sections: Mapping[str, Section]


def add_suite(subparsers: Any, suite: Suite, help: str, description: str) -> argparse.ArgumentParser:
    """Add the suite's verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(suite.name, help=help, description=description)
    parser.add_argument(
        "--section",
        nargs="+",
        choices=tuple(suite.sections),
        default=list(suite.sections),
        metavar="NAME",
        help=f"of {', '.join(suite.sections)} (default: all)",
    )
    parser.add_argument(
        "--work-dir",
        type=Output(),
        default="build/benchmarks",
        metavar="DIR",
        help="where the synthetic checkpoints are kept, 1.3 GB, and 15 GB of 7B (default: %(default)s)",
    )
    add_common(parser)
    parser.set_defaults(run=partial(run, suite))
    return parser


def run(suite: Suite, args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sections, print the table. "passed" is False when a bar is missed.

    KeyError for a figure that has no bar: a mistake in a section.
    """
    store = Path(args.work_dir).resolve()
    store.mkdir(parents=True, exist_ok=True)
    before = environment.load()
    measured: Figures = {}
    with tempfile.TemporaryDirectory(dir=store, prefix="run.") as work:
        for name, section in suite.sections.items():
            if name in args.section:
                measured |= section(store, Path(work))
    if unknown := sorted(measured.keys() - suite.bars.keys()):
        raise KeyError(f"{suite.name}: figures without a bar, which no table would show: {', '.join(unknown)}")
    figures = {key: judge(bar, measured[key]) for key, bar in suite.bars.items() if key in measured}
    known = environment.describe() | {"torch_threads": threads.count()}
    document = {
        "passed": all(figure["passed"] is not False for figure in figures.values()),
        "figures": figures,
        "environment": known,
        "load_before": before,
        "load_after": environment.load(),
    }
    if not args.json:
        print_document(suite.name, document)
    return document


def judge(bar: Bar, value: float) -> dict[str, Any]:
    """The bar with the figure's value (four digits, more where they would round it onto its bound; None where it is not
    finite, which JSON has not) and `passed`."""
    passed, digits = None, 4
    if bar.bound is not None:
        passed = {"<=": value <= bar.bound, ">=": value >= bar.bound, "<": value < bar.bound}[bar.sense]
        digits = 8 if float(f"{value:.4g}") == bar.bound else 4
    return {**asdict(bar), "value": float(f"{value:.{digits}g}") if math.isfinite(value) else None, "passed": passed}


def print_document(title: str, document: dict[str, Any]) -> None:
    """Figure, value, bar and mark, then the machine."""
    rows = []
    for figure in document["figures"].values():
        bar = "" if figure["bound"] is None else f"{_SIGNS[figure['sense']]} {figure['bound']:g} {figure['unit']}"
        value = "not finite" if figure["value"] is None else f"{figure['value']:.8g} {figure['unit']}"
        outcome = "" if figure["passed"] is None else mark(figure["passed"])
        rows.append((figure["figure"], value, bar, outcome))
    print_table(title, ("figure", "measured", "bar", ""), rows, numbers=("measured", "bar"))
    known = document["environment"]
    print(f"{environment.machine_line(known)}, load before {document['load_before']['1min']:.1f}")
    print(f"Python {known['python']}, {', '.join(f'{name} {version}' for name, version in known['packages'].items())}")


# Steps


def run_step(description: str, command: Sequence[str], check: bool = True) -> children.Finished:
    """Run a command in a process of its own. Raises CheckFailed when it fails, unless `check` is False."""
    with progress(description):
        done = children.run(command, log)
    if done.returncode and check:
        raise CheckFailed(f"{description}: exit {done.returncode}: {' '.join(command)}")
    return done


def result(description: str, command: Sequence[str]) -> dict[str, Any]:
    """What a step printed as its last line; logged, too, so that an interrupted run has told what it found."""
    document = run_step(description, command).document(description)
    log(f"{description}: {json.dumps(document)}")
    return document


def export(verb: str, checkpoint: Path, target: Path, *flags: str) -> list[str]:
    """The command of an export."""
    paths = ["--checkpoint", str(checkpoint), "--output-dir", str(target)]
    return [sys.executable, "-m", "model_export", verb, *paths, *flags]


def step(module: str, name: str, *arguments: object) -> list[str]:
    """The command of a step of `benchmarks.MODULE`."""
    return [sys.executable, "-m", f"benchmarks.suites.{module}", name, *map(str, arguments)]


def synthetic(store: Path, shape: str = "0.5b") -> Path:
    """A checkpoint of a real shape with random weights, made once."""
    target = store / f"synthetic-{shape}"
    if not target.is_dir():
        run_step(f"writing a random checkpoint of the {shape} shape", step("steps", "synthetic", target, shape))
    return target
