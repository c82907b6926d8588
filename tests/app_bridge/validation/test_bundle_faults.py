"""Single faults of a Core AI bundle: each is found by its own rule at its own place, none is reported as another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coreai", reason="Core AI's packages: make setup EXTRAS=coreai")

from app_bridge.app import facts
from app_bridge.validation.validate import validate
from fastvlm.common.errors import UserError
from model_export.coreai import packages
from tests.app_bridge import broken
from tests.app_bridge.broken import gone, in_json, in_text, put, several, without
from tests.app_bridge.validation.remembering import errors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_once")]

METADATA, TOKENIZER, SETTINGS = "metadata.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
DECODER, EMBED, VISION = "fastvlm.aimodel", "embed.aimodel", "vision.aimodel"
Break = Callable[[Path], object]


def language(**values: Any) -> Break:
    return in_json(METADATA, lambda document: document["language"].update(values))


def vision(**values: Any) -> Break:
    return in_json(METADATA, lambda document: document["vision"].update(values))


def no_vision(key: str) -> Break:
    return in_json(METADATA, lambda document: document["vision"].pop(key))


def assets(**values: Any) -> Break:
    return in_json(METADATA, lambda document: document["assets"].update(values))


def template(*changes: tuple[str, str]) -> Break:
    """Replace texts of the chat template."""

    def in_settings(document: dict[str, Any]) -> None:
        for old, new in changes:
            assert old in document["chat_template"]
            document["chat_template"] = document["chat_template"].replace(old, new)

    return in_json(SETTINGS, in_settings)


def outside(folder: Path) -> None:
    (folder / "vision.aimodel").rename(folder.parent / "elsewhere.aimodel")
    (folder / "vision.aimodel").symlink_to(folder.parent / "elsewhere.aimodel")


def renamed_token(old: str, new: str) -> Break:
    return several(
        *(in_text(name, lambda raw: raw.replace(old.encode(), new.encode())) for name in (TOKENIZER, SETTINGS))
    )


def ordinary(text: str) -> Break:
    """An added token becomes one of the vocabulary, with the same id."""

    def in_tokenizer(document: dict[str, Any]) -> None:
        (token,) = (one for one in document["added_tokens"] if one["content"] == text)
        document["added_tokens"].remove(token)
        document["model"]["vocab"][text] = token["id"]

    def in_settings(document: dict[str, Any]) -> None:
        kept = document["added_tokens_decoder"]
        document["added_tokens_decoder"] = {key: one for key, one in kept.items() if one["content"] != text}

    return several(in_json(TOKENIZER, in_tokenizer), in_json(SETTINGS, in_settings))


def other_name(document: dict[str, Any]) -> None:
    document["added_tokens_decoder"]["434"]["content"] = "<picture>"


def beyond(document: dict[str, Any]) -> None:
    document["added_tokens"].append(document["added_tokens"][-1] | {"id": 448, "content": "<more>"})


CTC = {"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": True}
# Rule, what its finding names, what breaks a copy: a fault of the export, which signs it.
FAULTS: dict[str, tuple[str, str, Break]] = {
    "no metadata.json": ("file-missing", METADATA, gone(METADATA)),
    "metadata.json no JSON": ("not-json", METADATA, in_text(METADATA, lambda raw: raw[:-9])),
    "kind": ("kind", "kind", put(METADATA, "kind", "llm")),
    "version": ("metadata-version", "metadata_version", put(METADATA, "metadata_version", "0.1")),
    "no version": ("key-missing", "metadata_version", without(METADATA, "metadata_version")),
    "no name": ("key-missing", "name", without(METADATA, "name")),
    "no language": ("key-missing", "language", without(METADATA, "language")),
    "no vision asset": ("key-missing", "assets.vision", in_json(METADATA, lambda d: d["assets"].pop("vision"))),
    "user_data": ("key-type", "user_data", put(METADATA, "user_data", {"n": 1})),
    "size as text": ("key-type", "vision.image_size", vision(image_size="256")),
    "token id beyond": ("key-type", "vision.image_token_id", vision(image_token_id=2**31)),
    "map": ("key-type", "language.function_map", language(function_map={"main": "main"})),
    "mean short": ("list-length", "vision.image_mean", vision(image_mean=[0.0, 0.0])),
    "mean absent": ("image-default", "vision.image_mean", no_vision("image_mean")),
    "std absent": ("image-default", "vision.image_std", no_vision("image_std")),
    "strategy absent": ("image-default", "vision.image_strategy", no_vision("image_strategy")),
    "strategy": ("strategy-unknown", "vision.image_strategy", vision(image_strategy="crop")),
    "std zero": ("normalisation", "vision.image_std", vision(image_std=[1, 0, 1])),
    "1/255": ("rescale-factor", "vision.rescale_factor", vision(rescale_factor=1 / 255)),
    "picture": ("image-size", "input images", vision(image_size=512)),
    "picture's tokens": ("image-token-count", "image_embeddings", vision(image_token_count=17)),
    "vocabulary": ("vocab-size", "logits", language(vocab_size=449)),
    "context beyond the cache": ("cache-context", "k_cache", language(max_context_length=4096)),
    "context none": ("config-value", "language.max_context_length", language(max_context_length=0)),
    "hub's tokenizer": ("tokenizer-embedded", "embedded_tokenizer", language(embedded_tokenizer=False)),
    "another function": ("function-missing", DECODER, language(function_map={"main": ["extend"]})),
    "asset above": ("asset-outside", "assets'../x.aimodel'", assets(vision="../x.aimodel")),
    "asset absolute": ("asset-outside", "/tmp", assets(vision="/tmp/x.aimodel")),
    "asset is the bundle": ("asset-outside", "''", assets(vision="")),
    "asset gone": ("file-missing", EMBED, gone(EMBED)),
    "program gone": ("file-missing", f"{EMBED}/main.mlirb", gone(f"{EMBED}/main.mlirb")),
    "hash gone": ("file-missing", f"{EMBED}/main.hash", gone(f"{EMBED}/main.hash")),
    "hash": ("asset-hash", EMBED, in_text(f"{EMBED}/main.hash", lambda raw: raw[::-1])),
    "hash as text": ("asset-hash", EMBED, in_text(f"{EMBED}/main.hash", lambda raw: raw.hex().encode())),
    "asset's metadata gone": ("file-missing", f"{EMBED}/{METADATA}", gone(f"{EMBED}/{METADATA}")),
    "asset's metadata": ("not-json", f"{EMBED}/{METADATA}", in_text(f"{EMBED}/{METADATA}", lambda raw: raw[1:])),
    "asset's version": ("asset-version", EMBED, put(f"{EMBED}/{METADATA}", "assetVersion", "3.0")),
    "no tokenizer.json": ("file-missing", TOKENIZER, gone(TOKENIZER)),
    "no settings": ("file-missing", SETTINGS, gone(SETTINGS)),
    "tokenizer's class": ("tokenizer-class", SETTINGS, put(SETTINGS, "tokenizer_class", "MyTokenizer")),
    "tokenizer's model": ("tokenizer-model", TOKENIZER, in_json(TOKENIZER, lambda d: d["model"].pop("merges"))),
    "tokenizer's component": ("tokenizer-component", TOKENIZER, put(TOKENIZER, "decoder", CTC)),
    "two tokenizers": ("tokenizer-stale", "<picture>", in_json(SETTINGS, other_name)),
    "text": ("tokenizer-text", TOKENIZER, put(TOKENIZER, "normalizer", {"type": "Lowercase"})),
    "vocabulary's ids": ("vocabulary-size", "448", in_json(TOKENIZER, beyond)),
    "image token's id": ("image-token", "ordinary token", vision(image_token_id=65)),
    "image token none": ("image-token", "no token", vision(image_token_id=440)),
    "image token ordinary": ("image-token", "ordinary token '<image>'", ordinary("<image>")),
    "image token twice": ("image-token", "2 times", template(("content'] }}", "content'] * 2 }}"))),
    "image token lost": ("image-token", "0 times", template(("message['content'] is string", "false"))),
    "no template": ("chat-template", SETTINGS, without(SETTINGS, "chat_template")),
    "template broken": ("chat-template", SETTINGS, put(SETTINGS, "chat_template", "{% for %}")),
    "template endless": ("chat-template", SETTINGS, put(SETTINGS, "chat_template", "{{ range(10**12) | list }}")),
    "system line": ("system-line", SETTINGS, template(("{% if loop.first", "{% if false and loop.first"))),
    "another system line": ("system-line", SETTINGS, template(("helpful", "kind"))),
    "prompt": ("prompt", SETTINGS, template(("<|im_start|>assistant\n", "<|im_start|>assistant"))),
    "stop": ("stop-token", "<|im_end|>", several(ordinary("<|im_end|>"), put(SETTINGS, "eos_token", "<|endoftext|>"))),
    "eos": ("eos-token", SETTINGS, put(SETTINGS, "eos_token", "a")),
    "licence": ("licence-missing", "LICENSE", gone("LICENSE")),
}  # fmt: skip


def test_what_was_exported_passes(demo_bundle: Path) -> None:
    assert validate(demo_bundle, facts.table()) == []


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_one_finding(name: str, demo_bundle: Path, tmp_path: Path) -> None:
    rule, names, break_it = FAULTS[name]
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    break_it(folder)
    broken.signed(folder)
    found = errors(folder)
    assert [one for one, _ in found] == [rule], found
    assert names in found[0][1], found


def test_a_link_out_of_the_bundle_is_not_followed(demo_bundle: Path, tmp_path: Path) -> None:
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    outside(folder)
    assert errors(folder) == [("asset-outside", f"{METADATA}: assets{VISION!r}")]
    gone("export.json")(folder)
    assert errors(folder) == [("asset-outside", f"{METADATA}: assets{VISION!r}")]


def test_faults_in_several_places_are_all_found(demo_bundle: Path, tmp_path: Path) -> None:
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    several(vision(rescale_factor=0.5, image_std=[1, 0, 1]), put(SETTINGS, "eos_token", "a"), gone(EMBED))(folder)
    assert sorted(rule for rule, _ in errors(folder)) == [
        "eos-token",
        "file-missing",
        "normalisation",
        "rescale-factor",
    ]


# What the engine takes: the one warning, None for nothing; what makes it so; whether an export of ours made it.
TAKEN: list[tuple[str | None, Break, bool]] = [
    ("cache-context", language(max_context_length=1024), True),
    (None, no_vision("rescale_factor"), True),
    (None, in_json(METADATA, lambda document: document.update(source={"id": 1}, user_data={"a": "b"})), True),
    (None, in_json(METADATA, lambda document: document["language"].pop("function_map")), True),
    (None, vision(image_strategy="pad", image_mean=[0.5, 0.5, 0.5]), True),
    ("image-default", no_vision("image_mean"), False),
    (None, several(renamed_token("<image>", "<|image_pad|>"), template(("assistant\n", "assistant"))), False),
]  # fmt: skip


@pytest.mark.parametrize(("warning", "change", "ours"), TAKEN)
def test_what_the_engine_takes(
    warning: str | None, change: Break, ours: bool, demo_bundle: Path, tmp_path: Path
) -> None:
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    change(folder)
    broken.signed(folder) if ours else gone("export.json")(folder)
    found = {(one.rule, one.severity) for one in validate(folder, facts.table())}
    assert found == ({(warning, "warning")} if warning else set()) | (
        set() if ours else {("made-elsewhere", "warning")}
    )


def test_without_apples_packages_it_says_how_to_get_them(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PACKAGES", ("coreai-core", "no-such-package"))
    with pytest.raises(UserError, match="no-such-package: not installed"):
        validate(demo_bundle, facts.table())


def test_the_command(demo_bundle: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    answer = cli("validate", demo_bundle, "--json")
    assert answer.code == 0 and answer.document["passed"] and answer.document["findings"] == []
    assert any("Apple's runtime" in line for line in answer.document["checked"])
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    vision(rescale_factor=1 / 255)(folder)
    answer = cli("validate", folder)
    assert answer.code == 1 and "rescale-factor: metadata.json: vision.rescale_factor" in answer.out
    for flags in (("--app", tmp_path), ("--runner", tmp_path)):
        answer = cli("validate", demo_bundle, *flags)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert json.loads((demo_bundle / METADATA).read_text())["kind"] == "vlm"
