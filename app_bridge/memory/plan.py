"""`python -m app_bridge plan`: what a model takes of a device's memory in the app, and whether that fits.

`memory_model` counts; limits and what isn't known from the model are data with sources: memory_limits.json.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app_bridge.app.facts import AppFacts
from app_bridge.app.facts import table as app_facts
from app_bridge.memory import model as memory_model
from app_bridge.memory.model import MIB, Model, Part
from benchmarks.estimate.estimate import Device, device_key, devices, language_model, stored_bytes
from benchmarks.estimate.estimate import facts as published
from benchmarks.estimate.work import encoder_work
from benchmarks.peers.shapes import TEXT_TOKENS
from fastvlm.common.cli import add_common, progress
from fastvlm.common.errors import UserError
from model_export import artefact as exported
from model_export import contract
from model_export.encoder.package import WEIGHTS
from quantization.catalogue import PUBLISHED_APP, SIZES, human

if TYPE_CHECKING:  # torch behind it
    from fastvlm.synthetic.checkpoint import Shape
    from quantization.recipe import Recipe

LIMITS = Path(__file__).parent / "memory_limits.json"
STATES = ("increased", "default")  # with the entitlement and without
LONGEST = 2048  # tokens of text that are still answered
FITS, TIGHT, NOT = "fits", "tight", "does not fit"
_SIZE = re.compile(r"(\d{1,7}(?:\.\d{1,9})?)\s*(MB|GB|MiB|GiB)")
_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": MIB, "GiB": MIB << 10}
_NORM, _PROJECTOR = "language_model.model.norm.weight", "multi_modal_projector.linear_0.weight"


@dataclass(frozen=True)
class Limit:
    """Bytes that an app may have, from the least to the most that the sources say."""

    low: int
    high: int
    sources: tuple[str, ...]

    def verdict(self, low: int, high: int) -> str:
        """Of a need from low to high: whether it fits for sure, for sure not, or neither."""
        return FITS if high <= self.low else NOT if low > self.high else TIGHT


def add_parser(verbs: Any) -> None:
    """Add the verb `plan`."""
    parser = verbs.add_parser(
        "plan",
        help="whether a model fits the memory that a device lets the app have",
        description="Weights, KV cache, activations and the app itself against a device's memory limit, with and"
        " without the increased-memory entitlement. Exit 1 unless it fits, and then the largest recipe that does.",
    )
    parser.add_argument("artefact", nargs="?", type=Path, metavar="ARTEFACT", help="an exported artefact")
    parser.add_argument("--shape", metavar="|".join(SIZES), help="instead of an artefact: a published model")
    parser.add_argument(
        "--recipe", metavar="R", help="with --shape: how its weights are stored, as --quant (default: fp16)"
    )
    parser.add_argument("--device", metavar="D", help="one of benchmarks/devices.json, as iphone-15-pro or m1-max")
    parser.add_argument(
        "--memory", metavar="GB", help="which of the sizes that the device was sold with (default: the least)"
    )
    parser.add_argument(
        "--limit",
        metavar="SIZE",
        help="as 3.0GB: what os_proc_available_memory() said when the app started (what the app had then is added)",
    )
    parser.add_argument(
        "--prompt-length", type=int, default=TEXT_TOKENS, metavar="T",
        help="tokens of text around the picture's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--table", action="store_true", help="all devices and recipes for the published models, in Markdown"
    )
    parser.add_argument(
        "--measure", action="store_true",
        help="with an artefact: run its language model with MLX here, and compare the peak with the plan's",
    )  # fmt: skip
    add_common(parser)
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    """One plan, the table, or a measurement; the document is the `--json` output. UserError for an unusable request."""
    from app_bridge.memory import report

    _check(args)
    if args.table:
        document = report.overview()
        if not args.json:
            report.print_overview(document)
        return document
    model, shape = stored(args.artefact.expanduser()) if args.artefact else planned(args.shape, args.recipe or "fp16")
    if args.measure:
        tokens = model.picture_tokens + args.prompt_length
        with progress("run the language model with MLX"):
            document = memory_model.measure(args.artefact.expanduser(), model, tokens, app_facts().cache_limit)
        if not args.json:
            report.print_measurement(document)
        return document
    known, about = _given(args.limit, args.device) if args.limit else known_limits(args.device, args.memory)
    named = str(args.artefact) if args.artefact else f"{SIZES[args.shape]} {args.recipe or 'fp16'}"
    document = {"model": named} | about | plan(model, shape, known, args.prompt_length)
    if not args.json:
        report.print_plan(document)
    return document


def _check(args: argparse.Namespace) -> None:
    faults = []
    if args.table:
        given = [name for name in ("artefact", "shape", "recipe", "device", "memory", "limit") if getattr(args, name)]
        faults += [f"--table is of all models and devices: leave out {', '.join(given)}"] if given else []
        faults += ["--table and --measure: expected one of them"] if args.measure else []
    elif bool(args.artefact) == bool(args.shape):
        faults.append(f"expected an ARTEFACT or --shape {'|'.join(SIZES)}, got {'both' if args.shape else 'neither'}")
    elif args.shape and args.shape not in SIZES:
        faults.append(f"--shape {args.shape}: expected one of {', '.join(SIZES)}")
    if args.recipe and args.artefact:
        faults.append("--recipe: an artefact has its own: expected it with --shape")
    if args.measure and not args.table and (not args.artefact or args.device or args.limit or args.memory):
        faults.append("--measure: expected with an ARTEFACT alone: it runs on this machine")
    if not (args.device or args.limit or args.table or args.measure):
        faults.append(f"--device or --limit is missing: expected one of {', '.join(devices())}")
    if args.memory and (args.limit or not args.device):
        faults.append("--memory: expected with --device and without --limit")
    if not 0 <= args.prompt_length <= LONGEST:
        faults.append(f"--prompt-length {args.prompt_length}: expected 0 to {LONGEST}")
    if faults:
        raise UserError("; ".join(faults))


@cache
def limits() -> dict[str, Any]:
    """memory_limits.json."""
    document: dict[str, Any] = json.loads(LIMITS.read_text(encoding="utf-8"))
    return document


def known_limits(device: str, memory: str | None) -> tuple[dict[str, Limit], dict[str, Any]]:
    """The limits of a device by state, and what is to be said of the device.

    UserError for an unknown device or size, and where no source gives its limit.
    """
    try:
        device = device_key(device)
    except UserError as error:
        advice = "or give the limit of another: --limit 3.0GB, what os_proc_available_memory() says when the app starts"
        raise UserError(f"{error}, {advice}") from None
    found = devices()[device]
    sizes = {f"{size:g}": size for size in found.memory_gb}
    size = sizes.get(memory or next(iter(sizes)))
    if size is None:
        raise UserError(f"--memory {memory}: {found.name} was sold with {' or '.join(sizes)} GB: expected one of them")
    known = limits_of(found, size)
    if not known:
        others = [f"--memory {other}" for other, gb in sizes.items() if limits_of(found, gb)]
        raise UserError(
            f"--device {device}: the limit of {found.name} with {size:g} GB is not known: measure"
            " os_proc_available_memory() when the app starts on it, and give --limit 3.0GB"
            + (f" (known: {', '.join(others)})" if others else "")
        )
    about = {"device": device, "name": found.name, "memory_gb": size, "sold_with_gb": list(found.memory_gb)}
    return known, about | {"kind": found.kind}


def limits_of(device: Device, memory_gb: float) -> dict[str, Limit]:
    """What the sources say of a device with so much memory, by state; empty where they say nothing.

    A state that has no entry, as on a Mac, is like the default.
    """
    of_kind = limits()["limits"][device.kind]
    entry = limits()["devices"].get(device.key) or of_kind.get(f"{memory_gb:g}") or of_kind.get("other")
    if not entry:
        return {}
    states = {state: entry.get(state, entry["default"]) for state in STATES}
    return {state: _limit(states[state], memory_gb) for state in STATES}


def _limit(entry: Mapping[str, Any], memory_gb: float) -> Limit:
    unit = MIB if "mib" in entry else memory_gb * (MIB << 10)
    low, high = entry.get("mib") or entry["part"]
    return Limit(int(low * unit), int(high * unit), tuple(entry["sources"]))


def _given(limit: str, device: str | None) -> tuple[dict[str, Limit], dict[str, Any]]:
    """The limit behind what the user measured at the app's start, whatever entitlement the app had.

    os_proc_available_memory() leaves out what the app has taken by then, which the plan counts: it is added.
    """
    size = _SIZE.fullmatch(limit)
    left = int(float(size[1]) * _UNITS[size[2]]) if size else 0
    if not left:
        raise UserError(f"--limit {limit[:20]}: expected a size such as 3.0GB, 3072MiB")
    most = left + limits()["overheads"]["app"]["mib"][0] * MIB
    said = f"{human(left)} as you measured it, and {human(most - left)} that the app itself has at its start"
    about: dict[str, Any] = {"device": device, "name": device or "the device", "memory_gb": None, "kind": None}
    return dict.fromkeys(STATES, Limit(most, most, (said,))), about | {"sold_with_gb": []}


def planned(shape: str, recipe: str) -> tuple[Model, "Shape"]:
    """A published model by a recipe, before anything is exported. UserError for what is no recipe or doesn't fit it."""
    from fastvlm.synthetic.checkpoint import SHAPES
    from quantization.recipe import load_recipe

    return sized(SHAPES[shape], load_recipe(recipe)), SHAPES[shape]


