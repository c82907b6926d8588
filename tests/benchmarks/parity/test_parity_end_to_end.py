"""Parity from the bytes of both sides: a sound artefact passes; one weight of either side perturbed fails, by name."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.parity import compare
from fastvlm.common.errors import UserError
from fastvlm.data.scenes import CHECKPOINT, draw_scene
from model_export import contract
from tests.helpers import with_tensors

pytestmark = pytest.mark.slow

LAYER = "stages.2.blocks.0.mlp.fc1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one picture of the user's."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.linear_gradient("L").save(folder / "mine <b>.png")
    return folder


@pytest.fixture(scope="module")
def compared(demo_artefact: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    page = tmp_path_factory.mktemp("page") / "index.html"
    result = compare.compare(CHECKPOINT, demo_artefact, images=pictures, limit=1, report=page)
    return {"result": result, "page": page.read_text()}


def test_a_sound_artefact_passes(compared):
    result = compared["result"]
    assert result["passed"], result["verdict"]
    assert result["exact"]["questions"] == 1
    assert result["precision"] == "float16" and result["family"] == "fp16"
    assert 50 <= result["metrics"]["encoder_snr"]["value"] < 100  # fp16 really ran
    assert result["pictures"] == {"demo": 1, "yours": 1} and "mine &lt;b&gt;.png" in compared["page"]
    assert {error["layer"] for error in result["operations"]["layers"]} >= {LAYER}
    assert any(error["snr_db"] not in ("inf", "-inf") for error in result["operations"]["rounding"])
    assert "parity passed" in compared["page"] and "weakest: " in compared["page"] and "<mark>" not in compared["page"]


def test_the_same_again_is_the_same_document(compared, demo_artefact, pictures, tmp_path):
    moved = tmp_path / demo_artefact.name
    shutil.copytree(demo_artefact, moved)
    assert json.dumps(compare.compare(CHECKPOINT, moved, images=pictures, limit=1)) == json.dumps(compared["result"])


def perturbed(folder: Path, name: str, amount: float) -> Path:
    """A copy of the checkpoint with one value of one tensor changed."""

    def add(tensors):
        (key,) = (key for key in tensors if key.endswith(name))
        tensors[key].view(-1)[3] += amount

    return with_tensors(CHECKPOINT, folder / "checkpoint", add)


def test_one_weight_of_the_language_model_perturbed(demo_artefact, tmp_path):
    other = perturbed(tmp_path, "language_model.layers.0.mlp.down_proj.weight", 4.0)
    result = compare.compare(other, demo_artefact, limit=1)
    assert not result["passed"] and result["broken"][0] == "prefill_kl" and not result["first_operation"]


def test_one_weight_of_the_saved_program_perturbed(demo_artefact, tmp_path):
    copy = tmp_path / "artefact"
    shutil.copytree(demo_artefact, copy)
    weights = next((copy / contract.PACKAGE).rglob("weight.bin"))
    data = bytearray(weights.read_bytes())
    middle = len(data) // 2 & ~1
    data[middle : middle + 2] = torch.tensor([900.0], dtype=torch.float16).numpy().tobytes()
    weights.write_bytes(data)
    result = compare.compare(CHECKPOINT, copy, limit=1)
    assert not result["passed"]
    assert {"layer_snr", "encoder_snr"} <= set(result["broken"])
    assert result["first_operation"]["layer"] in result["verdict"]


def test_another_checkpoints_artefact_is_refused(make_checkpoint, demo_artefact):
    other = make_checkpoint(form="training", dtype="float16")
    with pytest.raises(UserError, match=r"cannot be compared: .*vocabulary: checkpoint \d+, artefact \d+"):
        compare.compare(other, demo_artefact, limit=1)


def test_the_reference_runs_at_the_artefacts_resolution(demo_model):
    other, picture = compare.at_size(demo_model, 128), draw_scene(np.random.default_rng(0), [])
    assert demo_model.image_size == 256 and other.image_size == 128
    shapes = [model.embed("What is this?", picture).shape for model in (demo_model, other)]
    assert shapes[0][1] - shapes[1][1] == 16 - 4


def test_the_command(cli, demo_artefact, tmp_path, monkeypatch):
    page = tmp_path / "out" / "index.html"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "parity", "--limit", "1"])
    flags = ("--candidate", demo_artefact, "--limit", 1, "--output", page)
    answer = cli("parity", "--reference", CHECKPOINT, *flags)
    assert answer.code == 0, answer.err
    assert "encoder features" in answer.out and "MIL executor" in answer.out and "✓" in answer.out
    assert "fastvlm parity" in page.read_text()
    other = perturbed(tmp_path, f"{LAYER}.weight", 1.0)
    answer = cli("parity", "--reference", other, *flags, "--json")
    assert answer.code == 1 and answer.document["passed"] is False
    assert answer.document["broken"][0] == "layer_snr" and answer.document["first_operation"]["layer"] == LAYER


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--limit", 0, "--limit: got 0"),
        ("--reference", "nowhere", "nowhere"),
        ("--candidate", "nowhere", "nowhere"),
        ("--images", "nowhere", "--images nowhere: not a folder"),
        ("--images", "PICTURES", "cut.png"),
    ],
)
def test_unusable_input_is_one_line_and_exit_2(cli, demo_artefact, tmp_path, flag, value, message):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cut.png").write_bytes(b"\x89PNG")
    options = {"--reference": CHECKPOINT, "--candidate": demo_artefact, "--output": tmp_path / "page.html"}
    options[flag] = tmp_path / "pictures" if value == "PICTURES" else value
    answer = cli("parity", *(word for pair in options.items() for word in pair))
    (error,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert answer.code == 2 and message in error and not (tmp_path / "page.html").exists()
