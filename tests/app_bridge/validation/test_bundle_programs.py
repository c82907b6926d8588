"""Single faults of a Core AI bundle's programs, by what Apple's runtime says of their functions."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coreai", reason="Core AI's packages: make setup EXTRAS=coreai")

from app_bridge.validation import check_assets
from model_export.coreai.contract import OPEN, Function
from tests.app_bridge import broken
from tests.app_bridge.broken import gone
from tests.app_bridge.validation.remembering import errors, remembering

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_once")]

EMBED, VISION = "embed.aimodel", "vision.aimodel"


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


def caches(*shape: int) -> Callable[[Function], Function]:
    return lambda function: replace(function, states=tuple(replace(each, shape=shape) for each in function.states))


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
    "heads open": ({"state-shape"}, "main", caches(4, 1, OPEN, 2048, 32)),
    "a cache's rank": ({"state-shape"}, "main", caches(2, 2048, 32)),
    "cache short": ({"cache-context"}, "main", caches(4, 1, 2, 2047, 32)),
}  # fmt: skip


def other_program(folder: Path) -> None:
    """An asset that is whole, in another's place."""
    shutil.rmtree(folder / VISION)
    shutil.copytree(folder / EMBED, folder / VISION)


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
