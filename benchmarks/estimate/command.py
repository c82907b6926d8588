"""`fastvlm estimate`: time to first token on Apple devices that aren't at hand, as a range."""

import argparse
from collections.abc import Iterable
from typing import Any

from benchmarks.estimate.devices import UNITS, device_key, devices
from benchmarks.estimate.work import TEXT_TOKENS
from fastvlm.common.arguments import whole_number
from quantization.catalogue import SIZES
from quantization.recipe import usable_recipe


def add_parser(subparsers: Any) -> None:
    """Add the verb `estimate`."""
    parser = subparsers.add_parser(
        "estimate",
        description="Estimate, from the model's arithmetic and published measurements, the time to first token of an"
        " exported model on an Apple device: always a range, with what it rests on.",
    )
    add, pixels, tokens = parser.add_argument, whole_number(64, 64, 2048), whole_number(0, most=2048)
    add("--shape", choices=tuple(SIZES), help="the published model whose sizes count")
    add("--device", type=device_key, metavar="D", help="one that --list knows, as m1-max or iphone-15-pro")
    text = "how the weights are stored, as --quant (default: %(default)s)"
    add("--recipe", type=usable_recipe, default="fp16", metavar="R", help=text)
    text = "the picture's side (default: %(default)s)"
    add("--resolution", type=pixels, default=1024, metavar="PIXELS", help=text)
    text = "tokens of text around the picture's (default: %(default)s)"
    add("--prompt-length", type=tokens, default=TEXT_TOKENS, metavar="T", help=text)
    text = "what runs the encoder; the language model runs on the GPU (default: %(default)s)"
    add("--units", choices=UNITS, default=UNITS[0], help=text)
    add("--list", action="store_true", help="the devices and their figures")
    parser.check(_missing)
    parser.set_defaults(run=run_estimate)


def _missing(args: argparse.Namespace) -> list[str]:
    expected: dict[str, Iterable[str]] = {"shape": SIZES, "device": devices()}
    return [
        f"--{flag}: is missing: expected one of {', '.join(known)}"
        for flag, known in expected.items()
        if not (args.list or getattr(args, flag))
    ]


def run_estimate(args: argparse.Namespace) -> dict[str, Any]:
    """List the devices, or estimate; the document is the `--json` output."""
    from benchmarks.estimate import report
    from benchmarks.estimate.estimate import estimate, known_devices

    if args.list:
        document: dict[str, Any] = {"devices": known_devices()}
        if not args.json:
            report.print_devices(document)
        return document
    result = estimate(args.shape, args.device, args.recipe, args.resolution, args.prompt_length, args.units)
    if not args.json:
        report.print_estimate(result)
    return result
