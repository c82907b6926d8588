"""Single faults of a Core AI bundle: each is found by its own rule at its own place, and none is reported as another."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coreai", reason="Core AI's packages: make setup EXTRAS=coreai")

from app_bridge.app import facts
from app_bridge.validation import check_assets
from app_bridge.validation.validate import validate
from fastvlm.common.errors import UserError
from model_export.coreai import packages
from model_export.coreai.contract import OPEN, Function
from tests.app_bridge import broken
from tests.app_bridge.broken import gone, in_json, in_text, put, several, without
from tests.app_bridge.validation.remembering import remembering

pytestmark = pytest.mark.slow

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


def template(change: Callable[[str], str]) -> Break:
    def in_settings(document: dict[str, Any]) -> None:
        assert change(document["chat_template"]) != document["chat_template"]
        document["chat_template"] = change(document["chat_template"])

    return in_json(SETTINGS, in_settings)


def outside(folder: Path) -> None:
    (folder / "vision.aimodel").rename(folder.parent / "elsewhere.aimodel")
    (folder / "vision.aimodel").symlink_to(folder.parent / "elsewhere.aimodel")


def other_program(folder: Path) -> None:
    """An asset that is whole, in another's place."""
    shutil.rmtree(folder / VISION)
    shutil.copytree(folder / EMBED, folder / VISION)


def renamed_token(old: str, new: str) -> Break:
    return several(
        *(in_text(name, lambda raw: raw.replace(old.encode(), new.encode())) for name in (TOKENIZER, SETTINGS))
    )


def ordinary(document: dict[str, Any]) -> None:
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != "<image>"]
    document["model"]["vocab"]["<image>"] = 434


ONE = "{{ messages[0]['content'] }}"
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
    "picture": ("image-size", "input images256", vision(image_size=512)),
    "picture's tokens": ("image-token-count", "image_embeddings", vision(image_token_count=17)),
    "vocabulary": ("vocab-size", "logits", language(vocab_size=449)),
    "context beyond the cache": ("cache-context", "k_cache", language(max_context_length=4096)),
    "context none": ("config-value", "language.max_context_length", language(max_context_length=0)),
    "hub's tokenizer": ("tokenizer-embedded", "embedded_tokenizer", language(embedded_tokenizer=False)),
    "another function": ("function-missing", DECODER, language(function_map={"main": ["extend"]})),
    "asset above": ("asset-outside", "assets'../x.aimodel'", assets(vision="../x.aimodel")),
    "asset absolute": ("asset-outside", "/tmp", assets(vision="/tmp/x.aimodel")),
    "asset is the bundle": ("asset-outside", "''", assets(vision="")),
    "asset a link": ("asset-outside", VISION, outside),
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
    "tokenizer's component": ("tokenizer-component", TOKENIZER, put(TOKENIZER, "decoder", {"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": True})),
    "two tokenizers": ("tokenizer-stale", "<image>", in_json(SETTINGS, lambda d: d["added_tokens_decoder"]["434"].update(content="<picture>"))),
    "text": ("tokenizer-text", TOKENIZER, put(TOKENIZER, "normalizer", {"type": "Lowercase"})),
    "vocabulary's ids": ("vocabulary-size", "434", several(language(vocab_size=434))),
    "image token's id": ("image-token", "ordinary token", vision(image_token_id=65)),
    "image token none": ("image-token", "no token", vision(image_token_id=440)),
    "image token ordinary": ("image-token", "ordinary token '<image>'", several(in_json(TOKENIZER, ordinary), in_json(SETTINGS, lambda d: d["added_tokens_decoder"].pop("434")))),
    "image token twice": ("image-token", "2 times", template(lambda text: text.replace("{{ message['content'] }}", "{{ message['content'] * 2 }}"))),
    "image token lost": ("image-token", "0 times", template(lambda text: text.replace("<|im_start|>{{ message['role'] }}", "", 1).replace("message['content'] is string", "false"))),
    "no template": ("chat-template", SETTINGS, without(SETTINGS, "chat_template")),
    "template broken": ("chat-template", SETTINGS, put(SETTINGS, "chat_template", "{% for %}")),
    "template endless": ("chat-template", SETTINGS, put(SETTINGS, "chat_template", "{{ range(10**12) | list }}")),
    "system line": ("system-line", SETTINGS, template(lambda text: text.replace("{% if loop.first", "{% if false and loop.first"))),
    "another system line": ("system-line", SETTINGS, template(lambda text: text.replace("helpful", "kind"))),
    "prompt": ("prompt", SETTINGS, template(lambda text: text.replace("<|im_start|>assistant\n", "<|im_start|>assistant"))),
    "stop": ("stop-token", "<|im_end|>", several(renamed_token("<|im_end|>", "<|im_stop|>"))),
    "eos": ("eos-token", SETTINGS, put(SETTINGS, "eos_token", "a")),
    "licence": ("licence-missing", "LICENSE", gone("LICENSE")),
}  # fmt: skip


