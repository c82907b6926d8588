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
from safetensors.numpy import load_file, save_file

from app_bridge.app import facts as app_facts
from app_bridge.app import sources
from app_bridge.app.facts import AppFacts
from app_bridge.validation.check_coreml import KNOWN
from app_bridge.validation.validate import validate
from tests.app_bridge import broken
from tests.app_bridge.app.conftest import VIEWER, fingerprinted
from tests.app_bridge.broken import gone, in_json, put, without

pytestmark = pytest.mark.slow

Cli = Callable[..., Any]
Break = Callable[[Path], object]

CONFIG, PREPROCESSOR, SETTINGS = "config.json", "preprocessor_config.json", "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
OPSETS = ("CoreML5", "CoreML6", "CoreML7", "CoreML8")
# What other versions of the app use of their packages (app_bridge/app/packages.json), by the loader that these are.
APIS = {
    "app 2.25": ("createAttentionMask(h:cache:returnArray:)", "LMInput.ProcessedImage(pixels:frames:)"),
    "app 3.31": ("LoRAModel.loraLayers", "loadContainer(from:using:)"),
}
# Which loaders read which recipes, by hand from what each recipe stores (None: the published app, too).
READ_BY = {"bf16": None, "int2": None, "int4-g32": None, "mixed_3_6": "app 2.25", "int5": "app 3.31"}
READ_BY |= {"mxfp8": "app 3.31", "nvfp4": "app 3.31"}


def rules(folder: Path, facts: AppFacts | None = None) -> list[str]:
    """The rules of all findings but of those about packages."""
    found = validate(folder, facts or app_facts.table())
    return [one.rule for one in found if not one.rule.startswith("package-")]


def pinned() -> AppFacts:
    """The published app with the versions that are known to work."""
    facts = app_facts.table()
    exact = {"mlx-swift": "0.21.3", "mlx-swift-examples": "2.21.2", "swift-transformers": "0.1.19"}
    packages = tuple(replace(one, kind="exactVersion", minimum=exact[one.name]) for one in facts.packages)
    return replace(facts, packages=packages)


def test_an_unbroken_artefact_in_a_pinned_app_has_no_finding_at_all(app_artefact: Path) -> None:
    assert validate(app_artefact, pinned()) == []


@pytest.mark.parametrize("recipe", READ_BY)
def test_each_recipe_is_read_by_the_apps_that_can(
    recipe: str, app_artefact: Path, app_checkpoint: Path, tmp_path: Path
) -> None:
    facts, least = app_facts.table(), READ_BY[recipe]
    artefact = broken.with_recipe(recipe, app_artefact, app_checkpoint, tmp_path / recipe)
    if least is None:
        assert rules(artefact) == []
        return
    (finding,) = (one for one in validate(artefact, facts) if one.severity == "error")
    assert finding.rule == "quantization-unsupported"
    assert least in finding.remedy and "demo app" not in finding.remedy
    newest = list(APIS).index(least)
    for number, (name, api) in enumerate(APIS.items()):
        other = replace(facts, api=api, packages=())
        assert rules(artefact, other) == ([] if number >= newest else ["quantization-unsupported"]), name


def one_file(folder: Path) -> None:
    projector = load_file(folder / "multi_modal_projector.safetensors")
    broken.in_tensors(lambda tensors: tensors.update(projector))(folder)
    (folder / "multi_modal_projector.safetensors").unlink()
    broken.signed(folder, llm={"files": ["model.safetensors"]})


def two_functions(spec: Any) -> None:
    functions, description = spec.mlProgram.functions, spec.description
    functions["encode_512"].CopyFrom(functions["main"])
    for name in ("encode_512", "main"):
        described = description.functions.add()
        described.name = name
        described.input.extend(description.input)
        described.output.extend(description.output)
    description.defaultFunctionName = "main"


def unknown_operation(spec: Any) -> None:
    main = spec.mlProgram.functions["main"]
    operations = main.block_specializations[main.opset].operations
    next(one for one in operations if one.type == "conv").type = "fancy_conv"


def rope(**scaling: Any) -> Break:
    return put(CONFIG, "rope_scaling", scaling | {"mrope_section": [2, 3, 3]})


