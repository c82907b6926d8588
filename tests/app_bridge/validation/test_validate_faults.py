"""Single faults of the configuration files, the Core ML package and the app: each is found by its own rule at its own
place, and none is reported as another."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app_bridge.app import facts as app_facts
from app_bridge.app.facts import AppFacts, Key
from tests.app_bridge.broken import (
    Change,
    Fault,
    expect_fault,
    expect_one,
    gone,
    in_package,
    in_tensors,
    in_text,
    put,
    rules,
    several,
    without,
)

pytestmark = pytest.mark.slow

CONFIG, PREPROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer.json"
PACKAGE = "fastvithd.mlpackage"
PROGRAM, WEIGHT_BIN = (f"{PACKAGE}/Data/com.apple.CoreML/{name}" for name in ("model.mlmodel", "weights/weight.bin"))


def feature(spec: Any, side: str) -> Any:
    return (spec.description.input if side == "input" else spec.description.output)[0]


def shape(side: str, *sizes: int) -> Change:
    return lambda spec: feature(spec, side).type.multiArrayType.shape.__setitem__(slice(None), sizes)


def half(side: str) -> Change:
    return lambda spec: setattr(feature(spec, side).type.multiArrayType, "dataType", 65552)


def named(side: str, name: str) -> Change:
    return lambda spec: setattr(feature(spec, side), "name", name)


def version(number: int) -> Change:
    return lambda spec: setattr(spec, "specificationVersion", number)


def other_default(specification: Any) -> None:
    functions = specification.mlProgram.functions
    functions["encode_512"].CopyFrom(functions["main"])
    for name in ("main", "encode_512"):
        described = specification.description.functions.add()
        described.name = name
        described.input.extend(specification.description.input)
        described.output.extend(specification.description.output)
    specification.description.defaultFunctionName = "encode_512"


def described_only(specification: Any) -> None:
    other_default(specification)
    specification.description.defaultFunctionName = "main"
    specification.description.functions.add().name = "encode_256"


def nan_in(weights: bytes) -> bytes:
    """The file's first tensor, whose place stands 16 bytes into the record after the header, begins with a NaN."""
    start = int.from_bytes(weights[80:88], "little")
    return weights[:start] + b"\x00\x7e" + weights[start + 2 :]


def second_input(specification: Any) -> None:
    function = specification.mlProgram.functions["main"]
    function.inputs.add().CopyFrom(function.inputs[0])
    function.inputs[1].name = "mask"
    specification.description.input.add().CopyFrom(specification.description.input[0])
    specification.description.input[1].name = "mask"


def size_of(type: Any, number: int, size: int) -> None:
    type.tensorType.dimensions[number].constant.size = size


def main(specification: Any) -> Any:
    return specification.mlProgram.functions["main"]


def last(specification: Any) -> Any:
    return main(specification).block_specializations[main(specification).opset].operations[-1]


def an_image(specification: Any) -> None:
    image = specification.description.input[0].type.imageType
    image.width = image.height = 1024
    image.colorSpace = image.RGB


def flexible(specification: Any) -> None:
    array = specification.description.input[0].type.multiArrayType
    for _ in range(4):
        array.shapeRange.sizeRanges.add().upperBound = -1


def a_folder(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


def a_pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def with_head(tensors: dict[str, np.ndarray]) -> None:
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]


