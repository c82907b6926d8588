"""The settings for speed: the same model, each stage in what a measurement chose, refused where it can't be."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.common.errors import UserError
from model_export import runtime
from model_export.mil import int8
from model_export.runtime import fastest
from model_export.runtime.fastest import Stages

PROMPT = "What is it?"


@pytest.mark.parametrize(
    ("compute", "stages", "vision", "language"),
    [
        ("bfloat16", None, "bfloat16", "bfloat16"),
        ("auto", Stages("bfloat16", "float32", "float32"), "bfloat16", "float32"),
        ("auto", Stages("float32", "float32", "bfloat16"), "float32", "float32 prompts, bfloat16 tokens"),
        ("int8", Stages("bfloat16", "bfloat16", "bfloat16"), "int8", "bfloat16, int8 logits"),
        ("int8", Stages("float32", "float32", "float32"), "int8-float32", "float32, int8 logits"),
    ],
)  # fmt: skip
def test_the_same_model_for_speed_and_names_that_say_what_each_stage_computes_in(
    tiny_artefact: Path,
    compute: str,
    stages: Stages | None,
    vision: str,
    language: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if compute == "int8" and not int8.AVAILABLE:
        pytest.skip("this processor or PyTorch has no 8-bit products (VNNI)")
    monkeypatch.setattr(fastest, "choose", lambda: stages)
    exact, fast = (runtime.load(tiny_artefact, "executor", "torch", how) for how in ("as-typed", compute))
    assert fast.runners["vision"] == f"MIL executor ({vision})"
    assert f" CPU {language} over MLX " in fast.runners["language"]
    picture = np.random.default_rng(1).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    expected, found = exact.logits(PROMPT, picture), fast.logits(PROMPT, picture)
    assert 0 < np.abs(expected - found).max() < 0.1 * np.abs(expected).max()


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, float]]:
    """What is measured from now on, and kept in a folder of the test's."""
    found = {
        "encode": {"float32": 1.0, "bfloat16": 2.0},
        "prefill": {"float32": 3.0, "bfloat16": 4.0},
        "decode": {"float32": 6.0, "bfloat16": 5.0},
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fastest, "measure", lambda: found)
    return found


def test_each_stage_has_what_took_least(times: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert fastest.choose() == Stages("float32", "float32", "bfloat16")
    assert "prefill in float32 (float32 3000.00 ms, bfloat16 4000.00 ms), decode in" in capsys.readouterr().err


def test_matrices_of_bfloat16_prompts_are_not_held_twice(times: dict) -> None:
    times["prefill"]["bfloat16"], times["decode"]["bfloat16"] = 2.0, 7.0
    assert fastest.choose() == Stages("float32", "bfloat16", "bfloat16")


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "spoil",
    [
        None,
        lambda path: path.unlink(),
        lambda path: path.write_text(path.read_text()[:-9]),
        lambda path: path.write_text("[]"),
        lambda path: change(path, machine={}),
        lambda path: change(path, stages={"encode": "float32", "prefill": "int4", "decode": "float32"}),
        lambda path: change(path, stages={"encode": "float32"}),
        lambda path: change(path, stages={name: [] for name in ("encode", "prefill", "decode")}),
    ],
)
def test_a_measurement_is_kept_for_the_machine_and_nothing_else_is_believed(
    times: dict, spoil: Callable[[Path], None] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fastest.choose()
    path = tmp_path / "cache/fastvlm/fastest.json"
    if spoil:
        spoil(path)
    times["encode"]["bfloat16"] = 0.5
    assert fastest.choose() == (Stages("bfloat16", "float32", "bfloat16") if spoil else first)
    assert (str(path) in capsys.readouterr().err) == (spoil is None)
    assert list(path.parent.iterdir()) == [path]  # whole, and no part beside it


def test_other_instructions_or_threads_are_another_machine(times: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fastest.choose()
    times["encode"]["bfloat16"] = 0.5
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert fastest.choose() != first
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    times["encode"]["bfloat16"] = 2.0
    other = torch.get_num_threads() + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: other)
    times["encode"]["float32"] = 9.0
    assert fastest.choose() != first


def test_a_cache_that_cannot_be_written_is_no_obstacle(times: dict, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert fastest.choose() == Stages("float32", "float32", "bfloat16")


def test_every_stage_is_measured_in_both() -> None:
    found = fastest.measure()
    assert set(found) == {"encode", "prefill", "decode"}
    assert all(set(one) == set(fastest.DTYPES) and 0 < min(one.values()) < 60 for one in found.values())


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
