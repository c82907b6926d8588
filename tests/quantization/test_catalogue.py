"""`fastvlm recipes`: the named recipes over the published shapes, their sizes and their loaders."""

import json
import math
from types import SimpleNamespace

import pytest
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.synthetic.checkpoint import SHAPES
from model_export.language.llm import planned_bytes
from model_export.language.llm import weight_shapes as exported_shapes
from quantization.catalogue import LOADERS, SIZES, START, describe, weight_shapes
from quantization.recipe import load_recipe, named_recipes, recipe_from_json

NAMED = named_recipes()
ELSEWHERE = ("language_model.lm_head.weight", "vision_tower.")
# Qwen2's own counts (https://huggingface.co/Qwen/Qwen2-0.5B and its siblings, model.safetensors' metadata)
PARAMETERS = {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "7b": 7_615_616_512}
EVERY = {"mlx-lm", "mlx-vlm", "demo app", "app 2.25", "app 3.31"}


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("name", NAMED)
def test_named_recipes_cover_the_published_models(name, key):
    shapes = weight_shapes(SHAPES[key])
    options = NAMED[name].options(shapes, ELSEWHERE)
    assert options.keys() == shapes.keys()
    if name != "fit":
        assert {weight: schemes[0] for weight, schemes in options.items()} == NAMED[name].plan(shapes, ELSEWHERE)


@pytest.mark.parametrize("key", PARAMETERS)
def test_shapes_are_the_published_models(key):
    shapes = weight_shapes(SHAPES[key])
    language = {name: shape for name, shape in shapes.items() if name.startswith("language_model.")}
    assert sum(map(math.prod, language.values())) == PARAMETERS[key]


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_and_sizes_are_an_exports(tied, make_checkpoint, monkeypatch):
    checkpoint = open_checkpoint(make_checkpoint(tied=tied))
    monkeypatch.setitem(SHAPES, "0.5b", SimpleNamespace(**vars(SHAPES["tiny"]) | {"tied": tied, "vision_width": 256}))
    exported = exported_shapes(checkpoint)
    assert weight_shapes(SHAPES["0.5b"]) == exported
    for name in ("fp16", "int4", "mixed_3_6", "nvfp4"):
        size = describe(NAMED[name])["sizes"]["0.5B"]
        assert size["bytes"] == planned_bytes(checkpoint, NAMED[name])
        assert size["bits_per_weight"] == round(8 * size["bytes"] / sum(map(math.prod, exported.values())), 2)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("name", QUANT_RECIPES)
def test_mixed_recipes_choose_as_mlx_lm(name, key):
    """mlx-lm's predicate, over the modules that it quantizes: whatever has a matrix, without the projector."""
    shapes = weight_shapes(SHAPES[key])
    paths = [weight.removesuffix(".weight") for weight, shape in shapes.items()
             if len(shape) == 2 and weight.startswith("language_model.")]  # fmt: skip
    model = SimpleNamespace(named_modules=lambda: [(path, None) for path in paths], layers=[0] * SHAPES[key].layers)
    predicate = mixed_quant_predicate_builder(name, model)
    plan = load_recipe(name).plan(shapes, ELSEWHERE)
    entries = {path: plan[f"{path}.weight"].mlx() for path in paths}
    assert entries == {path: {k: predicate(path, None)[k] for k in ("group_size", "bits")} for path in paths}
    assert len({entry["bits"] for entry in entries.values()}) == 2
    assert all(plan[other].mlx() is None for other in plan.keys() - {f"{path}.weight" for path in paths})


def test_sizes_are_ordered_as_bits_are():
    sizes = {name: describe(NAMED[name])["sizes"]["7B"].get("bytes", 0) for name in NAMED}
    order = ["int2", "int3", "int3-mixed", "int4", "int4-g32", "int5", "mixed-4-8", "int6", "int8", "fp16"]
    assert [sizes[name] for name in order] == sorted(sizes[name] for name in order)
    assert sizes["int4"] == sizes["int4-awq"] == sizes["int4-gptq"] == sizes["int4-dwq"] == sizes["nvfp4"]