# A key of either file -> values that Swift's type doesn't take.
WRONG_TYPES: dict[str, dict[str, list[Any]]] = {
    CONFIG: {
        "vocab_size": [None],
        "hidden_size": ["64"],
        "intermediate_size": [128.5],
        "image_token_index": [True, 2**63],
        "tie_word_embeddings": [1, []],
        "rope_theta": [1e39],
        "rope_scaling": [[1], {"mrope_section": [2.5]}, {"mrope_section": [2], "type": None}],
    },
    PREPROCESSOR: {"crop_size": [1024, {"height": 1024, "width": "1024"}], "image_std": [[1, 1, "1"]]},
}
# (the one rule, what its finding names, what breaks a copy)
FAULTS: list[Fault] = [
    *(
        ("key-type", key, put(file, key, value))
        for file, keys in WRONG_TYPES.items()
        for key, values in keys.items()
        for value in values
    ),
    ("file-missing", CONFIG, gone(CONFIG)),
    ("file-unreadable", CONFIG, a_folder),
    ("not-json", CONFIG, in_text(CONFIG, lambda text: text[:200])),
    ("not-json", CONFIG, in_text(CONFIG, lambda text: text.replace(b"silu", b"sil\xfc"))),
    ("not-json", CONFIG, in_text(CONFIG, lambda text: text.replace(b"1e-06", b"NaN"))),
    ("not-an-object", CONFIG, in_text(CONFIG, lambda text: b"[" + text + b"]")),
    ("duplicate-key", "vocab_size", in_text(CONFIG, lambda text: text.replace(b"{", b'{"vocab_size": 576,', 1))),
    ("key-missing", "hidden_size", without(CONFIG, "hidden_size")),
    ("key-missing", "mrope_section", put(CONFIG, "rope_scaling", {"type": "linear"})),
    ("config-value", "rope_type", put(CONFIG, "rope_scaling", {"mrope_section": [2], "rope_type": "yarn"})),
    ("model-type", "model_type", put(CONFIG, "model_type", "qwen2_vl")),
    ("key-missing", "model_type", without(CONFIG, "model_type")),
    ("config-value", "num_hidden_layers", put(CONFIG, "num_hidden_layers", 0)),
    ("file-unreadable", CONFIG, a_pipe),
    ("config-value", "vocab_size", put(CONFIG, "vocab_size", 0)),
    ("config-value", "hidden_act", put(CONFIG, "hidden_act", "gelu")),
    ("config-value", "mm_use_im_start_end", put(CONFIG, "mm_use_im_start_end", True)),
    ("weight-shape", "embed_tokens", put(CONFIG, "vocab_size", 600)),
    ("weight-shape", "k_proj", put(CONFIG, "num_key_value_heads", 4)),
    ("layer-count", "num_hidden_layers", put(CONFIG, "num_hidden_layers", 3)),
    ("layer-count", "num_hidden_layers", put(CONFIG, "num_hidden_layers", 10**15)),
    ("encoder-width", "mm_hidden_size", put(CONFIG, "mm_hidden_size", 768)),
    ("tied-embeddings", "tie_word_embeddings", put(CONFIG, "tie_word_embeddings", False)),
    ("tied-embeddings", "tie_word_embeddings", several(without(CONFIG, "tie_word_embeddings"), in_tensors(with_head))),
    ("file-changed", CONFIG, put(CONFIG, "rope_theta", 10000.0)),
    ("processor-class", "processor_class", put(PREPROCESSOR, "processor_class", "FastVlmProcessor")),
    ("key-missing", "processor_class", without(PREPROCESSOR, "processor_class")),
    ("key-missing", "crop_size", without(PREPROCESSOR, "crop_size")),
    ("crop-size", "crop_size", put(PREPROCESSOR, "crop_size", {"height": 512, "width": 512})),
    ("crop-size", "crop_size", put(PREPROCESSOR, "crop_size", {"height": 1024, "width": 512})),
    ("shortest-edge", "shortest_edge", put(PREPROCESSOR, "size", {"shortest_edge": 512})),
    ("list-length", "image_mean", put(PREPROCESSOR, "image_mean", [0.0, 0.0])),
    ("normalisation", "image_mean", put(PREPROCESSOR, "image_mean", [0.48, 0.46, 0.41])),
    ("normalisation", "image_std", put(PREPROCESSOR, "image_std", [1, 0, 1])),
    ("file-missing", PACKAGE, gone(PACKAGE)),
    ("package-name", "encoder.mlpackage", lambda folder: (folder / PACKAGE).rename(folder / "encoder.mlpackage")),
    ("package-unreadable", PACKAGE, in_text(PROGRAM, lambda data: data[:-1000])),
    ("package-unreadable", PACKAGE, gone(f"{PACKAGE}/Manifest.json")),
    ("package-unreadable", PACKAGE, in_package(lambda spec: spec.neuralNetwork.SetInParent())),
    ("package-weights", PACKAGE, in_text(WEIGHT_BIN, lambda data: data[:-4096])),
    ("package-weights", PACKAGE, gone(f"{PACKAGE}/Data/com.apple.CoreML/weights")),
    ("weight-value", PACKAGE, in_text(WEIGHT_BIN, nan_in)),
    ("package-unreadable", "encode_256", in_package(described_only)),
    ("input-name", "input", in_package(named("input", "image"))),
    ("output-name", "output", in_package(named("output", "features"))),
    ("input-rank", "images", in_package(shape("input", 3, 1024, 1024))),
    ("input-shape", "images", in_package(shape("input", 1, 3, 1024, 512))),
    ("input-shape", "images", in_package(shape("input", 1, 1, 1024, 1024))),
    ("input-shape", "images", in_package(flexible)),
    ("encoder-tokens", "image_features", in_package(shape("input", 1, 3, 512, 512))),
    ("input-dtype", "images", in_package(half("input"))),
    ("input-kind", "images", in_package(an_image)),
    ("input-extra", "inputs", in_package(second_input)),
    ("output-dtype", "image_features", in_package(half("output"))),
    ("output-rank", "image_features", in_package(shape("output", 256, 3072))),
    ("output-shape", "image_features", in_package(shape("output", 1, 256, 768))),
    ("default-function", PACKAGE, in_package(other_default)),
    ("deployment-target", PACKAGE, in_package(version(10))),
    ("specification-version", PACKAGE, in_package(version(6))),
    ("package-description", "images", in_package(lambda spec: size_of(main(spec).inputs[0].type, 2, 512))),
    ("package-description", "image_features", in_package(lambda spec: size_of(last(spec).outputs[0].type, 1, 64))),
    ("deployment-target", PACKAGE, in_package(version(99))),
]


