"""`fastvlm recipes`: what the recipes are, how large they make the published models, what loads them."""

import argparse
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.shapes import language_shapes
from fastvlm.common.cli import wide_console
from fastvlm.common.errors import UserError
from fastvlm.common.terminal import Console, print_table
from fastvlm.common.units import format_bytes
from quantization.coreai import listing
from quantization.recipe import ELSEWHERE, Recipe, Rule, load_recipe, named_recipes, usable_recipe
from quantization.schemes import Scheme, nbytes

if TYPE_CHECKING:
    from fastvlm.synthetic.checkpoint import Shape

SIZES = {"0.5b": "0.5B", "1.5b": "1.5B", "7b": "7B"}  # fastvlm.synthetic.checkpoint.SHAPES -> as Apple calls them
ENCODER = "the Core ML encoder adds 245 MB in float16, 123 in int8, 62 in palette4-g16"  # of 125M weights


@dataclass(frozen=True)
class Loader:
    """A loader of artefacts and the settings it supports. mixed: more than one, by entries for single modules.

    layout: which artefacts (`--layout`); app: whether it is a version of the demo app.
    """

    name: str
    source: str
    layout: str
    app: bool
    bits: tuple[int, ...]  # affine
    modes: tuple[str, ...]
    mixed: bool

    def reads(self, settings: Collection[tuple[str, int, int]]) -> bool:
        """Whether it loads weights of these (mode, bits, group size)."""
        return (self.mixed or len(settings) < 2) and all(
            mode in self.modes and (mode != "affine" or bits in self.bits) for mode, bits, _ in settings
        )


_BITS = (2, 3, 4, 5, 6, 8)
_OLD_BITS = (2, 3, 4, 6, 8)  # mlx before 0.26 has no kernels for 5 (mlx/backend/metal/kernels/quantized.metal)
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
# Read in the sources of these versions in November 2026; mlx-lm and mlx-vlm were run on Linux, the app was not.
LOADERS = (
    Loader("mlx-lm", "0.32.2, mlx 0.32.4", "app", False, _BITS, _MODES, True),
    Loader("mlx-vlm", "0.7.10, mlx 0.32.4, for --layout mlx-vlm", "mlx-vlm", False, _BITS, _MODES, True),
    # its project file names no version but a least one, and it builds with these alone (ml-fastvlm issue 39)
    Loader(
        "demo app", "as published: mlx-swift-examples 2.21.2, mlx 0.21.0", "app", True, _OLD_BITS, ("affine",), False
    ),
    Loader(
        "app 2.25", "ml-fastvlm pull request 59: mlx-swift-examples 2.25.7, mlx 0.25.1", "app", True, _OLD_BITS,
        ("affine",), True,
    ),
    Loader("app 3.31", "ml-fastvlm pull request 78: mlx-swift-lm 3.31.4, mlx 0.31.1", "app", True, _BITS, _MODES, True),
)  # fmt: skip
START = ("int8", "every loader reads it, and of the demo's 500 questions it answers all as the checkpoint does")
PUBLISHED_APP = next(loader.name for loader in LOADERS if loader.app)  # the app's versions stand from old to new


def add_recipes(verbs: Any) -> None:
    """The verb `recipes`."""
    text = "List the recipes, the size of each published model under them, and what loads the result."
    parser = verbs.add_parser("recipes", description=text)
    parser.add_argument(
        "recipe",
        nargs="*",
        type=usable_recipe,
        metavar="RECIPE",
        help="a name, a name with a size (fit:400MB), or a .json: its rules, too",
    )
    parser.set_defaults(run=run_recipes)


def run_recipes(args: argparse.Namespace) -> dict[str, Any]:
    """All named recipes in a table, or some with their rules. UserError for what is no recipe."""
    recipes = [load_recipe(name) for name in args.recipe] or list(named_recipes().values())
    rows = [describe(recipe) for recipe in recipes]
    console = wide_console(180)
    _print_rows(rows if args.recipe else sorted(rows, key=_smallest), console)
    if not args.recipe:
        console.print(
            f"→ {START[0]}: the one to start with: {START[1]}. `recipes NAME` says what one is.", markup=False
        )
    console.print(f"Sizes are of the language model and the projector; {ENCODER}.", markup=False)
    for loader in LOADERS:
        console.print(f"{loader.name}: {loader.source}", markup=False)
    listing.print_recipes(rows, console)
    for recipe, row in zip(recipes, rows) if args.recipe else ():
        console.print()
        print_table(
            f"{recipe.name}, the first rule that matches decides",
            ("weights", "become", "because"),
            [(rule.pattern + _layers(rule), " or ".join(map(_in_words, rule.schemes)), rule.why)
             for rule in recipe.rules]
            + [(rule.pattern, f"Core AI: {rule.form}", rule.why) for rule in recipe.coreai],
            console=console,
        )  # fmt: skip
        for name, size in row["sizes"].items():
            if "fault" in size:
                console.print(f"{name}: {size['fault']}", markup=False)
    return {"recipes": rows, "loaders": {loader.name: loader.source for loader in LOADERS}}


