"""`python -m benchmarks parity | export | encoder | estimate | quantization | ttft | mac-report | peers`."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import environment
from benchmarks.estimate import estimate
from benchmarks.mac import report
from benchmarks.parity.pictures import LIMIT
from benchmarks.peers import command as peers
from benchmarks.suites import encoder, export, quantization
from benchmarks.ttft import command as ttft
from fastvlm.common.cli import Parser, add_common, log, main, progress
from fastvlm.common.files import Output
from fastvlm.common.terminal import Console
from model_export.config import LLM_RUNNERS, VISION_RUNNERS


def build_parser() -> argparse.ArgumentParser:
    """The command line of the package."""
    parser = Parser(
        prog="python -m benchmarks",
        description="Is an artefact still the model it came from, and what does exporting cost?",
    )
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    _add_parity(subparsers)
    export.add_parser(subparsers)
    encoder.add_parser(subparsers)
    estimate.add_parser(subparsers)
    quantization.add_parser(subparsers)
    ttft.add_parser(subparsers)
    report.add_parser(subparsers)
    peers.add_parser(subparsers)
    return parser


def _add_parity(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "parity",
        help="compare an artefact with the checkpoint it was made from",
        description="Compare an artefact with its checkpoint stage by stage, from the bytes of both, and write a page."
        " Exit 1 when a tolerance is broken.",
    )
    parser.add_argument(
        "--reference", required=True, metavar="CHECKPOINT", help="a checkpoint folder; PyTorch runs it in float32"
    )
    parser.add_argument("--candidate", required=True, metavar="ARTEFACT", help="an artefact folder")
    parser.add_argument("--images", metavar="FOLDER", help="pictures of yours, besides the demo set")
    parser.add_argument(
        "--limit",
        type=int,
        default=LIMIT,
        metavar="N",
        help="demo questions, and pictures of yours, at most (default: %(default)s; the demo set has 500)",
    )
    parser.add_argument(
        "--output-dir",
        type=Output(files=("index.html",)),
        default="build/parity",
        metavar="DIR",
        help="where the page goes (default: %(default)s)",
    )
    parser.add_argument(
        "--vision",
        choices=VISION_RUNNERS,
        default="auto",
        help="what runs the encoder (default: Core ML on a Mac, else the executor)",
    )
    parser.add_argument(
        "--llm",
        choices=LLM_RUNNERS,
        default="auto",
        help="what runs the language model (default: MLX on a Mac, else PyTorch)",
    )
    parser.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="one that was exported (default: the artefact's native one)"
    )
    add_common(parser)
    parser.set_defaults(run=run_parity)


def run_parity(args: argparse.Namespace) -> dict[str, Any]:
    """Compare, print the figures as a table, write `index.html`."""
    with progress("import PyTorch"):
        from benchmarks.parity import compare

    page = Path(args.output_dir) / "index.html"
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    result = compare.compare(
        args.reference, args.candidate, args.images, args.limit,
        report=page, vision=args.vision, llm=args.llm, command=command, resolution=args.resolution,
    )  # fmt: skip
    if not args.json:
        print_parity(result)
    log(f"page: {page}")
    return {**result, "page": str(page), "load": environment.load()}


def print_parity(result: dict[str, Any]) -> None:
    """The figures of `parity.compare` as a table on stdout, with what ran each side."""
    from benchmarks.parity.report import bound, figure

    console = Console(highlight=False)
    table = Table(title="parity", title_justify="left")
    for column in ("", "figure", "measured", "tolerance"):
        table.add_column(column, overflow="fold")
    for metric in result["metrics"].values():
        mark = {True: "[green]✓[/]", False: "[red]✗[/]"}.get(metric["passed"], "–")
        table.add_row(mark, metric["label"], figure(metric["value"], metric["unit"]), bound(metric))
    console.print(table)
    for side in ("reference", "candidate"):
        runners = ", ".join(f"{part}: {name}" for part, name in result[side]["runners"].items())
        console.print(f"{side} {result[side]['name']}: {runners}", markup=False)
    if result["exact"]:
        exact = result["exact"]
        console.print(
            f"exact answers: reference {exact['reference']}, candidate {exact['candidate']} of {exact['questions']}"
        )
    console.print(environment.machine_line(result["environment"]), markup=False)
    console.print(result["verdict"], style="green" if result["passed"] else "red", markup=False)


if __name__ == "__main__":
    main(build_parser, at_once=True)  # taking down PyTorch and what a benchmark has loaded can take seconds
