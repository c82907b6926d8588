"""`python -m app_bridge plan`: what a model takes of a device's memory in the app, and whether that fits."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app_bridge.app.facts import table as app_facts
from app_bridge.memory import fit, measure, report
from app_bridge.memory.limits import MIB, measured_limits, reported_limits
from benchmarks.estimate.estimate import devices
from benchmarks.peers.shapes import TEXT_TOKENS
from fastvlm.common.cli import progress
from fastvlm.common.errors import UserError
from quantization.catalogue import SIZES
from quantization.recipe import load_recipe

LONGEST = 2048  # tokens of text that are still answered
_SIZE = re.compile(r"(\d{1,7}(?:\.\d{1,9})?)\s*(MB|GB|MiB|GiB)")
_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": MIB, "GiB": MIB << 10}


def add_parser(verbs: Any) -> None:
    """Add the verb `plan`."""
    parser = verbs.add_parser(
        "plan",
        description="Weights, KV cache, activations and the app itself against a device's memory limit, with and"
        " without the increased-memory entitlement. Exit 1 unless it fits, and then the largest recipe that does.",
    )
    add = parser.add_argument
    add("artefact", nargs="?", type=Path, metavar="ARTEFACT", help="an exported artefact")
    add("--shape", metavar="|".join(SIZES), help="instead of an artefact: a published model")
    add("--recipe", metavar="R", help="with --shape: how its weights are stored, as --quant (default: fp16)")
    add("--device", metavar="D", help="one of benchmarks/devices.json, as iphone-15-pro or m1-max")
    add("--memory", metavar="GB", help="which of the sizes that the device was sold with (default: the least)")
    text = "as 3.0GB: what os_proc_available_memory() said when the app started (what the app had then is added)"
    add("--limit", metavar="SIZE", help=text)
    text = "tokens of text around the picture's (default: %(default)s)"
    add("--prompt-length", type=int, default=TEXT_TOKENS, metavar="T", help=text)
    add("--table", action="store_true", help="all devices and recipes for the published models, in Markdown")
    text = "with an artefact: run its language model with MLX here, and compare the peak with the plan's"
    add("--measure", action="store_true", help=text)
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Print one plan, the table, or a measurement; the document is the `--json` output. UserError with all faults."""
    if faults := [*_faults(args)]:
        raise UserError("; ".join(faults))
    if args.table:
        document, show = fit.overview(), report.print_overview
    elif args.measure:
        folder = args.artefact.expanduser()
        model, _ = fit.stored(folder)
        with progress("run the language model with MLX"):
            tokens = model.picture_tokens + args.prompt_length
            document, show = measure.measure(folder, model, tokens, app_facts().cache_limit), report.print_measurement
    else:
        document, show = _plan(args), report.print_plan
    if not args.json:
        show(document)
    return document


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from fastvlm.synthetic.checkpoint import SHAPES  # torch

    if args.artefact:
        model, shape = fit.stored(args.artefact.expanduser())
    else:
        shape = SHAPES[args.shape]
        model = fit.planned(shape, load_recipe(args.recipe or "fp16"))
    if args.limit:
        limits, about = measured_limits(_bytes(args.limit), args.device)
    else:
        limits, about = reported_limits(args.device, args.memory)
    name = str(args.artefact or f"{SIZES[args.shape]} {args.recipe or 'fp16'}")
    return {"model": name} | about | fit.plan(model, shape, limits, args.prompt_length)


def _faults(args: argparse.Namespace) -> Iterator[str]:
    """Flags that are wrong or do not go together."""
    given = [name for name in ("artefact", "shape", "recipe", "device", "memory", "limit") if getattr(args, name)]
    if args.table and given:
        yield f"--table is of all models and devices: leave out {', '.join(given)}"
    if args.table and args.measure:
        yield "--table and --measure: expected one of them"
    if not args.table and bool(args.artefact) == bool(args.shape):
        yield f"expected an ARTEFACT or --shape {'|'.join(SIZES)}, got {'both' if args.shape else 'neither'}"
    if args.shape and args.shape not in SIZES:
        yield f"--shape {args.shape}: expected one of {', '.join(SIZES)}"
    if args.recipe and args.artefact:
        yield "--recipe: an artefact has its own: expected it with --shape"
    if args.measure and not args.table and given != ["artefact"]:
        yield "--measure: expected with an ARTEFACT alone: it runs on this machine"
    if not (args.device or args.limit or args.table or args.measure):
        yield f"--device or --limit is missing: expected one of {', '.join(devices())}"
    if args.memory and (args.limit or not args.device):
        yield "--memory: expected with --device and without --limit"
    if args.limit and not _bytes(args.limit):
        yield f"--limit {args.limit[:20]}: expected a size such as 3.0GB, 3072MiB"
    if not 0 <= args.prompt_length <= LONGEST:
        yield f"--prompt-length {args.prompt_length}: expected 0 to {LONGEST}"


def _bytes(size: str) -> int:
    """Bytes of a size such as 3.0GB, 0 for none."""
    match = _SIZE.fullmatch(size)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0
