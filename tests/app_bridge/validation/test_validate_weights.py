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
        shutil.copy(folder / name, folder / target)

    return copy


# name: (what breaks a copy, the one rule, what its finding names)
FAULTS: dict[str, Fault] = {
    # weights
    "no weights": (several(gone(WEIGHTS), gone(PROJECTOR), broken.signed), "file-missing", "safetensors"),
    "projector's file missing": (gone(PROJECTOR), "file-missing", PROJECTOR),
    "weights truncated": (in_text(WEIGHTS, lambda data: data[:-100]), "weights-unreadable", WEIGHTS),
    "weights a pointer": (
        in_text(WEIGHTS, lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
        "weights-unreadable",
        WEIGHTS,
    ),
    "weight missing": (dropped(NORM), "weight-missing", NORM),
    "bias missing": (dropped(f"{Q}.bias"), "weight-missing", f"{Q}.bias"),
    "projector's weight missing": (
        dropped("multi_modal_projector.linear_2.weight", PROJECTOR),
        "weight-missing",
        "linear_2",
    ),
    "weight too many": (
        in_tensors(lambda t: t.__setitem__("vision_tower.x", t[NORM])),
        "weight-unknown",
        "vision_tower.x",
    ),
    "a layer missing": (
        in_tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith(LAYER)]),
        "layer-count",
        "num_hidden_layers",
    ),
    "weight of another shape and type": (
        tensor(f"{Q}.weight", lambda w: w[:-1].astype(np.int32)),
        "weight-shape",
        f"{Q}.weight",
    ),
    "a file that only the manifest knows of": (several(gone(PROJECTOR), broken.signed), "file-missing", PROJECTOR),
    "weight renamed": (
        in_tensors(lambda t: t.__setitem__("language_model.norm.weight", t.pop("language_model.model.norm.weight"))),
        "weight-name",
        "language_model.norm.weight",
    ),
    "LLaVA's names": (in_tensors(unprefixed), "weight-name", "model.safetensors: model.layers"),
    "bias that the app has not": (
        in_tensors(lambda t: t.__setitem__(f"{LAYER}self_attn.o_proj.bias", t[NORM])),
        "weight-unknown",
        "o_proj.bias",
    ),
    "weight of another shape": (tensor(f"{Q}.weight", lambda w: w[:-1]), "weight-shape", f"{Q}.weight"),
    "weight transposed": (tensor(f"{LAYER}mlp.up_proj.weight", lambda w: w.T), "weight-shape", "up_proj"),
    "weight of another rank": (tensor(NORM, lambda w: w[None]), "weight-rank", NORM),
    "weight of another type": (tensor(NORM, lambda w: w.astype(np.int32)), "weight-dtype", NORM),
    "one NaN": (tensor(NORM, lambda w: with_value(w, np.nan)), "weight-value", NORM),
    "one infinite value": (tensor(f"{Q}.weight", lambda w: with_value(w, -np.inf)), "weight-value", f"{Q}.weight"),
    "two models": (copied(WEIGHTS, "old.safetensors"), "weight-twice", "old.safetensors"),
    "a bit flipped": (in_text(WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1])), "file-changed", WEIGHTS),
    # tokenizer
    "tokenizer missing": (gone(TOKENIZER), "file-missing", TOKENIZER),
    "tokenizer's settings missing": (gone(TOKENIZER_CONFIG), "file-missing", TOKENIZER_CONFIG),
    "tokenizer truncated": (in_text(TOKENIZER, lambda text: text[:-100]), "not-json", TOKENIZER),
    "tokenizer of another model": (
        in_json(TOKENIZER, lambda document: swapped(document["added_tokens"])),
        "tokenizer-stale",
        TOKENIZER,
    ),
    "both tokenizer files of another": (in_added(swapped), "tokenizer-stale", TOKENIZER),
    "other merges": (
        in_json(TOKENIZER, lambda document: document["model"]["merges"].reverse()),
        "tokenizer-stale",
        TOKENIZER,
    ),
    "tokenizer class": (put(TOKENIZER_CONFIG, "tokenizer_class", "T5Tokenizer"), "tokenizer-class", "tokenizer_class"),
    "tokenizer class missing": (without(TOKENIZER_CONFIG, "tokenizer_class"), "tokenizer-class", "tokenizer_class"),
    "tokenizer's model": (
        put(TOKENIZER, "model", {"type": "WordLevel", "vocab": {}, "unk_token": "?"}),
        "tokenizer-model",
        TOKENIZER,
    ),
    "no document of the library": (
        in_json(TOKENIZER, lambda document: document["model"]["merges"].append("x y z")),
        "tokenizer-unreadable",
        TOKENIZER,
    ),
    "unknown step": (
        put(TOKENIZER, "pre_tokenizer", {"type": "UnicodeScripts"}),
        "tokenizer-component",
        "pre_tokenizer",
    ),
    "unknown normalizer": (
        put(TOKENIZER, "normalizer", {"type": "Sequence", "normalizers": [{"type": "Nmt"}]}),
        "tokenizer-component",
        "normalizer",
    ),
    "another decoder": (put(TOKENIZER, "decoder", {"type": "Fuse"}), "tokenizer-text", TOKENIZER),
    "small letters only": (
        put(TOKENIZER, "normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
        "tokenizer-text",
        TOKENIZER,
    ),
    "no blanks": (
        in_json(TOKENIZER, lambda document: document["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")),
        "tokenizer-text",
        TOKENIZER,
    ),
    "byte without a token": (in_json(TOKENIZER, without_byte), "tokenizer-bytes", TOKENIZER),
    "tokens around the prompt": (in_json(TOKENIZER, begins), "tokenizer-adds-tokens", "post_processor"),
    "image token lost": (in_added(lost("<image>")), "image-token", TOKENIZER),
    "image token of another id": (put(CONFIG, "image_token_index", -200), "image-token-index", "image_token_index"),
    "mark of a turn lost": (in_added(lost("<|im_start|>")), "turn-token", TOKENIZER),
    "another end": (put(TOKENIZER_CONFIG, "eos_token", "<|endoftext|>"), "eos-token", "eos_token"),
    "id past the table": (
        in_json(TOKENIZER, lambda document: document["model"]["vocab"].__setitem__("ĀĀ", 700)),
        "vocabulary-size",
        TOKENIZER,
    ),
    # the folder
    "previous model inside": (
        several(copied(CONFIG, "previous/config.json"), broken.signed),
        "name-twice",
        "previous/config.json",
    ),
    "second package of the name": (
        several(lambda folder: shutil.copytree(folder / PACKAGE, folder / "old" / PACKAGE), broken.signed),
        "name-twice",
        f"old/{PACKAGE}",
    ),
    "file that the app doesn't read": (
        put("processor_config.json", "patch_size", 32),
        "file-changed",
        "processor_config.json",
    ),
    "licence gone": (gone("LICENSE"), "licence-missing", "LICENSE"),
    "half a model": (lambda folder: broken.signed(folder, parts=["llm"]), "artefact-partial", "export.json"),
    "another layout": (
        lambda folder: broken.signed(folder, parts=["llm"], llm={"layout": "mlx-vlm"}),
        "artefact-layout",
        "export.json",
    ),
}

