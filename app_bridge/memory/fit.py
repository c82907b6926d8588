"""Whether a model fits a device's memory limit, and the largest recipe by which it does."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app_bridge.app.facts import table as app_facts
from app_bridge.memory import limits as known
from app_bridge.memory import model as memory
from app_bridge.memory.limits import FITS, Limit, Limits
from app_bridge.memory.model import Model, Part
from benchmarks.estimate.estimate import language_model, stored_bytes
from benchmarks.estimate.work import TEXT_TOKENS, encoder_work
from fastvlm.common.dtypes import ITEMSIZE
from fastvlm.common.errors import UserError
from model_export import artefact as exported
from model_export import contract
from model_export.encoder.package import WEIGHTS
from quantization.catalogue import PUBLISHED_APP, describe
from quantization.recipe import Recipe, named_recipes

if TYPE_CHECKING:  # torch
    from fastvlm.synthetic.checkpoint import Shape

_NORM = "language_model.model.norm.weight"  # never quantized: of the type that the model computes with


def planned(shape: "Shape", recipe: Recipe) -> Model:
    """Return the model that an export of `shape` by `recipe` would be. UserError where the recipe doesn't fit it."""
    size = stored_bytes(recipe, shape)
    return Model(
        language_model(shape),
        language=round(size["language"] - size["projector"]),
        projector=round(size["projector"]),
        encoder=encoder_work("fastvithd", shape.image_size).weights,
        itemsize=ITEMSIZE[recipe.choices(_NORM)[0].dtype],
        image_size=shape.image_size,
        picture_tokens=contract.tokens_per_image(shape.image_size),
    )


def stored(artefact: Path) -> tuple[Model, "Shape"]:
    """Return the model in an artefact, from its manifest, config.json and a tensor's type, and its shape.

    Raises UserError for a folder that is no whole artefact for the app.
    """
    from model_export.stored import StoredTensors

    document = exported.read_whole(artefact)
    exported.check_for_app(artefact, document)
    made = document["config"]
    tensors = StoredTensors(artefact)
    try:
        shape = _shape(tensors.config, document["image"]["image_size"])
        encoder = document["files"][f"{contract.PACKAGE}/{WEIGHTS.as_posix()}"]["size"]
        if made.get("vision_quant", "fp16") != "fp16":  # compressed: at most what FastViTHD is when decoded
            encoder = max(encoder, encoder_work("fastvithd", 1024).weights)
        model = Model(
            language_model(shape),
            language=tensors.nbytes(contract.LANGUAGE_PREFIX),
            projector=tensors.nbytes(contract.PROJECTOR_PREFIX),
            encoder=encoder,
            itemsize=tensors.stored(_NORM)["weight"].dtype.itemsize,
            encoder_itemsize=4 if made.get("compute_precision") == "float32" else 2,
            image_size=shape.image_size,
            picture_tokens=int(document["image"]["tokens_per_image"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{artefact}: is not what the export wrote ({error} is missing or wrong): export again"
        ) from None
    return model, shape


def plan(model: Model, shape: "Shape", limits: Limits, prompt: int = TEXT_TOKENS) -> dict[str, Any]:
    """Return each part in bytes, their sum, each state's limit and verdict, and whether it fits in the app's state.

    Where it doesn't for sure, `largest` and `largest_in_app` are the largest recipe that does, of all and of those that
    the published app reads (or None).
    """
    state = "increased" if app_facts().increased_memory_limit else "default"
    document = judged(_parts(model, prompt), limits, state) | {
        "prompt_tokens": prompt, "picture_tokens": model.picture_tokens,
    }  # fmt: skip
    return document if document["passed"] else document | _largest(model, shape, limits[state], prompt)


def judged(needed: list[Part], limits: Limits, state: str) -> dict[str, Any]:
    """Return parts and their sum, each state's limit and verdict, and whether it fits for sure in the app's `state`."""
    sources = known.table()["sources"]
    low, high = memory.total(needed)
    verdicts = {
        name: {
            "low": limit.low, "high": limit.high, "verdict": limit.verdict(low, high),
            "sources": [sources.get(source, {"url": "--limit", "says": source}) for source in limit.sources],
        }
        for name, limit in limits.items()
    }  # fmt: skip
    passed = verdicts[state]["verdict"] == FITS
    need = {"low": low, "high": high}
    return {"parts": needed, "need": need, "limits": verdicts, "state": state, "passed": passed}


def sized_recipes(shape: "Shape") -> list[tuple[Recipe, Model]]:
    """Return the named recipes of one fixed size for a model of this shape, with the model; largest first.

    Recipes of equal size that need no calibration come first, then float16.
    """
    models = []
    for recipe in named_recipes().values():
        try:
            models.append((recipe, planned(shape, recipe)))
        except UserError:  # needs a budget, or doesn't fit these widths
            continue
    return sorted(
        models, key=lambda pair: (-pair[1].language - pair[1].projector, pair[0].calibrates, pair[0].name != "fp16")
    )


def _parts(model: Model, prompt: int) -> list[Part]:
    """`memory.parts` in the published app, with the table's overheads."""
    app = app_facts()
    return memory.parts(model, prompt, app.max_tokens, app.cache_limit, known.table()["overheads"])


def _largest(model: Model, shape: "Shape", limit: Limit, prompt: int) -> dict[str, Any]:
    """The largest recipes by which the same model fits for sure."""
    fitting = []
    for recipe, other in sized_recipes(shape):
        same = replace(model, language=other.language, projector=other.projector, itemsize=other.itemsize)
        low, high = memory.total(_parts(same, prompt))
        if limit.verdict(low, high) == FITS:
            loads_in = describe(recipe)["loads_in"]
            fitting.append({"recipe": recipe.name, "low": low, "high": high, "loads_in": loads_in})
    in_app = (entry for entry in fitting if PUBLISHED_APP in entry["loads_in"])
    return {"largest": next(iter(fitting), None), "largest_in_app": next(in_app, None)}


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
