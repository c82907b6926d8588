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
    path = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = Model_pb2.Model()
    model.ParseFromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())


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


def test_no_package(package: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "missing.mlpackage", "no such package")
    file = tmp_path / "file.mlpackage"
    file.write_bytes(b"")
    refuse(file, "not a folder")
    (package / "Manifest.json").unlink()
    refuse(package, "no Manifest.json")


def test_compiled_model(package: Path) -> None:
    refuse(package.rename(package.with_suffix(".mlmodelc")), "compiled model")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"rootModelIdentifier": "a", "itemInfoEntries": {}}'])
def test_unusable_manifest(package: Path, content: bytes) -> None:
    (package / "Manifest.json").write_bytes(content)
    refuse(package, "unusable manifest")


@pytest.mark.parametrize("path", ["../../outside", "/etc/passwd", "com.apple.CoreML/../../../outside", "a\0b"])
def test_manifest_does_not_lead_outside(package: Path, path: str) -> None:
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path
    (package / "Manifest.json").write_text(json.dumps(manifest))
    refuse(package, "outside the package")


def test_a_symbolic_link_does_not_lead_outside(package: Path, tmp_path: Path) -> None:
    outside = tmp_path / "weight.bin"
    weights(package).rename(outside)
    weights(package).symlink_to(outside)
    refuse(package, "outside the package")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("@model_path/../../weight.bin", "outside the package"),
        ("@model_path//etc/passwd", "outside the package"),
        ("/etc/passwd", "not under @model_path"),
        ("@model_path/weights/other.bin", "cannot read the weight file"),
    ],
)
def test_weight_file_name(package: Path, name: str, message: str) -> None:
    def change(model: Any) -> None:
        for operation in operations(model):
            value = operation.attributes.get("val", None)
            if value is not None and value.WhichOneof("value") == "blobFileValue":
                value.blobFileValue.fileName = name

    edit(package, change)
    refuse(package, message)


def test_specification(package: Path) -> None:
    path = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refuse(package, "not a Core ML specification, or truncated")
    path.write_bytes(b"")
    refuse(package, "expected an mlProgram")
    path.unlink()
    refuse(package, "cannot read the model specification")


def test_neural_network(package: Path) -> None:
    edit(package, lambda model: model.neuralNetwork.SetInParent())
    refuse(package, "the model is a neuralNetwork")


def test_weight_file(package: Path) -> None:
    content = weights(package).read_bytes()
    weights(package).write_bytes(content[:-64])
    refuse(package, "not in the file")
    weights(package).write_bytes(content[:32])
    refuse(package, "truncated weight file")
    weights(package).unlink()
    refuse(package, "cannot read the weight file")


def test_unknown_function_and_policy(package: Path) -> None:
    refuse(package, r"no function 'encode', it has \['main'\]", function_name="encode")
    refuse(package, "unknown compute policy 'fp64'", compute="fp64")


def test_unknown_opset(package: Path) -> None:
    def change(model: Any) -> None:
        function = model.mlProgram.functions["main"]
        function.block_specializations["CoreML99"].CopyFrom(function.block_specializations[function.opset])
        function.opset = "CoreML99"

    edit(package, change)
    refuse(package, "opset CoreML99 is not supported")


def test_every_unsupported_operation_is_listed(package: Path) -> None:
    def change(model: Any) -> None:
        find(model, "linear").type = "mystery"
        find(model, "relu").type = "enigma"

    edit(package, change)
    refuse(package, r"2 unsupported operation\(s\): hidden \(mystery, CoreML7\); y \(enigma, CoreML7\)")


def test_an_operation_of_a_later_opset_is_unsupported(package: Path) -> None:
    edit(package, lambda model: setattr(find(model, "relu"), "type", "scaled_dot_product_attention"))
    refuse(package, r"y \(scaled_dot_product_attention, CoreML7\)")


def test_unknown_and_unusable_parameters(package: Path) -> None:
    def change(model: Any) -> None:
        find(model, "relu").inputs["slope"].CopyFrom(find(model, "relu").inputs["x"])

    edit(package, change)
    refuse(package, r"y \(relu, CoreML7\): parameters not understood: slope")


def test_undefined_value(package: Path) -> None:
    edit(package, lambda model: setattr(find(model, "relu").inputs["x"].arguments[0], "name", "nothing"))
    refuse(package, r"'y' uses undefined values \['nothing'\]")


def test_a_declared_shape_that_the_operation_does_not_give(package: Path) -> None:
    def change(model: Any) -> None:
        find(model, "linear").outputs[0].type.tensorType.dimensions[1].constant.size = 9

    edit(package, change)
    refuse(package, r"hidden \(linear, .*gives \[2, 8\], declared fp32\[2, 9\]")


def test_a_declared_type_that_the_operation_does_not_give(package: Path) -> None:
    def change(model: Any) -> None:
        find(model, "linear").outputs[0].type.tensorType.dataType = MIL_pb2.INT32

    edit(package, change)
    with pytest.raises(mil.MILError, match=r"came out as float32\[2, 8\], declared int32\[2, 8\]"):
        mil.load(package).predict({"x": X})


@pytest.mark.parametrize("part", ["input", "output"])
def test_a_description_that_contradicts_the_program(package: Path, part: str) -> None:
    array = lambda model: getattr(model.description, part)[0].type.multiArrayType  # noqa: E731
    edit(
        package,
        lambda model: array(model).shape.__setitem__(0, 7) if array(model).shape else array(model).shape.extend([7]),
    )
    refuse(package, f"{part} '.' is described as fp32")


def test_a_described_name_that_the_program_lacks(package: Path) -> None:
    edit(package, lambda model: setattr(model.description.output[0], "name", "features"))
    refuse(package, r"the description has outputs \['features'\], the program \['y'\]")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"inputs named \[\], expected \['x'\]"),
        ({"x": X, "z": X}, r"inputs named \['x', 'z'\]"),
        ({"x": X.tolist()}, "list, expected a numpy array"),
        ({"x": X[:1]}, r"float32\[1, 16\], expected fp32\[2, 16\]"),
        ({"x": X.astype(np.float64)}, r"float64\[2, 16\], expected"),
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