def tensor(kind: str, place: int, **values: Any) -> Callable[[Function], Function]:
    """A change to one input, output or state of a function."""

    def change(function: Function) -> Function:
        tensors = list(getattr(function, kind))
        tensors[place] = replace(tensors[place], **values)
        return replace(function, **{kind: tuple(tensors)})

    return change


def turned(kind: str) -> Callable[[Function], Function]:
    return lambda function: replace(function, **{kind: getattr(function, kind)[::-1]})


def cut(kind: str, count: int) -> Callable[[Function], Function]:
    return lambda function: replace(function, **{kind: (getattr(function, kind) * 2)[:count]})


# Rule(s), role, what Apple's runtime says of its function instead.
PROGRAMS: dict[str, tuple[set[str], str, Callable[[Function], Function]]] = {
    "one input": ({"input-count"}, "main", cut("inputs", 1)),
    "three inputs": ({"input-count"}, "main", cut("inputs", 3)),
    "two pictures": ({"input-count"}, "vision", cut("inputs", 2)),
    "no output": ({"output-count"}, "main", cut("outputs", 0)),
    "two outputs": ({"output-count"}, "main", cut("outputs", 2)),
    "one state": ({"state-count"}, "main", cut("states", 1)),
    "a state of the embeddings'": ({"state-count"}, "embedding", lambda f: replace(f, states=f.inputs)),
    "inputs turned": ({"input-name", "input-dtype", "input-shape"}, "main", turned("inputs")),
    "states turned": ({"state-name"}, "main", turned("states")),
    "picture's name": ({"input-name"}, "vision", tensor("inputs", 0, name="pixels")),
    "output's name": ({"output-name"}, "main", tensor("outputs", 0, name="scores")),
    "picture's dtype": ({"input-dtype"}, "vision", tensor("inputs", 0, dtype="float16")),
    "picture's features' dtype": ({"output-dtype"}, "vision", tensor("outputs", 0, dtype="float32")),
    "ids' dtype": ({"input-dtype"}, "embedding", tensor("inputs", 0, dtype="int64")),
    "embeddings' dtype": ({"output-dtype"}, "embedding", tensor("outputs", 0, dtype="float32")),
    "decoder's dtype": ({"input-dtype"}, "main", tensor("inputs", 0, dtype="float32")),
    "positions' dtype": ({"input-dtype"}, "main", tensor("inputs", 1, dtype="int64")),
    "logits' dtype": ({"output-dtype"}, "main", tensor("outputs", 0, dtype="float32")),
    "cache's dtype": ({"state-dtype"}, "main", tensor("states", 1, dtype="float32")),
    "picture's rank": ({"input-shape"}, "vision", tensor("inputs", 0, shape=(3, 256, 256))),
    "channels last": ({"input-shape"}, "vision", tensor("inputs", 0, shape=(1, 256, 256, 3))),
    "features' tokens open": ({"output-shape"}, "vision", tensor("outputs", 0, shape=(1, OPEN, 128))),
    "ids fixed": ({"input-shape"}, "embedding", tensor("inputs", 0, shape=(1, 64))),
    "positions fixed": ({"input-shape"}, "main", tensor("inputs", 1, shape=(1, 64))),
    "last logits": ({"output-shape"}, "main", tensor("outputs", 0, shape=(1, 1, 448))),
    "features' width": ({"embedding-width"}, "vision", tensor("outputs", 0, shape=(1, 16, 64))),
    "embeddings' width": ({"embedding-width"}, "embedding", tensor("outputs", 0, shape=(1, OPEN, 64))),
    "decoder's width": ({"embedding-width"}, "main", tensor("inputs", 0, shape=(1, OPEN, 64))),
    "caches differ": ({"state-shape"}, "main", tensor("states", 1, shape=(4, 1, 2, 2048, 16))),
    "heads open": ({"state-shape"}, "main", lambda f: replace(f, states=tuple(replace(s, shape=(4, 1, OPEN, 2048, 32)) for s in f.states))),
    "a cache's rank": ({"state-shape"}, "main", lambda f: replace(f, states=tuple(replace(s, shape=(2, 2048, 32)) for s in f.states))),
    "cache short": ({"cache-context"}, "main", lambda f: replace(f, states=tuple(replace(s, shape=(4, 1, 2, 2047, 32)) for s in f.states))),
}  # fmt: skip