def describe(recipe: Recipe) -> dict[str, Any]:
    """A recipe with its sizes and loaders.

    `sizes`: for each published model {"bytes", "bits_per_weight"}; {"least", "most"} where it leaves choices open;
    {"fault"} where it doesn't fit. A budget is its own size. `coreai_bytes`: those of a Core AI bundle's decoder and
    embeddings, where the recipe has forms for it.
    """
    from fastvlm.synthetic.checkpoint import SHAPES  # and with it torch

    sizes, settings, coreai = {}, set(), {}
    for key, name in SIZES.items():
        shapes = weight_shapes(SHAPES[key])
        if recipe.coreai:
            coreai[name] = listing.size(recipe.coreai, shapes)
        try:
            sizes[name], needed = _size(recipe, shapes)
            settings |= needed
        except UserError as error:
            sizes[name] = {"fault": str(error)}
    fits = any("fault" not in size for size in sizes.values())
    return {
        **recipe.to_json(),
        "method": recipe.method,
        "sizes": sizes,
        **({"coreai_bytes": coreai} if coreai else {}),
        "loads_in": [loader.name for loader in LOADERS if fits and loader.reads(settings)],
    }


def weight_shapes(shape: "Shape") -> dict[str, tuple[int, ...]]:
    """The artefact's weights (without an encoder) of a model of this shape: name -> shape."""
    canonical = language_shapes(
        hidden=shape.hidden,
        inner=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head=shape.hidden // shape.heads,
        layers=shape.layers,
        vocab=shape.vocab,
        features=shape.vision_width,
        bias=True,
    )
    stored = {
        naming.to_artefact(name): size for name, size in canonical.items() if name != naming.LM_HEAD or not shape.tied
    }
    return {name: size for name, size in stored.items() if name is not None}


def _size(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Any], set[tuple[str, int, int]]]:
    """One model's size, and the settings that MLX will read. UserError where the recipe doesn't fit it."""
    options = recipe.options(shapes, ELSEWHERE)
    parameters = sum(map(math.prod, shapes.values()))
    sizes = {name: [nbytes(scheme, shapes[name]) for scheme in schemes] for name, schemes in options.items()}
    least, most = (sum(edge(each) for each in sizes.values()) for edge in (min, max))
    size: dict[str, Any] = {"least": least, "most": most}
    if recipe.budget:
        limit = recipe.budget.limit(parameters)
        if limit < least:
            raise UserError(f"at least {format_bytes(least)} ({8 * least / parameters:.2f} bits per weight)")
        size |= _figures(min(limit, most), parameters)
    elif least == most:
        recipe.plan(shapes, ELSEWHERE)  # what its method cannot store
        size = _figures(least, parameters)
    return size, _settings(scheme for schemes in options.values() for scheme in schemes)


def _figures(size: int, parameters: int) -> dict[str, Any]:
    return {"bytes": size, "bits_per_weight": round(8 * size / parameters, 2)}


def _settings(schemes: Iterable[Scheme]) -> set[tuple[str, int, int]]:
    entries = [scheme.mlx() for scheme in schemes]
    return {(entry.get("mode", "affine"), entry["bits"], entry["group_size"]) for entry in entries if entry}


def _smallest(row: dict[str, Any]) -> float:
    """A recipe's size for the smallest model; recipes without one are last."""
    return float(row["sizes"][SIZES["0.5b"]].get("bytes", math.inf))


def _cell(size: dict[str, Any]) -> str:
    if "fault" in size:
        return "doesn't fit"
    return format_bytes(size["bytes"]) if "bytes" in size else f"≥ {format_bytes(size['least'])}"


def _print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """The recipes, a row each."""
    numbers, described = ["bits/weight", *SIZES.values()], ["loads in", "method", "what it is"]
    cells = []
    for row in rows:
        sizes = row["sizes"].values()
        bits = sorted({f"{size['bits_per_weight']:.1f}" for size in sizes if "bytes" in size}, key=float)
        cells.append(
            [
                ("→ " if row["name"] == START[0] else "") + row["name"],
                " to ".join(dict.fromkeys((bits[0], bits[-1]))) if bits else "",
                *map(_cell, sizes),
                _loaders(row["loads_in"]),
                row["method"],
                row["description"],
            ]
        )
    print_table("recipes", ["recipe", *numbers, *described], cells, numbers, console)


def _loaders(names: Sequence[str]) -> str:
    """The loaders in few words: "all", "all but demo app", or their names."""
    missing = [loader.name for loader in LOADERS if loader.name not in names]
    if not missing:
        return "all"
    return f"all but {', '.join(missing)}" if len(missing) < len(names) else ", ".join(names)


def _layers(rule: Rule) -> str:
    """The layers that a rule is limited to, "" for all."""
    if rule.layers is None:
        return ""
    edges = (("first", rule.layers.first), ("last", rule.layers.last))
    parts = [f"the {edge} {Fraction(part).limit_denominator(100)} of the layers" for edge, part in edges if part]
    parts += [f"1 in {rule.layers.every} of those between"] if rule.layers.every else []
    return f" ({', '.join(parts)})"


def _in_words(scheme: Scheme) -> str:
    """A scheme in a few words."""
    document = scheme.to_json()
    if document.get("mode") == "affine":
        return f"{document['bits']} bit/{document['group_size']}"
    return str(document.get("form") or document.get("mode") or document["dtype"])