def sized(shape: "Shape", recipe: "Recipe") -> Model:
    """A model of a shape by a recipe, with FastViTHD decoded. UserError where the recipe doesn't fit it."""
    from fastvlm.common.dtypes import ITEMSIZE

    size = stored_bytes(recipe, shape)
    norm, projector = (recipe.choices(name)[0] for name in (_NORM, _PROJECTOR))
    work = encoder_work(published("published.json")["encoders"]["fastvithd"], shape.image_size)
    return Model(
        language_model(shape),
        features=shape.vision_width,
        language=round(size["language"] - size["projector"]),
        projector=round(size["projector"]),
        encoder=work.weights,
        itemsize=ITEMSIZE[norm.dtype],
        quantized=projector.mlx() is not None,
        image_size=shape.image_size,
        picture_tokens=contract.tokens_per_image(shape.image_size),
    )  # fmt: skip


def stored(artefact: Path) -> tuple[Model, "Shape"]:
    """A model as an artefact holds it, from its manifest, config.json and two tensors' types.

    UserError for what is no whole artefact, or none for the app.
    """
    from model_export.runtime.language import StoredTensors

    document = exported.read_whole(artefact)
    exported.check_for_app(artefact, document)
    made = document["config"]
    tensors = StoredTensors(artefact)
    try:
        shape = _shape(tensors.config, document["image"]["image_size"])
        picture_tokens = int(document["image"]["tokens_per_image"])
        projector = tensors.nbytes(contract.PROJECTOR_PREFIX)
        encoder = document["files"][f"{contract.PACKAGE}/{WEIGHTS.as_posix()}"]["size"]
        width, quantized = tensors.stored(_NORM)["weight"].dtype.itemsize, "scales" in tensors.stored(_PROJECTOR)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{artefact}: is not what the export wrote ({error} is missing or wrong): export again"
        ) from None
    if made.get("vision_quant", "fp16") != "fp16":  # compressed: at most what FastViTHD is when decoded
        encoder = max(encoder, encoder_work(published("published.json")["encoders"]["fastvithd"], 1024).weights)
    model = Model(
        language_model(shape),
        features=shape.vision_width,
        language=tensors.nbytes(contract.LANGUAGE_PREFIX),
        projector=projector,
        encoder=encoder,
        itemsize=width,
        encoder_itemsize=4 if made.get("compute_precision") == "float32" else 2,
        quantized=quantized,
        image_size=shape.image_size,
        picture_tokens=picture_tokens,
    )
    return model, shape


