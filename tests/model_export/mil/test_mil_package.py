"""Packages, programs and inputs that cannot be run: one line each, and every unsupported operation at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
from coremltools.proto import MIL_pb2, Model_pb2

from model_export import mil

WEIGHT = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
X = np.ones((2, 16), np.float32)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "template.mlpackage"

    def build(x: Any) -> Any:
        hidden = packages.mb.linear(x=x, weight=WEIGHT, name="hidden")
        return packages.mb.relu(x=hidden, name="y")

    assert packages.save_program(path, build, {"x": X}) == ["y"]
    return path


@pytest.fixture
def package(template: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(template, tmp_path / "copy.mlpackage"))


def weights(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def edit(package: Path, change: Callable[[Any], None]) -> None:
    """Change the specification in place."""
    model = Model_pb2.Model()
    model.ParseFromString(specification(package).read_bytes())
    change(model)
    specification(package).write_bytes(model.SerializeToString())


def operations(model: Any) -> Any:
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    return block.operations


def find(model: Any, type: str) -> Any:
    return next(operation for operation in operations(model) if operation.type == type)


def refuse(package: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(mil.MILError, match=message) as caught:
        mil.load(package, **options)
    assert "\n" not in str(caught.value)


def test_the_template_runs(template: Path) -> None:
    result = mil.load(template).predict({"x": X})["y"]
    np.testing.assert_allclose(result, np.maximum(X @ WEIGHT.T, 0), rtol=1e-5)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def lead_to(package: Path, path: str) -> None:
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path
    (package / "Manifest.json").write_text(json.dumps(manifest))


def link_outside(package: Path) -> None:
    outside = package.with_name("weight.bin")
    weights(package).rename(outside)
    weights(package).symlink_to(outside)


def specification(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


MANIFESTS = [b"", b"{", b"[]", b"{}", b'{"rootModelIdentifier": "a", "itemInfoEntries": {}}']
OUTSIDE = ["../../outside", "/etc/passwd", "com.apple.CoreML/../../../outside", "a\0b"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "Manifest.json").unlink(), "no Manifest.json"),
        *((lambda p, c=content: (p / "Manifest.json").write_bytes(c), "unusable manifest") for content in MANIFESTS),
        *((lambda p, path=path: lead_to(p, path), "outside the package") for path in OUTSIDE),
        (link_outside, "outside the package"),
        (lambda p: rewrite(specification(p), lambda c: c[: len(c) // 2]), "not a Core ML specification, or truncated"),
        (lambda p: rewrite(specification(p), lambda c: b""), "expected an mlProgram"),
        (lambda p: specification(p).unlink(), "cannot read the model specification"),
        (lambda p: rewrite(weights(p), lambda c: c[:-64]), "not in the file"),
        (lambda p: rewrite(weights(p), lambda c: c[:32]), "truncated weight file"),
        (lambda p: weights(p).unlink(), "cannot read the weight file"),
    ],
)
def test_damaged_files(package: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(package)
    refuse(package, message)


def test_no_package(package: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "missing.mlpackage", "no such package")
    file = tmp_path / "file.mlpackage"
    file.write_bytes(b"")
    refuse(file, "not a folder")
    refuse(package, r"no function 'encode', it has \['main'\]", function_name="encode")
    refuse(package, "unknown compute policy 'fp64'", compute="fp64")
    refuse(package.rename(package.with_suffix(".mlmodelc")), "compiled model")


def name_weights(model: Any, name: str) -> None:
    for operation in operations(model):
        value = operation.attributes.get("val", None)
        if value is not None and value.WhichOneof("value") == "blobFileValue":
            value.blobFileValue.fileName = name


def change_opset(model: Any) -> None:
    function = model.mlProgram.functions["main"]
    function.block_specializations["CoreML99"].CopyFrom(function.block_specializations[function.opset])
    function.opset = "CoreML99"


def rename_operations(model: Any) -> None:
    find(model, "linear").type, find(model, "relu").type = "mystery", "enigma"


def declare(model: Any, part: str) -> None:
    array = getattr(model.description, part)[0].type.multiArrayType
    array.shape[:] = [7, *array.shape[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: name_weights(m, "@model_path/../../weight.bin"), "outside the package"),
        (lambda m: name_weights(m, "@model_path//etc/passwd"), "outside the package"),
        (lambda m: name_weights(m, "/etc/passwd"), "not under @model_path"),
        (lambda m: name_weights(m, "@model_path/weights/other.bin"), "cannot read the weight file"),
        (lambda m: m.neuralNetwork.SetInParent(), "the model is a neuralNetwork"),
        (change_opset, "opset CoreML99 is not supported"),
        (rename_operations, r"2 unsupported operation\(s\): hidden \(mystery, CoreML7\); y \(enigma, CoreML7\)"),
        (
            lambda m: setattr(find(m, "relu"), "type", "scaled_dot_product_attention"),
            r"y \(scaled_dot_product_attention, CoreML7\)",
        ),
        (
            lambda m: find(m, "relu").inputs["slope"].CopyFrom(find(m, "relu").inputs["x"]),
            r"y \(relu, CoreML7\): parameters not understood: slope",
        ),
        (
            lambda m: setattr(find(m, "relu").inputs["x"].arguments[0], "name", "nothing"),
            r"'y' uses undefined values \['nothing'\]",
        ),
        (
            lambda m: setattr(find(m, "linear").outputs[0].type.tensorType.dimensions[1].constant, "size", 9),
            r"hidden \(linear, .*gives \[2, 8\], declared fp32\[2, 9\]",
        ),
        (lambda m: declare(m, "input"), "input '.' is described as fp32"),
        (lambda m: declare(m, "output"), "output '.' is described as fp32"),
        (
            lambda m: setattr(m.description.output[0], "name", "features"),
            r"the description has outputs \['features'\], the program \['y'\]",
        ),
    ],
)
def test_unusable_specifications(package: Path, change: Callable[[Any], None], message: str) -> None:
    edit(package, change)
    refuse(package, message)


def test_a_declared_type_that_the_operation_does_not_give(package: Path) -> None:
    edit(package, lambda m: setattr(find(m, "linear").outputs[0].type.tensorType, "dataType", MIL_pb2.INT32))
    with pytest.raises(mil.MILError, match=r"came out as float32\[2, 8\], declared int32\[2, 8\]"):
        mil.load(package).predict({"x": X})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"inputs named \[\], expected \['x'\]"),
        ({"x": X, "z": X}, r"inputs named \['x', 'z'\]"),
        ({"x": "text"}, "str of .*, expected numbers"),
        ({"x": [[1, 2], [3]]}, "list is no array"),
        ({"x": X[:1]}, r"float32\[1, 16\], expected fp32\[2, 16\]"),
    ],
)
def test_inputs(template: Path, inputs: Any, message: str) -> None:
    executor = mil.load(template)
    with pytest.raises(mil.MILError, match=message):
        executor.predict(inputs)


def test_strided_and_read_only_inputs(template: Path) -> None:
    executor = mil.load(template)
    ramp = np.arange(32, dtype=np.float32).reshape(2, 16)
    view = np.flip(ramp, 1)
    view.flags.writeable = False
    np.testing.assert_array_equal(executor.predict({"x": view})["y"], executor.predict({"x": view.copy()})["y"])


def test_constants_and_inputs_as_outputs(tmp_path: Path) -> None:
    """In-place work must not reach a caller's array, a constant or an output that is still needed."""
    path = tmp_path / "p.mlpackage"

    def build(x: Any) -> Any:
        kept = packages.mb.add(x=x, y=x, name="kept")
        turned = packages.mb.transpose(x=kept, perm=[1, 0])
        squared = packages.mb.matmul(x=kept, y=turned)
        both = packages.mb.add(x=squared, y=packages.mb.transpose(x=squared, perm=[1, 0]), name="both")
        return kept, packages.mb.exp(x=both, name="grown"), packages.mb.relu(x=x, name="same")

    packages.save_program(path, build, {"x": X / 16})
    outputs = mil.load(path).predict({"x": X / 16})
    np.testing.assert_allclose(outputs["kept"], X / 8)
    np.testing.assert_allclose(outputs["grown"], np.exp(2 * (X / 8) @ (X / 8).T), rtol=1e-6)
    np.testing.assert_array_equal(outputs["same"], X / 16)


def test_fp16_overflow_shows(tmp_path: Path) -> None:
    path, x = tmp_path / "p.mlpackage", np.array([300.0, 2.0], np.float16)
    packages.save_program(path, lambda x: packages.mb.square(x=x, name="y"), {"x": x})
    np.testing.assert_array_equal(mil.load(path).predict({"x": x})["y"], np.array([np.inf, 4], np.float16))
