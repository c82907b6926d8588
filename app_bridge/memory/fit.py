"""Whether a model fits a device's memory limit, and the largest recipe by which it does."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app_bridge.app.facts import table as app_facts
from app_bridge.memory import limits as known
from app_bridge.memory import model as memory
from app_bridge.memory.limits import FITS, Limit, Limits
from app_bridge.memory.model import Model, Part
from benchmarks.estimate.estimate import devices, language_model, stored_bytes
from benchmarks.estimate.estimate import facts as published
from benchmarks.estimate.work import EncoderWork, encoder_work
from benchmarks.peers.shapes import TEXT_TOKENS
from fastvlm.common.dtypes import ITEMSIZE
from fastvlm.common.errors import UserError
from model_export import artefact as exported
from model_export import contract
from model_export.encoder.package import WEIGHTS
from quantization.catalogue import PUBLISHED_APP, SIZES, describe
from quantization.recipe import Recipe, named_recipes

if TYPE_CHECKING:  # torch
    from fastvlm.synthetic.checkpoint import Shape

_NORM, _PROJECTOR = "language_model.model.norm.weight", "multi_modal_projector.linear_0.weight"


def planned(shape: "Shape", recipe: Recipe) -> Model:
    """Return the model that an export of `shape` by `recipe` would be. UserError where the recipe doesn't fit it."""
    size = stored_bytes(recipe, shape)
    norm, projector = (recipe.choices(name)[0] for name in (_NORM, _PROJECTOR))
    return Model(
        language_model(shape),
        features=shape.vision_width,
        language=round(size["language"] - size["projector"]),
        projector=round(size["projector"]),
        encoder=_fastvithd(shape.image_size).weights,
        itemsize=ITEMSIZE[norm.dtype],
        quantized=projector.mlx() is not None,
        image_size=shape.image_size,
        picture_tokens=contract.tokens_per_image(shape.image_size),
    )


def stored(artefact: Path) -> tuple[Model, "Shape"]:
    """Return the model in an artefact, from its manifest, config.json and two tensors' types, and its shape.

    Raises UserError for a folder that is no whole artefact for the app.
    """
    from model_export.stored import StoredTensors

    document = exported.read_whole(artefact)
    exported.check_for_app(artefact, document)
    made = document["config"]
    tensors = StoredTensors(artefact)
    try:
        shape = _shape(tensors.config, document["image"]["image_size"])
        picture_tokens = int(document["image"]["tokens_per_image"])
        projector = tensors.nbytes(contract.PROJECTOR_PREFIX)
        encoder = document["files"][f"{contract.PACKAGE}/{WEIGHTS.as_posix()}"]["size"]
        itemsize, quantized = tensors.stored(_NORM)["weight"].dtype.itemsize, "scales" in tensors.stored(_PROJECTOR)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{artefact}: is not what the export wrote ({error} is missing or wrong): export again"
        ) from None
    if made.get("vision_quant", "fp16") != "fp16":  # compressed: at most what FastViTHD is when decoded
        encoder = max(encoder, _fastvithd(1024).weights)
    model = Model(
        language_model(shape),
        features=shape.vision_width,
        language=tensors.nbytes(contract.LANGUAGE_PREFIX),
        projector=projector,
        encoder=encoder,
        itemsize=itemsize,
        encoder_itemsize=4 if made.get("compute_precision") == "float32" else 2,
        quantized=quantized,
        image_size=shape.image_size,
        picture_tokens=picture_tokens,
    )
    return model, shape


