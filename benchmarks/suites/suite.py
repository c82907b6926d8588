"""The benchmarks with bars: sections of steps, each in a process of its own; figures beside their bars."""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.suites import step, steps
from fastvlm.common import children, threads
from fastvlm.common.children import ROOT, Finished
from fastvlm.common.cli import EXIT_CHECK_FAILED, log, progress
from fastvlm.common.errors import CheckFailed
from fastvlm.common.files import Output
from fastvlm.common.terminal import mark, print_table

DEMO = ROOT / "fastvlm" / "demo_checkpoint"
SIGNS = {"<=": "≤", ">=": "≥", "<": "<"}


@dataclass
class Run:
    """A run of a suite: `store` keeps what later runs need, too, `work` is this run's own folder."""

    store: Path
    work: Path
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(
        self, key: str, label: str, value: float, unit: str = "", *, most: float | None = None,
        least: float | None = None, below: float | None = None,
    ) -> None:  # fmt: skip
        """Report a figure, with the bar that it must reach; without one it is only reported."""
        bars = {">=": least, "<": below, "<=": most}
        sense, bound = next(((sense, bound) for sense, bound in bars.items() if bound is not None), ("<=", None))
        if key in self.figures:
            raise KeyError(f"two figures {key}")
        self.figures[key] = judge(label, value, unit, sense, bound)

    def add_cost(
        self, key: str, label: str, done: Finished, most: float | None = None, peak: float | None = None
    ) -> None:
        """Report a process's time, with a bar in s, and its peak memory, with one in GB."""
        self.add(f"{key}_seconds", label, done.seconds, "s", most=most)
        self.add(f"{key}_peak", "  its peak memory", done.peak_gb, "GB", most=peak)


Section = Callable[[Run], None]


@dataclass(frozen=True)
class Suite:
    """A benchmark: named sections that report figures."""

    name: str
    sections: Mapping[str, Section]


def add_suite(subparsers: Any, suite: Suite, description: str) -> None:
    """Add the suite's verb."""
    parser = subparsers.add_parser(suite.name, description=f"{description} Exit 1 when a bar is missed.")
    parser.add_argument(
        "--section", nargs="+", choices=tuple(suite.sections), default=list(suite.sections), metavar="NAME",
        help=f"of {', '.join(suite.sections)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--work-dir", type=Output(), default="build/benchmarks", metavar="DIR",
        help="where the synthetic checkpoints are kept, 1.3 GB, and 15 GB of 7B (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=partial(run, suite))


def run(suite: Suite, args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sections, print the table. "passed" is False when a bar is missed."""
    store = Path(args.work_dir).resolve()
    store.mkdir(parents=True, exist_ok=True)
    before = environment.load()
    with tempfile.TemporaryDirectory(dir=store, prefix="run.") as work:
        current = Run(store, Path(work))
        for name, section in suite.sections.items():
            if name in args.section:
                section(current)
    document = {
        "suite": suite.name,
        "passed": all(figure["passed"] is not False for figure in current.figures.values()),
        "figures": current.figures,
        "environment": environment.describe() | {"torch_threads": threads.count()},
        "load_before": before,
        "load_after": environment.load(),
    }
    if not args.json:
        print_document(suite.name, document)
    return document


def judge(label: str, value: float, unit: str, sense: str, bound: float | None) -> dict[str, Any]:
    """A figure with its bar and `passed`. The value has four digits, more where they would round it onto its bound; it
    is None where it is not finite, which JSON has not."""
    passed, digits = None, 4
    if bound is not None:
        passed = {"<=": value <= bound, ">=": value >= bound, "<": value < bound}[sense]
        digits = 8 if float(f"{value:.4g}") == bound else 4
    shown = float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return {"figure": label, "sense": sense, "bound": bound, "unit": unit, "value": shown, "passed": passed}


def print_document(title: str, document: dict[str, Any]) -> None:
    """Figure, value, bar and mark, then the machine."""
    rows = []
    for figure in document["figures"].values():
        bar = "" if figure["bound"] is None else f"{SIGNS[figure['sense']]} {figure['bound']:g} {figure['unit']}"
        value = "not finite" if figure["value"] is None else f"{figure['value']:.8g} {figure['unit']}"
        rows.append((figure["figure"], value, bar, "" if figure["passed"] is None else mark(figure["passed"])))
    print_table(title, ("figure", "measured", "bar", ""), rows, numbers=("measured", "bar"))
    print(f"load before: {document['load_before']['1min']:.1f}")
    for name, line in environment.notes(document["environment"]):
        print(f"{name}: {line}")


# Steps


def run_step(description: str, command: Sequence[str], check: bool = True) -> Finished:
    """Run a command in a process of its own. Raises CheckFailed when it fails; without `check` it may end with 1, a
    check of its own that failed."""
    with progress(description):
        done = children.run(command, log)
    if done.returncode not in ((0,) if check else (0, EXIT_CHECK_FAILED)):
        raise CheckFailed(f"{description}: exit {done.returncode}: {' '.join(command)}")
    return done


def call(description: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function returns (JSON), called in a process of its own; logged, too, so that an interrupted run
    has shown its results."""
    found = run_step(description, step.command(function, *arguments)).document(description)["result"]
    log(f"{description}: {json.dumps(found)}")
    return found


def export(verb: str, checkpoint: Path, target: Path, *flags: str) -> list[str]:
    """The command of an export."""
    paths = ["--checkpoint", str(checkpoint), "--output-dir", str(target)]
    return [sys.executable, "-m", "model_export", verb, *paths, *flags]


def synthetic(store: Path, shape: str = "0.5b") -> Path:
    """A checkpoint of a real shape with random weights, made once."""
    target = store / f"synthetic-{shape}"
    if not target.is_dir():
        call(f"writing a random checkpoint of the {shape} shape", steps.synthetic, target, shape)
    return target
