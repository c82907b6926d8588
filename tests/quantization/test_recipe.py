"""Recipes: data in, data out, every fault at once."""

import json

import mlx.core as mx
import pytest

from fastvlm.errors import UserError
from quantization import affine
from quantization.recipe import load_recipe, named_recipes, recipe_from_json
from quantization.schemes import Affine, Cast

LAYER = "language_model.model.layers.0.mlp.up_proj.weight"
INT4 = {"mode": "affine", "bits": 4, "group_size": 64, "dtype": "float16"}


def recipe(*rules, **keys):
    return recipe_from_json({"name": "mine", "version": 1, "rules": list(rules)} | keys)


def test_named_recipes():
    recipes = named_recipes()
    assert set(recipes) == {"fp16", "bf16", "int8", "int4"}
    for name, named in recipes.items():
        assert named.name == name and named.description
        assert load_recipe(name) == named
    for name, bits in (("int8", 8), ("int4", 4)):
        quantized = Affine(bits, 64, "float16")
        assert recipes[name].scheme(LAYER) == quantized
        assert recipes[name].scheme("language_model.model.embed_tokens.weight") == quantized
        assert recipes[name].scheme("language_model.lm_head.weight") == quantized
        assert recipes[name].scheme("multi_modal_projector.linear_0.weight") == Cast("float16")
        assert recipes[name].scheme("language_model.model.layers.0.self_attn.q_proj.bias") == Cast("float16")
        assert recipes[name].scheme("language_model.model.norm.weight") == Cast("float16")


def test_json_round_trip(tmp_path):
    for name, named in named_recipes().items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(named.to_json()))
        assert load_recipe(path) == named


def test_first_rule_wins():
    mixed = recipe({"pattern": "*.0.*", "scheme": {"dtype": "float32"}}, {"pattern": "*", "scheme": INT4})
    assert mixed.scheme(LAYER) == Cast("float32")
    assert mixed.scheme(LAYER.replace(".0.", ".1.")) == Affine(4, 64, "float16")


def test_all_faults_at_once_with_the_legal_combinations():
    with pytest.raises(UserError) as error:
        recipe_from_json({
            "name": "", "version": 2, "author": "me",
            "rules": [
                {"pattern": "*", "scheme": {"mode": "affine", "bits": 7, "group_size": 48, "dtype": "float16"}},
                {"pattern": "", "scheme": {"dtype": "int8"}},
                {"pattern": "*", "scheme": {"mode": "nvfp4"}, "because": "x"},
                {"pattern": "*", "scheme": {"mode": "affine", "bits": True, "group_size": 64.0, "scale": 1}},
                "*",
            ],
        })  # fmt: skip
    message = str(error.value)
    for part in (
        "unknown key 'author'", "name: expected", "version: expected 1, got 2",
        "rule 1: scheme: bits 7 is not one of 2, 3, 4, 5, 6, 8, group_size 48 is not one of 32, 64, 128",
        "rule 2: pattern", "dtype 'int8' is not one of float16, bfloat16, float32",
        "rule 3: unknown key 'because'", "unknown mode 'nvfp4'",
        "rule 4: scheme: unknown key 'scale', bits True is not one of", "group_size 64.0 is not one of",
        "dtype is missing", "rule 5: expected an object",
        '{"mode": "affine", "bits": 2|3|4|5|6|8, "group_size": 32|64|128',
    ):  # fmt: skip
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("document", [[], "int4", None, {"name": "x", "version": 1, "rules": []}])
def test_what_is_no_recipe(document):
    with pytest.raises(UserError, match="rules"):
        recipe_from_json(document)


def test_files_that_cannot_be_read(tmp_path):
    broken, twice = tmp_path / "broken.json", tmp_path / "twice.json"
    broken.write_text("{")
    twice.write_text('{"name": "x", "name": "y", "version": 1, "rules": []}')
    with pytest.raises(UserError, match="not readable as JSON"):
        load_recipe(broken)
    with pytest.raises(UserError, match="name given twice"):
        load_recipe(twice)
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "absent.json")
    with pytest.raises(UserError, match="unknown recipe 'int5': expected bf16, fp16, int4, int8"):
        load_recipe("int5")


def test_plan_lists_every_weight_that_does_not_fit():
    mine = recipe(
        {"pattern": "language_model.*", "scheme": INT4},
        {"pattern": "vision_tower.*", "scheme": INT4},
        {"pattern": "no.such.weight", "scheme": INT4},
    )
    with pytest.raises(UserError) as error:
        mine.plan(
            {"language_model.a": (8, 96), "language_model.b": (8,), "language_model.c": (8, 50), "other": (8, 64)},
            elsewhere=("vision_tower.",),
        )
    message = str(error.value)
    assert "language_model.a [8, 96]: rows of 96 do not divide into groups of 64 (groups that do: 32)" in message
    assert "language_model.b [8]: affine quantization takes matrices" in message
    assert "groups that do: none, store it unquantized" in message
    assert "other: no rule matches" in message
    assert "rule 3 matches no weight: 'no.such.weight'" in message and "rule 2" not in message


def test_the_table_of_legal_combinations_is_what_mlx_runs():
    legal = set()
    for bits in range(2, 10):  # MLX 0.32 packs single bits as well, which older loaders refuse
        for group in (8, 16, 32, 64, 128, 256):
            try:
                mx.eval(mx.quantize(mx.ones((2, 512)), group, bits))
            except ValueError:
                continue
            legal.add((bits, group))
    assert legal == {(bits, group) for bits in affine.BITS for group in affine.GROUP_SIZES}