# An export that is so: (the one warning, None for nothing at all; what makes it so)
TAKEN: list[tuple[str | None, Break]] = [
    (None, put(CONFIG, "hidden_size", 64.0)),
    (None, in_json(CONFIG, lambda config: config.update(torch_dtype="float16", list=[1]))),
    (None, in_json(CONFIG, lambda config: config.update(rope_scaling=None, tie_word_embeddings=None))),
    (None, without(CONFIG, "tie_word_embeddings")),
    (None, rope(type="mrope")),
    (None, rope(rope_type="default")),
    (None, put(SETTINGS, "unk_token", {"content": "<|endoftext|>"})),
    (None, put(SETTINGS, "unk_token", "<|im_end|>")),
    (None, put(PREPROCESSOR, "image_std", [1, 1, 1, 1])),
    (None, put(SETTINGS, "tokenizer_class", "Qwen2TokenizerFast")),
    (None, put(SETTINGS, "eos_token", {"content": "<|im_end|>", "special": True})),
    (None, without(SETTINGS, "added_tokens_decoder")),
    (None, one_file),
    (None, broken.in_package(two_functions)),
    ("config-default", without(CONFIG, "rope_theta")),
    ("eos-token-id", put(CONFIG, "eos_token_id", [1])),
    ("unk-token", put(SETTINGS, "unk_token", "a")),
    ("unk-token", put(SETTINGS, "unk_token", {"content": "<image>"})),
    ("quantization-unused", put(CONFIG, "quantization", {"bits": 4, "group_size": 64})),
    ("shortest-edge", put(PREPROCESSOR, "size", {"shortest_edge": 1100})),
    ("image-strategy", put(PREPROCESSOR, "image_strategy", "pad")),
    ("prompt", put(SETTINGS, "chat_template", "{{ messages[0]['content'] }}")),
    ("text-clean-up", without(SETTINGS, "clean_up_tokenization_spaces")),
    ("chat-template", put(SETTINGS, "chat_template", "{% for %}")),
    ("chat-template", put(SETTINGS, "chat_template", "{{ range(10**12) | list }}")),
    ("operation-unknown", broken.in_package(unknown_operation)),
    ("index-stale", lambda folder: (folder / INDEX).write_text('{"weight_map": {}}')),
]


@pytest.mark.parametrize(("warning", "change"), TAKEN)
def test_what_the_app_takes(warning: str | None, change: Break, app_artefact: Path, tmp_path: Path) -> None:
    folder = broken.linked(app_artefact, tmp_path / "other")
    change(folder)
    broken.signed(folder)
    found = [(one.rule, one.severity) for one in validate(folder, pinned())]
    assert found == ([(warning, "warning")] if warning else [])


def test_lists_that_an_app_can_do_without_may_be_absent(app_artefact: Path, tmp_path: Path) -> None:
    """`[CGFloat]?`: nothing there is no list that is too short."""
    folder = broken.linked(app_artefact, tmp_path / "other")
    without(PREPROCESSOR, "image_mean")(folder)
    broken.signed(folder)
    facts = app_facts.table()
    lenient = tuple(replace(key, required="." in key.path) for key in facts.preprocessor)
    assert rules(folder, replace(facts, preprocessor=lenient)) == []


def test_faults_in_several_places_are_all_found(app_artefact: Path, tmp_path: Path) -> None:
    """`config.json` is a part of `preprocessor_config.json`; a file that differs and has an error isn't told twice."""
    folder = broken.linked(app_artefact, tmp_path / "broken")
    without(PREPROCESSOR, "image_mean")(folder)
    put(CONFIG, "rope_theta", 1.0)(folder)
    (folder / "notes.txt").write_text("mine")
    assert rules(folder) == ["key-missing", "file-changed", "file-extra"]
    in_json(CONFIG, lambda config: config.update(model_type="llava", hidden_size="64"))(folder)
    broken.in_package(lambda spec: setattr(spec.description.output[0], "name", "features"))(folder)
    gone(SETTINGS)(folder)
    found = ["model-type", "key-type", "key-missing", "output-name", "file-missing", "file-extra"]
    assert sorted(rules(folder)) == sorted(found)


def test_a_checkpoint_of_another_resolution_needs_an_app_that_knows_it(app_artefact: Path, tmp_path: Path) -> None:
    """One finding, with both ways out; in an app of that shape it is gone."""
    folder = broken.linked(app_artefact, tmp_path / "smaller")

    def smaller(spec: Any) -> None:
        spec.description.input[0].type.multiArrayType.shape[:] = (1, 3, 512, 512)
        spec.description.output[0].type.multiArrayType.shape[:] = (1, 64, 3072)
        main = spec.mlProgram.functions["main"]
        given = main.block_specializations[main.opset].operations[-1].outputs[0]
        for type, sizes in ((main.inputs[0].type, (1, 3, 512, 512)), (given.type, (1, 64, 3072))):
            for dimension, size in zip(type.tensorType.dimensions, sizes, strict=True):
                dimension.constant.size = size

    broken.in_package(smaller)(folder)
    sizes = {"crop_size": {"height": 512, "width": 512}, "size": {"shortest_edge": 512}}
    in_json(PREPROCESSOR, lambda settings: settings.update(sizes))(folder)
    broken.signed(folder)
    facts = app_facts.table()
    (finding,) = (one for one in validate(folder, facts) if one.severity == "error")
    assert (finding.rule, finding.got) == ("output-shape", "[1, 64, 3072]")
    assert "--image-size" in finding.remedy and "--app" in finding.remedy
    assert rules(folder, replace(facts, output_shape=(1, 64, 3072))) == []


