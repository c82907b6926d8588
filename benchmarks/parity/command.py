"""`python -m benchmarks parity`: is an artefact still the model it came from?"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.parity.pictures import LIMIT
from fastvlm.common.cli import add_common, log, progress
from fastvlm.common.files import Output
from model_export.config import LLM_RUNNERS, VISION_RUNNERS


def add_parser(subparsers: Any) -> None:
    """Add the verb `parity`."""
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
        from benchmarks.parity import compare, report

    page = Path(args.output_dir) / "index.html"
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    result = compare.compare(
        args.reference, args.candidate, args.images, args.limit,
        report=page, vision=args.vision, llm=args.llm, command=command, resolution=args.resolution,
    )  # fmt: skip
    if not args.json:
        report.print_result(result)
    log(f"page: {page}")
    return {**result, "page": str(page), "load": environment.load()}
