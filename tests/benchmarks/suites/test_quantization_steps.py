"""Steps of quantization.json: comparisons of bytes and of sweeps, each with a control."""

import copy
import json
import random

import numpy as np
import pytest

from benchmarks.suites import quantization_steps
from fastvlm.common.children import Finished
from fastvlm.common.errors import CheckFailed
from model_export.language.llm import export_llm
from quantization import schemes
from quantization.recipe import load_recipe
from quantization.schemes import Affine
from tests.helpers import with_tensors


@pytest.mark.slow
def test_schemes_are_compared_with_mlx(tiny_fast_vlm, monkeypatch):
    monkeypatch.setattr(quantization_steps, "_ROWS", 8)
    figures = quantization_steps.schemes(str(tiny_fast_vlm))
    assert figures["different"] == 0 and figures["compared"] >= 18
    monkeypatch.setattr(schemes, "MODES", {"affine": Affine})
    encode = Affine.encode
    monkeypatch.setattr(Affine, "encode", lambda scheme, rows: encode(scheme, np.roll(rows, 1, axis=1)))
    assert quantization_steps.schemes(str(tiny_fast_vlm))["different"] > 10


def test_files_are_compared_tensor_by_tensor(tiny_fast_vlm, tmp_path):
    from fastvlm.checkpoint.checkpoint import open_checkpoint

    (ours := tmp_path / "ours").mkdir()
    export_llm(open_checkpoint(tiny_fast_vlm), load_recipe("int4"), ours)
    assert quantization_steps.same_tensors(str(ours), str(ours))["different"] == 0

    def spoil(tensors):
        tensors["language_model.model.layers.0.mlp.up_proj.scales"][0, 0] += 1
        del tensors["language_model.model.norm.weight"]

    theirs = with_tensors(ours, tmp_path / "theirs", spoil)
    assert quantization_steps.same_tensors(str(ours), str(theirs))["different"] == 2


@pytest.fixture
def report() -> dict:
    """Of a sweep; sizes are the bits, and 4.5 for what is mixed."""
    kls = {"int3": 0.5, "int4": 0.1, "int5": 0.02, "int6": 0.01, "int8": 0.0, "int4-dwq": 0.04, "fit:5bpw": 0.05}
    points = []
    for recipe in (*quantization_steps.UNIFORM, *quantization_steps.CALIBRATED, *quantization_steps.MIXED):
        bits = 4.5 if recipe in quantization_steps.MIXED else int(recipe[3])
        kl = kls.get(recipe, 0.06)
        figures = {"bytes": bits, "prompt_kl_mean": kl, "answer_kl_mean": kl / 2, "same_answers": 1.0}
        points.append({"name": recipe, "recipe": recipe, "figures": figures})
    return {"points": points, "recommendation": "int4", "timings": {"sweep_seconds": 8.0}}


def test_gains_that_a_sweep_shows(report, tmp_path):
    (path := tmp_path / "report.json").write_text(json.dumps(report))
    gains = quantization_steps.gains(str(path))
    assert gains["int8_agreement"] == 1 and gains["recovered_prefill"] == gains["recovered_answers"]
    assert gains["recovered_prefill"] == pytest.approx(0.6)
    assert gains["line"] == pytest.approx({"int3-mixed": 1, "mixed-4-8": 1, "fit:5bpw": 0.05 / 0.06})


def test_differences_of_reports_are_counted(report):
    other = report | {"timings": {"sweep_seconds": 9.0}}
    assert quantization_steps.differences(report, other) == 0
    changed = copy.deepcopy(other)
    changed["points"][3]["figures"]["bytes"] += 1
    del changed["points"][5]
    assert quantization_steps.differences(report, changed) == 2
    with pytest.raises(CheckFailed, match="the reports are not"):
        quantization_steps.differences(report, other | {"recommendation": "int8"})


def test_a_sweep_is_killed_and_then_run_to_its_end(report, tmp_path, monkeypatch):
    """A stand-in that never ends, and a last run with a point less than the uninterrupted one."""
    folder = tmp_path / "killed"
    (path := tmp_path / "whole.json").write_text(json.dumps(report))
    (tmp_path / "sweep.py").write_text("import time; time.sleep(600)")
    (folder / "work" / "points").mkdir(parents=True)
    (folder / "work" / "points" / "one.json").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(random.Random, "uniform", lambda self, low, high: 0.01)

    def run(command, say):
        (folder / "report").mkdir()
        (folder / "report" / "report.json").write_text(json.dumps(report | {"points": report["points"][1:]}))
        return Finished(0, 1.0, 1, "")

    monkeypatch.setattr(quantization_steps.children, "run", run)
    figures = quantization_steps.killed(str(path), str(folder), "2", "sweep")
    assert figures == {"differences": 1, "between": 2}
