"""Single faults of the weights, their quantization, the tokenizer and the folder, as in test_validate_faults.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app_bridge.app.facts import table
from app_bridge.validation.finite import is_finite
from tests.app_bridge import broken
from tests.app_bridge.broken import (
    Fault,
    expect_fault,
    gone,
    in_json,
    in_tensors,
    in_text,
    put,
    rules,
    several,
    without,
)

pytestmark = pytest.mark.slow

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
PACKAGE, WEIGHTS, PROJECTOR = "fastvithd.mlpackage", "model.safetensors", "multi_modal_projector.safetensors"
LAYER = "language_model.model.layers.1."
Q, NORM = f"{LAYER}self_attn.q_proj", f"{LAYER}input_layernorm.weight"


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return in_tensors(lambda tensors: tensors.__setitem__(name, np.ascontiguousarray(change(tensors[name]))))


def with_value(weight: np.ndarray, value: float) -> np.ndarray:
    weight.flat[weight.size // 2] = value
    return weight


def dropped(name: str, file: str = WEIGHTS) -> Callable[[Path], None]:
    return in_tensors(lambda tensors: tensors.pop(name), file)


def unprefixed(tensors: dict[str, np.ndarray]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("language_model.")] = tensors.pop(name)


def in_added(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    """Change the added tokens in both files, which then agree."""

    def broken_both(folder: Path) -> None:
        document = json.loads((folder / TOKENIZER).read_text())
        change(document["added_tokens"])
        broken.replace(folder / TOKENIZER, json.dumps(document).encode())
        settings = json.loads((folder / TOKENIZER_CONFIG).read_text())
        settings["added_tokens_decoder"] = {
            str(token["id"]): {"content": token["content"]} for token in document["added_tokens"]
        }
        broken.replace(folder / TOKENIZER_CONFIG, json.dumps(settings).encode())

    return broken_both


def lost(content: str) -> Callable[[list[dict[str, Any]]], object]:
    return lambda added: added.remove(next(token for token in added if token["content"] == content))


def swapped(added: list[dict[str, Any]]) -> None:
    """Two special tokens have each other's ids, as in another model's tokenizer."""
    added[2]["content"], added[3]["content"] = added[3]["content"], added[2]["content"]


def without_byte(document: dict[str, Any]) -> None:
    """A byte that no merge is made of; its id goes to something else."""
    document["model"]["vocab"]["ĀĀ"] = document["model"]["vocab"].pop("ÿ")


def begins(document: dict[str, Any]) -> None:
    document["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}})
    document["post_processor"]["special_tokens"] = {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [509], "tokens": ["<|endoftext|>"]}
    }


def copied(name: str, target: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        (folder / target).parent.mkdir(exist_ok=True)
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, folder / target)

    return copy


def without_layer(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if name.startswith(LAYER)]:
        del tensors[name]


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return in_tensors(lambda tensors: tensors.__setitem__(new, tensors.pop(old)))


def normalizers(*types: str) -> Callable[[Path], None]:
    return put(TOKENIZER, "normalizer", {"type": "Sequence", "normalizers": [{"type": one} for one in types]})


def without_blanks(document: dict[str, Any]) -> None:
    document["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"


def block(value: Any) -> Callable[[Path], None]:
    return put(CONFIG, "quantization", value)


FOUR: dict[str, Any] = {"group_size": 64, "bits": 4}
# (the one rule, what its finding names, what breaks a copy)
FAULTS: list[Fault] = [
    ("file-missing", "safetensors", several(gone(WEIGHTS), gone(PROJECTOR), broken.signed)),
    ("file-missing", PROJECTOR, gone(PROJECTOR)),
    ("weights-unreadable", WEIGHTS, in_text(WEIGHTS, lambda data: data[:-100])),
    ("weights-unreadable", WEIGHTS, in_text(WEIGHTS, lambda data: b"version https://git-lfs.github.com/spec/v1\n")),
    ("weight-missing", NORM, dropped(NORM)),
    ("weight-missing", f"{Q}.bias", dropped(f"{Q}.bias")),
    ("weight-missing", "linear_2", dropped("multi_modal_projector.linear_2.weight", PROJECTOR)),
    ("weight-unknown", "vision_tower.x", in_tensors(lambda t: t.__setitem__("vision_tower.x", t[NORM]))),
    ("layer-count", "num_hidden_layers", in_tensors(without_layer)),
    ("weight-shape", f"{Q}.weight", tensor(f"{Q}.weight", lambda w: w[:-1].astype(np.int32))),
    ("file-missing", PROJECTOR, several(gone(PROJECTOR), broken.signed)),
    (
        "weight-name",
        "language_model.norm.weight",
        renamed("language_model.model.norm.weight", "language_model.norm.weight"),
    ),
    ("weight-name", "model.safetensors: model.layers", in_tensors(unprefixed)),
    ("weight-unknown", "o_proj.bias", in_tensors(lambda t: t.__setitem__(f"{LAYER}self_attn.o_proj.bias", t[NORM]))),
    ("weight-shape", f"{Q}.weight", tensor(f"{Q}.weight", lambda w: w[:-1])),
    ("weight-shape", "up_proj", tensor(f"{LAYER}mlp.up_proj.weight", lambda w: w.T)),
    ("weight-rank", NORM, tensor(NORM, lambda w: w[None])),
    ("weight-dtype", NORM, tensor(NORM, lambda w: w.astype(np.int32))),
    ("weight-value", NORM, tensor(NORM, lambda w: with_value(w, np.nan))),
    ("weight-value", f"{Q}.weight", tensor(f"{Q}.weight", lambda w: with_value(w, -np.inf))),
    ("weight-twice", "old.safetensors", copied(WEIGHTS, "old.safetensors")),
    ("file-changed", WEIGHTS, in_text(WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1]))),
    ("file-missing", TOKENIZER, gone(TOKENIZER)),
    ("file-missing", TOKENIZER_CONFIG, gone(TOKENIZER_CONFIG)),
    ("not-json", TOKENIZER, in_text(TOKENIZER, lambda text: text[:-100])),
    ("tokenizer-stale", TOKENIZER, in_json(TOKENIZER, lambda document: swapped(document["added_tokens"]))),
    ("tokenizer-stale", TOKENIZER, in_added(swapped)),
    ("tokenizer-stale", TOKENIZER, in_json(TOKENIZER, lambda document: document["model"]["merges"].reverse())),
    ("tokenizer-class", "tokenizer_class", put(TOKENIZER_CONFIG, "tokenizer_class", "T5Tokenizer")),
    ("tokenizer-class", "tokenizer_class", without(TOKENIZER_CONFIG, "tokenizer_class")),
    ("tokenizer-model", TOKENIZER, put(TOKENIZER, "model", {"type": "WordLevel", "vocab": {}, "unk_token": "?"})),
    ("tokenizer-unreadable", TOKENIZER, in_json(TOKENIZER, lambda read: read["model"]["merges"].append("x y z"))),
    ("tokenizer-component", "pre_tokenizer", put(TOKENIZER, "pre_tokenizer", {"type": "UnicodeScripts"})),
    ("tokenizer-component", "normalizer", normalizers("Nmt")),
    ("tokenizer-text", TOKENIZER, put(TOKENIZER, "decoder", {"type": "Fuse"})),
    ("tokenizer-text", TOKENIZER, normalizers("NFC", "Lowercase")),
    ("tokenizer-text", TOKENIZER, in_json(TOKENIZER, without_blanks)),
    ("tokenizer-bytes", TOKENIZER, in_json(TOKENIZER, without_byte)),
    ("tokenizer-adds-tokens", "post_processor", in_json(TOKENIZER, begins)),
    ("image-token", TOKENIZER, in_added(lost("<image>"))),
    ("image-token-index", "image_token_index", put(CONFIG, "image_token_index", -200)),
    ("turn-token", TOKENIZER, in_added(lost("<|im_start|>"))),
    ("eos-token", "eos_token", put(TOKENIZER_CONFIG, "eos_token", "<|endoftext|>")),
    ("vocabulary-size", TOKENIZER, in_json(TOKENIZER, lambda read: read["model"]["vocab"].update({"ĀĀ": 700}))),
    ("name-twice", "previous/config.json", several(copied(CONFIG, "previous/config.json"), broken.signed)),
    ("name-twice", f"old/{PACKAGE}", several(copied(PACKAGE, f"old/{PACKAGE}"), broken.signed)),
    ("file-changed", "processor_config.json", put("processor_config.json", "patch_size", 32)),
    ("licence-missing", "LICENSE", gone("LICENSE")),
    ("artefact-partial", "export.json", lambda folder: broken.signed(folder, parts=["llm"])),
    ("artefact-layout", "export.json", lambda folder: broken.signed(folder, parts=["llm"], llm={"layout": "mlx-vlm"})),
]
# Of an int4 artefact.
QUANTIZED: list[Fault] = [
    ("quantized-triple", Q, dropped(f"{Q}.scales")),
    ("quantized-triple", Q, dropped(f"{Q}.biases")),
    ("quantized-triple", Q, dropped(f"{Q}.weight")),
    ("weight-shape", f"{Q}.scales", tensor(f"{Q}.scales", lambda s: s[:-1])),
    ("weight-dtype", f"{Q}.scales", tensor(f"{Q}.scales", lambda s: s.astype(np.uint8))),
    ("weight-dtype", f"{Q}.weight", tensor(f"{Q}.weight", lambda w: w.view(np.int32))),
    ("weight-unknown", "scales", in_tensors(lambda t: t.__setitem__(f"{LAYER}input_layernorm.scales", t[NORM]))),
    ("quantization-missing", "quantization", without(CONFIG, "quantization")),
    ("quantization-block", "quantization", put(CONFIG, "quantization", [64, 4])),
    ("quantization-block", "bits", block({"group_size": 64})),
    ("quantization-block", "bits", block({"group_size": 64, "bits": "4"})),
    ("quantization-mismatch", "quantization", block({"group_size": 64, "bits": 8})),
    ("quantization-mismatch", "quantization", block({"group_size": 32, "bits": 4})),
    ("quantization-unsupported", "quantization", block(FOUR | {"mode": "mxfp4"})),
    ("quantization-unsupported", "quantization", block({"group_size": 64, "bits": 5})),
    ("quantization-unsupported", "quantization", block({"group_size": 16, "bits": 4})),
    ("quantization-unsupported", "quantization", block(FOUR | {Q: {"group_size": 64, "bits": 8}})),
    ("quantization-entry", "no.module", block(FOUR | {"no.module": FOUR})),
    ("quantization-entry", Q, block(FOUR | {Q: False})),
]


@pytest.fixture(scope="module")
def int4_artefact(app_artefact: Path, app_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken.with_recipe("int4", app_artefact, app_checkpoint, tmp_path_factory.mktemp("int4") / "artefact")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_each_fault_is_one_finding(fault: Fault, app_artefact: Path, tmp_path: Path) -> None:
    expect_fault(fault, app_artefact, tmp_path / "broken")


@pytest.mark.parametrize("fault", QUANTIZED, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_each_fault_of_a_quantized_artefact_is_one_finding(fault: Fault, int4_artefact: Path, tmp_path: Path) -> None:
    expect_fault(fault, int4_artefact, tmp_path / "broken")


def test_the_unbroken_quantized_artefact_has_none(int4_artefact: Path) -> None:
    assert rules(int4_artefact, table()) == []


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        ("float16", ("F16", "fp16")),
        ("bfloat16", ("BF16", "bf16")),
        ("float32", ("F32", "fp32")),
        ("float64", ("F64", "fp64")),
        ("float8_e5m2", ("F8_E5M2", "fp8e5m2")),
        ("float8_e4m3fn", ("F8_E4M3", "fp8e4m3fn")),
    ],
)
def test_values_of_every_type_are_looked_at(dtype: str, names: tuple[str, ...]) -> None:
    """Against PyTorch's own numbers: the largest ones are finite."""
    largest = torch.finfo(getattr(torch, dtype)).max
    for value in (0.0, -largest, largest, float("nan"), float("inf"), -float("inf")):
        values = torch.zeros(3, 2).double()
        values[1, 1] = value
        stored = values.to(getattr(torch, dtype))
        finite = bool(torch.isfinite(stored.double()).all())
        raw = stored.reshape(-1).view(torch.uint8).numpy()
        assert [is_finite(raw, name) for name in names] == [finite] * 2, value
    assert is_finite(raw[:0], names[0]) and is_finite(raw, "I32")