def _shape(config: Mapping[str, Any], image_size: int) -> "Shape":
    """The shape that a config.json describes. ValueError for sizes that are none."""
    from fastvlm.synthetic.checkpoint import Shape

    shape = Shape(
        config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
        config["num_key_value_heads"], config["intermediate_size"], config["vocab_size"],
        config["tie_word_embeddings"], image_size,
        {"embed_dims": [config["mm_hidden_size"] // 2]},  # its width, all that counts here, is twice that
    )  # fmt: skip
    sizes = (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.intermediate, shape.vocab)
    if min(*sizes, shape.vision_width, image_size) < 1 or shape.hidden % shape.heads:
        raise ValueError(f"a size in {contract.CONFIG}")
    return shape


def plan(model: Model, shape: "Shape", known: Mapping[str, Limit], prompt: int = TEXT_TOKENS) -> dict[str, Any]:
    """Each part in bytes, their sum, each state's limit and verdict, and whether it fits in the state that the app has.

    Where it doesn't for sure, `largest` and `largest_in_app` are the largest recipe that does, of all and of those that
    the published app reads (or None).
    """
    app = app_facts()
    found = parts(model, prompt, app)
    low, high = memory_model.total(found)
    state = "increased" if app.increased_memory_limit else "default"
    sources = limits()["sources"]
    verdicts = {
        name: {
            "low": limit.low, "high": limit.high, "verdict": limit.verdict(low, high),
            "sources": [sources.get(source, {"url": "--limit", "says": source}) for source in limit.sources],
        }
        for name, limit in known.items()
    }  # fmt: skip
    passed = verdicts[state]["verdict"] == FITS
    document = {
        "prompt_tokens": prompt, "picture_tokens": model.picture_tokens, "parts": [part.document() for part in found],
        "need": {"low": low, "high": high}, "limits": verdicts, "state": state, "passed": passed,
    }  # fmt: skip
    return document if passed else document | _largest(model, shape, known[state], prompt, app)


def parts(model: Model, prompt: int, app: AppFacts) -> list[Part]:
    """`memory_model.parts` in this app, with the table's overheads."""
    return memory_model.parts(model, prompt, app.max_tokens, app.cache_limit, limits()["overheads"])


def _largest(model: Model, shape: "Shape", limit: Limit, prompt: int, app: AppFacts) -> dict[str, Any]:
    """The largest recipes by which the same model fits for sure."""
    fitting = []
    for recipe, other in candidates(shape):
        other = replace(
            model,
            language=other.language,
            projector=other.projector,
            itemsize=other.itemsize,
            quantized=other.quantized,
        )
        low, high = memory_model.total(parts(other, prompt, app))
        if limit.verdict(low, high) == FITS:
            fitting.append({"recipe": recipe["name"], "low": low, "high": high, "loads_in": recipe["loads_in"]})
    in_app = [one for one in fitting if PUBLISHED_APP in one["loads_in"]]
    return {"largest": next(iter(fitting), None), "largest_in_app": next(iter(in_app), None)}


def candidates(shape: "Shape") -> list[tuple[dict[str, Any], Model]]:
    """The named recipes that are of one size for a model of this shape, largest first; of equal ones first those that
    need no pictures to calibrate with, and float16."""
    from quantization.catalogue import describe
    from quantization.recipe import named_recipes

    found = []
    for recipe in named_recipes().values():
        try:
            found.append((recipe, sized(shape, recipe)))
        except UserError:  # needs a budget, or doesn't fit these widths
            continue
    found.sort(key=lambda one: (-one[1].language - one[1].projector, one[0].calibrates, one[0].name != "fp16"))
    return [(describe(recipe), model) for recipe, model in found]
