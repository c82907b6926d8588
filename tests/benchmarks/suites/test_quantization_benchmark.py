"""`benchmarks quantization`: its sections, the turns, and the comparisons of bytes, each with a control."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from benchmarks.suites import quantization, quantization_steps, quantization_sweep
from fastvlm.common.errors import CheckFailed
from model_export.language.llm import export_llm
from quantization.recipe import load_recipe
from quantization.schemes import Affine


def test_every_section_reports_its_figures(made, run, monkeypatch):
    monkeypatch.setenv(quantization.MLX_VLM_PYTHON, "/peer/python")
    monkeypatch.setattr(quantization.subprocess, "check_output", lambda *a, **k: "/peer/mlx_vlm\n")
    for name in ("convert-0.5b", "convert-7b", "convert-fp4", "bytes"):
        quantization.SUITE.sections[name](run)
    for key in ("vlm", "app", "torch", "app_torch", "large", "mxfp4", "nvfp4"):
        assert run.figures[f"{key}_seconds_ratio"]["value"] == 0.25 and run.figures[f"{key}_peak_ratio"]["value"] == 1
    assert run.figures["large_peak_ratio"]["bound"] is None and run.figures["vlm_peak_ratio"]["passed"] is False
    assert sum(command[0] == "/peer/python" for command in made) == quantization.ROUNDS


def test_without_mlx_vlm_nothing_is_judged_and_it_says_so(made, run, monkeypatch, capsys):
    monkeypatch.delenv(quantization.MLX_VLM_PYTHON, raising=False)
    quantization.SUITE.sections["convert-0.5b"](run)
    assert run.figures and all(figure["bound"] is None for figure in run.figures.values())
    assert f"set {quantization.MLX_VLM_PYTHON}" in capsys.readouterr().err


def test_the_order_is_reversed_every_other_round(made, tmp_path):
    sides = {name: lambda target, name=name: [name, "-m", "x", "--mlx-path", str(target)] for name in "abc"}
    quantization.in_turns("key", sides, tmp_path, 2)
    assert [command[0] for command in made] == list("abccba")


def test_schemes_are_compared_with_mlx(tiny_fast_vlm, monkeypatch):
    figures = quantization_steps.schemes(str(tiny_fast_vlm))
    assert figures["different"] == 0 and figures["compared"] >= 18
    encode = Affine.encode
    monkeypatch.setattr(Affine, "encode", lambda scheme, rows: encode(scheme, np.roll(rows, 1, axis=1)))
    assert quantization_steps.schemes(str(tiny_fast_vlm))["different"] > 10


def test_files_are_compared_tensor_by_tensor(tiny_fast_vlm, tmp_path):
    from fastvlm.checkpoint.checkpoint import open_checkpoint

    (ours := tmp_path / "ours").mkdir()
    export_llm(open_checkpoint(tiny_fast_vlm), load_recipe("int4"), ours)
    theirs = shutil.copytree(ours, tmp_path / "theirs")
    assert quantization_steps.same_tensors(str(ours), str(theirs))["different"] == 0
    tensors = load_file(theirs / "model.safetensors")
    tensors["language_model.model.layers.0.mlp.up_proj.scales"][0, 0] += 1
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, theirs / "model.safetensors")
    assert quantization_steps.same_tensors(str(ours), str(theirs))["different"] == 2


def test_inputs_of_the_peers(tiny_llava, tmp_path):
    """mlx_lm loads the text model; its names are Qwen2's, its values the checkpoint's."""
    from mlx_lm.utils import load_model

    quantization_steps.text_model(str(tiny_llava), str(tmp_path / "text"))
    model, config = load_model(tmp_path / "text")
    assert config["model_type"] == "qwen2" and len(model.model.layers) == 2


KLS = {"int3": 0.5, "int4": 0.1, "int5": 0.02, "int6": 0.01, "int8": 0.0, "int4-dwq": 0.04, "fit:5bpw": 0.05}


def report() -> dict:
    """Of a sweep; sizes are the bits, and 4.5 for what is mixed."""
    points = []
    for recipe in quantization_sweep.RECIPES:
        bits = next((float(digit) for digit in recipe if digit.isdigit() and "mixed" not in recipe), 4.5)
        bits = 4.5 if recipe.startswith("fit") else bits
        kl = KLS.get(recipe, 0.06)
        figures = {"bytes": bits, "prompt_kl_mean": kl, "answer_kl_mean": kl / 2, "same_answers": 1.0}
        points.append({"name": recipe, "recipe": recipe, "figures": figures})
    return {"points": points, "recommendation": "int4", "timings": {"sweep_seconds": 8.0}}


@pytest.fixture
def swept(monkeypatch):
    """`_command`'s folders get this report."""
    found = report()

    def run_step(description, command):
        folder = Path(command[command.index("--report") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(found))

    monkeypatch.setattr(quantization_sweep, "run_step", run_step)
    return found


def test_what_a_sweep_shows(swept, run):
    quantization_sweep.sweep(run)
    figures = {key: figure["value"] for key, figure in run.figures.items()}
    assert figures["recovered_prefill"] == figures["recovered_answers"] == pytest.approx(0.6)
    assert figures["line_fit:5bpw"] == pytest.approx(0.05 / 0.06, rel=1e-3) and figures[
        "line_mixed-4-8"
    ] == pytest.approx(1.0, rel=1e-3)


def test_differences_of_reports_are_counted(swept, tmp_path):
    one, other = report(), report()
    other["timings"] = {"sweep_seconds": 9.0}
    assert quantization_sweep._differences(one, other) == 0
    changed = copy.deepcopy(other)
    changed["points"][3]["figures"]["bytes"] += 1
    del changed["points"][5]
    assert quantization_sweep._differences(one, changed) == 2
    with pytest.raises(CheckFailed, match="the reports are not"):
        quantization_sweep._differences(one, other | {"recommendation": "int8"})


def test_a_text_model_that_is_not_there_is_said(monkeypatch, run, capsys):
    monkeypatch.delenv(quantization_sweep.TEXT_MODEL, raising=False)
    quantization_sweep.text(run)
    assert not run.figures
    assert f"skipped, no bar judged: {quantization_sweep.TEXT_MODEL}" in capsys.readouterr().err
