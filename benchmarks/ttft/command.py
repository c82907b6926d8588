"""`fastvlm ttft`: time to first token of a checkpoint and of what was exported, side by side."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.ttft.document import load_document
from benchmarks.ttft.runner import DELAY, STAGES
from fastvlm.checkpoint.adapter_flag import add_adapter
from fastvlm.common.arguments import positive, whole_number
from fastvlm.common.cli import add_common, log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output, some_path
from fastvlm.common.staging import write_file
from fastvlm.data import pictures
from fastvlm.data.scenes import CHECKPOINT
from model_export.config import FORMATS
from quantization.catalogue import SIZES
from quantization.recipe import usable_recipe


def add_parser(subparsers: Any) -> None:
    """Add the verb `ttft` with `show`, `diff` and `repeatability`."""
    parser = subparsers.add_parser(
        "ttft",
        description="Measure load, preprocess, encode, project, prefill, first token, decode and a second question on"
        " the same picture, for each runner in its own process, in interleaved rounds. Without --artefact it exports"
        " one for each --quant.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, metavar="FOLDER", help="default: the demo checkpoint"
    )
    source.add_argument(
        "--shape", choices=tuple(SIZES), help="a checkpoint of this real shape with random weights, written once"
    )
    add_adapter(parser)
    _add_effort(parser, launches=3, rounds=5)
    exported = parser.add_mutually_exclusive_group()
    exported.add_argument(
        "--artefact", type=Path, nargs="+", default=[], metavar="FOLDER", help="made from the checkpoint"
    )
    exported.add_argument(
        "--quant",
        type=usable_recipe,
        nargs="+",
        default=["fp16"],
        metavar="RECIPE",
        help="what to export (default: fp16)",
    )
    text = "of what is exported (default: %(default)s)"
    add("--format", choices=FORMATS, default="coreml", metavar="NAME", help=text)
    pixels, count = whole_number(64, multiple=64), whole_number()
    add("--resolution", type=pixels, nargs="+", default=[], metavar="PX", help="default: the native one")
    add("--prompt-length", type=count, nargs="+", default=[], metavar="N", help="text tokens, template included")
    add("--runner", nargs="+", default=[], metavar="NAME", help="only these: names or patterns, 'executor-*'")
    add("--image-file", type=_picture, metavar="FILE", help="the picture (default: a drawn one)")
    add("--threads", type=count, metavar="N", help="of each runner (default: PyTorch's own choice)")
    add("--no-search", action="store_true", help="don't look for Transformers' best setting; its default only")
    add("--save", type=Output(file=True), metavar="RUN.json", help="write the run, for `show` and `diff`")
    add("--output", type=Output(file=True), metavar="PAGE.html", help="write the page")
    parser.set_defaults(run=run)

    verbs = parser.add_subparsers(metavar="show | diff | repeatability")
    parser = verbs.add_parser("show", help="a saved run again: table and page")
    parser.add_argument("saved", type=Path, metavar="RUN.json")
    parser.add_argument("--output", type=Output(file=True), metavar="PAGE.html", help="write the page")
    add_common(parser)
    parser.set_defaults(run=show)

    parser = verbs.add_parser("diff", help="what changed between two saved runs by more than their noise")
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--fail-on-slower", action="store_true", help="exit 1 when a stage became slower")
    add_common(parser)
    parser.set_defaults(run=compare)

    parser = verbs.add_parser(
        "repeatability",
        help="check that `diff` reports no change between equal runs, and reports a stage slowed by 15 %%",
        description="Measure the demo checkpoint again and again: pairs of equal runs, and as many with a stage slowed"
        " by 15 %. Exit 1 when more than one pair in 20 is called different, or a slowdown isn't named.",
    )
    parser.add_argument(
        "--pairs", type=whole_number(), default=20, metavar="N", help="of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=list(STAGES), help="slowed in turn (default: all)"
    )
    _add_effort(parser, launches=8, rounds=30)
    add_common(parser)
    parser.set_defaults(run=repeatability)


def _add_effort(parser: argparse.ArgumentParser, launches: int, rounds: int) -> None:
    add = parser.add_argument
    add("--launches", type=whole_number(), default=launches, metavar="N", help="processes of each runner (%(default)s)")
    add("--rounds", type=whole_number(), default=rounds, metavar="N", help="in each, after a warm-up (%(default)s)")
    add(
        "--budget",
        type=positive,
        default=120.0,
        metavar="S",
        help="seconds for a runner's rounds at a point, and for its first, cold pass: a slow runner gets fewer rounds,"
        " one that does not finish its first pass is stopped; the table says which (default: %(default)g)",
    )
    add(
        "--work-dir",
        type=Output(),
        default=Path("build/benchmarks"),
        metavar="DIR",
        help="where synthetic checkpoints and exports are kept (default: %(default)s)",
    )


def _picture(text: str) -> Path:
    path = some_path(text)
    pictures.check([path])
    return path


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; print, write and save the run. Returns its document."""
    from benchmarks.suites import suite
    from benchmarks.ttft import plan
    from benchmarks.ttft.run import Effort
    from benchmarks.ttft.runners import Request

    recipes, resolutions, lengths = (
        tuple(dict.fromkeys(values)) for values in (args.quant, args.resolution, args.prompt_length)
    )
    request = Request(
        args.checkpoint, Effort(args.launches, args.rounds, args.budget), tuple(args.artefact), recipes, args.format,
        resolutions, lengths, tuple(args.runner), args.image_file, args.threads, not args.no_search, args.work_dir,
        args.adapter,
    )  # fmt: skip
    plan.check(request)
    if args.shape:
        request = replace(request, checkpoint=suite.synthetic(args.work_dir.resolve(), args.shape))
    with progress("ttft"):
        document = plan.measure(request)
    if args.save:
        write_file(args.save, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        log(f"saved: {args.save}")
    return _shown(args, document)


def show(args: argparse.Namespace) -> dict[str, Any]:
    """Show a saved run as `run` does."""
    return _shown(args, load_document(args.saved))


def _shown(args: argparse.Namespace, document: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.ttft import report

    if args.output:
        write_file(args.output, report.render(document).encode())
        log(f"page: {args.output}")
    if not args.json:
        report.print_document(document)
    return document


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Compare two saved runs, and print what changed."""
    from benchmarks.ttft import diff, report

    comparison = diff.compare(load_document(args.old), load_document(args.new))
    if not args.json:
        report.print_changes(comparison)
    slower = any(row["called"] == "slower" for row in comparison["changes"])
    return comparison | ({"passed": not slower} if args.fail_on_slower else {})


def repeatability(args: argparse.Namespace) -> dict[str, Any]:
    """Measure how often `compare` is right, and print it."""
    from benchmarks.ttft import plan, repeat, report
    from benchmarks.ttft.run import Effort
    from benchmarks.ttft.runners import Request

    if delay := os.environ.get(DELAY):
        raise UserError(f"{DELAY} is set to {delay}: expected none, unset it")
    effort = Effort(args.launches, args.rounds, args.budget)
    request = Request(CHECKPOINT, effort, patterns=repeat.RUNNERS, search=False, work=args.work_dir)
    with progress("runs", 2 * args.pairs + 1) as advance:

        def measure() -> dict[str, Any]:
            document = plan.measure(request, say=lambda line: None)
            advance()
            return document

        result = repeat.repeat(measure, args.pairs, args.stage)
    if not args.json:
        report.print_repeated(result)
    return result
