"""Several resolutions in one package: each function is the single-resolution package, weights are stored once."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import compared_operations, computed, counts_of, largest_rank
from PIL import Image

from fastvlm.common.errors import CheckFailed, UserError
from model_export import artefact as manifests
from model_export import contract, mil, runtime
from model_export import export as exporting
from model_export.artefact import read_manifest
from model_export.audit.audit import audit
from model_export.config import ExportConfig
from model_export.encoder.package import WEIGHTS, check_package, describe_package
from model_export.export import export, plan

pytestmark = pytest.mark.slow

SIZES = {"main": 128, "encode_128": 128, "encode_192": 192}  # test_compress has a smaller one


@pytest.fixture(scope="module")
def several(tiny_checkpoint: Path, shared: Any) -> Path:
    return shared("several", lambda target: export(plan(ExportConfig(tiny_checkpoint, target, resolutions=(192,)))))


@pytest.fixture(scope="module")
def package(several: Path) -> Path:
    return several / contract.PACKAGE


def pixels_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((1, 3, size, size), dtype=np.float32)


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
    assert document["resolutions"] == [128, 192] and document["functions"] == sorted(SIZES)
    assert document["image_size"] == 128 and document["tokens_per_image"] == 4
    for name, size in SIZES.items():
        assert describe_package(package, name)["inputs"] == {"images": ("float32", (1, 3, size, size))}
    check_package(package, SIZES, 256)
    with pytest.raises(CheckFailed, match="encode_192: inputs"):
        check_package(package, SIZES | {"encode_192": 256}, 256)
    with pytest.raises(UserError, match=r"encode_256.*its functions are encode_128, encode_192, main"):
        describe_package(package, "encode_256")


def test_functions_share_graph_and_weights(package: Path, tiny_artefact: Path) -> None:
    single = tiny_artefact / contract.PACKAGE
    counts = counts_of(single)
    for function in SIZES:
        assert counts_of(package, function) == counts and largest_rank(package, function) == 4
    document = audit(package)
    assert document["passed"] and set(document["functions"]) == set(SIZES)
    total = document["weights"]["bytes"]  # some scalars are each function's own
    assert all(
        one["weights"]["bytes"] <= total < 1.001 * one["weights"]["bytes"] for one in document["functions"].values()
    )
    macs = {name: one["macs"] for name, one in document["functions"].items()}
    assert macs["encode_192"] > 2 * macs["encode_128"] == 2 * macs["main"]
    assert list(audit(package, "encode_192")["functions"]) == ["encode_192"]
    with pytest.raises(UserError, match="no function 'encode_16'; it has encode_128, encode_192, main"):
        audit(package, "encode_16")
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
    expected = computed(tiny_artefact / contract.PACKAGE, pixels_of(128))
    for function in (None, "main", "encode_128"):
        np.testing.assert_array_equal(computed(package, pixels_of(128), function=function), expected)
    export(plan(ExportConfig(tiny_checkpoint, tmp_path / "single", image_size=192), ("vision",)))
    assert read_manifest(tmp_path / "single")["vision"]["tokens_per_image"] == 9
    single = computed(tmp_path / "single" / contract.PACKAGE, pixels_of(192))
    np.testing.assert_array_equal(computed(package, pixels_of(192), function="encode_192"), single)
    assert not np.array_equal(computed(package, pixels_of(192, seed=1), function="encode_192"), single)


def test_ranges_of_one_of_them(cli: Any, package: Path) -> None:
    for flags, size in (((), 128), (("--function", "encode_192"), 192)):
        document = cli("ranges", "--model", package, "--limit", 1, *flags, "--json").document
        assert document["image_size"] == size and document["function"] == (flags[1] if flags else "main")
    answer = cli("ranges", "--model", package, "--function", "three")
    assert answer.code == 2 and "no function 'three'" in answer.err and "encode_192" in answer.err


# --- running one of them


def test_library_runs_each_resolution(several: Path, tiny_artefact: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 140, 3), dtype=np.uint8))
    native = runtime.load(tiny_artefact, "executor", "torch")
    for resolution in (None, 128, 192):
        model = runtime.load(several, "executor", "torch", resolution=resolution)
        size = resolution or 128
        pixels = model.preprocess(picture)
        assert model.image_size == size and pixels.shape == (1, 3, size, size)
        features = model.encode_image(pixels)
        assert features.shape == (1, (size // 64) ** 2, 256)
        function = "main" if resolution is None else f"encode_{resolution}"
        np.testing.assert_array_equal(features, computed(several / contract.PACKAGE, pixels, function=function))
        if size == 128:
            np.testing.assert_array_equal(features, native.encode_image(native.preprocess(picture)))
        words = model.embed("What is it?", picture).shape[1]
        assert words - (size // 64) ** 2 == native.embed("What is it?", picture).shape[1] - 4
    assert runtime.load(tiny_artefact, "executor", "torch", resolution=128).image_size == 128


@pytest.mark.parametrize("resolution", [256, 0, -64])
def test_resolution_that_was_not_exported_is_refused(several: Path, tiny_artefact: Path, resolution: int) -> None:
    for folder, held in ((several, "128, 192"), (tiny_artefact, "128")):
        with pytest.raises(UserError, match=f"--resolution {resolution}: .* was exported for {held}: .*--resolutions"):
            runtime.load(folder, "executor", "torch", resolution=resolution)


def test_generate_and_parity_at_a_resolution(cli: Any, several: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").save(picture)
    ask = ["generate", several, "--prompt", "What?", "--image-file", picture, "--max-new-tokens", "3", "--json"]
    ask += ["--vision", "executor", "--llm", "torch", "--compute", "as-typed", "--resolution"]
    compare = ["parity", "--reference", tiny_checkpoint, "--candidate", several, "--limit", "1", "--json"]
    compare += ["--output", tmp_path / "page.html", "--resolution"]
    answer = cli(*ask, 192)
    model = runtime.load(several, "executor", "torch", resolution=192)
    assert answer.code == 0 and answer.document["answers"] == [model.generate("What?", picture, 3)]
    answer = cli(*compare, 192)
    # A few tokens of a tiny random encoder do not always average to the 50 dB that are asked of a real one.
    assert answer.code == (not answer.document["passed"]) and {*answer.document["broken"]} <= {"encoder_snr"}
    metrics = answer.document["metrics"]
    assert metrics["encoder_snr"]["value"] >= 47 and metrics["layer_snr"]["value"] >= 47
    assert len(answer.document["operations"]["layers"]) == 42 and answer.document["operations"]["fault"] is None
    for words in (ask, compare):
        answer = cli(*words, 256)
        assert answer.code == 2 and answer.err.splitlines()[-1].startswith("error: --resolution 256: ")


def test_parity_looks_at_that_function(several: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The control: one function of the package reads another weight, and parity fails at its resolution alone."""
    import coremltools as ct

    copied = shutil.copytree(several, tmp_path / "copied")
    path = copied / contract.PACKAGE / "Data/com.apple.CoreML/model.mlmodel"
    spec = ct.utils.load_spec(str(copied / contract.PACKAGE))
    function = spec.mlProgram.functions["encode_192"]
    constants = {
        operation.outputs[0].name: operation.attributes["val"]
        for operation in function.block_specializations[function.opset].operations
        if operation.type == "const"
    }
    biases = [name for name in constants if "stages_2_blocks" in name and "fc2_bias" in name]
    assert len(biases) == 2, list(constants)[:9]
    constants[biases[0]].blobFileValue.offset = constants[biases[1]].blobFileValue.offset
    path.write_bytes(spec.SerializeToString(deterministic=True))
    manifests.write_manifest(copied, read_manifest(copied))
    broken = {}
    for resolution in (192, 128, None):
        size = resolution or 128
        found = compared_operations(tiny_checkpoint, copied, pixels_of(size), resolution)
        broken[resolution] = min(float(error["snr_db"]) for error in found["layers"]) < 40
    assert broken == {192: True, 128: False, None: False}


def test_disk_for_all_parts_is_asked_for(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every resolution is written by itself before they are merged: the parts exist at once."""
    single = ExportConfig(tiny_checkpoint, tmp_path / "made")
    sizes = plan(single).sizes
    free = sum(sizes.values()) + sizes[contract.PACKAGE] + exporting._SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, free))
    assert plan(single).sizes == sizes
    with pytest.raises(UserError, match="free, the export needs"):
        plan(ExportConfig(tiny_checkpoint, tmp_path / "made", resolutions=(64, 192)))
