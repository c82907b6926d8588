"""Recipes: data in, data out, every fault at once."""

import re

import mlx.core as mx
import pytest

from fastvlm.common.errors import UserError
from quantization.mlx import affine
from quantization.recipe import Budget, Layers, load_recipe, named_recipes, recipe_from_json
from quantization.schemes import Affine, Cast

LAYER = "language_model.model.layers.0.mlp.up_proj.weight"
INT4 = {"mode": "affine", "bits": 4, "group_size": 64, "dtype": "float16"}


def recipe(*rules, **keys):
    return recipe_from_json({"name": "mine", "version": 2, "rules": list(rules)} | keys)


def test_named_recipes():
    recipes = named_recipes()
    assert {"fp16", "bf16", "int8", "int4"} <= set(recipes)
    for name, named in recipes.items():
        assert named.name == name and named.description.endswith(".") and load_recipe(name) == named
        assert all(rule.why for rule in named.rules) or name in ("fp16", "bf16")
    for name, bits in (("int8", 8), ("int4", 4)):
        quantized = Affine(bits, 64, "float16")
        for weight in (LAYER, "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            assert recipes[name].choices(weight) == (quantized,)
        for weight in ("multi_modal_projector.linear_0.weight", "language_model.model.norm.weight",
                       "language_model.model.layers.0.self_attn.q_proj.bias"):  # fmt: skip
            assert recipes[name].choices(weight) == (Cast("float16"),)


def test_json_round_trip():
    assert all(recipe_from_json(named.to_json()) == named for named in named_recipes().values())


def test_first_rule_wins():
    mixed = recipe({"pattern": "*.0.*", "scheme": {"dtype": "float32"}}, {"pattern": "*", "scheme": INT4})
    assert mixed.choices(LAYER) == (Cast("float32"),)
    assert mixed.choices(LAYER.replace(".0.", ".1.")) == (Affine(4, 64, "float16"),)


def test_all_faults_at_once_with_the_legal_combinations():
    with pytest.raises(UserError) as error:
        recipe_from_json({
            "name": "", "version": True, "author": "me", "method": "magic", "budget": {"bytes": 0},
            "rules": [
                {"pattern": "*", "scheme": INT4 | {"bits": 7}},
                {"pattern": "", "scheme": INT4},
                {"pattern": "*", "scheme": {"mode": "affine", "bits": 4, "group_size": 64.0, "dtype": "float16"}},
                {"pattern": "*", "scheme": INT4, "because": "x"},
                "*",
            ],
        })  # fmt: skip
    message = str(error.value)
    for place in ("name", "version", "author", "method", "budget.bytes", "rules.0.scheme", "rules.1.pattern",
                  "rules.2.scheme", "rules.3.because", "rules.4"):  # fmt: skip
        assert message.count(f" {place}: ") == 1, place
    assert message.count('{"mode": "affine", "bits": 2|3|4|5|6|8, "group_size": 32|64|128') == 2
    assert "\n" not in message


@pytest.mark.parametrize("document", [[], "int4", None, {"name": "x", "version": 2, "rules": []}])
def test_documents_without_rules(document):
    with pytest.raises(UserError, match=r"recipe: : Input should be an object, got|recipe x: rules: got none"):
        recipe_from_json(document)


def test_files_that_cannot_be_read(tmp_path):
    broken, twice = tmp_path / "broken.json", tmp_path / "twice.json"
    broken.write_text("{")
    twice.write_text('{"name": "x", "name": "y", "version": 2, "rules": []}')
    with pytest.raises(UserError, match=r"no JSON \("):
        load_recipe(broken)
    with pytest.raises(UserError, match=r"the key .* twice"):
        load_recipe(twice)
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "absent.json")
    with pytest.raises(UserError, match="unknown recipe 'int7': expected bf16, "):
        load_recipe("int7")


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
    assert (
        "language_model.a [8, 96]: rows of 96 do not divide into affine's groups of 64 (groups that do: 32)" in message
    )
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


def test_layers_of_a_rule():
    """The very layers that mlx-lm's mixed predicates give more bits."""
    chosen = Layers(first=0.125, last=0.125, every=3)
    for count in (4, 24, 28):
        for index in range(count):
            more = index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
            assert ((index, count) in chosen) == more
    mine = recipe(
        {"pattern": "*.up_proj.weight", "layers": {"last": 0.5}, "scheme": {"dtype": "float32"}},
        {"pattern": "*", "scheme": {"dtype": "float16"}},
    )
    plan = mine.plan({LAYER.replace(".0.", f".{i}."): (8, 64) for i in range(4)} | {"a.up_proj.weight": (8, 64)})
    assert [scheme.dtype for scheme in plan.values()] == ["float16"] * 2 + ["float32"] * 2 + ["float16"]
    assert recipe_from_json(mine.to_json()) == mine


INT8 = INT4 | {"bits": 8}
ALL = {"pattern": "*", "scheme": {"dtype": "float16"}}