def test_where_the_app_differs_the_remedy_is_the_apps(app_artefact: Path) -> None:
    facts = app_facts.table()
    (finding,) = validate(app_artefact, replace(pinned(), model_type="qwen2"))
    assert finding.rule == "model-type" and finding.remedy.startswith("the app differs from the published one")
    assert rules(app_artefact, replace(facts, system_prompt="You are a poet.")) == ["prompt"]


def test_an_untied_model_passes_with_its_head_and_not_without(
    app_artefact: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(shape="app", dtype="float16", tied=False)
    artefact = broken.with_recipe("int8", app_artefact, checkpoint, tmp_path / "untied")
    assert rules(artefact) == []
    broken.in_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if "lm_head" in name])(artefact)
    assert rules(artefact) == ["tied-embeddings"]


def test_shards_pass_and_a_missing_one_is_one_finding(app_artefact: Path, tmp_path: Path) -> None:
    folder = broken.linked(app_artefact, tmp_path / "shards")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    broken.signed(folder, llm={"files": sorted({*index.values()})})
    assert rules(folder) == []
    (folder / "model-00002-of-00002.safetensors").unlink()
    for _ in range(2):  # a fault of the copy, then one of the export
        (finding,) = (one for one in validate(folder, app_facts.table()) if one.severity == "error")
        assert (finding.rule, finding.where) == ("file-missing", "model-00002-of-00002.safetensors")
        broken.signed(folder)


def test_an_apps_own_sources_are_read_and_compared_with_the_table(
    app_artefact: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own app takes the artefact; a changed value is judged, a declaration told, of the prompt warned."""
    published = fingerprinted(VIEWER)
    monkeypatch.setattr(sources, "published", lambda: published)
    app = Path(shutil.copytree(VIEWER, tmp_path / "app"))
    answer = cli("validate", app_artefact, "--app", app, "--json")
    assert answer.code == 0 and answer.document["facts"] == str(app)
    broken.in_text("FastVLM/Viewing.swift", lambda text: text.replace(b'default: "user"', b'default: "human"'))(app)
    answer = cli("validate", app_artefact, "--app", app, "--json")
    (doubt,) = (one for one in answer.document["findings"] if one["rule"] == "app-differs")
    assert (answer.code, doubt["severity"], doubt["where"]) == (0, "warning", "FastVLM/Viewing.swift:41")
    broken.in_text("FastVLM/Viewing.swift", lambda text: text.replace(b"1, 256", b"1, 16"))(app)
    broken.in_text("FastVLM/Decoder.swift", lambda text: text.replace(b"bias: false)", b"bias: true)"))(app)
    answer = cli("validate", app_artefact, "--app", app, "--json")
    places = [(one["rule"], one["where"]) for one in answer.document["findings"] if one["severity"] == "error"]
    assert answer.code == 1 and places == [
        ("app-differs", "FastVLM/Decoder.swift:15"),
        ("app-differs", "FastVLM/Decoder.swift:83"),
        ("output-shape", "fastvithd.mlpackage: output image_features"),
    ]
    (difference,) = (line for line in answer.document["differences"] if "output_shape" in line)
    assert f"where the app differs from our table: {difference}" in answer.err
    assert "Decoder.swift:15: check by hand" in answer.err


@pytest.mark.parametrize("opset", OPSETS)
def test_the_usual_operations_are_known_in_every_opset(opset: str) -> None:
    from model_export.mil import ops, registry

    assert ops and [one for one in KNOWN - {"const"} if registry.lookup(one, opset) is None] == []


def test_neither_checking_nor_describing_needs_pytorch(app_artefact: Path) -> None:
    """Its import takes seconds; the control is a module that does need it."""
    code = "import sys; from app_bridge.__main__ import build_parser; from fastvlm.common.cli import run"
    code += "; from app_bridge.install.describe import describe; from pathlib import Path"
    code += "; describe(Path(sys.argv[1])); run(build_parser, ['validate', sys.argv[1]])"
    code += "; before = 'torch' in sys.modules"
    code += "; import model_export.mil.ops; sys.exit(before or 'torch' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, app_artefact], capture_output=True).returncode == 0


def test_the_command_prints_findings_and_a_document(app_artefact: Path, tmp_path: Path, cli: Cli) -> None:
    answer = cli("validate", app_artefact, "--json")
    assert answer.code == 0 and answer.document["passed"] is True
    assert answer.document["facts"] == "table" and answer.document["differences"] == []
    assert any("heads" in line and "sha256" in line for line in answer.document["checked"])  # what no weight can tell
    assert answer.err.splitlines()[-1].startswith("passed: 0 errors")
    folder = Path(shutil.copytree(app_artefact, tmp_path / "broken"))
    without(CONFIG, "hidden_size")(folder)
    before = [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
    answer = cli("validate", folder, "--json")
    findings = [one["rule"] for one in answer.document["findings"] if one["severity"] == "error"]
    assert answer.code == 1 and findings == ["key-missing"]
    assert answer.err.splitlines()[1] == "error: key-missing: config.json: hidden_size"
    assert [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))] == before  # nothing is written


def test_what_is_no_artefact_is_unusable_input(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path):
        answer = cli("validate", path)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
