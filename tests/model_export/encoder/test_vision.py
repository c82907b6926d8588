"""The vision encoder's package: what Core ML will read, and that its bytes compute the checkpoint's encoder."""

import datetime
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data import pictures
from fastvlm.data.preprocessing import read_preprocessor
from fastvlm.model.build import encoder
from model_export import contract, mil
from model_export.artefact import read_manifest
from model_export.config import ExportConfig
from model_export.encoder import fp16, vision
from model_export.encoder.coreml import coremltools
from model_export.encoder.package import SPECIFICATION, WEIGHTS, check_package, describe_package, finish_package
from model_export.encoder.vision import PackageNotes, Pictures, _power_of_ten_above, export_vision

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(3).random((1, 3, 128, 128), dtype=np.float32)


def drawn(checkpoint: Checkpoint) -> Pictures:
    """What an export without `--calibration-data` measures on."""
    return lambda size: pictures.pixels(read_preprocessor(checkpoint.path), size)


def exported(
    folder: Path, target: Path, notes: PackageNotes | None = None, output: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """`export_vision` of a checkpoint folder to the package `target`."""
    checkpoint = open_checkpoint(folder)
    config = ExportConfig(folder, output or target.with_name("out"), **settings)
    return export_vision(checkpoint, config, target, drawn(checkpoint), notes)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, pixels: np.ndarray) -> np.ndarray:
    """The oracle: the unfolded encoder, in float64."""
    model = encoder(open_checkpoint(tiny_checkpoint), torch.float32).double()
    with torch.no_grad():
        return model.forward_features(torch.from_numpy(pixels).double()).flatten(2).transpose(1, 2).numpy()


def snr_db(expected: np.ndarray, actual: np.ndarray) -> float:
    noise = np.sum((expected - actual) ** 2)
    return float(10 * np.log10(np.sum(expected**2) / noise))


def computed(package: Path, pixels: np.ndarray, compute: str = "as-typed") -> np.ndarray:
    return mil.load(package, compute=compute).predict({contract.INPUT: pixels})[contract.OUTPUT]


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


def test_real_app_shape_is_what_the_contract_says() -> None:
    assert contract.output_shape(1024, 3072) == contract.APP_OUTPUT_SHAPE


def test_package_holds_neither_date_nor_path(tiny_artefact: Path) -> None:
    package = tiny_artefact / contract.PACKAGE
    files = sorted(path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file())
    assert files == [SPECIFICATION.as_posix(), WEIGHTS.as_posix(), "Manifest.json"]
    text = (package / SPECIFICATION).read_bytes()
    assert b"conversion_date" not in text and str(datetime.date.today()).encode() not in text
    assert b"/tmp" not in text and str(Path.home()).encode() not in text


def test_folded_graph_has_no_normalization_but_layer_norm(tiny_artefact: Path) -> None:
    facts = describe_package(tiny_artefact / contract.PACKAGE)
    assert "batch_norm" not in facts["operations"] and facts["operations"]["layer_norm"] == 2
    assert facts["value_dtypes"] == {"float16": sum(facts["operations"].values()) - 1, "float32": 1}


def test_saved_bytes_compute_the_encoder(tiny_artefact: Path, pixels: np.ndarray, expected: np.ndarray) -> None:
    assert snr_db(expected, computed(tiny_artefact / contract.PACKAGE, pixels)) >= 50


