"""`python -m model_export ranges`: the range of every operation's values, as a table, a JSON document and a plot."""

import argparse
import platform
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from fastvlm.common.cli import progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.common.terminal import print_table
from model_export import contract
from model_export.audit.range_summary import computing, row, summary, times
from model_export.config import size_faults

if TYPE_CHECKING:
    import numpy as np

    from fastvlm.data.preprocessing import Preprocessor
    from model_export.encoder.ranges import Range

TOP = 20
PLOTS = (".png", ".svg")


def add_ranges(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a parser's sub-parsers."""
    text = "the largest values of every operation, and the room that float16 leaves them"
    parser: argparse.ArgumentParser = verbs.add_parser("ranges", description=text)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a checkpoint: its folded encoder in PyTorch")
    what.add_argument("--model", type=Path, metavar="PATH", help="an artefact, or an .mlpackage: its saved program")
    parser.add_argument("--function", metavar="NAME", help="of a package with several (default: the package's own)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="pictures (default: a drawn scene and noise)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="per side (default: the checkpoint's own)")
    parser.add_argument("--limit", type=int, metavar="N", help="pictures at most (default: all)")
    parser.add_argument("--top", type=int, default=TOP, metavar="N", help="rows of the table (default: %(default)s)")
    parser.add_argument("--plot", type=Output(), metavar="FILE", help=f"draw all operations: {' or '.join(PLOTS)}")
    parser.set_defaults(run=run_ranges)
    return parser


def run_ranges(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table and the verdict, draw the plot; the document has every operation in order."""
    _check(args)
    if args.checkpoint is not None:
        document, ranges = _of_checkpoint(args)
    else:
        document, ranges = _of_package(args)
    document |= {"machine": platform.machine(), **summary(ranges)}
    document["operations"] = [row(one) for one in ranges]
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


def _check(args: argparse.Namespace) -> None:
    """Raises UserError naming everything that is wrong with the flags."""
    faults = [
        f"--{flag}: got {value}, expected 1 or more"
        for flag, value in (("limit", args.limit), ("top", args.top))
        if value is not None and value < 1
    ]
    if args.image_size is not None:
        faults += size_faults("--image-size", args.image_size)
    if args.model is not None and args.image_size is not None:
        faults.append("--image-size: a package has its own: choose a --function, or measure the --checkpoint")
    if args.checkpoint is not None and args.function is not None:
        faults.append("--function: a checkpoint has none: it goes with --model")
    if args.plot is not None and args.plot.suffix.lower() not in PLOTS:
        faults.append(f"--plot {args.plot}: expected a file ending in {' or '.join(PLOTS)}")
    if faults:
        raise UserError("; ".join(faults))


def _of_checkpoint(args: argparse.Namespace) -> tuple[dict[str, Any], list["Range"]]:
    with progress(f"open {args.checkpoint}"):
        from fastvlm.checkpoint.checkpoint import open_checkpoint
        from model_export.encoder import ranges

        checkpoint = open_checkpoint(args.checkpoint)
    preprocessor = replace(checkpoint.preprocessor, image_size=args.image_size or checkpoint.image_size)
    pictures, count, pixels = _pictures(args, preprocessor)
    with progress("ranges (pictures)", count) as advance:
        found = ranges.measure_checkpoint(checkpoint, preprocessor.image_size, pixels, advance)
    return _heading(args.checkpoint, None, "PyTorch, the folded graph in float32", preprocessor, pictures), found


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
        size = _image_size(executor)
        # A package alone does not say how its pictures are prepared; what comes out of the app's way will do.
        plain = Preprocessor(size, contract.APP_IMAGE_STRATEGY)
        preprocessor = replace(read_preprocessor(args.model), image_size=size) if package == artefact else plain
        pictures, count, pixels = _pictures(args, preprocessor)
        with progress("ranges (pictures)", count) as advance:
            found = package_ranges.measure_package(executor, pixels, advance)
    except mil.MILError as error:
        raise UserError(str(error)) from error
    name = executor.function.name
    return _heading(args.model, name, "MIL executor, the saved program in float32", preprocessor, pictures), found


def _image_size(executor: Any) -> int:
    """S of a function with one input (1, 3, S, S)."""
    types = [str(type) for type in executor.inputs.values()]
    shapes = [type.shape for type in executor.inputs.values()]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][:2] != (1, 3) or shapes[0][2] != shapes[0][3]:
        raise UserError(f"{executor.program.path}: inputs {types}: expected one picture, (1, 3, S, S)")
    if shapes[0][2] is None:
        raise UserError(f"{executor.program.path}: takes pictures of any size: expected one fixed size")
    return int(shapes[0][2])


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
    """What is measured on: in words, how many, and their pixels (1, 3, S, S) float32, prepared one at a time.

    Raises UserError for a folder without pictures, and naming all files that are no usable pictures.
    """
    from fastvlm.data import pictures
    from fastvlm.data.preprocessing import open_image

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
            f"{one.type} {one.name}" + ("" if one.dtype == "fp16" else f" ({one.dtype})"),
            place,
            f"{one.largest:.4g}",
            headroom(one.headroom),
            headroom(one.exported_headroom) if one.exponent else "",
            f"{one.square:.3g}" if one.square else "",
            headroom(one.square_headroom) if one.square else "",
            f"{one.subnormal:.1%}" if one.subnormal else "",
            f"{one.weight_subnormal:.1%}" if one.weight_subnormal else "",
        )
        for one, place in ranked[:top]
    ]
    numbers = ("largest", "headroom", "exported", "square", "its headroom", "subnormal", "of weights")
    count = f"the {len(rows)} of {len(ranked)} operations with the least headroom ({moves} more only move values)"
    print_table(count, ("operation", "layer", *numbers), rows, numbers)