@pytest.mark.parametrize(
    ("name", "missing"),
    [("fp16", set()), ("int4", set()), ("int6", set()), ("int4-awq", set()), ("int5", {"demo app", "app 2.25"}),
     ("mixed-4-8", {"demo app"}), ("mixed_3_6", {"demo app"}), ("mxfp4", {"demo app", "app 2.25"}),
     ("nvfp4", {"demo app", "app 2.25"}), ("fit:400MB", {"demo app", "app 2.25"})],
)  # fmt: skip
def test_what_loads_it(name, missing):
    assert {loader.name for loader in LOADERS} == EVERY
    assert set(describe(load_recipe(name))["loads_in"]) == EVERY - missing


def test_two_group_sizes_are_two_settings():
    rules = [
        {"pattern": pattern, "scheme": {"mode": "affine", "bits": 4, "group_size": group, "dtype": "float16"}}
        for pattern, group in (("*up_proj.weight", 32), ("*_proj.weight", 64))
    ]
    rules.append({"pattern": "*", "scheme": {"dtype": "float16"}})
    recipe = recipe_from_json({"name": "groups", "version": 2, "rules": rules})
    assert "demo app" not in describe(recipe)["loads_in"] and "app 2.25" in describe(recipe)["loads_in"]


def test_a_budget_is_its_size():
    least = describe(load_recipe("fit"))["sizes"]["7B"]["least"]
    assert describe(load_recipe("fit:300MB"))["sizes"]["0.5B"]["bytes"] == 300_000_000
    assert describe(load_recipe("fit:300MB"))["sizes"]["7B"] == {
        "fault": f"at least {least / 1e9:.2f} GB (2.54 bits per weight)"
    }
    assert describe(load_recipe("fit:4.5bpw"))["sizes"]["1.5B"]["bits_per_weight"] == 4.5
    assert describe(load_recipe("fit:90GB"))["sizes"]["7B"]["bytes"] < 10**10  # there is nothing to spend it on


@pytest.mark.parametrize("columns", [None, "80"])
def test_the_table_of_all(cli, monkeypatch, columns):
    """Every recipe is there, with its sizes, what it is, and the one to start with."""
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    answer = cli("recipes", "--json")
    assert answer.code == 0 and {row["name"] for row in answer.document["recipes"]} == set(NAMED)
    for part in (*NAMED, "285 MB", "4.33 GB", f"→ {START[0]}", "calibrated on"):
        assert part in answer.err
    lines = answer.err.splitlines()
    assert len(lines) < 130 and max(map(len, lines)) <= (80 if columns else 180)


def test_some_with_their_rules(cli, tmp_path):
    path = tmp_path / "mine.json"
    rule = {"pattern": "language_model.model.layers.27.*_proj.weight", "why": "the last layer",
            "scheme": {"mode": "affine", "bits": 8, "group_size": 64, "dtype": "float16"}}  # fmt: skip
    vision = {"pattern": "vision_encoder.stages.*", "scheme": {"mode": "coreml", "form": "palette4-g16"}}
    rest = {"pattern": "*", "scheme": {"dtype": "float16"}}
    path.write_text(json.dumps({"name": "[mine]", "version": 2, "rules": [rule, vision, rest]}))
    answer = cli("recipes", "int3-mixed", path)
    out = " ".join(answer.out.split())
    assert (
        answer.code == 0 and "the first 1/8 of the layers" in out and "its values are what attention passes on" in out
    )
    assert "[mine]" in out and "palette4-g16" in out and "the last layer" in out
    assert "0.5B: recipe [mine] does not fit this model: rule 1 matches no weight" in out
    assert "1.5B: recipe" not in out


def test_what_is_no_recipe_is_one_line(cli):
    answer = cli("recipes", "int4", f"fit:{'9' * 400}GB")
    assert answer.code == 2 and len(answer.err.splitlines()) == 1 and not answer.out
