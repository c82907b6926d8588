"""Parity from the bytes of both sides: a sound artefact passes; one weight of either side perturbed fails, by name."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastvlm
from benchmarks import __main__ as command_line
from benchmarks.parity import compare
from fastvlm.common.cli import run
from fastvlm.common.errors import UserError
from fastvlm.data import scenes
from model_export import contract
from model_export.config import ExportConfig

pytestmark = pytest.mark.slow

LAYER = "stages.2.blocks.0.mlp.fc1"


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return scenes.CHECKPOINT


@pytest.fixture(scope="module")
def artefact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from model_export.export import export, plan

    target = tmp_path_factory.mktemp("artefact") / "demo"
    export(plan(ExportConfig(checkpoint, target)))
    return target


@pytest.fixture(scope="module")
def compared(checkpoint: Path, artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    page = tmp_path_factory.mktemp("page") / "index.html"
    result = compare.compare(checkpoint, artefact, limit=2, report=page)
    return {"result": result, "page": page.read_text()}


def test_a_sound_artefact_passes(compared):
    result = compared["result"]
    assert result["passed"], result["verdict"]
    assert result["exact"]["questions"] == 2
    assert result["precision"] == "float16" and result["family"] == "fp16"
    assert 50 <= result["metrics"]["encoder_snr"]["value"] < 100  # fp16 really ran
    assert result["pictures"] == {"demo": 2}
    assert {error["layer"] for error in result["operations"]["layers"]} >= {LAYER}
    assert any(error["snr_db"] not in ("inf", "-inf") for error in result["operations"]["rounding"])
    assert "parity passed" in compared["page"] and "weakest: " in compared["page"]


def test_the_same_again_is_the_same_document(compared, checkpoint, artefact, tmp_path):
    moved = tmp_path / artefact.name
    shutil.copytree(artefact, moved)
    assert json.dumps(compare.compare(checkpoint, moved, limit=2)) == json.dumps(compared["result"])


def perturbed(checkpoint: Path, folder: Path, name: str, amount: float) -> Path:
    """A copy of the checkpoint with one value of one tensor changed."""
    copy = folder / "checkpoint"
    shutil.copytree(checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    (key,) = (key for key in tensors if key.endswith(name))
    tensors[key] = tensors[key].contiguous().clone()
    tensors[key].view(-1)[3] += amount
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("name", "amount", "first", "layer"),
    [
        (f"{LAYER}.weight", 1.0, "layer_snr", LAYER),
        ("multi_modal_projector.linear_1.weight", 2.0, "merged_snr", None),
        ("language_model.layers.0.mlp.down_proj.weight", 4.0, "prefill_kl", None),
        ("language_model.norm.weight", 4.0, "prefill_kl", None),
    ],
)
def test_one_weight_of_the_reference_perturbed(checkpoint, artefact, tmp_path, name, amount, first, layer):
    result = compare.compare(perturbed(checkpoint, tmp_path, name, amount), artefact, limit=1)
    assert not result["passed"]
    assert result["broken"][0] == first
    assert (result["first_operation"] or {"layer": None})["layer"] == layer


def test_one_weight_of_the_saved_program_perturbed(checkpoint, artefact, tmp_path):
    copy = tmp_path / "artefact"
    shutil.copytree(artefact, copy)
    weights = next((copy / contract.PACKAGE).rglob("weight.bin"))
    data = bytearray(weights.read_bytes())
    middle = len(data) // 2 & ~1
    data[middle : middle + 2] = torch.tensor([900.0], dtype=torch.float16).numpy().tobytes()
    weights.write_bytes(data)
    result = compare.compare(checkpoint, copy, limit=1)
    assert not result["passed"]
    assert {"layer_snr", "encoder_snr"} <= set(result["broken"])
    assert result["first_operation"]["layer"] in result["verdict"]


def test_the_users_pictures_are_compared(checkpoint, artefact, tmp_path):
    from PIL import Image

    Image.linear_gradient("L").save(tmp_path / "mine <b>.png")
    result = compare.compare(checkpoint, artefact, images=tmp_path, limit=1, report=tmp_path / "page.html")
    assert result["pictures"] == {"demo": 1, "yours": 1} and result["passed"]
    assert "mine &lt;b&gt;.png" in (tmp_path / "page.html").read_text()


def test_another_checkpoints_artefact_is_refused(make_checkpoint, artefact):
    other = make_checkpoint(form="training", dtype="float16")
    with pytest.raises(UserError, match=r"cannot be compared: .*vocabulary: checkpoint \d+, artefact \d+"):
        compare.compare(other, artefact, limit=1)


def test_the_reference_runs_at_the_artefacts_resolution(checkpoint):
    model = fastvlm.load(checkpoint)
    other = compare.at_size(model, 128)
    assert model.image_size == 256 and other.image_size == 128
    assert other.embed("What is this?", scenes.draw_scene(np.random.default_rng(0), [])).shape[1] == (
        model.embed("What is this?", scenes.draw_scene(np.random.default_rng(0), [])).shape[1] - 16 + 4
    )


def test_the_command(checkpoint, artefact, tmp_path, capsys, monkeypatch):
    arguments = ["parity", "--reference", str(checkpoint), "--candidate", str(artefact), "--limit", "1"]
    arguments += ["--output", str(tmp_path / "out" / "index.html")]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert run(command_line.build_parser, arguments) == 0
    printed = capsys.readouterr().out
    assert "encoder features" in printed and "MIL executor" in printed and "✓" in printed
    assert "python -m benchmarks parity" in (tmp_path / "out" / "index.html").read_text()

    arguments[2] = str(perturbed(checkpoint, tmp_path, f"{LAYER}.weight", 1.0))
    assert run(command_line.build_parser, [*arguments, "--json"]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["passed"] is False and document["first_operation"]["layer"] == LAYER


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--limit": "0"}, "--limit: got 0"),
        ({"--reference": "nowhere"}, "nowhere"),
        ({"--candidate": "nowhere"}, "nowhere"),
        ({"--images": "nowhere"}, "--images nowhere: not a folder"),
    ],
)
def test_unusable_input_is_one_line_and_exit_2(checkpoint, artefact, tmp_path, capsys, change, message):
    options = {
        "--reference": str(checkpoint),
        "--candidate": str(artefact),
        "--output": str(tmp_path / "page.html"),
    } | change
    assert run(command_line.build_parser, ["parity", *(word for pair in options.items() for word in pair)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "page.html").exists()