def test_one_flipped_weight_byte_shows(
    tiny_artefact: Path, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    package = shutil.copytree(tiny_artefact / contract.PACKAGE, tmp_path / contract.PACKAGE)
    data = bytearray((package / WEIGHTS).read_bytes())
    data[129] ^= 0x08  # in the first weight's exponent: 64 bytes of header, 64 of the blob's, then its values
    (package / WEIGHTS).write_bytes(data)
    assert not snr_db(expected, computed(package, pixels)) >= 50


@pytest.mark.parametrize(("target", "specification"), [("iOS15", 6), ("iOS16", 7), ("iOS18", 9)])
def test_every_deployment_target(
    tiny_checkpoint: Path, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path, target: str, specification: int
) -> None:
    facts = exported(tiny_checkpoint, tmp_path / contract.PACKAGE, minimum_deployment_target=target)
    assert facts["specification_version"] == specification
    assert facts["fold"]["relative_error_below"] <= facts["fold"]["tolerance"]
    assert snr_db(expected, computed(tmp_path / contract.PACKAGE, pixels)) >= 50


def test_float32_program_and_other_image_size(
    tiny_checkpoint: Path, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    settings = {"compute_precision": "float32", "compute_units": "CPU_AND_GPU"}
    facts = exported(tiny_checkpoint, tmp_path / contract.PACKAGE, **settings)
    assert "fp16" not in facts and set(facts["value_dtypes"]) == {"float32"}
    assert snr_db(expected, computed(tmp_path / contract.PACKAGE, pixels, "float32")) >= 100
    with pytest.raises(CheckFailed, match="float32 in a float16 program"):
        check_package(tmp_path / contract.PACKAGE, {"main": 128}, 256)
    check_package(tmp_path / contract.PACKAGE, {"main": 128}, 256, None)

    facts = exported(tiny_checkpoint, tmp_path / "small.mlpackage", image_size=192)
    assert facts["tokens_per_image"] == 9
    assert describe_package(tmp_path / "small.mlpackage")["inputs"]["images"] == ("float32", (1, 3, 192, 192))
    assert {path.name for path in tmp_path.iterdir()} == {contract.PACKAGE, "small.mlpackage"}  # nothing temporary left


@pytest.mark.parametrize(("size", "channels", "what"), [(192, 256, "inputs"), (128, 255, "outputs")])
def test_other_interface_is_refused(tiny_artefact: Path, size: int, channels: int, what: str) -> None:
    with pytest.raises(CheckFailed, match=what):
        check_package(tiny_artefact / contract.PACKAGE, {"main": size}, channels)


def test_other_functions_or_precision_are_refused(tiny_artefact: Path) -> None:
    package = tiny_artefact / contract.PACKAGE
    check_package(package, {"main": 128}, 256)
    with pytest.raises(CheckFailed, match=r"functions: got \['main'\], expected \['encode_128', 'main'\]"):
        check_package(package, {"main": 128, "encode_128": 128}, 256)
    with pytest.raises(CheckFailed, match="operations are float16 in a float32 program"):
        check_package(package, {"main": 128}, 256, None)
    with pytest.raises(CheckFailed, match=r"functions: .*; .*inputs: .*; .*outputs: "):  # every fault at once
        check_package(package, {"main": 192, "other": 128}, 256)


def test_damaged_or_foreign_package_is_refused(tiny_artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        describe_package(tmp_path)
    package = shutil.copytree(tiny_artefact / contract.PACKAGE, tmp_path / contract.PACKAGE)
    (package / SPECIFICATION).write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="not a Core ML specification"):
        describe_package(package)
    (package / SPECIFICATION).write_bytes(b"")
    with pytest.raises(UserError, match="not an ML program"):
        describe_package(package)


def test_finishing_twice_changes_nothing(tiny_artefact: Path, tmp_path: Path) -> None:
    package = shutil.copytree(tiny_artefact / contract.PACKAGE, tmp_path / contract.PACKAGE)
    spec = coremltools().utils.load_spec(str(package))
    metadata = spec.description.metadata
    spec.description.metadata.userDefined["com.github.apple.coremltools.conversion_date"] = "2020-01-01"
    (package / SPECIFICATION).write_bytes(spec.SerializeToString())
    description = {
        "short_description": metadata.shortDescription,
        "author": metadata.author,
        "licence": metadata.license,
        "version": metadata.versionString,
        **{feature.name: feature.shortDescription for feature in (*spec.description.input, *spec.description.output)},
    }
    finish_package(package, description)
    for name in (SPECIFICATION, Path("Manifest.json")):
        assert (package / name).read_bytes() == (tiny_artefact / contract.PACKAGE / name).read_bytes()


def test_weight_beyond_float16_is_brought_into_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its power of two coremltools would leave its operation in float32, silently: the export fails on that."""
    from safetensors.torch import load_file, save_file

    from fastvlm.checkpoint import naming

    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    stored = open_checkpoint(folder).tensors
    mlp = {
        name: stored[f"{naming.VISION}stages.0.blocks.0.mlp.{name}"].source
        for name in ("fc1.weight", "fc1.bias", "fc2.weight")
    }
    tensors = {key: value.float() for key, value in tensors.items()}
    tensors[mlp["fc1.weight"]][0] = tensors[mlp["fc1.bias"]][0] = 0  # what the large weight multiplies
    tensors[mlp["fc2.weight"]][0, 0] = 1e7
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    facts = exported(folder, tmp_path / "ours.mlpackage", PackageNotes("pad"))
    assert facts["fp16"]["layer_exponents"].keys() == {"stages.0.blocks.0.mlp.fc2"}
    monkeypatch.setattr("model_export.encoder.fp16.choose", lambda fastvit, ranges: fp16.flow(fastvit))
    with pytest.raises(CheckFailed, match="float32 in a float16 program"):
        exported(folder, tmp_path / contract.PACKAGE, PackageNotes("pad"))


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
    notes = PackageNotes("center_crop", read_manifest(tiny_artefact)["sources"]["sha256"])
    exported(tiny_checkpoint, tmp_path / "full.mlpackage", notes, tmp_path)
    for name in (SPECIFICATION, WEIGHTS):
        assert (tmp_path / "full.mlpackage" / name).read_bytes() == (
            tiny_artefact / contract.PACKAGE / name
        ).read_bytes()


def test_power_of_ten_above() -> None:
    assert [_power_of_ten_above(x) for x in (0.0, 2.3e-14, 1e-13, 5.0)] == [0.0, 1e-13, 1e-13, 10.0]


@pytest.mark.slow
def test_import_noise_is_kept_from_the_user() -> None:
    """With the control: the bare import of coremltools does print, which is why there is something to keep."""
    quiet, plain = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for code in ("from model_export.encoder.coreml import coremltools; coremltools()", "import coremltools")
    )
    assert quiet.stdout == quiet.stderr == ""
    if sys.platform != "darwin":
        assert "Failed to load _MLModelProxy" in plain.stderr
