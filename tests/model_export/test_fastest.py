"""The settings for speed: the same model in bfloat16, chosen by measurement, refused where it can't be."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.errors import UserError
from model_export import fastest, runtime
from model_export.mil import int8

PROMPT = "What is it?"


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_the_same_model_for_speed(tiny_artefact: Path, compute: str) -> None:
    if compute == "int8" and not int8.AVAILABLE:
        pytest.skip("this processor or PyTorch has no 8-bit products (VNNI)")
    exact, fast = (runtime.load(tiny_artefact, "executor", "torch", how) for how in ("as-typed", compute))
    assert fast.runners["vision"] == f"MIL executor ({compute})" and "bfloat16" in fast.runners["language"]
    picture = np.random.default_rng(1).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    expected, found = exact.logits(PROMPT, picture), fast.logits(PROMPT, picture)
    assert 0 < np.abs(expected - found).max() < 0.1 * np.abs(expected).max()


def test_threads_and_dtype_are_those_that_took_least(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    asked = []

    def seconds(dtype: str, threads: int) -> float:
        asked.append((dtype, threads))
        return {("bfloat16", 2): 0.001}.get((dtype, threads), 0.002)

    monkeypatch.setattr(fastest, "_seconds", seconds)
    try:
        assert fastest.choose() == "bfloat16"
        monkeypatch.undo()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert asked == [(dtype, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2, 4)]
    assert "bfloat16 on 2 threads (float32 on 1 threads 2.0 ms" in capsys.readouterr().err


def test_a_stated_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    assert fastest.choose() in ("float32", "bfloat16") and torch.get_num_threads() == before


def test_int8_is_refused_where_it_cannot_run(tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "AVAILABLE", False)
    with pytest.raises(UserError, match=r"--compute int8: .*VNNI"):
        runtime.load(tiny_artefact, "executor", "torch", "int8")


@pytest.mark.parametrize(
    "options, named", [({"units": "ALL"}, "--compute-units ALL"), ({"units": "TPU"}, "CPU_AND_NE")]
)
def test_what_would_do_nothing_is_refused(tiny_artefact: Path, options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        runtime.load(tiny_artefact, "executor", "torch", **options)