def plan(model: Model, shape: "Shape", limits: Limits, prompt: int = TEXT_TOKENS) -> dict[str, Any]:
    """Return each part in bytes, their sum, each state's limit and verdict, and whether it fits in the app's state.

    Where it doesn't for sure, `largest` and `largest_in_app` are the largest recipe that does, of all and of those that
    the published app reads (or None).
    """
    state = "increased" if app_facts().increased_memory_limit else "default"
    found, sources = parts(model, prompt), known.table()["sources"]
    low, high = memory.total(found)
    verdicts = {
        name: {
            "low": limit.low, "high": limit.high, "verdict": limit.verdict(low, high),
            "sources": [sources.get(source, {"url": "--limit", "says": source}) for source in limit.sources],
        }
        for name, limit in limits.items()
    }  # fmt: skip
    passed = verdicts[state]["verdict"] == FITS
    document = {
        "prompt_tokens": prompt, "picture_tokens": model.picture_tokens, "parts": [part.document() for part in found],
        "need": {"low": low, "high": high}, "limits": verdicts, "state": state, "passed": passed,
    }  # fmt: skip
    return document if passed else document | _largest(model, shape, limits[state], prompt)


def parts(model: Model, prompt: int = TEXT_TOKENS) -> list[Part]:
    """Return `memory.parts` in the published app, with the table's overheads."""
    app = app_facts()
    return memory.parts(model, prompt, app.max_tokens, app.cache_limit, known.table()["overheads"])


def sized_recipes(shape: "Shape") -> list[tuple[dict[str, Any], Model]]:
    """Return the named recipes of one fixed size for a model of this shape, described, with the model; largest first.

    Of equal ones those come first that need no pictures to calibrate with, and float16.
    """

    def models() -> Iterator[tuple[Recipe, Model]]:
        for recipe in named_recipes().values():
            try:
                yield recipe, planned(shape, recipe)
            except UserError:  # needs a budget, or doesn't fit these widths
                continue

    found = sorted(
        models(), key=lambda one: (-one[1].language - one[1].projector, one[0].calibrates, one[0].name != "fp16")
    )
    return [(describe(recipe), model) for recipe, model in found]


def overview() -> dict[str, Any]:
    """Return verdicts for the published models: `rows` (model and recipe) by `columns` (devices with the same limits).

    A recipe is left out that the published app can't read, or that has another's size.
    """
    from fastvlm.synthetic.checkpoint import SHAPES

    columns, rows = _columns(), []
    for key, name in SIZES.items():
        seen = set()
        for recipe, model in sized_recipes(SHAPES[key]):
            if PUBLISHED_APP not in recipe["loads_in"] or model.language in seen:
                continue
            seen.add(model.language)
            low, high = memory.total(parts(model))
            verdicts = [
                {state: limit.verdict(low, high) for state, limit in column["limits"].items()} for column in columns
            ]
            rows.append({"model": name, "recipe": recipe["name"], "low": low, "high": high, "verdicts": verdicts})
    for column in columns:
        column["limits"] = {state: vars(limit) for state, limit in column["limits"].items()}
    return {"columns": columns, "rows": rows}


def _columns() -> list[dict[str, Any]]:
    """The devices by kind and limits; {"kind", "memory_gb", "devices", "limits"}, `limits` empty where not known."""
    found: dict[Any, dict[str, Any]] = {}
    for device in devices().values():
        for size in device.memory_gb:
            limits = known.limits_of(device, size)
            column = {"kind": device.kind, "memory_gb": size, "devices": [], "limits": limits}
            found.setdefault((device.kind, size, *limits.values()), column)["devices"].append(device.name)
    order = ("phone", "tablet", "mac")
    return sorted(found.values(), key=lambda column: (order.index(column["kind"]), column["memory_gb"]))


def _largest(model: Model, shape: "Shape", limit: Limit, prompt: int) -> dict[str, Any]:
    """The largest recipes by which the same model fits for sure."""
    fitting = []
    for recipe, other in sized_recipes(shape):
        changed = {key: getattr(other, key) for key in ("language", "projector", "itemsize", "quantized")}
        low, high = memory.total(parts(replace(model, **changed), prompt))
        if limit.verdict(low, high) == FITS:
            fitting.append({"recipe": recipe["name"], "low": low, "high": high, "loads_in": recipe["loads_in"]})
    in_app = [one for one in fitting if PUBLISHED_APP in one["loads_in"]]
    return {"largest": next(iter(fitting), None), "largest_in_app": next(iter(in_app), None)}


def _fastvithd(image_size: int) -> EncoderWork:
    return encoder_work(published("published.json")["encoders"]["fastvithd"], image_size)


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