# Of an int4 artefact.
QUANTIZED: dict[str, Fault] = {
    "scales missing": (dropped(f"{Q}.scales"), "quantized-triple", Q),
    "biases missing": (dropped(f"{Q}.biases"), "quantized-triple", Q),
    "packed weight missing": (dropped(f"{Q}.weight"), "quantized-triple", Q),
    "scales of another shape": (tensor(f"{Q}.scales", lambda s: s[:-1]), "weight-shape", f"{Q}.scales"),
    "scales of another type": (tensor(f"{Q}.scales", lambda s: s.astype(np.uint8)), "weight-dtype", f"{Q}.scales"),
    "packed weight of another type": (tensor(f"{Q}.weight", lambda w: w.view(np.int32)), "weight-dtype", f"{Q}.weight"),
    "norm quantized": (
        in_tensors(lambda t: t.__setitem__(f"{LAYER}input_layernorm.scales", t[NORM])),
        "weight-unknown",
        "scales",
    ),
    "block missing": (without(CONFIG, "quantization"), "quantization-missing", "quantization"),
    "block a list": (put(CONFIG, "quantization", [64, 4]), "quantization-block", "quantization"),
    "block without bits": (put(CONFIG, "quantization", {"group_size": 64}), "quantization-block", "bits"),
    "bits as text": (put(CONFIG, "quantization", {"group_size": 64, "bits": "4"}), "quantization-block", "bits"),
    "other bits": (put(CONFIG, "quantization", {"group_size": 64, "bits": 8}), "quantization-mismatch", "quantization"),
    "other groups": (
        put(CONFIG, "quantization", {"group_size": 32, "bits": 4}),
        "quantization-mismatch",
        "quantization",
    ),
    "unsupported mode": (
        put(CONFIG, "quantization", {"group_size": 64, "bits": 4, "mode": "mxfp4"}),
        "quantization-unsupported",
        "quantization",
    ),
    "unsupported bits": (
        put(CONFIG, "quantization", {"group_size": 64, "bits": 5}),
        "quantization-unsupported",
        "quantization",
    ),
    "unsupported groups": (
        put(CONFIG, "quantization", {"group_size": 16, "bits": 4}),
        "quantization-unsupported",
        "quantization",
    ),
    "one module apart": (
        put(CONFIG, "quantization", {"group_size": 64, "bits": 4, Q: {"group_size": 64, "bits": 8}}),
        "quantization-unsupported",
        "quantization",
    ),
    "entry for no module": (
        put(CONFIG, "quantization", {"group_size": 64, "bits": 4, "no.module": {"group_size": 64, "bits": 4}}),
        "quantization-entry",
        "no.module",
    ),
    "module said not to be quantized": (
        put(CONFIG, "quantization", {"group_size": 64, "bits": 4, Q: False}),
        "quantization-entry",
        Q,
    ),
}


@pytest.fixture(scope="module")
def int4_artefact(app_artefact: Path, app_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken.with_recipe("int4", app_artefact, app_checkpoint, tmp_path_factory.mktemp("int4") / "artefact")


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_finding(name: str, app_artefact: Path, tmp_path: Path) -> None:
    expect_fault(FAULTS[name], app_artefact, tmp_path / "broken")


@pytest.mark.parametrize("name", QUANTIZED)
def test_each_fault_of_a_quantized_artefact_is_one_finding(name: str, int4_artefact: Path, tmp_path: Path) -> None:
    expect_fault(QUANTIZED[name], int4_artefact, tmp_path / "broken")


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
