"""Several resolutions in one package: each function is the single-resolution package, weights are stored once."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoders import compared_operations, counts_of, hashes, largest_rank
from PIL import Image

from benchmarks import __main__ as benchmarks
from fastvlm.common.cli import run
from fastvlm.common.errors import CheckFailed, UserError
from model_export import artefact as manifests
from model_export import contract, mil, runtime
from model_export import export as exporting
from model_export.__main__ import build_parser
from model_export.artefact import read_manifest, verify
from model_export.audit.audit import audit
from model_export.config import ExportConfig
from model_export.encoder.package import WEIGHTS, check_package, describe_package
from model_export.export import export, plan

pytestmark = pytest.mark.slow

SIZES = {"main": 128, "encode_64": 64, "encode_128": 128, "encode_192": 192}


@pytest.fixture(scope="module")
def several(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("several") / "made"
    export(plan(ExportConfig(tiny_checkpoint, target, resolutions=(64, 192))))
    return target


@pytest.fixture(scope="module")
def package(several: Path) -> Path:
    return several / contract.PACKAGE


def pixels_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((1, 3, size, size), dtype=np.float32)


def encode(package: Path, pixels: np.ndarray, function: str | None = None) -> np.ndarray:
    return mil.load(package, function_name=function).predict({contract.INPUT: pixels})[contract.OUTPUT]


# --- the package


def test_functions_and_their_interfaces(several: Path, package: Path) -> None:
    import coremltools as ct

    spec = ct.utils.load_spec(str(package))
    found = {
        function.name: [
            [list(feature.type.multiArrayType.shape) for feature in side] for side in (function.input, function.output)
        ]
        for function in spec.description.functions
    }
    assert found == {
        name: [[[1, 3, size, size]], [[1, (size // 64) ** 2, 256]]] for name, size in SIZES.items()
    } and set(spec.mlProgram.functions) == set(SIZES)
    assert spec.description.defaultFunctionName == "main" and spec.specificationVersion == 9
    texts = {function.name: function.input[0].shortDescription for function in spec.description.functions}
    assert all(f"(1, 3, {size}, {size})" in texts[name] for name, size in SIZES.items())
    document = read_manifest(several)["vision"]
    assert document["resolutions"] == [64, 128, 192] and document["functions"] == sorted(SIZES)
    assert document["image_size"] == 128 and document["tokens_per_image"] == 4
    for name, size in SIZES.items():
        assert describe_package(package, name)["inputs"] == {"images": ("float32", (1, 3, size, size))}
    with pytest.raises(UserError, match=r"encode_256.*its functions are encode_128, encode_192, encode_64, main"):
        describe_package(package, "encode_256")


def test_weights_are_stored_once(package: Path, tiny_artefact: Path) -> None:
    single = tiny_artefact / contract.PACKAGE
    assert (package / WEIGHTS).stat().st_size == (single / WEIGHTS).stat().st_size
    assert sorted(path.name for path in (package / WEIGHTS).parent.iterdir()) == ["weight.bin"]
    used = {name: {where.offset for where in weights_of(package, name)} for name in SIZES}
    assert len(used["main"]) > 40 and all(offsets == used["main"] for offsets in used.values())


def weights_of(package: Path, function: str) -> list[mil.program.BlobRef]:
    program = mil.read_package(package).functions[function]
    constants = [operation.attributes.get("val") for operation in program.block.operations]
    return [one.data for one in constants if one is not None and isinstance(one.data, mil.program.BlobRef)]


def test_each_function_is_the_single_package_bit_for_bit(
    package: Path, tiny_artefact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    expected = encode(tiny_artefact / contract.PACKAGE, pixels_of(128))
    for function in (None, "main", "encode_128"):
        np.testing.assert_array_equal(encode(package, pixels_of(128), function), expected)
    export(plan(ExportConfig(tiny_checkpoint, tmp_path / "single", image_size=192), ("vision",)))
    single = encode(tmp_path / "single" / contract.PACKAGE, pixels_of(192))
    np.testing.assert_array_equal(encode(package, pixels_of(192), "encode_192"), single)
    assert not np.array_equal(encode(package, pixels_of(192, seed=1), "encode_192"), single)


def test_every_function_is_the_graph_that_the_engine_likes(package: Path, tiny_artefact: Path) -> None:
    counts = counts_of(tiny_artefact / contract.PACKAGE)
    for function in SIZES:
        assert counts_of(package, function) == counts and largest_rank(package, function) == 4
    document = audit(package)
    assert document["passed"] and set(document["functions"]) == set(SIZES)


def test_contract_is_checked_for_every_function(package: Path) -> None:
    check_package(package, SIZES, 256)
    for wrong, message in (
        (SIZES | {"encode_192": 256}, "encode_192: inputs"),
        (SIZES | {"main": 192}, "main: inputs"),
        ({"main": 128}, "functions: got"),
        (SIZES | {"encode_256": 256}, "functions: got"),
    ):
        with pytest.raises(CheckFailed, match=message):
            check_package(package, wrong, 256)


# --- the target that it needs


def test_command_writes_the_same_bytes_and_says_that_the_target_is_newer(
    several: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["vision", "--checkpoint", str(tiny_checkpoint), "--output-dir", str(tmp_path / "again"), "--json"]
    assert run(build_parser, [*command, "--resolutions", "192", "64", "64"]) == 0
    captured = capsys.readouterr()
    assert "deployment target iOS18: several functions in one package, new in iOS18" in captured.err.splitlines()
    document = json.loads(captured.out.splitlines()[-1])
    again = hashes(tmp_path / "again" / contract.PACKAGE)
    assert again == hashes(several / contract.PACKAGE)
    for config in (document["config"], read_manifest(several)["config"]):
        assert config["minimum_deployment_target"] == "iOS18"
        assert config["newer_target"] == {"several functions in one package": "iOS18"}
    assert verify(tmp_path / "again") == [] and verify(several) == []
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


# --- running one of them


def test_library_runs_each_resolution(several: Path, tiny_artefact: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 140, 3), dtype=np.uint8))
    native = runtime.load(tiny_artefact, "executor", "torch")
    for resolution in (None, 64, 128, 192):
        model = runtime.load(several, "executor", "torch", resolution=resolution)
        size = resolution or 128
        pixels = model.preprocess(picture)
        assert model.image_size == size and pixels.shape == (1, 3, size, size)
        features = model.encode_image(pixels)
        assert features.shape == (1, (size // 64) ** 2, 256)
        function = "main" if resolution is None else f"encode_{resolution}"
        np.testing.assert_array_equal(features, encode(several / contract.PACKAGE, pixels, function))
        if size == 128:
            np.testing.assert_array_equal(features, native.encode_image(native.preprocess(picture)))
        words = model.embed("What is it?", picture).shape[1]
        assert words - (size // 64) ** 2 == native.embed("What is it?", picture).shape[1] - 4
    assert runtime.load(tiny_artefact, "executor", "torch", resolution=128).image_size == 128


@pytest.mark.parametrize("resolution", [256, 100, 0, -64])
def test_resolution_that_was_not_exported_is_refused(several: Path, tiny_artefact: Path, resolution: int) -> None:
    with pytest.raises(UserError, match=f"--resolution {resolution}: .* was exported for 64, 128, 192: choose one"):
        runtime.load(several, "executor", "torch", resolution=resolution)
    with pytest.raises(UserError, match=f"--resolution {resolution}: .* was exported for 128: .*--resolutions"):
        runtime.load(tiny_artefact, "executor", "torch", resolution=resolution)


def test_generate_at_a_resolution(several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.linear_gradient("L").save(tmp_path / "picture.png")
    command = ["generate", "--model", str(several), "--prompt", "What?", "--image-file", str(tmp_path / "picture.png")]
    command += ["--max-new-tokens", "3", "--vision", "executor", "--llm", "torch", "--compute", "as-typed", "--json"]
    answers = {}
    for resolution in (64, 192):
        assert run(build_parser, [*command, "--resolution", str(resolution)]) == 0
        answers[resolution] = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"][0]
        model = runtime.load(several, "executor", "torch", resolution=resolution)
        assert answers[resolution] == model.generate("What?", tmp_path / "picture.png", 3)
    assert run(build_parser, [*command, "--resolution", "256"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: --resolution 256: ")


def test_parity_at_a_resolution(
    several: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ["parity", "--reference", str(tiny_checkpoint), "--candidate", str(several), "--limit", "1"]
    command += ["--output", str(tmp_path / "page.html"), "--json", "--resolution"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *command])
    for resolution in (64, 192):
        code = run(benchmarks.build_parser, [*command, str(resolution)])
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        # A few tokens of a tiny random encoder do not always average to the 50 dB that are asked of a real one.
        assert code == (0 if document["passed"] else 1) and set(document["broken"]) <= {"encoder_snr"}
        assert document["metrics"]["encoder_snr"]["value"] >= 47 and document["metrics"]["layer_snr"]["value"] >= 47
        assert len(document["operations"]["layers"]) == 42 and document["operations"]["fault"] is None
    assert run(benchmarks.build_parser, [*command, "256"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --resolution 256: ")


def test_parity_looks_at_that_function(several: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The control: one function of the package reads another weight, and parity fails at its resolution alone."""
    import coremltools as ct

    copied = shutil.copytree(several, tmp_path / "copied")
    path = copied / contract.PACKAGE / "Data/com.apple.CoreML/model.mlmodel"
    spec = ct.utils.load_spec(str(copied / contract.PACKAGE))
    function = spec.mlProgram.functions["encode_64"]
    constants = {
        operation.outputs[0].name: operation.attributes["val"]
        for operation in function.block_specializations[function.opset].operations
        if operation.type == "const"
    }
    kernels = [name for name in constants if "stages_0_blocks_0_mlp_conv_conv_weight" in name]
    kernels += [name for name in constants if "stages_0_blocks_0_token_mixer_reparam_conv_weight" in name]
    biases = [name for name in constants if "stages_2_blocks" in name and "fc2_bias" in name]
    assert len(biases) == 2, list(constants)[:9]
    constants[biases[0]].blobFileValue.offset = constants[biases[1]].blobFileValue.offset
    path.write_bytes(spec.SerializeToString(deterministic=True))
    document = read_manifest(copied)
    manifests.write_manifest(copied, document)
    broken = {}
    for resolution in (64, 192, None):
        size = resolution or 128
        found = compared_operations(tiny_checkpoint, copied, pixels_of(size), resolution)
        broken[resolution] = min(float(error["snr_db"]) for error in found["layers"]) < 40
    assert broken == {64: True, 192: False, None: False}


def test_disk_for_all_parts_is_asked_for(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every resolution is written by itself before they are merged: the parts exist at once."""
    single = ExportConfig(tiny_checkpoint, tmp_path / "made")
    sizes = plan(single).sizes
    free = sum(sizes.values()) + sizes[contract.PACKAGE] + exporting._SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, free))
    assert plan(replace(single, resolutions=())).sizes == sizes
    with pytest.raises(UserError, match="GB free"):
        plan(replace(single, resolutions=(64, 192)))
