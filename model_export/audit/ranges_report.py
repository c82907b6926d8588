"""`python -m model_export ranges`: where an encoder gets hot, as a table, a JSON document and a plot."""

import argparse
import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fastvlm.common.cli import progress, wide_console
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from model_export import contract
from model_export.config import size_faults

if TYPE_CHECKING:
    import numpy as np

    from fastvlm.data.preprocessing import Preprocessor
    from model_export.encoder.ranges import Range

TOP = 20
PLOTS = (".png", ".svg")
# Operations that only hand values on: what they hold has been counted where it was computed.
_MOVES = {
    "cast", "clone", "concat", "expand_dims", "permute", "reshape", "slice_by_index", "split", "split_with_sizes",
    "squeeze", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


def add_ranges(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a parser's sub-parsers."""
    text = "the largest values of every operation, and the room that float16 leaves them"
    parser: argparse.ArgumentParser = verbs.add_parser("ranges", help=text, description=text)
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
    document["operations"] = [_row(found) for found in ranges]
    print_table(ranges, args.top)
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


# report


def summary(ranges: list["Range"]) -> dict[str, Any]:
    """The figures of the last line, and the line. They count the operations that the program holds in float16; in a
    float32 program all of them, as float16 would have to hold them."""
    from model_export.encoder.fp16 import HEADROOM, LARGEST

    every = computing(ranges)
    held = [pair for pair in every if pair[0].dtype == "fp16"]
    judged, place = [found for found, _ in held or every], {found.name: place for found, place in every}
    hottest = min(judged, key=lambda found: found.headroom)
    square = min(judged, key=lambda found: found.square_headroom)
    weights = max(judged, key=lambda found: found.weight_subnormal)

    def at(found: "Range") -> str:
        return f"{place[found.name]} ({found.type} {found.name})".lstrip()

    over = sum(found.headroom < 1 for found in judged)
    under = sum(found.headroom < HEADROOM for found in judged)
    parts = [
        f"smallest headroom {times(hottest.headroom)} at {at(hottest)}, which reaches {hottest.largest:.4g}",
        f"{under} of {len(judged)} operations under {HEADROOM:g}x, {over} overflow",
    ]
    if square.square:
        fits = "overflows" if square.square_headroom < 1 else "has headroom"
        parts.append(
            f"largest square in a LayerNorm {square.square:.4g} at {at(square)} {fits}, {times(square.square_headroom)}"
        )
    if weights.weight_subnormal:
        parts.append(f"most subnormal weights at {at(weights)}, {weights.weight_subnormal:.1%}")
    scaled = [found for found in judged if found.exponent]
    if scaled:
        near = min(judged, key=lambda found: found.exported_headroom)
        parts.append(
            f"an export lets {len(scaled)} operations carry x / 2^k, k up to {max(one.exponent for one in scaled)}:"
            f" smallest headroom then {times(near.exported_headroom)} at {at(near)}"
        )
    wide = "" if held else "in a float32 program, were it float16: "
    return {
        "limit": LARGEST,
        "asked_headroom": HEADROOM,
        "judged": len(judged),
        "smallest_headroom": _finite(hottest.headroom),
        "hottest": hottest.name,
        "under_asked_headroom": under,
        "overflows": over,
        "largest_square": square.square,
        "hottest_square": square.name if square.square else None,
        "scaled_operations": len(scaled),
        "smallest_exported_headroom": _finite(min(found.exported_headroom for found in judged)),
        "square_overflows": sum(found.square_headroom < 1 for found in judged),
        "verdict": wide + "; ".join(parts),
    }


def computing(ranges: list["Range"]) -> list[tuple["Range", str]]:
    """The operations that do more than hand values on (all, if none does), each with the place it is at: its layer, or
    "after LAYER" where a package's operation has no weight that names one."""
    found, last = [], ""
    for one in ranges:
        last = one.layer or last
        found.append((one, one.layer or (f"after {last}" if last else "")))
    return [(one, place) for one, place in found if one.type not in _MOVES] or found


def print_table(ranges: list["Range"], top: int) -> None:
    """The hottest operations, those that only move values left out."""
    from model_export.encoder.fp16 import HEADROOM

    shown = sorted(computing(ranges), key=lambda pair: min(pair[0].headroom, pair[0].square_headroom))
    hidden = len(ranges) - len(shown)
    title = f"the hottest {min(top, len(shown))} of {len(shown)} operations ({hidden} more only move values)"
    table = Table(title=title, title_justify="left")
    for column in ("operation", "layer"):
        table.add_column(column, overflow="fold")
    for column in ("largest", "headroom", "exported", "square", "headroom", "subnormal", "of weights"):
        table.add_column(column, justify="right", no_wrap=True)
    for found, place in shown[:top]:
        table.add_row(
            escape(f"{found.type} {found.name}") + ("" if found.dtype == "fp16" else f" ({found.dtype})"),
            escape(place),
            f"{found.largest:.4g}",
            _coloured(found.headroom, HEADROOM),
            _coloured(found.exported_headroom, HEADROOM) if found.exponent else "",
            f"{found.square:.3g}" if found.square else "",
            _coloured(found.square_headroom, HEADROOM) if found.square else "",
            f"{found.subnormal:.1%}" if found.subnormal else "",
            f"{found.weight_subnormal:.1%}" if found.weight_subnormal else "",
        )
    console = wide_console(150)
    console.print(table)


def _coloured(headroom: float, asked: float) -> str:
    text = times(headroom)
    return f"[red]{text}[/]" if headroom < 1 else f"[yellow]{text}[/]" if headroom < asked else text


def times(headroom: float) -> str:
    """12.3x; three digits where it matters, thousands in full."""
    if headroom < 0.01 or math.isinf(headroom):
        return f"{headroom:.2g}x"
    digits = 2 if headroom < 10 else 1 if headroom < 100 else 0
    return f"{headroom:,.{digits}f}x"


def _row(found: "Range") -> dict[str, Any]:
    """An operation in the document; what is infinite (no values, no LayerNorm) is null."""
    return {
        **asdict(found),
        "headroom": _finite(found.headroom),
        "square_headroom": _finite(found.square_headroom),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
