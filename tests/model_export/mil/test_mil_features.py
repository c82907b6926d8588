"""What a caller gives and gets: pictures, labels, flexible shapes, defaults, numbers of other types."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
import torch
from mil_packages import mb
from PIL import Image

from model_export import mil

import coremltools as ct  # isort: skip

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8)  # height 6, width 8
PICTURE, GRAY = Image.fromarray(COLORS), Image.fromarray(COLORS[..., 0])
HALF = Image.fromarray(RNG.uniform(-2, 2, (6, 8)).astype(np.float32))


class Function(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., mil.MILExecutor]:
    """`converted(function, example shape, inputs=..., ...)`: coremltools' conversion, loaded."""

    def convert(function: Any, shape: tuple[int, ...], **options: Any) -> mil.MILExecutor:
        traced = torch.jit.trace(Function(function).eval(), torch.rand(shape), check_trace=False)
        options = {"minimum_deployment_target": ct.target.iOS17, "compute_precision": ct.precision.FLOAT32} | options
        ct.convert(traced, skip_model_load=True, **options).save(str(tmp_path / "p.mlpackage"))
        return mil.load(tmp_path / "p.mlpackage")

    return convert


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
@pytest.mark.parametrize("precision", ["FLOAT32", "FLOAT16"])
def test_a_picture_with_scale_and_bias(converted: Any, layout: str, precision: str) -> None:
    scale, bias = 1 / 127.5, [-1.0, -0.5, 0.25]
    color = getattr(ct.colorlayout, layout)
    image = ct.ImageType("image", (1, 3, 6, 8), scale=scale, bias=bias, color_layout=color)
    executor = converted(
        lambda x: x + 1, (1, 3, 6, 8), inputs=[image], compute_precision=getattr(ct.precision, precision)
    )
    (result,) = executor.predict({"image": PICTURE}).values()
    ordered = COLORS if layout == "RGB" else COLORS[..., ::-1]
    expected = ordered.transpose(2, 0, 1)[None] * scale + np.array(bias).reshape(1, 3, 1, 1) + 1
    np.testing.assert_allclose(result, expected, rtol=1e-6 if precision == "FLOAT32" else 2e-3, atol=1e-3)
    assert np.abs(result - expected[:, ::-1]).max() > 0.5  # the control: the other order of colours


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_a_picture_as_result(converted: Any, layout: str) -> None:
    color = getattr(ct.colorlayout, layout)
    executor = converted(
        lambda x: x * 1.5 - 20, (1, 3, 6, 8), inputs=[ct.ImageType("image", (1, 3, 6, 8), color_layout=color)],
        outputs=[ct.ImageType("y", color_layout=color)],
    )  # fmt: skip
    result = executor.predict({"image": PICTURE})["y"]
    assert result.mode == "RGBA" and result.size == (8, 6)
    expected = np.clip(np.rint(COLORS.astype(np.float64) * 1.5 - 20), 0, 255)
    np.testing.assert_array_equal(np.asarray(result)[..., :3], expected)
    assert (np.asarray(result)[..., 3] == 255).all() and {0, 255} <= set(expected.flat)


def test_pictures_in_gray(converted: Any) -> None:
    layout = ct.colorlayout.GRAYSCALE
    image = [ct.ImageType("image", (1, 1, 6, 8), color_layout=layout)]
    executor = converted(
        lambda x: 255 - x, (1, 1, 6, 8), inputs=image, outputs=[ct.ImageType("y", color_layout=layout)]
    )
    result = executor.predict({"image": GRAY})["y"]
    assert result.mode == "L"
    np.testing.assert_array_equal(np.asarray(result), 255 - COLORS[..., 0])


def test_pictures_of_float16(converted: Any) -> None:
    layout = ct.colorlayout.GRAYSCALE_FLOAT16
    shapes = ct.EnumeratedShapes([(1, 1, 6, 8), (1, 1, 12, 8)])
    image = [ct.ImageType("image", shape=shapes, color_layout=layout)]
    executor = converted(lambda x: x * 2, (1, 1, 6, 8), inputs=image, outputs=[ct.ImageType("y", color_layout=layout)])
    for picture in (HALF, Image.fromarray(np.tile(np.asarray(HALF), (2, 1)))):
        result = executor.predict({"image": picture})["y"]
        assert result.mode == "F"
        np.testing.assert_array_equal(np.asarray(result), np.asarray(picture).astype(np.float16) * np.float16(2))
    with pytest.raises(mil.MILError, match=r"float16\[1, 1, 8, 6\], expected fp16\[1, 1, 6, 8\] or \[1, 1, 12, 8\]"):
        executor.predict({"image": HALF.transpose(Image.Transpose.ROTATE_90)})


