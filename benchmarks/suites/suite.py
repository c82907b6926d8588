"""The benchmarks with bars: tables of commands (NAME.json), each a process of its own, whose figures have bars."""

import argparse
import math
import operator
import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import checks, environment
from benchmarks.checks import Check
from fastvlm.common import children, threads
from fastvlm.common.children import ROOT, Finished
from fastvlm.common.cli import EXIT_CHECK_FAILED, log, progress
from fastvlm.common.errors import CheckFailed
from fastvlm.common.files import Output
from fastvlm.common.terminal import mark, print_table

DEMO = ROOT / "fastvlm" / "demo_checkpoint"
_OPERATORS: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add, "-": operator.sub, "/": operator.truediv, "|": min,
}  # fmt: skip
_BARS = {"<=": ("≤", operator.le), ">=": ("≥", operator.ge), "<": ("<", operator.lt)}


def table(name: str) -> Path:
    """The file of a benchmark's checks; their parts are its sections."""
    return Path(__file__).with_name(f"{name}.json")


def _add(name: str, subparsers: Any) -> None:
    rows = checks.load(table(name))
    sections = list(dict.fromkeys(row.part for row in rows))
    needs = " and ".join(dict.fromkeys(need for row in rows for need in row.needs))
    parser = subparsers.add_parser(
        name,
        description=f"Measure the figures of docs/BENCHMARKS.md ({name}) on random weights of real shapes and on the"
        f" demo checkpoint, each beside its bar. {f'Some are skipped unless {needs} are set. ' if needs else ''}Exit 1"
        " when a bar is missed.",
    )
    parser.add_argument(
        "--section", nargs="+", choices=sections, default=sections, metavar="NAME",
        help=f"of {', '.join(sections)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--work-dir", type=Output(), default="build/benchmarks", metavar="DIR",
        help="where the synthetic checkpoints are kept, 1.3 GB, and 15 GB of 7B (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=partial(run, name))


add_export, add_encoder, add_quantization = (partial(_add, name) for name in ("export", "encoder", "quantization"))


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sections, print the table. "passed" is False when a bar is missed."""
    store = Path(args.work_dir).resolve()
    store.mkdir(parents=True, exist_ok=True)
    rows, before = checks.load(table(name)), environment.load()
    with tempfile.TemporaryDirectory(dir=store, prefix="run.") as work:
        places = {**os.environ, "demo": str(DEMO), "store": str(store), "work": work}
        figures = measure(checks.chosen(rows, [row.name for row in rows if row.part in args.section]), places)
    document = {
        "suite": name,
        "passed": all(figure["passed"] is not False for figure in figures.values()),
        "figures": figures,
        "environment": environment.describe() | {"torch_threads": threads.count()},
        "load_before": before,
        "load_after": environment.load(),
    }
    if not args.json:
        print_document(document)
    return document


def measure(rows: Sequence[Check], places: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The figures of the rows by their keys. A row whose environment variables are not set is skipped, with a line."""
    results: dict[str, Any] = {}
    figures: dict[str, dict[str, Any]] = {}
    for row in rows:
        if absent := [need for need in row.needs if not places.get(need)]:
            log(f"{row.title}: skipped, no bar judged: {', '.join(absent)} is not set (docs/BENCHMARKS.md)")
        elif not checks.is_made(row, places):
            results[row.name] = _costs_in_turns(row, places) if row.turns else _result(row, places)
            for key, label, amount, *bar in row.figures:
                if key in figures:
                    raise KeyError(f"two figures {key}")
                figures[key] = judge(label, amount_of(results, amount), *bar)
                log(" ".join([label.strip(), *cells(figures[key])]))
    return figures


def _result(row: Check, places: Mapping[str, str]) -> dict[str, Any]:
    done = _finished(row.title, checks.words(row.command, places), row.may_fail)
    return _cost(done) | (checks.result_in(done.stdout)[0] or {})


def _costs_in_turns(row: Check, places: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Median cost of every command, run one after the other, the order reversed every other round."""
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in row.turns}
    for number in range(row.rounds):
        for name in list(row.turns)[:: -1 if number % 2 else 1]:
            title = f"{row.title}, {name}, round {number + 1} of {row.rounds}"
            costs[name].append(_cost(_finished(title, checks.words(row.turns[name], places))))
            shutil.rmtree(Path(places["work"], "turn"))
    return {
        name: {key: statistics.median(cost[key] for cost in rounds) for key in rounds[0]}
        for name, rounds in costs.items()
    }


def _cost(done: Finished) -> dict[str, float]:
    return {"seconds": done.seconds, "peak_gb": done.peak_gb}


def _finished(title: str, command: Sequence[str], may_fail: bool = False) -> Finished:
    """Run a command in a process of its own. Raises CheckFailed when it fails."""
    with progress(title):
        done = children.run(command, log)
    if done.returncode not in ((0, EXIT_CHECK_FAILED) if may_fail else (0,)):
        raise CheckFailed(f"{title}: {shlex.join(command)} {done.ending}: {done.last_line}")
    return done


def amount_of(results: Mapping[str, Any], text: str) -> float:
    """A figure's value: `ROW.PATH`, or several of them with + - / or | (the lesser) between, from left to right. The
    values at a path are added; where there is none, it is not a number."""
    first, *rest = re.split(r" ([-+/|]) ", text)
    total = _sum_at(results, first)
    for sign, path in zip(rest[::2], rest[1::2], strict=True):
        total = _OPERATORS[sign](total, _sum_at(results, path))
    return total


def _sum_at(results: Mapping[str, Any], path: str) -> float:
    values = [value for value in checks.values_at(results, path.split(".")) if value is not None]
    return sum(values) if values else math.nan


def judge(label: str, value: float, unit: str = "", sense: str = "<=", bound: float | None = None) -> dict[str, Any]:
    """A figure with its bar and `passed`. The value has four digits, more where they would round it onto its bound; it
    is None where it is not finite, which JSON has not."""
    passed, digits = None, 4
    if bound is not None:
        passed = _BARS[sense][1](value, bound)
        digits = 8 if float(f"{value:.4g}") == bound else 4
    shown = float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return {"figure": label, "sense": sense, "bound": bound, "unit": unit, "value": shown, "passed": passed}


def cells(figure: Mapping[str, Any]) -> tuple[str, str]:
    """The value and the bar of a figure in words; no bar: empty."""
    unit = f" {figure['unit']}" if figure["unit"] else ""
    value = "not finite" if figure["value"] is None else f"{figure['value']:.8g}{unit}"
    return value, "" if figure["bound"] is None else f"{_BARS[figure['sense']][0]} {figure['bound']:g}{unit}"


def print_document(document: Mapping[str, Any]) -> None:
    """Figure, value, bar and mark, then the machine."""
    rows = [
        (figure["figure"], *cells(figure), "" if figure["passed"] is None else mark(figure["passed"]))
        for figure in document["figures"].values()
    ]
    print_table(document["suite"], ("figure", "measured", "bar", ""), rows, numbers=("measured", "bar"))
    print(f"load before: {document['load_before']['1min']:.1f}")
    for name, line in environment.notes(document["environment"]):
        print(f"{name}: {line}")


def synthetic(store: Path, shape: str) -> Path:
    """A checkpoint of a real shape with random weights, made once, by a process of its own."""
    target = store / f"synthetic-{shape}"
    if not target.is_dir():
        options = ("dtype=bfloat16", "shards=4") if shape == "7b" else ("dtype=float16",)  # as it is published
        write = ("benchmarks.suites.step", "fastvlm.synthetic.checkpoint:write_checkpoint", target, f"shape={shape}")
        command = [sys.executable, "-m", *map(str, write), *options]
        _finished(f"writing a random checkpoint of the {shape} shape", command)
    return target
