"""`fastvlm ranges`: the range of every operation's values, as a table, a JSON document and a plot."""

import argparse
import platform
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from fastvlm.checkpoint.adapter_flag import add_adapter
from fastvlm.common.arguments import whole_number
from fastvlm.common.cli import progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.common.terminal import print_table
from model_export import contract
from model_export.audit.range_summary import computing, row, summary, times
from model_export.config import image_size

if TYPE_CHECKING:
    import numpy as np

    from fastvlm.data.preprocessing import Preprocessor
    from model_export.encoder.ranges import Range

TOP = 20
PLOTS = (".png", ".svg")


def add_ranges(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a parser's sub-parsers."""
    text = "Show the largest values of every operation, and the room that float16 leaves them."
    parser: Any = verbs.add_parser("ranges", description=text)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a checkpoint: its folded encoder in PyTorch")
    add_adapter(parser)
    what.add_argument("--model", type=Path, metavar="PATH", help="an artefact, or an .mlpackage: its saved program")
    add = parser.add_argument
    add("--function", metavar="NAME", help="of a package with several (default: the package's own)")
    add("--images", type=Path, metavar="FOLDER", help="pictures (default: a drawn scene and noise)")
    add("--image-size", type=image_size, metavar="PIXELS", help="per side (default: the checkpoint's own)")
    add("--limit", type=whole_number(), metavar="N", help="pictures at most (default: all)")
    add("--top", type=whole_number(), default=TOP, metavar="N", help="rows of the table (default: %(default)s)")
    add("--plot", type=Output(), metavar="FILE", help=f"draw all operations: {' or '.join(PLOTS)}")
    parser.check(_faults)
    parser.set_defaults(run=run_ranges)
    return parser


def _faults(args: argparse.Namespace) -> Iterator[str]:
    if args.model is not None and args.image_size is not None:
        yield "--image-size: a package has its own: choose a --function, or measure the --checkpoint"
    if args.model is not None and args.adapter is not None:
        yield "--adapter: is merged into a checkpoint: it goes with --checkpoint"
    if args.checkpoint is not None and args.function is not None:
        yield "--function: a checkpoint has none: it goes with --model"
    if args.plot is not None and args.plot.suffix.lower() not in PLOTS:
        yield f"--plot {args.plot}: expected a file ending in {' or '.join(PLOTS)}"


def run_ranges(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table and the verdict, draw the plot; the document has every operation in order."""
    document, ranges = (_of_checkpoint if args.checkpoint is not None else _of_package)(args)
    document |= {"machine": platform.machine(), **summary(ranges)}
    document["operations"] = [row(operation) for operation in ranges]
    print_ranges(ranges, args.top)
    size = document["image_size"]
    print(f"{document['runner']}, {size} x {size}, {document['pictures']}")
    print(document["verdict"])
    if args.plot is not None:
        from model_export.audit.ranges_plot import write_plot

        write_plot(ranges, args.plot, f"{document['source']}, {size} x {size}, {document['pictures']}")
        print(f"plot: {args.plot}")
        document["plot"] = str(args.plot)
    return document


def _of_checkpoint(args: argparse.Namespace) -> tuple[dict[str, Any], list["Range"]]:
    with progress(f"open {args.checkpoint}"):
        from fastvlm.checkpoint.checkpoint import open_checkpoint
        from model_export.encoder import ranges

        checkpoint = open_checkpoint(args.checkpoint, adapter=args.adapter)
    preprocessor = replace(checkpoint.preprocessor, image_size=args.image_size or checkpoint.image_size)
    pictures, count, pixels = _pictures(args, preprocessor)
    with progress("ranges (pictures)", count) as advance:
        measured = ranges.measure_checkpoint(checkpoint, pixels, advance)
    return _heading(args.checkpoint, None, "PyTorch, the folded encoder in float32", preprocessor, pictures), measured


def _of_package(args: argparse.Namespace) -> tuple[dict[str, Any], list["Range"]]:
    artefact = args.model / contract.PACKAGE
    package = artefact if artefact.exists() else args.model
    with progress("import PyTorch"):
        from fastvlm.data.preprocessing import Preprocessor, read_preprocessor
        from model_export import mil
        from model_export.encoder import package_ranges
    try:
        with progress(f"load {package}"):
            executor = mil.load(package, compute="float32", function_name=args.function)
        inputs = [*executor.inputs.values()]
        size = inputs[0].shape[-1] if inputs and inputs[0].shape else None
        if len(inputs) != 1 or size is None or inputs[0].shape != (1, 3, size, size):
            given = ", ".join(map(str, inputs))
            raise UserError(f"{package}: inputs {given}: expected one picture of a fixed size, (1, 3, S, S)")
        # A package alone does not say how its pictures are prepared; what comes out of the app's way will do.
        plain = Preprocessor(size, contract.APP_IMAGE_STRATEGY)
        preprocessor = replace(read_preprocessor(args.model), image_size=size) if package == artefact else plain
        pictures, count, pixels = _pictures(args, preprocessor)
        with progress("ranges (pictures)", count) as advance:
            measured = package_ranges.measure_package(executor, pixels, advance)
    except mil.MILError as error:
        raise UserError(str(error)) from error
    name = executor.function.name
    return _heading(args.model, name, "MIL executor, the saved program in float32", preprocessor, pictures), measured


def _heading(
    source: Path, function: str | None, runner: str, preprocessor: "Preprocessor", pictures: str
) -> dict[str, Any]:
    return {
        "source": str(source),
        "function": function,
        "runner": runner,
        "image_size": preprocessor.image_size,
        "image_strategy": preprocessor.image_strategy,
        "pictures": pictures,
    }


def _pictures(args: argparse.Namespace, preprocessor: "Preprocessor") -> tuple[str, int, Iterable["np.ndarray"]]:
    """The pictures to measure on: in words, how many, and their pixels (1, 3, S, S) float32, prepared one at a time.

    Raises UserError for a folder without pictures, and naming all files that are no usable pictures.
    """
    from fastvlm.data import pictures
    from fastvlm.data.images import open_image

    size = preprocessor.image_size
    if args.images is None:
        built_in = list(pictures.pixels(preprocessor, size))
        drawn = built_in[: args.limit]
        text = f"{len(drawn)} of {len(built_in)} built-in pictures (a drawn scene, then noise)"
        return text, len(drawn), drawn
    every = pictures.files(args.images)
    chosen = every[: args.limit]
    pictures.check(chosen)
    text = f"{len(chosen)} of {len(every)} pictures in {args.images}"
    return text, len(chosen), pictures.pixels(preprocessor, size, [partial(open_image, path) for path in chosen])


def print_ranges(ranges: list["Range"], top: int) -> None:
    """The operations with the least headroom, those that only move values left out."""
    from model_export.encoder.fp16 import HEADROOM

    def headroom(value: float) -> Text:
        return Text(times(value), "red" if value < 1 else "yellow" if value < HEADROOM else "")

    ranked = sorted(computing(ranges), key=lambda pair: min(pair[0].headroom, pair[0].square_headroom))
    moves = len(ranges) - len(ranked)
    rows = [
        (
            f"{operation.type} {operation.name}" + ("" if operation.dtype == "fp16" else f" ({operation.dtype})"),
            place,
            f"{operation.largest:.4g}",
            headroom(operation.headroom),
            headroom(operation.exported_headroom) if operation.exponent else "",
            f"{operation.square:.3g}" if operation.square else "",
            headroom(operation.square_headroom) if operation.square else "",
            f"{operation.subnormal:.1%}" if operation.subnormal else "",
            f"{operation.weight_subnormal:.1%}" if operation.weight_subnormal else "",
        )
        for operation, place in ranked[:top]
    ]
    numbers = ("largest", "headroom", "exported", "square", "its headroom", "subnormal", "of weights")
    count = f"the {len(rows)} of {len(ranked)} operations with the least headroom ({moves} more only move values)"
    print_table(count, ("operation", "layer", *numbers), rows, numbers)