def test_pictures_that_cannot_be_taken(converted: Any) -> None:
    executor = converted(lambda x: x, (1, 3, 6, 8), inputs=[ct.ImageType("image", (1, 3, 6, 8))])
    for given, message in (
        (GRAY, "a picture of mode 'L', expected a PIL.Image.Image with mode=='RGB'"),
        (COLORS, "ndarray, expected a PIL.Image.Image"),
    ):
        with pytest.raises(TypeError, match=message):
            executor.predict({"image": given})
    with pytest.raises(RuntimeError, match=r"\[1, 3, 12, 16\], expected fp32\[1, 3, 6, 8\]"):
        executor.predict({"image": PICTURE.resize((16, 12))})


# -- classifiers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [["cat", "dog", "é"], [7, -1, 2**40]])
def test_a_classifier(converted: Any, labels: list[Any]) -> None:
    executor = converted(
        lambda x: torch.softmax(x, -1), (1, 3), inputs=[ct.TensorType("x", (1, 3))],
        classifier_config=ct.ClassifierConfig(labels, predicted_feature_name="label"),
    )  # fmt: skip
    x = np.array([[0.5, 2, 2]], np.float32)
    result = executor.predict({"x": x})
    expected = np.exp(x[0]) / np.exp(x[0]).sum()
    (name,) = set(result) - {"label"}
    assert result["label"] == labels[1] and type(result["label"]) is type(labels[0])  # the first of the largest
    assert list(result[name]) == labels and list(result[name].values()) == pytest.approx(expected, rel=1e-5)


# -- shapes, defaults, numbers -----------------------------------------------------------------------------------------


def test_flexible_shapes(converted: Any) -> None:
    shape = ct.Shape((1, ct.RangeDim(2, 5), ct.RangeDim(1, 9)))
    executor = converted(lambda x: torch.softmax(x * 2, 1), (1, 3, 4), inputs=[ct.TensorType("x", shape)])
    for sizes in ((1, 2, 1), (1, 5, 9)):
        x = RNG.normal(size=sizes).astype(np.float32)
        (result,) = executor.predict({"x": x}).values()
        np.testing.assert_allclose(result, np.exp(2 * x) / np.exp(2 * x).sum(1, keepdims=True), rtol=1e-5)
    for sizes in ((1, 6, 1), (1, 1, 1), (2, 3, 1), (3, 1)):
        with pytest.raises(mil.MILError, match=r"expected fp32\[1, 2\.\.5, 1\.\.9\]"):
            executor.predict({"x": np.ones(sizes, np.float32)})


def test_enumerated_shapes(converted: Any) -> None:
    shapes = ct.EnumeratedShapes([(2, 3), (4, 3)])
    executor = converted(lambda x: x.sum(0), (2, 3), inputs=[ct.TensorType("x", shapes)])
    for rows in (2, 4):
        (result,) = executor.predict({"x": np.ones((rows, 3))}).values()
        np.testing.assert_array_equal(result, [rows] * 3)
    with pytest.raises(mil.MILError, match=r"\[3, 3\], expected fp32\[2, 3\] or \[4, 3\]"):
        executor.predict({"x": np.ones((3, 3))})


def test_an_input_with_a_default(converted: Any) -> None:
    given = ct.TensorType("x", (2, 3), default_value=np.full((2, 3), 2.5, np.float32))
    executor = converted(lambda x: x + 1, (2, 3), inputs=[given])
    (result,) = executor.predict({}).values()
    np.testing.assert_array_equal(result, np.full((2, 3), 3.5))
    (result,) = executor.predict({"x": np.zeros((2, 3))}).values()
    np.testing.assert_array_equal(result, np.ones((2, 3)))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> mil.MILExecutor:
    path = tmp_path_factory.mktemp("numbers") / "p.mlpackage"

    def build(half: Any, whole: Any) -> Any:
        return mb.add(x=half, y=np.float16(1), name="half_1"), mb.add(x=whole, y=1, name="whole_1")

    packages.save_program(path, build, {"half": np.zeros(2, np.float16), "whole": np.zeros(2, np.int32)})
    return mil.load(path)


@pytest.mark.parametrize(
    ("half", "whole"),
    [
        (np.array([1.0, 70000], np.float32), [3, 4]),
        (np.array([2, 3], np.uint8), np.array([1, 2], np.int64)),
        ([0.1, -0.0], (5.0, -6.0)),
        (torch.tensor([0.1, 1], dtype=torch.bfloat16), torch.tensor([True, False])),
        (torch.tensor([0.1, 1], requires_grad=True), np.array([1, 2], np.uint16)[::-1]),
    ],
)
def test_numbers_of_other_types(numbers: mil.MILExecutor, half: Any, whole: Any) -> None:
    found = numbers.predict({"half": half, "whole": whole})
    wide = np.array(half.tolist() if isinstance(half, torch.Tensor) else half, np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found["half_1"], wide.astype(np.float16) + np.float16(1))
    assert found["half_1"].dtype == np.float16 and found["whole_1"].dtype == np.int32
    np.testing.assert_array_equal(found["whole_1"], np.array(list(map(int, whole))) + 1)


