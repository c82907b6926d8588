"""The vision encoder's package: what Core ML will read, and that its bytes compute the checkpoint's encoder."""

import datetime
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import computed, exported, float64_features

from fastvlm.common.errors import CheckFailed, UserError
from model_export import contract
from model_export.artefact import read_manifest
from model_export.encoder import vision
from model_export.encoder.coreml import coremltools
from model_export.encoder.package import SPECIFICATION, WEIGHTS, check_package, describe_package
from model_export.encoder.vision import _power_of_ten_above
from tests.helpers import snr_db

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, pixels: np.ndarray) -> np.ndarray:
    return float64_features(tiny_checkpoint, pixels)


def test_package_opens_in_coremltools_with_the_apps_interface(tiny_artefact: Path) -> None:
    package = tiny_artefact / contract.PACKAGE
    spec = coremltools().utils.load_spec(str(package))
    arrays = {f.name: f.type.multiArrayType for f in (*spec.description.input, *spec.description.output)}
    assert {name: list(array.shape) for name, array in arrays.items()} == {
        "images": [1, 3, 128, 128],
        "image_features": [1, 4, 256],
    }
    assert all(array.dataType == array.FLOAT32 for array in arrays.values())
    model = coremltools().models.MLModel(str(package), skip_model_load=True)
    assert model.short_description.startswith("FastVLM") and model.license and model.author and model.version
    assert model.user_defined_metadata["fastvlm.image_strategy"] == "center_crop"
    assert model.user_defined_metadata["fastvlm.compute_units"] == "CPU_AND_NE"
    assert len(model.user_defined_metadata["fastvlm.source_sha256"]) == 64


def test_package_holds_neither_date_nor_path(tiny_artefact: Path) -> None:
    package = tiny_artefact / contract.PACKAGE
    files = sorted(path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file())
    assert files == [SPECIFICATION.as_posix(), WEIGHTS.as_posix(), "Manifest.json"]
    text = (package / SPECIFICATION).read_bytes()
    assert b"conversion_date" not in text and str(datetime.date.today()).encode() not in text
    assert b"/tmp" not in text and str(Path.home()).encode() not in text


def test_saved_bytes_compute_the_encoder(
    tiny_artefact: Path, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    """With the control: one flipped byte of a weight shows."""
    assert contract.output_shape(1024, 3072) == contract.APP_OUTPUT_SHAPE
    assert snr_db(expected, computed(tiny_artefact / contract.PACKAGE, pixels)) >= 50
    package = shutil.copytree(tiny_artefact / contract.PACKAGE, tmp_path / contract.PACKAGE)
    data = bytearray((package / WEIGHTS).read_bytes())
    data[129] ^= 0x08  # in the first weight's exponent: 64 bytes of header, 64 of the blob's, then its values
    (package / WEIGHTS).write_bytes(data)
    assert not snr_db(expected, computed(package, pixels)) >= 50


@pytest.mark.parametrize(("target", "specification"), [("iOS15", 6), ("iOS18", 9)])
def test_every_deployment_target(
    tiny_checkpoint: Path, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path, target: str, specification: int
) -> None:
    facts = exported(tiny_checkpoint, tmp_path / contract.PACKAGE, minimum_deployment_target=target)
    assert facts["specification_version"] == specification
    assert facts["fold"]["relative_error_below"] <= facts["fold"]["tolerance"]
    assert snr_db(expected, computed(tmp_path / contract.PACKAGE, pixels)) >= 50


def test_float32_program(tiny_checkpoint: Path, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    settings = {"compute_precision": "float32", "compute_units": "CPU_AND_GPU"}
    facts = exported(tiny_checkpoint, tmp_path / contract.PACKAGE, **settings)
    assert "fp16" not in facts and set(facts["value_dtypes"]) == {"float32"}
    assert snr_db(expected, computed(tmp_path / contract.PACKAGE, pixels, "float32")) >= 100
    with pytest.raises(CheckFailed, match="float32 in a float16 program"):
        check_package(tmp_path / contract.PACKAGE, {"main": 128}, 256)
    check_package(tmp_path / contract.PACKAGE, {"main": 128}, 256, None)
    assert [path.name for path in tmp_path.iterdir()] == [contract.PACKAGE]  # nothing temporary left


@pytest.mark.parametrize(
    ("sizes", "channels", "float32", "faults"),
    [
        ({"main": 192}, 256, (), "inputs: got"),
        ({"main": 128}, 255, (), "outputs: got"),
        ({"main": 128, "encode_128": 128}, 256, (), r"functions: got \['main'\], expected \['encode_128', 'main'\]"),
        ({"main": 128}, 256, None, "operations are float16 in a float32 program"),
        ({"main": 192, "other": 128}, 256, (), r"functions: .*; .*inputs: .*; .*outputs: "),  # every fault at once
    ],
)
def test_other_interface_or_precision_is_refused(
    tiny_artefact: Path, sizes: dict[str, int], channels: int, float32: Any, faults: str
) -> None:
    check_package(tiny_artefact / contract.PACKAGE, {"main": 128}, 256)  # the control
    with pytest.raises(CheckFailed, match=faults):
        check_package(tiny_artefact / contract.PACKAGE, sizes, channels, float32)


def test_damaged_or_foreign_package_is_refused(tiny_artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Manifest"):
        describe_package(tmp_path)
    package = shutil.copytree(tiny_artefact / contract.PACKAGE, tmp_path / contract.PACKAGE)
    (package / SPECIFICATION).write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="not a Core ML specification"):
        describe_package(package)
    (package / SPECIFICATION).write_bytes(b"")
    with pytest.raises(UserError, match="expected an mlProgram"):
        describe_package(package)


def test_broken_fold_is_not_exported(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm.model import fold

    correct = fold._fold_layer_scale
    monkeypatch.setattr(fold, "_fold_layer_scale", lambda *args: None)
    with pytest.raises(CheckFailed):
        exported(tiny_checkpoint, tmp_path / "a.mlpackage", output=tmp_path)
    assert correct is not fold._fold_layer_scale and not (tmp_path / "a.mlpackage").exists()


def test_shortened_pipeline_gives_coremltools_own_program(
    tiny_checkpoint: Path, tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "_PASSES", set(coremltools().PassPipeline().passes))
    source = read_manifest(tiny_artefact)["sources"]["sha256"]
    exported(tiny_checkpoint, tmp_path / "full.mlpackage", source, tmp_path)
    for name in (SPECIFICATION, WEIGHTS):
        assert (tmp_path / "full.mlpackage" / name).read_bytes() == (
            tiny_artefact / contract.PACKAGE / name
        ).read_bytes()


def test_power_of_ten_above() -> None:
    assert [_power_of_ten_above(x) for x in (0.0, 2.3e-14, 1e-13, 5.0)] == [0.0, 1e-13, 1e-13, 10.0]
