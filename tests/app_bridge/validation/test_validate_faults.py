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


def shape(feature: Any, *sizes: int) -> None:
    feature.type.multiArrayType.shape[:] = sizes


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


def last(specification: Any) -> Any:
    function = specification.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations[-1]


def an_image(specification: Any) -> None:
    image = specification.description.input[0].type.imageType
    image.width = image.height = 1024


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


# name: (what breaks a copy, the one rule, what its finding names)
FAULTS: dict[str, Fault] = {
    # config.json
    "config missing": (gone(CONFIG), "file-missing", CONFIG),
    "config a folder": (a_folder, "file-unreadable", CONFIG),
    "config truncated": (in_text(CONFIG, lambda text: text[:200]), "not-json", CONFIG),
    "config in Latin-1": (in_text(CONFIG, lambda text: text.replace(b"silu", b"sil\xfc")), "not-json", CONFIG),
    "config with NaN": (in_text(CONFIG, lambda text: text.replace(b"1e-06", b"NaN")), "not-json", CONFIG),
    "config a list": (in_text(CONFIG, lambda text: b"[" + text + b"]"), "not-json", CONFIG),
    "key twice": (
        in_text(CONFIG, lambda text: text.replace(b"{", b'{"vocab_size": 576,', 1)),
        "duplicate-key",
        "vocab_size",
    ),
    "key missing": (without(CONFIG, "hidden_size"), "key-missing", "hidden_size"),
    "key null": (put(CONFIG, "vocab_size", None), "key-type", "vocab_size"),
    "text for a number": (put(CONFIG, "hidden_size", "64"), "key-type", "hidden_size"),
    "half a number": (put(CONFIG, "intermediate_size", 128.5), "key-type", "intermediate_size"),
    "true for a number": (put(CONFIG, "image_token_index", True), "key-type", "image_token_index"),
    "number past Int": (put(CONFIG, "image_token_index", 2**63), "key-type", "image_token_index"),
    "number for a Bool": (put(CONFIG, "tie_word_embeddings", 1), "key-type", "tie_word_embeddings"),
    "nothing for a Bool": (put(CONFIG, "tie_word_embeddings", []), "key-type", "tie_word_embeddings"),
    "number past Float": (put(CONFIG, "rope_theta", 1e39), "key-type", "rope_theta"),
    "rope scaling without sections": (put(CONFIG, "rope_scaling", {"type": "linear"}), "key-missing", "mrope_section"),
    "rope scaling with halves": (put(CONFIG, "rope_scaling", {"mrope_section": [2.5]}), "key-type", "mrope_section"),
    "rope scaling with null": (
        put(CONFIG, "rope_scaling", {"mrope_section": [2], "type": None}),
        "key-type",
        "rope_scaling",
    ),
    "rope scaling that the app leaves out": (
        put(CONFIG, "rope_scaling", {"mrope_section": [2], "type": "linear", "factor": 2.0}),
        "config-value",
        "rope_scaling",
    ),
    "rope scaling of transformers' name": (
        put(CONFIG, "rope_scaling", {"mrope_section": [2], "rope_type": "yarn"}),
        "config-value",
        "rope_type",
    ),
    "rope scaling a list": (put(CONFIG, "rope_scaling", [1]), "key-type", "rope_scaling"),
    "model type": (put(CONFIG, "model_type", "qwen2_vl"), "model-type", "model_type"),
    "model type missing": (without(CONFIG, "model_type"), "key-missing", "model_type"),
    "no layers": (put(CONFIG, "num_hidden_layers", 0), "config-value", "num_hidden_layers"),
    "config a pipe": (a_pipe, "file-unreadable", CONFIG),
    "no vocabulary": (put(CONFIG, "vocab_size", 0), "config-value", "vocab_size"),
    "another activation": (put(CONFIG, "hidden_act", "gelu"), "config-value", "hidden_act"),
    "another prompt": (put(CONFIG, "mm_use_im_start_end", True), "config-value", "mm_use_im_start_end"),
    "larger vocabulary": (put(CONFIG, "vocab_size", 600), "weight-shape", "embed_tokens"),
    "more heads": (put(CONFIG, "num_key_value_heads", 4), "weight-shape", "k_proj"),
    "another layer": (put(CONFIG, "num_hidden_layers", 3), "layer-count", "num_hidden_layers"),
    "endless layers": (put(CONFIG, "num_hidden_layers", 10**15), "layer-count", "num_hidden_layers"),
    "features": (put(CONFIG, "mm_hidden_size", 768), "encoder-width", "mm_hidden_size"),
    "head said to be there": (put(CONFIG, "tie_word_embeddings", False), "tied-embeddings", "tie_word_embeddings"),
    "head not spoken of": (
        several(without(CONFIG, "tie_word_embeddings"), in_tensors(with_head)),
        "tied-embeddings",
        "tie_word_embeddings",
    ),
    "another number that only the manifest knows": (put(CONFIG, "rope_theta", 10000.0), "file-changed", CONFIG),
    # preprocessor_config.json
    "processor class": (put(PREPROCESSOR, "processor_class", "FastVlmProcessor"), "processor-class", "processor_class"),
    "processor class missing": (without(PREPROCESSOR, "processor_class"), "key-missing", "processor_class"),
    "crop missing": (without(PREPROCESSOR, "crop_size"), "key-missing", "crop_size"),
    "crop a number": (put(PREPROCESSOR, "crop_size", 1024), "key-type", "crop_size"),
    "crop as text": (put(PREPROCESSOR, "crop_size", {"height": 1024, "width": "1024"}), "key-type", "crop_size.width"),
    "crop too small": (put(PREPROCESSOR, "crop_size", {"height": 512, "width": 512}), "crop-size", "crop_size"),
    "crop not square": (put(PREPROCESSOR, "crop_size", {"height": 1024, "width": 512}), "crop-size", "crop_size"),
    "edge too short": (put(PREPROCESSOR, "size", {"shortest_edge": 512}), "shortest-edge", "shortest_edge"),
    "two colours": (put(PREPROCESSOR, "image_mean", [0.0, 0.0]), "list-length", "image_mean"),
    "text for a colour": (put(PREPROCESSOR, "image_std", [1, 1, "1"]), "key-type", "image_std"),
    "CLIP's mean": (put(PREPROCESSOR, "image_mean", [0.48, 0.46, 0.41]), "normalisation", "image_mean"),
    "no deviation": (put(PREPROCESSOR, "image_std", [1, 0, 1]), "normalisation", "image_std"),
    # the package
    "package missing": (gone(PACKAGE), "file-missing", PACKAGE),
    "package renamed": (
        lambda folder: (folder / PACKAGE).rename(folder / "encoder.mlpackage"),
        "package-name",
        "encoder.mlpackage",
    ),
    "specification truncated": (
        in_text(f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel", lambda data: data[:-1000]),
        "package-unreadable",
        PACKAGE,
    ),
    "package's manifest gone": (gone(f"{PACKAGE}/Manifest.json"), "package-unreadable", PACKAGE),
    "a neural network": (in_package(lambda spec: spec.neuralNetwork.SetInParent()), "package-unreadable", PACKAGE),
    "weights of the package truncated": (
        in_text(f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin", lambda data: data[:-4096]),
        "package-weights",
        PACKAGE,
    ),
    "weights of the package gone": (gone(f"{PACKAGE}/Data/com.apple.CoreML/weights"), "package-weights", PACKAGE),
    "a NaN in the package": (
        in_text(f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin", nan_in),
        "weight-value",
        PACKAGE,
    ),
    "a function that is only described": (in_package(described_only), "package-unreadable", "encode_256"),
    "input renamed": (
        in_package(lambda spec: setattr(spec.description.input[0], "name", "image")),
        "input-name",
        "input",
    ),
    "output renamed": (
        in_package(lambda spec: setattr(spec.description.output[0], "name", "features")),
        "output-name",
        "output",
    ),
    "input of three dimensions": (
        in_package(lambda spec: shape(spec.description.input[0], 3, 1024, 1024)),
        "input-rank",
        "images",
    ),
    "input not square": (
        in_package(lambda spec: shape(spec.description.input[0], 1, 3, 1024, 512)),
        "input-shape",
        "images",
    ),
    "input of one colour": (
        in_package(lambda spec: shape(spec.description.input[0], 1, 1, 1024, 1024)),
        "input-shape",
        "images",
    ),
    "input of any size": (in_package(flexible), "input-shape", "images"),
    "smaller input": (
        in_package(lambda spec: shape(spec.description.input[0], 1, 3, 512, 512)),
        "encoder-tokens",
        "image_features",
    ),
    "float16 input": (
        in_package(lambda spec: setattr(spec.description.input[0].type.multiArrayType, "dataType", 65552)),
        "input-dtype",
        "images",
    ),
    "a picture as input": (in_package(an_image), "input-kind", "images"),
    "second input": (in_package(second_input), "input-extra", "inputs"),
    "float16 output": (
        in_package(lambda spec: setattr(spec.description.output[0].type.multiArrayType, "dataType", 65552)),
        "output-dtype",
        "image_features",
    ),
    "output without a batch": (
        in_package(lambda spec: shape(spec.description.output[0], 256, 3072)),
        "output-rank",
        "image_features",
    ),
    "output of fewer channels": (
        in_package(lambda spec: shape(spec.description.output[0], 1, 256, 768)),
        "output-shape",
        "image_features",
    ),
    "another default function": (in_package(other_default), "default-function", PACKAGE),
    "too new a system": (
        in_package(lambda spec: setattr(spec, "specificationVersion", 10)),
        "deployment-target",
        PACKAGE,
    ),
    "too old a specification": (
        in_package(lambda spec: setattr(spec, "specificationVersion", 6)),
        "specification-version",
        PACKAGE,
    ),
    "a program of another input": (
        in_package(lambda spec: size_of(spec.mlProgram.functions["main"].inputs[0].type, 2, 512)),
        "package-description",
        "images",
    ),
    "a program of another output": (
        in_package(lambda spec: size_of(last(spec).outputs[0].type, 1, 64)),
        "package-description",
        "image_features",
    ),
    "an unknown system": (
        in_package(lambda spec: setattr(spec, "specificationVersion", 99)),
        "deployment-target",
        PACKAGE,
    ),
}


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


# Another app: name: (its facts, the one rule, what its finding names)
APPS: dict[str, tuple[Callable[[AppFacts], AppFacts], str, str]] = {
    "class": (changed(model_class="FastViTHD"), "package-name", PACKAGE),
    "input's name": (changed(input_name="pixels"), "input-name", PACKAGE),
    "input's type": (changed(input_dtype="float16"), "input-dtype", "images"),
    "input's shape": (changed(input_shape=(1, 3, 512, 512)), "input-shape", "images"),
    "output's name": (changed(output_name="features"), "output-name", PACKAGE),
    "output's shape": (changed(output_shape=(1, 64, 3072)), "output-shape", "image_features"),
    "output's type": (changed(output_dtype="float16"), "output-dtype", "image_features"),
    "model type": (changed(model_type="fast_vlm"), "model-type", "model_type"),
    "processor": (changed(processor_class="FastVLMProcessor"), "processor-class", "processor_class"),
    "a key more": (one_more_key, "key-missing", "sliding_window"),
    "no default for what the app ends without": (without_default, "key-missing", "rope_scaling.mrope_section"),
    "a default without it": (another_section, "key-missing", "rope_scaling.sections"),
    "a bias more": (with_bias, "weight-missing", "o_proj.bias"),
    "patches": (changed(patch_size=32), "prompt-tokens", "prompt"),
    "additional tokens": (changed(additional_image_tokens=1), "prompt-tokens", "prompt"),
    "image token": (changed(image_token="<|image_pad|>"), "image-token", TOKENIZER),
    "marks": (changed(turn="<|turn|>{role}\n{content}<|im_end|>"), "turn-token", TOKENIZER),
    "end of a turn": (changed(turn="<|im_start|>{role}\n{content}<|endoftext|>"), "eos-token", "eos_token"),
    "another file to find the model by": (changed(bundle_resource="model.json"), "file-missing", "model.json"),
    "package known to break": (pinned(mlx_swift_examples="2.25.7"), "package-known-to-break", "mlx-swift-examples"),
    "package gone": (
        lambda facts: replace(facts, packages=facts.packages[:2]),
        "package-missing",
        "swift-transformers",
    ),
    "older iPhones": (changed(deployment={"iOS": "16.4"}), "deployment-target", PACKAGE),
    "older Macs": (changed(deployment={"iOS": "18.2", "macOS": "13.0"}), "deployment-target", PACKAGE),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_finding(name: str, app_artefact: Path, tmp_path: Path) -> None:
    expect_fault(FAULTS[name], app_artefact, tmp_path / "broken")


@pytest.mark.parametrize("name", APPS)
def test_each_difference_of_the_app_is_one_finding(name: str, app_artefact: Path) -> None:
    change, rule, names = APPS[name]
    expect_one(rules(app_artefact, change(app_facts.table())), rule, names)
