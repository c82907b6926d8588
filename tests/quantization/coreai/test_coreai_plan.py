"""A recipe's rules over a bundle's weights, and the recipes that come with the project."""

import math
from argparse import Namespace

import pytest

from fastvlm.common.errors import UserError
from fastvlm.synthetic.checkpoint import SHAPES
from quantization.catalogue import describe, run_recipes, weight_shapes
from quantization.coreai.listing import language_shapes
from quantization.coreai.plan import plan
from quantization.recipe import load_recipe, named_recipes, recipe_from_json

RULES = [{"pattern": "*", "scheme": {"dtype": "float16"}}]
SMALL = {"decoder.model.layers.0.mlp.up_proj": (256, 128), "decoder.lm_head": (512, 128), "embedding": (512, 128),
         "vision.fastvit.stem.0": (16, 3, 3, 3), "vision.linear_0": (128, 100)}  # fmt: skip


def recipe(*rules, **keys):
    return recipe_from_json({"name": "mine", "version": 2, "rules": RULES, "coreai": list(rules)} | keys)


def test_first_rule_decides_and_nothing_stays_float16_unsaid():
    rules = recipe(
        {"pattern": "decoder.lm_head", "form": "int8", "why": "the words"},
        {"pattern": "decoder.*", "form": "int4-b32"},
        {"pattern": "vision.*", "form": "int8-b32"},
    ).coreai
    made = plan(rules, SMALL)
    assert {name: form.name for name, form in made.forms.items()} == {
        "decoder.model.layers.0.mlp.up_proj": "int4-b32", "decoder.lm_head": "int8",
    }  # fmt: skip
    assert made.of("decoder.").keys() == {"model.layers.0.mlp.up_proj", "lm_head"} and made.of("embedding") == {}
    assert made.forms.keys() | made.kept.keys() == SMALL.keys()
    assert made.kept["embedding"] == "no rule matches it"
    assert "432 values" in made.kept["vision.fastvit.stem.0"] and "blocks of 32" in made.kept["vision.linear_0"]


def test_every_fault_at_once():
    with pytest.raises(UserError) as error:
        recipe(
            {"pattern": "decoder.*", "form": "int9"},
            {"pattern": "language_model.*", "form": "int8"},
            {"pattern": "embedding", "form": "int8", "because": "x"},
            {"form": "int8"},
        )
    for place in ("coreai.0.form: no such form; expected fp16, int8", "coreai.1", "expected a pattern that begins with",
                  "coreai.2.because", "coreai.3.pattern"):  # fmt: skip
        assert place in str(error.value)
    with pytest.raises(UserError, match=r"match no weight: decoder\.x\*, vision\.y; a weight is decoder\.model"):
        plan(
            recipe(*({"pattern": glob, "form": "int8"} for glob in ("decoder.x*", "vision.y", "embedding"))).coreai,
            SMALL,
        )
    with pytest.raises(UserError, match="expected method rtn"):
        recipe({"pattern": "*", "form": "int8"}, method="dwq")


@pytest.mark.parametrize("key", ["0.5b", "7b"])
def test_named_recipes_shrink_the_published_models(key):
    """Every matrix of the language model takes its form, and the size is its values' bits and 7 % at most."""
    weights = weight_shapes(SHAPES[key])
    shapes = language_shapes(weights)
    values = sum(map(math.prod, shapes.values()))
    tied = weights.get("language_model.lm_head.weight") is None
    assert values == sum(
        math.prod(shape) * (2 if tied and "embed_tokens" in name else 1)
        for name, shape in weights.items()
        if name.startswith("language_model.") and len(shape) == 2
    )
    bits = {"fp16": 16, "int8": 8, "int6": 6, "int4": 4.5, "int4-g32": 4.5, "mxfp8": 8, "palette4": 4, "palette8": 8}
    having = {name: row for name, row in named_recipes().items() if row.coreai}
    assert having.keys() == bits.keys() | {"mixed-4-8"}
    for name, row in having.items():
        size = describe(row)["coreai_bytes"][{"0.5b": "0.5B", "7b": "7B"}[key]]
        vision = {"vision.linear_0": (128, 128), "vision.fastvit.stem.0": (64, 64, 1, 1)}
        kept = plan(row.coreai, shapes | vision).kept
        assert name == "fp16" or not any(part.startswith(("decoder", "embedding")) for part in kept)
        if name in bits:
            assert 1 <= size / (values * bits[name] / 8) < 1.07
    assert "coreai_bytes" not in describe(load_recipe("int5"))


def test_the_listing_fits_and_says_what_the_neural_engine_refuses(capsys, monkeypatch):

    monkeypatch.setenv("COLUMNS", "80")
    run_recipes(Namespace(recipe=[]))
    lines = capsys.readouterr().out.split("Core AI's forms\n")[1].splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert next(line.split() for line in lines if line.startswith("mixed-4-8"))[1:4] == ["int8,", "int4-b32", "fp16"]
    assert "int4-b32: the Neural Engine's compiler is reported to refuse it" in " ".join(lines)