def test_choices_and_a_budget():
    rules = [{"pattern": "*_proj.weight", "choices": [INT4, INT8, INT4 | {"group_size": 128}]}, ALL]
    mine, shapes = recipe(*rules, budget={"bits_per_weight": 4.5}), {LAYER: (8, 192), "norm": (8,)}
    assert recipe_from_json(mine.to_json()) == mine and mine.budget.limit(1600) == 900
    assert [s.bits for s in mine.options(shapes)[LAYER]] == [4, 8]  # rows of 192 have no groups of 128
    with pytest.raises(UserError, match="leaves the schemes open: say how large, as in fit:400MB"):
        mine.plan(shapes)
    decided = mine.decided({LAYER: Affine(8, 64, "float16")})
    assert decided.budget is None and decided.plan(shapes)[LAYER].bits == 8
    assert recipe_from_json(decided.to_json()) == decided


def test_a_size_in_the_name():
    assert load_recipe("fit:400MB").budget == Budget(bytes=400_000_000)
    assert load_recipe("fit:1.5GB").budget == Budget(bytes=1_500_000_000)
    assert load_recipe("fit:4.5bpw").budget == Budget(bits_per_weight=4.5)
    assert load_recipe("fit:4.5bpw").name == "fit:4.5bpw"
    for text in ("fit:", "fit:400", "fit:0MB", "fit:-1GB", "fit:1e3MB", "fit:400MB:400MB"):
        with pytest.raises(UserError, match="expected one such as 400MB"):
            load_recipe(text)
    with pytest.raises(UserError, match="int4:400MB: takes no size"):
        load_recipe("int4:400MB")


@pytest.mark.parametrize(
    ("keys", "rule", "place"),
    [
        ({"budget": {"bytes": 4}}, {}, "no rule offers choices to spend a budget on"),
        ({"budget": {"bytes": 4, "bits_per_weight": 1}}, {}, "budget: expected either"),
        ({"method": "awq"}, {"scheme": None, "choices": [INT4, INT8]}, "method awq takes one scheme"),
        ({}, {"choices": [INT4, INT8]}, "rules.0: expected either"),
        ({}, {"scheme": None, "choices": [INT4]}, "rules.0: expected either"),
        ({}, {"scheme": None}, "rules.0: expected either"),
        ({}, {"layers": {"first": 2}}, "rules.0.layers.first: "),
        ({}, {"layers": {}}, "rules.0.layers: expected"),
        ({}, {"layers": {"every": True}}, "rules.0.layers.every: "),
        ({}, {"layers": {"second": 1}}, "rules.0.layers.second: "),
        ({}, {"scheme": {"mode": "coreml", "form": "int8"}}, 'rules.0: mode "coreml" is for'),
        ({}, {"pattern": "vision_encoder.*"}, 'rules.0: mode "coreml" is for'),
        ({}, {"pattern": "vision_encoder.*", "scheme": {"mode": "coreml", "form": "jpeg"}}, "rules.0.scheme: no such"),
        ({}, {"scheme": {"mode": "fp7"}}, "rules.0.scheme: no such"),
        ({}, {"scheme": {"mode": []}}, "rules.0.scheme: no such"),
        ({}, {"scheme": {"dtype": "int8"}}, "rules.0.scheme: no such"),
    ],
)
def test_refusals_name_the_place(keys, rule, place):
    first = {key: value for key, value in ({"pattern": "*", "scheme": INT4} | rule).items() if value is not None}
    with pytest.raises(UserError, match=re.escape(place)):
        recipe(first, ALL, **keys)


def test_methods_take_what_mlx_lm_takes():
    shapes = {LAYER: (8, 64), LAYER.replace("up", "down"): (8, 64), "norm": (8,)}
    up, down, rest = {"pattern": "*up_proj.weight"}, {"pattern": "*down_proj.weight"}, ALL
    assert recipe(up | {"scheme": INT4}, down | {"scheme": INT4}, rest, method="gptq").plan(shapes)
    for schemes, method, message in (
        ((INT4, INT8), "awq", "method awq takes one affine scheme for all decoder matrices, got 2 schemes"),
        ((INT4, {"dtype": "float16"}), "gptq", "got 2 schemes"),
        ((INT4 | {"bits": 3},) * 2, "gptq", "method gptq takes 2, 4, 8 bits, got 3"),
        ((INT8,) * 2, "dwq", "below 8 bits: the recipe has none"),
    ):
        mine = recipe(up | {"scheme": schemes[0]}, down | {"scheme": schemes[1]}, rest, method=method)
        with pytest.raises(UserError, match=message):
            mine.plan(shapes)


def test_the_encoders_rules():
    mine = recipe(
        {"pattern": "vision_encoder.stages.4.*", "scheme": {"mode": "coreml", "form": "palette4-g16"}},
        {"pattern": "vision_encoder.*", "scheme": {"mode": "coreml", "form": "int8"}},
        ALL,
    )
    assert mine.vision == (("stages.4.*", "palette4-g16"), ("*", "int8"))
    assert mine.plan({LAYER: (8, 64)}) == {LAYER: Cast("float16")}  # the MLX folder has nothing of it
    assert recipe_from_json(mine.to_json()) == mine
