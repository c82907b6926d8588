"""What `validate` lets pass, warns of, refuses and prints; single faults are in test_validate_faults.py."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app_bridge import __main__ as command
from app_bridge.app import facts as app_facts
from app_bridge.app import sources
from app_bridge.app.facts import AppFacts
from app_bridge.validation.check_coreml import KNOWN
from app_bridge.validation.validate import validate
from fastvlm.common.cli import run
from fastvlm.common.errors import UserError
from model_export.encoder.package import read_specification
from quantization.recipe import named_recipes
from tests.app_bridge import broken
from tests.app_bridge.app.conftest import VIEWER, fingerprinted
from tests.app_bridge.broken import gone, in_json

pytestmark = pytest.mark.slow

OPSETS = ("CoreML5", "CoreML6", "CoreML7", "CoreML8")
# What other versions of the app use of their packages (app_bridge/packages.json), by the loader that these are.
APIS = {
    "app 2.25": ("createAttentionMask(h:cache:returnArray:)", "LMInput.ProcessedImage(pixels:frames:)"),
    "app 3.31": ("LoRAModel.loraLayers", "loadContainer(from:using:)"),
}
# Which loaders read which recipes, by hand from what each recipe stores (None: the published app, too).
READ_BY = {
    "fp16": None,
    "bf16": None,
    "int2": None,
    "int3": None,
    "int4": None,
    "int4-g32": None,
    "int6": None,
    "int8": None,
    "int3-mixed": "app 2.25",
    "mixed-4-8": "app 2.25",
    "mixed_2_6": "app 2.25",
    "mixed_3_4": "app 2.25",
    "mixed_3_6": "app 2.25",
    "mixed_4_6": "app 2.25",
    "int5": "app 3.31",
    "mxfp4": "app 3.31",
    "mxfp8": "app 3.31",
    "nvfp4": "app 3.31",
}


def errors(artefact: Path, facts: AppFacts) -> list[str]:
    return [finding.rule for finding in validate(artefact, facts) if finding.severity == "error"]


def warnings(artefact: Path, facts: AppFacts | None = None) -> list[str]:
    """Those about the artefact."""
    found = validate(artefact, facts or app_facts.table())
    return [one.rule for one in found if one.severity == "warning" and not one.rule.startswith("package-")]


def test_an_unbroken_artefact_in_a_pinned_app_has_no_finding_at_all(app_artefact: Path) -> None:
    facts = app_facts.table()
    exact = {"mlx-swift": "0.21.3", "mlx-swift-examples": "2.21.2", "swift-transformers": "0.1.19"}
    pinned = tuple(replace(one, kind="exactVersion", minimum=exact[one.name]) for one in facts.packages)
    assert validate(app_artefact, replace(facts, packages=pinned)) == []


def test_every_recipe_that_needs_no_calibration_is_in_the_list() -> None:
    recipes = named_recipes()
    fixed = {name for name, one in recipes.items() if all(len(rule.choices) == 1 for rule in one.rules)}
    assert set(READ_BY) == {name for name in fixed if not recipes[name].calibrates}


@pytest.mark.parametrize("recipe", READ_BY)
def test_each_recipe_is_read_by_the_apps_that_can(
    recipe: str, app_artefact: Path, app_checkpoint: Path, tmp_path: Path
) -> None:
    facts, least = app_facts.table(), READ_BY[recipe]
    artefact = broken.with_recipe(recipe, app_artefact, app_checkpoint, tmp_path / recipe)
    if least is None:
        assert errors(artefact, facts) == []
        return
    (finding,) = (one for one in validate(artefact, facts) if one.severity == "error")
    assert finding.rule == "quantization-unsupported"
    assert least in finding.remedy and "demo app" not in finding.remedy
    newest = list(APIS).index(least)
    for number, (name, api) in enumerate(APIS.items()):
        other = replace(facts, api=api, packages=())
        assert errors(artefact, other) == ([] if number >= newest else ["quantization-unsupported"]), name


BENIGN: dict[str, Callable[[Path], None]] = {
    "a whole number written as a float": in_json("config.json", lambda c: c.update(hidden_size=64.0)),
    "keys that the app doesn't know": in_json("config.json", lambda c: c.update(torch_dtype="float16", list=[1])),
    "null for an optional key": in_json(
        "config.json", lambda c: c.update(rope_scaling=None, max_position_embeddings=None, tie_word_embeddings=None)
    ),
    "rope scaling with sections": in_json(
        "config.json", lambda c: c.update(rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    ),
    "rope scaling by default": in_json(
        "config.json", lambda c: c.update(rope_scaling={"rope_type": "default", "mrope_section": [2, 3, 3]})
    ),
    "an unknown token that no text has": in_json(
        "tokenizer_config.json", lambda t: t.update(unk_token={"content": "<|endoftext|>"})
    ),
    "an unknown token that ends a turn": in_json("tokenizer_config.json", lambda t: t.update(unk_token="<|im_end|>")),
    "tied by default": in_json("config.json", lambda c: c.pop("tie_word_embeddings")),
    "integers for colours, and a fourth": in_json(
        "preprocessor_config.json", lambda p: p.update(image_std=[1, 1, 1, 1], image_mean=[0, 0, 0, 0])
    ),
    "the class with Fast": in_json("tokenizer_config.json", lambda t: t.update(tokenizer_class="Qwen2TokenizerFast")),
    "the end as an object": in_json(
        "tokenizer_config.json", lambda t: t.update(eos_token={"content": "<|im_end|>", "special": True})
    ),
    "no ids in the settings": in_json("tokenizer_config.json", lambda t: t.pop("added_tokens_decoder")),
    "one file of weights": lambda folder: one_file(folder),
}


def one_file(folder: Path) -> None:
    from safetensors.numpy import load_file

    projector = load_file(folder / "multi_modal_projector.safetensors")
    broken.in_tensors(lambda tensors: tensors.update(projector))(folder)
    (folder / "multi_modal_projector.safetensors").unlink()
    broken.signed(folder, llm={"files": ["model.safetensors"]})


@pytest.mark.parametrize("name", BENIGN)
def test_what_the_app_takes_is_no_finding(name: str, app_artefact: Path, tmp_path: Path) -> None:
    folder = broken.linked(app_artefact, tmp_path / "other")
    BENIGN[name](folder)
    broken.signed(folder)
    assert errors(folder, app_facts.table()) == [] and warnings(folder) == []


def first_convolution(spec: Any) -> Any:
    main = spec.mlProgram.functions["main"]
    operations = main.block_specializations[main.opset].operations
    return next(one for one in operations if one.type == "conv")


DOUBTFUL: dict[str, tuple[Callable[[Path], None], str]] = {
    "an assumed number": (in_json("config.json", lambda c: c.pop("rope_theta")), "config-default"),
    "another end in config.json": (in_json("config.json", lambda c: c.update(eos_token_id=[1])), "eos-token-id"),
    "an ordinary token as the unknown one": (
        in_json("tokenizer_config.json", lambda t: t.update(unk_token="a")),
        "unk-token",
    ),
    "a token of the prompt as the unknown one": (
        in_json("tokenizer_config.json", lambda t: t.update(unk_token={"content": "<image>"})),
        "unk-token",
    ),
    "a block for nothing": (
        in_json("config.json", lambda c: c.update(quantization={"bits": 4, "group_size": 64})),
        "quantization-unused",
    ),
    "larger pictures": (
        in_json("preprocessor_config.json", lambda p: p.update(size={"shortest_edge": 1100})),
        "shortest-edge",
    ),
    "padded pictures": (
        in_json("preprocessor_config.json", lambda p: p.update(image_strategy="pad")),
        "image-strategy",
    ),
    "another prompt": (
        in_json("tokenizer_config.json", lambda t: t.update(chat_template="{{ messages[0]['content'] }}")),
        "prompt",
    ),
    "answers tidied up": (
        in_json("tokenizer_config.json", lambda t: t.pop("clean_up_tokenization_spaces")),
        "text-clean-up",
    ),
    "no template": (in_json("tokenizer_config.json", lambda t: t.update(chat_template="{% for %}")), "chat-template"),
    "a template that hangs on": (
        in_json("tokenizer_config.json", lambda t: t.update(chat_template="{{ range(10**12) | list }}")),
        "chat-template",
    ),
    "an operation of nobody's": (
        broken.in_package(lambda spec: setattr(first_convolution(spec), "type", "fancy_conv")),
        "operation-unknown",
    ),
    "a stale index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "index-stale",
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_the_app_takes_otherwise_is_a_warning(name: str, app_artefact: Path, tmp_path: Path) -> None:
    change, rule = DOUBTFUL[name]
    folder = broken.linked(app_artefact, tmp_path / "other")
    change(folder)
    broken.signed(folder)
    assert errors(folder, app_facts.table()) == [] and warnings(folder) == [rule]


def test_lists_that_an_app_can_do_without_may_be_absent(app_artefact: Path, tmp_path: Path) -> None:
    """`[CGFloat]?`: nothing there is no list that is too short."""
    folder = broken.linked(app_artefact, tmp_path / "other")
    in_json("preprocessor_config.json", lambda p: p.pop("image_mean"))(folder)
    broken.signed(folder)
    facts = app_facts.table()
    lenient = tuple(replace(key, required="." in key.path) for key in facts.preprocessor)
    assert errors(folder, replace(facts, preprocessor=lenient)) == []


def test_what_no_weight_can_tell_is_said(app_artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(command.build_parser, ["validate", str(app_artefact), "--json"])
    checked = json.loads(capsys.readouterr().out.splitlines()[-1])["checked"]
    assert any("heads" in line and "sha256" in line for line in checked)


def test_an_app_with_another_system_prompt_is_warned_of(app_artefact: Path) -> None:
    assert warnings(app_artefact, replace(app_facts.table(), system_prompt="You are a poet.")) == ["prompt"]


def test_a_file_that_nobody_wrote_is_warned_of(app_artefact: Path, tmp_path: Path) -> None:
    folder = broken.linked(app_artefact, tmp_path / "other")
    (folder / "notes.txt").write_text("mine")
    assert warnings(folder) == ["file-extra"]


def test_faults_in_several_places_are_all_found(app_artefact: Path, tmp_path: Path) -> None:
    folder = broken.linked(app_artefact, tmp_path / "broken")
    in_json("config.json", lambda c: c.update(model_type="llava", hidden_size="64"))(folder)
    in_json("preprocessor_config.json", lambda p: p.pop("image_mean"))(folder)
    broken.in_package(lambda spec: setattr(spec.description.output[0], "name", "features"))(folder)
    gone("tokenizer_config.json")(folder)
    found = {"model-type", "key-type", "key-missing", "output-name", "file-missing"}
    assert set(errors(folder, app_facts.table())) == found and len(errors(folder, app_facts.table())) == 5


def test_a_finding_about_a_file_hides_none_about_another(app_artefact: Path, tmp_path: Path) -> None:
    """`config.json` is a part of `preprocessor_config.json`."""
    folder = broken.linked(app_artefact, tmp_path / "broken")
    in_json("preprocessor_config.json", lambda p: p.pop("image_mean"))(folder)
    in_json("config.json", lambda c: c.update(rope_theta=1.0))(folder)
    assert errors(folder, app_facts.table()) == ["key-missing", "file-changed"]


def test_a_checkpoint_of_another_resolution_needs_an_app_that_knows_it(
    app_artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One finding, with both ways out; in an app of that shape it is gone."""
    folder = broken.linked(app_artefact, tmp_path / "smaller")

    def smaller(spec: object) -> None:
        spec.description.input[0].type.multiArrayType.shape[:] = (1, 3, 512, 512)  # type: ignore[attr-defined]
        spec.description.output[0].type.multiArrayType.shape[:] = (1, 64, 3072)  # type: ignore[attr-defined]
        main = spec.mlProgram.functions["main"]  # type: ignore[attr-defined]
        given = main.block_specializations[main.opset].operations[-1].outputs[0]
        for type, sizes in ((main.inputs[0].type, (1, 3, 512, 512)), (given.type, (1, 64, 3072))):
            for dimension, size in zip(type.tensorType.dimensions, sizes, strict=True):
                dimension.constant.size = size

    broken.in_package(smaller)(folder)
    in_json(
        "preprocessor_config.json",
        lambda p: p.update(crop_size={"height": 512, "width": 512}, size={"shortest_edge": 512}),
    )(folder)
    broken.signed(folder)
    facts = app_facts.table()
    (finding,) = (one for one in validate(folder, facts) if one.severity == "error")
    assert (finding.rule, finding.got) == ("output-shape", "[1, 64, 3072]")
    assert "--image-size" in finding.remedy and "--app" in finding.remedy
    assert errors(folder, replace(facts, output_shape=(1, 64, 3072))) == []


