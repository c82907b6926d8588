"""`benchmarks quantization`: its sections, the turns, and the comparisons of bytes, each with a control."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import quantization, quantization_steps, suite
from model_export.llm import export_llm
from quantization import affine
from quantization.recipe import load_recipe


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a section runs; each ends well and leaves its target."""
    commands: list[list[str]] = []

    def run(description, command, check=True):
        commands.append(command)
        if command[2] == "benchmarks.quantization_steps":
            assert command[3] in quantization_steps.STEPS
        for flag in ("--output-dir", "--mlx-path"):
            if flag in command:
                Path(command[command.index(flag) + 1]).mkdir(parents=True)
        seconds = 1.0 if "model_export" in command else 4.0
        return type("Done", (), {"seconds": seconds, "peak_gb": 2.0, "returncode": 0, "stdout": "{}\n"})()

    monkeypatch.setattr(quantization, "run_step", run)
    monkeypatch.setattr(suite, "run_step", run)
    monkeypatch.setattr(quantization.subprocess, "check_output", lambda *a, **k: "/peer/mlx_vlm\n")
    return commands


def test_every_section_reports_bars(made, tmp_path, monkeypatch):
    monkeypatch.setenv(quantization.MLX_VLM_PYTHON, "/peer/python")
    figures = {}
    for section in quantization.SUITE.sections.values():
        figures |= section(tmp_path, tmp_path / "work")
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
    monkeypatch.setattr(affine, "_SMALLEST_SCALE", 1e-1)
    assert quantization_steps.schemes(str(tiny_fast_vlm))["different_schemes"] > 10


def test_files_are_compared_tensor_by_tensor(tiny_fast_vlm, tmp_path):
    from fastvlm.checkpoint import open_checkpoint

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
