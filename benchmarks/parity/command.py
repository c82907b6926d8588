"""`parity`: an artefact beside the checkpoint that it was made from, with a table and a page."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.parity.pictures import COREAI_LIMIT, LIMIT
from fastvlm.checkpoint.adapter_flag import add_adapter
from fastvlm.common.arguments import whole_number
from fastvlm.common.cli import log, progress
from fastvlm.common.files import Output
from model_export.config import LLM_RUNNERS, VISION_RUNNERS


def add_parity(verbs: Any) -> None:
    """Add `parity`."""
    parser = verbs.add_parser(
        "parity",
        description="Compare an artefact with its checkpoint stage by stage, from the bytes of both, and write a page."
        " Exit 1 when a tolerance is broken.",
    )
    add = parser.add_argument
    add("--reference", required=True, type=Path, metavar="CHECKPOINT", help="a checkpoint; PyTorch runs it in float32")
    add_adapter(parser)
    add("--candidate", required=True, type=Path, metavar="ARTEFACT", help="an artefact folder")
    add("--images", metavar="FOLDER", help="pictures of yours, besides the demo set")
    limit = (
        f"demo questions, and pictures of yours, at most (default: {LIMIT}, {COREAI_LIMIT} of a Core AI bundle;"
        " the demo set has 500)"
    )
    add("--limit", type=whole_number(), metavar="N", help=limit)
    add("--output", type=Output(file=True), metavar="PAGE.html", help="the page (default: ARTEFACT-parity.html)")
    vision = "what runs the encoder (default: Core ML on a Mac, else the executor)"
    add("--vision", choices=VISION_RUNNERS, default="auto", help=vision)
    llm = "what runs the language model (default: MLX on a Mac, else PyTorch)"
    add("--llm", choices=LLM_RUNNERS, default="auto", help=llm)
    resolution = "one that was exported (default: the artefact's native one)"
    add("--resolution", type=int, metavar="PIXELS", help=resolution)
    parser.set_defaults(run=run_parity)


def run_parity(args: argparse.Namespace) -> dict[str, Any]:
    """Compare, print the figures as a table, write the page."""
    with progress("import PyTorch"):
        from benchmarks.parity import compare, report

    page = args.output or args.candidate.resolve().with_name(f"{args.candidate.resolve().name}-parity.html")
    command = shlex.join(["fastvlm", *sys.argv[1:]])
    result = compare.compare(
        args.reference, args.candidate, args.images, args.limit,
        report=page, vision=args.vision, llm=args.llm, command=command, resolution=args.resolution,
        adapter=args.adapter,
    )  # fmt: skip
    if not args.json:
        report.print_result(result)
    log(f"page: {page}")
    return {**result, "page": str(page), "load": environment.load()}
