"""The settings for speed: the same model, each stage in what is fastest here, refused where it can't be."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.common.errors import UserError
from model_export import runtime
from model_export.mil import int8, onednn
from model_export.runtime import loading

PROMPT = "What is it?"


@pytest.mark.parametrize(
    ("compute", "stages", "vision", "language"),
    [
        ("bfloat16", None, "bfloat16", "bfloat16"),
        ("auto", ("bfloat16", "float32", "float32"), "bfloat16", "float32"),
        ("auto", ("float32", "float32", "bfloat16"), "float32", "float32 prompts, bfloat16 tokens"),
        ("int8", ("bfloat16", "bfloat16", "bfloat16"), "int8", "bfloat16, int8 logits"),
        ("int8", ("float32", "float32", "float32"), "int8-float32", "float32, int8 logits"),
    ],
)  # fmt: skip
def test_the_same_model_for_speed_and_names_that_say_what_each_stage_computes_in(
    tiny_artefact: Path,
    compute: str,
    stages: tuple[str, ...] | None,
    vision: str,
    language: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if compute == "int8" and not int8.AVAILABLE:
        pytest.skip("this processor or PyTorch has no 8-bit products (VNNI)")
    monkeypatch.setattr(loading, "fastest_here", lambda: stages)
    exact, fast = (runtime.load(tiny_artefact, "executor", "torch", how) for how in ("as-typed", compute))
    assert fast.runners["vision"] == f"MIL executor ({vision})"
    assert f" CPU {language} over MLX " in fast.runners["language"]
    picture = np.random.default_rng(1).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    expected, found = exact.logits(PROMPT, picture), fast.logits(PROMPT, picture)
    assert 0 < np.abs(expected - found).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("instructions", "packs", "expected"),
    [
        ("_is_avx512_bf16_supported", True, ("bfloat16", "bfloat16", "bfloat16")),
        ("_is_amx_tile_supported", True, ("bfloat16", "bfloat16", "bfloat16")),
        (None, True, ("float32", "float32", "bfloat16")),
        (None, False, ("float32", "float32", "float32")),
    ],
)
def test_stages_follow_from_the_processors_instructions(
    instructions: str | None, packs: bool, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions)
    monkeypatch.setattr(onednn, "packs", lambda dtype: packs)
    assert loading.fastest_here() == expected


def test_int8_is_refused_where_it_cannot_run(tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "AVAILABLE", False)
    with pytest.raises(UserError, match=r"--compute int8: .*VNNI"):
        runtime.load(tiny_artefact, "executor", "torch", "int8")
