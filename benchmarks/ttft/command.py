"""`python -m benchmarks ttft`: time to first token of a checkpoint and of what was exported, side by side.

`ttft_plan` says what is measured, `ttft_run` has the processes, `ttft_runner` the clock, `ttft_search` Transformers'
best setting, `ttft_document` reads a saved run, `ttft_report` makes the tables and the page, `ttft_diff` says what
changed between two runs, `ttft_repeat` whether that is so.
"""

import argparse
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.suites.suite import DEMO, synthetic
from benchmarks.ttft import diff, plan, report
from benchmarks.ttft.document import load_document
from benchmarks.ttft.run import Effort
from benchmarks.ttft.runner import DELAY, parse_delays
from fastvlm.common.cli import add_common, log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.common.staging import write_file
from quantization.catalogue import SIZES

_DEFAULT = Effort()


def add_parser(subparsers: Any) -> None:
    """Add the verb `ttft` with `show`, `diff` and `repeatability`."""
    parser = subparsers.add_parser(
        "ttft",
        help="time to first token: the artefact, Transformers, mlx-vlm, side by side and interleaved",
        description="Measure load, preprocess, encode, project, prefill, first token, decode and a second question on"
        " the same picture, for each runner in its own process, in interleaved rounds. Without --artefact it exports"
        " one for each --quant.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, default=DEMO, metavar="FOLDER", help="default: the demo checkpoint")
    source.add_argument(
        "--shape", choices=tuple(SIZES), help="a checkpoint of this real shape with random weights, written once"
    )
    add_effort(parser)
    parser.add_argument(
        "--artefact", type=Path, nargs="+", default=[], metavar="FOLDER", help="made from the checkpoint"
    )
    parser.add_argument("--quant", nargs="+", metavar="RECIPE", help="what to export (default: fp16)")
    parser.add_argument("--resolution", type=int, nargs="+", default=[], metavar="PX", help="default: the native one")
    parser.add_argument(
        "--prompt-length", type=int, nargs="+", default=[], metavar="N", help="text tokens, template included"
    )
    parser.add_argument(
        "--runner", nargs="+", default=[], metavar="NAME", help="only these: names or patterns, 'executor-*'"
    )
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="PEER", help="models that the paper compares with, too"
    )
    parser.add_argument("--image-file", type=Path, metavar="FILE", help="the picture (default: a drawn one)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each runner (default: PyTorch's own choice)")
    parser.add_argument(
        "--no-search", action="store_true", help="don't look for Transformers' best setting; its default only"
    )
    parser.add_argument("--compile", action="store_true", help="try torch.compile in the search, too")
    parser.add_argument("--output", type=Output(), metavar="PAGE.html", help="write the page")
    parser.add_argument("--save", type=Output(), metavar="RUN.json", help="write the run, for `show` and `diff`")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    add_common(parser)
    parser.set_defaults(run=run)
    verbs = parser.add_subparsers(metavar="show | diff | repeatability")
    _add_show(verbs)
    diff.add_parser(verbs)
    from benchmarks.ttft import repeat

    repeat.add_parser(verbs)


def add_effort(parser: argparse.ArgumentParser, effort: Effort = _DEFAULT) -> None:
    """Add the flags that say how much is measured, and where things are kept."""
    parser.add_argument(
        "--launches",
        type=int,
        default=effort.launches,
        metavar="N",
        help="processes of each runner (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=effort.rounds, metavar="N", help="in each, after a warm-up (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=effort.budget,
        metavar="S",
        help="seconds for a runner's rounds at a point, and for its first, cold pass: a slow one gets fewer rounds, one"
        " that isn't through by then is stopped, and the table says so (default: %(default)g)",
    )
    parser.add_argument(
        "--work-dir",
        type=Output(),
        default=Path("build/benchmarks"),
        metavar="DIR",
        help="where synthetic checkpoints and exports are kept (default: %(default)s)",
    )


def effort_faults(args: argparse.Namespace) -> list[str]:
    """Numbers that measure nothing, and a delay that isn't one."""
    given = {name: getattr(args, name) for name in ("launches", "rounds", "budget")}
    bad = [f"--{name} {value}" for name, value in given.items() if not 0 < value < math.inf]
    faults = [f"{', '.join(bad)}: expected more than 0"] if bad else []
    try:
        parse_delays(os.environ.get(DELAY, ""))
    except ValueError as error:
        faults.append(str(error))
    return faults


def _add_show(verbs: Any) -> None:
    parser = verbs.add_parser("show", help="a saved run again: table, page, Markdown")
    parser.add_argument("saved", type=Path, metavar="RUN.json")
    parser.add_argument("--output", type=Output(), metavar="PAGE.html", help="write the page")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    add_common(parser)
    parser.set_defaults(run=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; print, write and save what was asked for."""
    asked = plan.Asked(
        checkpoint=args.checkpoint, artefacts=tuple(args.artefact),
        recipes=tuple(dict.fromkeys(args.quant or ["fp16"])),
        resolutions=tuple(dict.fromkeys(args.resolution)), prompt_lengths=tuple(dict.fromkeys(args.prompt_length)),
        patterns=tuple(args.runner), against=tuple(args.against), picture=args.image_file, threads=args.threads,
        effort=Effort(args.launches, args.rounds, args.budget), search=not args.no_search, compiled=args.compile,
        work=args.work_dir,
    )  # fmt: skip
    if faults := [*effort_faults(args), *_number_faults(args), *_target_faults(args), *plan.check(asked)]:
        raise UserError("; ".join(faults))
    if args.shape:
        asked = replace(asked, checkpoint=synthetic(args.work_dir.resolve(), args.shape))
    with progress("ttft"):
        document = plan.measure(asked)
    document["ratios"] = report.ratios(document)
    if args.save:
        save(args.save, document)
    _tell(args, document)
    return document


def _number_faults(args: argparse.Namespace) -> list[str]:
    bad = [
        f"--{name.replace('_', '-')} {value}"
        for name in ("resolution", "prompt_length")
        for value in getattr(args, name)
        if value < 1
    ]
    if args.threads is not None and args.threads < 1:
        bad.append(f"--threads {args.threads}")
    bad += [f"--resolution {value} (a multiple of 64)" for value in args.resolution if value > 0 and value % 64]
    faults = [f"{', '.join(bad)}: expected whole numbers from 1, pictures' sides multiples of 64"] if bad else []
    if args.artefact and args.quant:
        faults.append("--quant beside --artefact: the artefact has its recipe, expected one of the two")
    return faults


def _target_faults(args: argparse.Namespace) -> list[str]:
    targets = {name: getattr(args, name, None) for name in ("save", "output")}
    return [
        f"--{name} {path}: is a folder, expected the name of a file"
        for name, path in targets.items()
        if path is not None and path.is_dir()
    ]


def save(path: Path, document: dict[str, Any]) -> None:
    """Write the run, whole or not at all."""
    write_file(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    log(f"saved: {path}")


def show(args: argparse.Namespace) -> dict[str, Any]:
    """A saved run, as `run` shows it."""
    if faults := _target_faults(args):
        raise UserError("; ".join(faults))
    document = load_document(args.saved)
    _tell(args, document)
    return document


def _tell(args: argparse.Namespace, document: dict[str, Any]) -> None:
    if args.output:
        report.write(args.output, document)
        log(f"page: {args.output}")
    if args.markdown:
        print(report.markdown(document))
    elif not args.json:
        report.print_document(document)
