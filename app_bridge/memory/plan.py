"""`fastvlm plan`: the memory that a model takes in the app, and whether it fits a device."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app_bridge.memory import bundle, fit, report
from app_bridge.memory.limits import measured_limits, reported_limits
from app_bridge.memory.model import Model
from benchmarks.estimate.devices import devices
from benchmarks.estimate.work import TEXT_TOKENS
from fastvlm.common.arguments import size, whole_number
from model_export import artefact as exported
from model_export.config import FORMATS
from quantization.catalogue import SIZES
from quantization.recipe import load_recipe, usable_recipe

if TYPE_CHECKING:  # torch
    from fastvlm.synthetic.checkpoint import Shape

LONGEST = 2048  # tokens of text that are still answered


def add_parser(verbs: Any) -> None:
    """Add the verb `plan`."""
    parser = verbs.add_parser(
        "plan",
        description="Weights, KV cache, activations and the app itself against a device's memory limit, with and"
        " without the increased-memory entitlement. Exit 1 unless it fits, and then the largest recipe that does.",
    )
    add = parser.add_argument
    add("artefact", nargs="?", type=Path, metavar="ARTEFACT", help="an exported artefact")
    add("--shape", choices=list(SIZES), help="instead of an artefact: a published model")
    text = "with --shape: for the demo app, or a Core AI bundle in fp16 for Apple's engine (default: coreml)"
    add("--format", choices=FORMATS, help=text)
    text = "with --shape: the recipe of its weights, as for --quant (default: fp16)"
    add("--recipe", type=usable_recipe, metavar="R", help=text)
    add("--device", metavar="D", help="a device, such as iphone-15-pro or m1-max")
    add("--memory", metavar="GB", help="memory of the device (default: the least that it was sold with)")
    text = (
        "what os_proc_available_memory() returned when the app started, such as 3.0GB (the app's own memory is added)"
    )
    add("--limit", type=size, metavar="SIZE", help=text)
    text = "tokens of text around the picture's (default: %(default)s)"
    add("--prompt-length", type=whole_number(0, most=LONGEST), default=TEXT_TOKENS, metavar="T", help=text)
    parser.check(_faults)
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Print one plan; the document is the `--json` output."""
    artefact = args.artefact and args.artefact.expanduser()
    is_bundle = exported.is_bundle(exported.read(artefact)) if artefact else args.format == "coreai"
    if args.limit:
        limits, about = measured_limits(args.limit, args.device)
    else:
        limits, about = reported_limits(args.device, args.memory)
    name = str(artefact or f"{SIZES[args.shape]} {args.recipe or 'fp16'}")
    if is_bundle:  # in an app of one's own, which has the entitlement or not
        of = bundle.stored(artefact) if artefact else bundle.planned(_shape(args.shape))
        fitting = fit.judged(bundle.parts(of, args.prompt_length), limits, "default")
    else:
        model, shape = fit.stored(artefact) if artefact else _planned(args.shape, args.recipe or "fp16")
        fitting = fit.plan(model, shape, limits, args.prompt_length)
    document = {"model": name, "bundle": is_bundle} | about | fitting
    if not args.json:
        report.print_plan(document)
    return document


def _shape(name: str) -> "Shape":
    from fastvlm.synthetic.checkpoint import SHAPES  # torch

    return SHAPES[name]


def _planned(name: str, recipe: str) -> tuple[Model, "Shape"]:
    return fit.planned(_shape(name), load_recipe(recipe)), _shape(name)


def _faults(args: argparse.Namespace) -> Iterator[str]:
    """Flags that do not go together."""
    if not (args.artefact or args.shape):
        yield f"ARTEFACT or --shape: is missing: expected an artefact's folder, or one of {', '.join(SIZES)}"
    if args.artefact and args.shape:
        yield f"--shape {args.shape}: given with an ARTEFACT: leave one out"
    if args.format and args.artefact:
        yield "--format: an artefact has its own: expected it with --shape"
    if args.recipe and args.format == "coreai":
        yield "--recipe: a Core AI bundle is planned in fp16: leave it out"
    if args.recipe and args.artefact:
        yield "--recipe: an artefact has its own: expected it with --shape"
    if not (args.device or args.limit):
        yield f"--device or --limit: is missing: expected one of {', '.join(devices())}"
    if args.memory and (args.limit or not args.device):
        yield "--memory: expected with --device and without --limit"