def errors(folder: Path) -> list[tuple[str, str]]:
    return broken.rules(folder, facts.table())


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_assets, "Runtime", remembering())


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
    assert names in found[0][1] or names.replace("256", "") in found[0][1], found


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_fault_of_a_program_has_its_rule(name: str, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules, role, change = PROGRAMS[name]
    monkeypatch.setattr(check_assets, "Runtime", remembering({role: change}))
    assert {rule for rule, _ in errors(demo_bundle)} == rules


def test_another_program_in_the_place_of_one(demo_bundle: Path, tmp_path: Path) -> None:
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    other_program(folder)
    broken.signed(folder)
    assert {rule for rule, _ in errors(folder)} == {
        "input-name",
        "input-dtype",
        "input-shape",
        "output-name",
        "output-shape",
    }


def test_faults_in_several_places_are_all_found(demo_bundle: Path, tmp_path: Path) -> None:
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    several(vision(rescale_factor=0.5, image_std=[1, 0, 1]), put(SETTINGS, "eos_token", "a"), gone(EMBED))(folder)
    assert sorted(rule for rule, _ in errors(folder)) == [
        "eos-token",
        "file-missing",
        "normalisation",
        "rescale-factor",
    ]


# What the engine takes: the one warning, None for nothing; what makes it so; whether an export of ours is to have made it.
TAKEN: list[tuple[str | None, Break, bool]] = [
    ("cache-context", language(max_context_length=1024), True),
    (None, no_vision("rescale_factor"), True),
    (None, in_json(METADATA, lambda document: document.update(source={"hf_model_id": "x"}, user_data={"a": "b"})), True),
    (None, in_json(METADATA, lambda document: document["language"].pop("function_map")), True),
    (None, vision(image_strategy="pad", image_mean=[0.5, 0.5, 0.5]), True),
    ("image-default", no_vision("image_mean"), False),
    (None, several(renamed_token("<image>", "<|image_pad|>"), template(lambda text: text + "\n")), False),
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


def test_two_vision_functions_are_taken_for_one(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Apple's own exports have them: encode_image and project instead of main, embed_tokens."""
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    gone("export.json")(folder)
    plain = remembering()()

    class Split:
        features = (replace(plain.load("vision", folder / VISION)[1].outputs[0], name="features"),)

        def load(self, role: str, asset: Path, function: str = "main") -> Any:
            names, found = plain.load(role, asset)
            if role == "main":
                return names, found
            if asset.name == EMBED:
                return ["embed_tokens"], found if function == "embed_tokens" else None
            parts = {
                "encode_image": replace(found, outputs=self.features),
                "project": replace(found, inputs=self.features),
            }
            return [*parts], parts.get(function)

    monkeypatch.setattr(check_assets, "Runtime", Split)
    assert errors(folder) == []
    Split.features = (replace(Split.features[0], dtype="float32"),)
    assert errors(folder) == []
    wide = replace(Split.features[0], shape=(1, 16, 99))
    original = Split.load
    Split.load = lambda self, role, asset, function="main": (  # type: ignore[method-assign]
        lambda names, found: (names, replace(found, inputs=(wide,)) if function == "project" else found)
    )(*original(self, role, asset, function))
    assert [rule for rule, _ in errors(folder)] == ["project-input"]


def test_a_compiled_asset_is_left_to_a_mac(demo_bundle: Path, tmp_path: Path) -> None:
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    gone("export.json")(folder)
    (folder / VISION).rename(folder / f"{VISION}c")
    assert errors(folder) == []


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
