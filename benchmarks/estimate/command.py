"""`python -m benchmarks estimate`: time to first token on Apple devices that aren't at hand, as a range."""

import argparse
from typing import Any

from benchmarks.estimate import report
from benchmarks.estimate.estimate import SHAPE_NAMES, UNITS, estimate, known_devices
from benchmarks.peers.shapes import TEXT_TOKENS


def add_parser(subparsers: Any) -> None:
    """Add the verb `estimate`."""
    parser = subparsers.add_parser(
        "estimate",
        description="Estimate, from the model's arithmetic and published measurements, the time to first token of an"
        " exported model on an Apple device: always a range, with what it rests on.",
    )
    parser.add_argument("--shape", metavar="|".join(SHAPE_NAMES), help="the published model whose sizes count")
    parser.add_argument("--device", metavar="D", help="one that --list knows, as m1-max or iphone-15-pro")
    parser.add_argument(
        "--recipe", default="fp16", metavar="R", help="how the weights are stored, as --quant (default: %(default)s)"
    )
    parser.add_argument(
        "--resolution", type=int, default=1024, metavar="PIXELS", help="the picture's side (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-length", type=int, default=TEXT_TOKENS, metavar="T",
        help="tokens of text around the picture's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--units", choices=UNITS, default=UNITS[0],
        help="what runs the encoder; the language model runs on the GPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the devices and their figures")
    parser.set_defaults(run=run_estimate)


def run_estimate(args: argparse.Namespace) -> dict[str, Any]:
    """List the devices, or estimate; the document is the `--json` output. UserError with every fault of the request."""
    if args.list:
        document: dict[str, Any] = {"devices": known_devices()}
        if not args.json:
            report.print_devices(document)
        return document
    result = estimate(args.shape, args.device, args.recipe, args.resolution, args.prompt_length, args.units)
    if not args.json:
        report.print_estimate(result)
    return result