def test_where_the_app_differs_the_remedy_is_the_apps(app_artefact: Path) -> None:
    (finding,) = (
        one for one in validate(app_artefact, replace(app_facts.table(), model_type="qwen2")) if one.severity == "error"
    )
    assert finding.rule == "model-type" and finding.remedy.startswith("the app differs from the published one")


def test_an_artefact_of_another_layout_is_to_be_exported_for_the_app(app_artefact: Path, tmp_path: Path) -> None:
    folder = broken.linked(app_artefact, tmp_path / "other")
    broken.signed(folder, llm={"layout": "mlx-vlm"})
    (finding,) = validate(folder, app_facts.table())
    assert (finding.rule, finding.remedy) == ("artefact-layout", "export with --layout app")


def test_several_functions_pass_if_main_is_the_default(app_artefact: Path, tmp_path: Path) -> None:
    folder = broken.linked(app_artefact, tmp_path / "several")

    def two(spec: object) -> None:
        functions, description = spec.mlProgram.functions, spec.description  # type: ignore[attr-defined]
        functions["encode_512"].CopyFrom(functions["main"])
        for name in ("encode_512", "main"):
            described = description.functions.add()
            described.name = name
            described.input.extend(description.input)
            described.output.extend(description.output)
        description.defaultFunctionName = "main"

    broken.in_package(two)(folder)
    broken.signed(folder)
    assert len(read_specification(folder / "fastvithd.mlpackage").mlProgram.functions) == 2
    assert errors(folder, app_facts.table()) == []