def changed(**values: Any) -> Callable[[AppFacts], AppFacts]:
    return lambda facts: replace(facts, **values)


def with_bias(facts: AppFacts) -> AppFacts:
    layers = tuple(replace(layer, bias=True) if layer.path.endswith("o_proj") else layer for layer in facts.layers)
    return replace(facts, layers=layers)


def one_more_key(facts: AppFacts) -> AppFacts:
    return replace(facts, config=(*facts.config, Key("sliding_window", "Int", True)))


def pinned(**versions: str) -> Callable[[AppFacts], AppFacts]:
    """The app with exact versions of some packages."""

    def change(facts: AppFacts) -> AppFacts:
        exact = {name.replace("_", "-"): version for name, version in versions.items()}
        return replace(
            facts,
            packages=tuple(
                replace(one, kind="exactVersion", minimum=exact[one.name]) if one.name in exact else one
                for one in facts.packages
            ),
        )

    return change


def without_default(facts: AppFacts) -> AppFacts:
    config = tuple(replace(key, default=None) if key.path == "rope_scaling" else key for key in facts.config)
    return replace(facts, config=config)


def another_section(facts: AppFacts) -> AppFacts:
    config = (replace(key, path=key.path.replace(".mrope_section", ".sections")) for key in facts.config)
    return replace(facts, config=tuple(config))


# Another app: (the one rule, what its finding names, its facts)
APPS: list[tuple[str, str, Callable[[AppFacts], AppFacts]]] = [
    ("package-name", PACKAGE, changed(model_class="FastViTHD")),
    ("input-name", PACKAGE, changed(input_name="pixels")),
    ("input-dtype", "images", changed(input_dtype="float16")),
    ("input-shape", "images", changed(input_shape=(1, 3, 512, 512))),
    ("output-name", PACKAGE, changed(output_name="features")),
    ("output-shape", "image_features", changed(output_shape=(1, 64, 3072))),
    ("output-dtype", "image_features", changed(output_dtype="float16")),
    ("model-type", "model_type", changed(model_type="fast_vlm")),
    ("processor-class", "processor_class", changed(processor_class="FastVLMProcessor")),
    ("key-missing", "sliding_window", one_more_key),
    ("key-missing", "rope_scaling.mrope_section", without_default),
    ("key-missing", "rope_scaling.sections", another_section),
    ("weight-missing", "o_proj.bias", with_bias),
    ("prompt-tokens", "prompt", changed(patch_size=32)),
    ("prompt-tokens", "prompt", changed(additional_image_tokens=1)),
    ("image-token", TOKENIZER, changed(image_token="<|image_pad|>")),
    ("turn-token", TOKENIZER, changed(turn="<|turn|>{role}\n{content}<|im_end|>")),
    ("eos-token", "eos_token", changed(turn="<|im_start|>{role}\n{content}<|endoftext|>")),
    ("file-missing", "model.json", changed(bundle_resource="model.json")),
    ("package-known-to-break", "mlx-swift-examples", pinned(mlx_swift_examples="2.25.7")),
    ("package-missing", "swift-transformers", lambda facts: replace(facts, packages=facts.packages[:2])),
    ("deployment-target", PACKAGE, changed(deployment={"iOS": "16.4"})),
    ("deployment-target", PACKAGE, changed(deployment={"iOS": "18.2", "macOS": "13.0"})),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_each_fault_is_one_finding(fault: Fault, app_artefact: Path, tmp_path: Path) -> None:
    expect_fault(fault, app_artefact, tmp_path / "broken")


@pytest.mark.parametrize(("rule", "names", "change"), APPS)
def test_each_difference_of_the_app_is_one_finding(
    rule: str, names: str, change: Callable[[AppFacts], AppFacts], app_artefact: Path
) -> None:
    expect_one(rules(app_artefact, change(app_facts.table())), rule, names)
