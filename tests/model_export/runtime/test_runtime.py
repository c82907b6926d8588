"""Running an artefact: from its bytes alone, the same model as the checkpoint, and only on the runner asked for."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastvlm
from fastvlm.common.errors import UserError
from fastvlm.model.surface import FastVLM
from model_export import contract, mil, runtime
from model_export.config import ExportConfig
from model_export.export import export, plan
from tests.helpers import snr_db


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((300, 220))


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> FastVLM:
    return fastvlm.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def portable(tiny_artefact: Path) -> FastVLM:
    return runtime.load(tiny_artefact, vision="executor", llm="torch")


def test_same_model_as_the_checkpoint(reference: FastVLM, portable: FastVLM, picture: Image.Image) -> None:
    pixels = portable.preprocess(picture)
    np.testing.assert_array_equal(pixels, reference.preprocess(picture))
    features = portable.encode_image(pixels)
    assert features.shape == (1, 4, 256) and features.dtype == np.float32
    assert snr_db(reference.encode_image(pixels), features) >= 50
    assert snr_db(reference.project(features), portable.project(features)) >= 50
    expected = reference.logits("What is it?", picture)
    assert snr_db(expected, portable.logits("What is it?", picture)) >= 40
    assert snr_db(expected, portable.logits("What is it?", picture.rotate(90))) < 40  # the picture does matter
    assert portable.runners["vision"] == "MIL executor (as-typed)"
    assert portable.runners["language"].startswith("PyTorch") and "MLX float16" in portable.runners["language"]


def test_runs_from_the_artefacts_bytes_alone(
    tiny_checkpoint: Path, tiny_artefact: Path, tmp_path: Path, picture: Image.Image
) -> None:
    moved, away = shutil.copytree(tiny_artefact, tmp_path / "moved"), tiny_checkpoint.rename(tmp_path / "away")
    try:
        model = runtime.load(moved)
        assert model.image_token_id == model.tokenizer.convert_tokens_to_ids("<image>")
        ids = model.language.logits(np.zeros((1, 1, 64), np.float32)).shape[2]
        assert model.logits("hello", picture).shape[2] == ids
    finally:
        away.rename(tiny_checkpoint)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs here")
def test_coreml_is_refused_off_a_mac(tiny_artefact: Path) -> None:
    with pytest.raises(UserError, match="macOS only: use --vision executor"):
        runtime.load(tiny_artefact, vision="coreml")
    assert "MIL executor" in runtime.load(tiny_artefact).runners["vision"]


@pytest.mark.skipif(sys.platform != "darwin", reason="needs Core ML and the Neural Engine: run `make test` on a Mac")
def test_coreml_and_mlx_give_the_same_model(tiny_artefact: Path, reference: FastVLM, picture: Image.Image) -> None:
    model = runtime.load(tiny_artefact)
    assert model.runners["vision"] == "Core ML (CPU_AND_NE)" and model.runners["language"].startswith("MLX")
    pixels = model.preprocess(picture)
    assert snr_db(reference.encode_image(pixels), model.encode_image(pixels)) >= 40
    assert snr_db(reference.logits("What is it?", picture), model.logits("What is it?", picture)) >= 30


def test_executor_policy_is_chosen_and_named(tiny_artefact: Path, portable: FastVLM, picture: Image.Image) -> None:
    exact = runtime.ExecutorVision(tiny_artefact, "float32")
    assert exact.name == "MIL executor (float32)"
    pixels = portable.preprocess(picture)
    assert not np.array_equal(exact.encode(pixels), portable.encode_image(pixels))
    with pytest.raises(UserError, match="policy"):
        runtime.ExecutorVision(tiny_artefact, "float64")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"vision": "gpu"}, "auto, coreml, executor"),
        ({"vision": "", "llm": "torch"}, "auto, coreml, executor"),
        ({"llm": "coreml"}, "auto, mlx, torch"),
        ({"vision": "executor", "units": "ALL"}, "--compute-units ALL"),  # would do nothing
        ({"vision": "executor", "units": "TPU"}, "CPU_AND_NE"),
    ],
)
def test_unusable_options_are_refused(tiny_artefact: Path, options: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        runtime.load(tiny_artefact, **options)  # type: ignore[arg-type]


def test_artefact_that_is_not_whole_is_refused(tiny_artefact: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_artefact, tmp_path / "copy")
    (copied / contract.TOKENIZER).unlink()
    with (copied / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"model\.safetensors: changed.*tokenizer\.json: missing"):
        runtime.load(copied)
    with pytest.raises(UserError, match="expected an artefact"):
        runtime.load(tmp_path)


def test_one_half_alone_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export(plan(ExportConfig(tiny_checkpoint, tmp_path / "half"), ("llm",)))
    with pytest.raises(UserError, match="no vision"):
        runtime.load(tmp_path / "half")


def test_damaged_package_is_refused_in_a_line(tiny_artefact: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_artefact, tmp_path / "copy")
    path = copied / contract.PACKAGE / "Data" / "com.apple.CoreML" / "model.mlmodel"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError) as error:
        runtime.load(copied)
    assert isinstance(error.value.__cause__, mil.MILError) and "\n" not in str(error.value)


def test_generate_streams_and_says_what_ran(
    cli: Any, tiny_artefact: Path, tmp_path: Path, picture: Image.Image
) -> None:
    picture.save(tmp_path / "picture.png")
    words = ["generate", tiny_artefact, "--prompt", "What is it?", "--max-new-tokens", "3", "--vision", "executor"]
    words += ["--llm", "torch", "--compute", "as-typed", "--image-file", tmp_path / "picture.png"]
    answer = cli(*words)
    assert answer.code == 0 and "vision: MIL executor" in answer.err and "language: PyTorch" in answer.err
    model = runtime.load(tiny_artefact, "executor", "torch")
    assert answer.out.strip() == model.generate("What is it?", picture, 3).strip()
    answer = cli(*words, "--image-file", tmp_path / "picture.png")
    assert answer.code == 0 and "not trained for it" in answer.err