@pytest.mark.parametrize("whole", [[0.5, 1], [2**31, 0], [np.nan, 1], [np.inf, 1], np.array([2**63, 1], np.uint64)])
def test_numbers_that_an_integer_input_does_not_have(numbers: mil.MILExecutor, whole: Any) -> None:
    with pytest.raises(mil.MILError, match=r"'whole': .* with numbers that int32 does not have"):
        numbers.predict({"half": [0, 0], "whole": whole})


def test_several_at_once_and_other_kinds_of_data(numbers: mil.MILExecutor) -> None:
    data = [{"half": [i, i], "whole": [i, 0]} for i in range(3)]
    assert [found["whole_1"].tolist() for found in numbers.predict(data)] == [[1, 1], [2, 1], [3, 1]]
    assert numbers.predict([]) == []
    for given, kind, message in (
        ((data[0],), TypeError, "must be either a dict or list of dict, but got <class 'tuple'>"),
        ([data[0], 3], TypeError, "must contain only dictionaries"),
        ({"half": [0, 0]}, RuntimeError, r"inputs named \['half'\], expected \['half', 'whole'\]"),
        ({**data[0], "more": 1}, KeyError, r"inputs named \['half', 'more', 'whole'\], expected"),
        ({"half": ["a", "b"], "whole": [0, 0]}, TypeError, "expected numbers"),
    ):
        with pytest.raises(kind, match=message) as caught:
            numbers.predict(given)
        assert isinstance(caught.value, mil.MILError)


def test_bytes_of_ios_26(tmp_path: Path) -> None:
    traced = torch.jit.trace(Function(lambda x: x * 2), torch.ones(2, 3), check_trace=False)
    kind: Any = {"dtype": ct.converters.mil.mil.types.int8}
    model = ct.convert(
        traced, inputs=[ct.TensorType("x", (2, 3), **kind)], outputs=[ct.TensorType("y", **kind)],
        minimum_deployment_target=ct.target.iOS26, skip_model_load=True,
    )  # fmt: skip
    model.save(str(tmp_path / "p.mlpackage"))
    executor = mil.load(tmp_path / "p.mlpackage")
    result = executor.predict({"x": np.array([[1, -2, 3], [60, -64, 0]])})["y"]
    np.testing.assert_array_equal(result, np.array([[2, -4, 6], [120, -128, 0]], np.int8))
    assert result.dtype == np.int8 and executor.function.opset == "CoreML9"
    with pytest.raises(mil.MILError, match="numbers that int8 does not have"):
        executor.predict({"x": np.full((2, 3), 128)})


def test_a_scalar(tmp_path: Path) -> None:
    build = lambda x: mb.squeeze(x=mb.add(x=x, y=1.0), name="y")  # noqa: E731
    packages.save_program(tmp_path / "p.mlpackage", build, {"x": np.ones(1, np.float32)})
    result = mil.load(tmp_path / "p.mlpackage").predict({"x": [2]})["y"]
    assert result.shape == () and result == 3


def test_what_a_package_says_of_itself(numbers: mil.MILExecutor) -> None:
    assert numbers.input_description == {"half": "", "whole": ""}
    assert list(numbers.output_description) == ["half_1", "whole_1"]
    assert numbers.user_defined_metadata["com.github.apple.coremltools.version"] == ct.__version__
    assert [item.name for item in numbers.get_spec().description.input] == ["half", "whole"]
    assert numbers.function_name == "main"


# -- models that are no ML program -------------------------------------------------------------------------------------


def test_other_models_are_refused(tmp_path: Path) -> None:
    from coremltools.models.datatypes import Array
    from coremltools.models.neural_network import NeuralNetworkBuilder

    builder = NeuralNetworkBuilder([("x", Array(3))], [("y", Array(3))])
    builder.add_activation("a", "RELU", "x", "y")
    ct.models.MLModel(builder.spec, skip_model_load=True).save(str(tmp_path / "old.mlmodel"))
    ct.models.MLModel(builder.spec, skip_model_load=True).save(str(tmp_path / "old.mlpackage"))
    (tmp_path / "x.mlmodelc").mkdir()
    for name, message in (
        ("old.mlmodel", "an .mlmodel holds a neural network or another older model; expected an .mlpackage"),
        ("old.mlpackage", "the model is a neuralNetwork, expected an mlProgram"),
        ("x.mlmodelc", "a compiled model"),
    ):
        with pytest.raises(mil.MILError, match=message) as caught:
            mil.load(tmp_path / name)
        assert "\n" not in str(caught.value)
