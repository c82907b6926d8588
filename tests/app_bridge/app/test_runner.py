"""The facts of an engine read from its sources: ours (runner/), and Apple's where FASTVLM_RUNNER names a checkout."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app_bridge.app import runner
from app_bridge.app.differences import differences
from app_bridge.app.engine import engine
from app_bridge.app.swift import Program
from fastvlm.common.errors import UserError
from model_export.coreai import contract

RUNNER = Path(__file__).parent / "runner"
ENGINE = "swift/Sources/CoreAILanguageModels/Engine.swift"
SIDE = "metadata vision.image_size"
# Old text, new text -> what differs: a value, or !a declaration.
CHANGES: list[tuple[str, str, list[str]]] = [
    ('"0.2"', '"0.3"', ["metadata_version"]),
    ("== .vlm", "== .llm", ["kind"]),
    ('"<|im_end|>"', '"<|end|>"', ["stop_token"]),
    ('"<|image_pad|>"', '"<image>"', ["fallback_token"]),
    ("?? 512", "?? 64", ["answer"]),
    ("inputNames.count == 2", "inputNames.count == 3", ["inputs"]),
    ("stateNames.count == 2", "stateNames.count == 4", ["states"]),
    ("min(256", "min(512", ["grows_from"]),
    ("    case pad", '    case pad = "padded"', ["strategies"]),
    ('"image_mean"', '"mean"', ["metadata vision.image_mean", "metadata vision.mean"]),
    ("let name: String", "let name: String?", ["metadata name"]),
    ("box.decode(Int.self, forKey: .side)", "box.decodeIfPresent(Int.self, forKey: .side) ?? 7", [SIDE]),
    ("forKey: .within) ?? true", "forKey: .within) ?? false", ["metadata language.embedded_tokenizer"]),
    ("forKey: .fitting) ?? .stretch", "forKey: .fitting) ?? .crop", ["metadata vision.image_strategy"]),
    ("Double.self, forKey: .factor", "Float.self, forKey: .factor", ["metadata vision.rescale_factor"]),
    ("self.limit = min", "self.limit = 2 * min", ["!Speaker.init(limit:program:)"]),
    ("Head(raw).version ??", "Head(raw).revision ??", ["!Folder.init(raw:)"]),
    ("forKey: .factor) ?? 1.0", "forKey: .factor) ?? usual()", ["!vision.rescale_factor"]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def ours_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    published: dict[str, Any] = json.loads((RUNNER.parent / "runner.json").read_text())
    reading = runner.EngineReading(Program({ENGINE: (RUNNER / ENGINE).read_bytes()}, runner.QUERIES), published)
    reading.facts()
    for name, members in reading.fingerprints().items():
        published["types"][name]["members"] = members
    monkeypatch.setattr(runner, "published", lambda: published)


def test_our_engine_has_the_tables_facts() -> None:
    assert differences(runner.read(RUNNER), engine()) == []
    assert runner.read(RUNNER) == engine()


def test_apples_engine_has_the_tables_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.environ.get("FASTVLM_RUNNER")
    if not folder:
        pytest.skip("FASTVLM_RUNNER is not set to a checkout of apple/coreai-models: Apple's sources were not read")
    published = json.loads(runner.PUBLISHED.read_text())
    monkeypatch.setattr(runner, "published", lambda: published)
    assert runner.read(Path(folder)) == engine()
    published["types"]["CoreAISequentialVLMEngine"]["members"]["zeroFill(_:)"] = "another"
    (changed,) = runner.read(Path(folder)).changed
    assert changed.line("engine").startswith(
        "CoreAISequentialVLMEngine.zeroFill(_:): differs from the published engine"
    )


@pytest.mark.parametrize(("old", "new", "expected"), CHANGES)
def test_one_change_is_one_difference(old: str, new: str, expected: list[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RUNNER, tmp_path / "runner"))
    text = (folder / ENGINE).read_text()
    assert old in text
    (folder / ENGINE).write_text(text.replace(old, new))
    read = runner.read(folder)
    found = differences(replace(read, changed=()), engine())
    said = [line.partition(":")[0] for line in found] + [f"!{changed.what}" for changed in read.changed]
    assert list(dict.fromkeys(said)) == expected, (found, read.changed)
    assert all(changed.where.startswith(ENGINE) and changed.facts for changed in read.changed)


def test_a_folder_without_an_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected apple/coreai-models"):
        runner.read(tmp_path)


def test_the_contract_and_the_table_agree() -> None:
    facts, program = engine(), contract.interfaces(contract.Shape(256, 16, 8, 9, 1, 1, 4, 64))["main"]
    assert (facts.metadata_version, facts.kind) == (contract.METADATA_VERSION, contract.KIND)
    assert (facts.stop_token, facts.answer, facts.grows_from) == (
        contract.END_OF_TURN, contract.ANSWER, contract.GROWS_FROM,
    )  # fmt: skip
    assert facts.strategies == tuple(sorted(contract.IMAGE_STRATEGIES))
    assert (facts.inputs, facts.states) == (len(program.inputs), len(program.states))
    required = {key.path.removeprefix("assets.") for key in facts.metadata if key.path.startswith("assets.")}
    assert required == contract.ASSETS.keys()


def test_a_growing_cache_doubles_up_to_the_context() -> None:
    sizes = [contract.capacity(positions, 2000) for positions in (1, 256, 257, 512, 513, 1025, 2000)]
    assert sizes == [256, 256, 512, 512, 1024, 2000, 2000]
    assert contract.capacity(1, 100) == 100