def test_an_untied_model_passes_with_its_head_and_not_without(
    app_artefact: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(shape="app", dtype="float16", tied=False)
    artefact = broken.with_recipe("int8", app_artefact, checkpoint, tmp_path / "untied")
    assert errors(artefact, app_facts.table()) == []
    broken.in_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if "lm_head" in name])(artefact)
    assert errors(artefact, app_facts.table()) == ["tied-embeddings"]


def test_shards_pass_and_a_missing_one_is_one_finding(app_artefact: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = broken.linked(app_artefact, tmp_path / "shards")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    broken.signed(folder, llm={"files": sorted({*index.values()})})
    assert errors(folder, app_facts.table()) == [] and warnings(folder) == []
    (folder / "model-00002-of-00002.safetensors").unlink()
    for _ in range(2):  # a fault of the copy, then one of the export
        (finding,) = (one for one in validate(folder, app_facts.table()) if one.severity == "error")
        assert (finding.rule, finding.where) == ("file-missing", "model-00002-of-00002.safetensors")
        broken.signed(folder)


def test_an_apps_own_sources_are_read_and_compared_with_the_table(
    app_artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own app takes the artefact; a changed value is judged, a declaration told, of the prompt warned."""
    published = fingerprinted(VIEWER)
    monkeypatch.setattr(sources, "published", lambda: published)
    app = tmp_path / "app"
    shutil.copytree(VIEWER, app)
    command_line = ["validate", str(app_artefact), "--app", str(app), "--json"]

    def document() -> dict[str, Any]:
        return json.loads(capsys.readouterr().out.splitlines()[-1])  # type: ignore[no-any-return]

    assert run(command.build_parser, command_line) == 0
    assert document()["facts"] == str(app)
    broken.in_text("FastVLM/Viewing.swift", lambda text: text.replace(b'default: "user"', b'default: "human"'))(app)
    assert run(command.build_parser, command_line) == 0
    (doubt,) = (one for one in document()["findings"] if one["rule"] == "app-differs")
    assert (doubt["severity"], doubt["where"]) == ("warning", "FastVLM/Viewing.swift:41")
    broken.in_text("FastVLM/Viewing.swift", lambda text: text.replace(b"1, 256", b"1, 16"))(app)
    broken.in_text("FastVLM/Decoder.swift", lambda text: text.replace(b"bias: false)", b"bias: true)"))(app)
    assert run(command.build_parser, command_line) == 1
    last, err = capsys.readouterr()
    text, found = err.splitlines(), json.loads(last)
    places = [(one["rule"], one["where"]) for one in found["findings"] if one["severity"] == "error"]
    assert places == [
        ("app-differs", "FastVLM/Decoder.swift:15"),
        ("app-differs", "FastVLM/Decoder.swift:83"),
        ("output-shape", "fastvithd.mlpackage: output image_features"),
    ]
    (difference,) = (line for line in found["differences"] if "output_shape" in line)
    assert f"where the app differs from our table: {difference}" in text
    assert any("Decoder.swift:15: check by hand" in line for line in text)


@pytest.mark.parametrize("opset", OPSETS)
def test_the_usual_operations_are_known_in_every_opset(opset: str) -> None:
    from model_export.mil import ops, registry

    assert ops and [one for one in KNOWN - {"const"} if registry.lookup(one, opset) is None] == []


def test_nothing_of_it_needs_pytorch(app_artefact: Path) -> None:
    """Its import takes seconds; the control is what does need it."""
    code = "import sys; from app_bridge.__main__ import build_parser; from fastvlm.common.cli import run"
    code += "; run(build_parser, ['validate', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    for body, expected in ((code, 0), (code.replace("sys.exit(", "import torch; sys.exit("), 1)):
        assert subprocess.run([sys.executable, "-c", body, app_artefact], capture_output=True).returncode == expected


def test_the_command_prints_findings_and_a_document(
    app_artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command.build_parser, ["validate", str(app_artefact), "--json"]) == 0
    last, err = capsys.readouterr()
    text, document = err.splitlines(), json.loads(last)
    assert document["passed"] is True and document["facts"] == "table" and document["differences"] == []
    assert any("config.json" in line for line in document["checked"])
    assert text[-1].startswith("passed: 0 errors")
    folder = broken.linked(app_artefact, tmp_path / "broken")
    in_json("config.json", lambda c: c.pop("hidden_size"))(folder)
    assert run(command.build_parser, ["validate", str(folder), "--json"]) == 1
    last, err = capsys.readouterr()
    text = err.splitlines()
    findings = [one for one in json.loads(last)["findings"] if one["severity"] == "error"]
    assert [one["rule"] for one in findings] == ["key-missing"]
    assert text[1:4] == [
        "error: key-missing: config.json: hidden_size",
        "    got nothing, expected an integer (Swift's Int): the app's decoder throws without it",
        "    export again",
    ]


def test_what_is_no_artefact_is_unusable_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path):
        assert run(command.build_parser, ["validate", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="no such folder"):
        validate(tmp_path / "none", app_facts.table())


def test_nothing_is_written(app_artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(app_artefact, folder)

    def state() -> list[tuple[str, int, int]]:
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))]

    before = state()
    validate(folder, app_facts.table())
    assert state() == before
