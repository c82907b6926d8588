"""`benchmarks quantization`: its sections, the turns, and the comparisons of bytes, each with a control."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from benchmarks.suites import quantization, quantization_steps, quantization_sweep, suite
from fastvlm.common.children import Finished
from fastvlm.common.errors import CheckFailed
from model_export.language.llm import export_llm
from quantization.recipe import load_recipe
from quantization.schemes import Affine


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a section runs; each ends well and leaves its target."""
    commands: list[list[str]] = []

    def run(description, command, check=True):
        commands.append(command)
        if command[2] == "benchmarks.suites.quantization_steps":
            assert command[3] in quantization_steps.STEPS
        for flag in ("--output-dir", "--mlx-path"):
            if flag in command:
                Path(command[command.index(flag) + 1]).mkdir(parents=True)
        seconds = 1.0 if "model_export" in command else 4.0
        return Finished(0, seconds, 2 * 10**9, "{}\n")

    monkeypatch.setattr(quantization, "run_step", run)
    monkeypatch.setattr(suite, "run_step", run)
    monkeypatch.setattr(quantization.subprocess, "check_output", lambda *a, **k: "/peer/mlx_vlm\n")
    return commands


def test_every_section_reports_bars(made, tmp_path, monkeypatch):
    monkeypatch.setenv(quantization.MLX_VLM_PYTHON, "/peer/python")
    figures = {}
    for name in ("convert-0.5b", "convert-7b", "convert-fp4", "bytes"):
        figures |= quantization.SUITE.sections[name](tmp_path, tmp_path / "work")
    assert set(figures) <= set(quantization.SUITE.bars)
    assert figures["vlm_seconds_ratio"] == figures["large_seconds_ratio"] == figures["nvfp4_seconds_ratio"] == 0.25
    assert figures["torch_peak_ratio"] == 1.0
    assert sum(command[0] == "/peer/python" for command in made) == quantization.ROUNDS


def test_without_mlx_vlm_nothing_is_judged_and_it_says_so(made, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(quantization.MLX_VLM_PYTHON, raising=False)
    figures = quantization.SUITE.sections["convert-0.5b"](tmp_path, tmp_path / "work")
    assert figures and not [key for key in figures if key.endswith("ratio")]
    assert f"set {quantization.MLX_VLM_PYTHON}" in capsys.readouterr().err


def test_the_order_is_reversed_every_other_round(tmp_path, made):
    sides = {name: lambda target, name=name: [name, "-m", "x", "--mlx-path", str(target)] for name in "abc"}
    quantization._in_turns("key", sides, tmp_path, 2)
    assert [command[0] for command in made] == list("abccba")


def test_schemes_are_compared_with_mlx(tiny_fast_vlm, monkeypatch):
    figures = quantization_steps.schemes(str(tiny_fast_vlm))
    assert figures["different_schemes"] == 0 and figures["compared_schemes"] >= 18
    encode = Affine.encode
    monkeypatch.setattr(Affine, "encode", lambda scheme, rows: encode(scheme, np.roll(rows, 1, axis=1)))
    assert quantization_steps.schemes(str(tiny_fast_vlm))["different_schemes"] > 10


def test_files_are_compared_tensor_by_tensor(tiny_fast_vlm, tmp_path):
    from fastvlm.checkpoint.checkpoint import open_checkpoint

    (ours := tmp_path / "ours").mkdir()
    export_llm(open_checkpoint(tiny_fast_vlm), load_recipe("int4"), ours)
    theirs = shutil.copytree(ours, tmp_path / "theirs")
    assert quantization_steps.same_tensors(str(ours), str(theirs))["different_tensors"] == 0
    tensors = load_file(theirs / "model.safetensors")
    tensors["language_model.model.layers.0.mlp.up_proj.scales"][0, 0] += 1
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, theirs / "model.safetensors")
    assert quantization_steps.same_tensors(str(ours), str(theirs))["different_tensors"] == 2


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

    def run(description, command):
        folder = Path(command[command.index("--report") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(found))

    monkeypatch.setattr(quantization_sweep, "run_step", run)
    return found


def test_what_a_sweep_shows(swept, tmp_path):
    figures = quantization_sweep.sweep(tmp_path, tmp_path)
    assert set(figures) <= set(quantization.SUITE.bars)
    assert figures["recovered_prefill"] == figures["recovered_answers"] == pytest.approx(0.6)
    assert figures["line_fit:5bpw"] == pytest.approx(0.05 / 0.06) and figures["line_mixed-4-8"] == pytest.approx(1.0)


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


def test_a_text_model_that_is_not_there_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(quantization_sweep.TEXT_MODEL, raising=False)
    assert quantization_sweep.text(tmp_path, tmp_path) == {}
    assert f"set {quantization_sweep.TEXT_MODEL}" in capsys.readouterr().err
