"""coremltools' own MLModel, and its tools that predict, after `mil.install()`."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
import torch
from mil_packages import mb

from model_export import mil
from model_export.mil import dropin as module

import coremltools as ct  # isort: skip
from coremltools.models import model as theirs  # isort: skip

pytestmark = pytest.mark.skipif(theirs._MLModelProxy is not None, reason="Core ML is here")
X = np.array([1, -2, 3], np.float32)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(theirs, "_MLModelProxy", None)
    monkeypatch.setattr(theirs, "_macos_version", theirs._macos_version)
    monkeypatch.setattr(theirs.MLModel, "make_state", theirs.MLModel.make_state)
    monkeypatch.setattr(module, "_said", False)
    mil.install()
    yield


@pytest.fixture
def package(tmp_path: Path) -> str:
    def build(x: Any) -> Any:
        return mb.relu(x=mb.mul(x=x, y=2.0, name="doubled"), name="y")

    packages.save_program(tmp_path / "p.mlpackage", build, {"x": X})
    return str(tmp_path / "p.mlpackage")


def test_without_it_nothing_predicts(package: str) -> None:
    with pytest.raises(Exception, match="only supported on macOS"):
        ct.models.MLModel(package).predict({"x": X})


def test_predict_says_once_what_ran(installed: None, package: str, capfd: pytest.CaptureFixture[str]) -> None:
    mil.install()  # again: the same
    model = ct.models.MLModel(package)
    assert "executor" not in capfd.readouterr().err
    np.testing.assert_array_equal(model.predict({"x": X})["y"], [2, 0, 6])
    np.testing.assert_array_equal(model.predict([{"x": X}, {"x": -X}])[1]["y"], [0, 4, 0])
    said = [line for line in capfd.readouterr().err.splitlines() if "executor" in line]
    assert said == [
        "coremltools MLModel: predictions are run by fastvlm's executor in PyTorch (as-typed), not by Core ML"
    ]
    assert model.load_duration_in_nano_seconds > 0 and model.last_predict_duration_in_nano_seconds > 0
    with pytest.raises(KeyError, match="does not match any of the model input name"):  # coremltools' own check
        model.predict({"z": X})
    with pytest.raises(RuntimeError, match=r"float32\[1\], expected fp32\[3\]"):
        model.predict({"x": X[:1]})


def test_errors_begin_as_core_mls_do(installed: None, tmp_path: Path) -> None:
    """Those that coremltools' own tests expect; the executor's own line follows."""

    def predict(x: Any, **options: Any) -> Any:
        traced = torch.jit.trace(torch.nn.ReLU(), torch.zeros(2, 3), check_trace=False)
        return ct.convert(traced, inputs=[ct.TensorType("x", **options)]).predict({"x": np.ones(x, np.float32)})

    ranges = {"shape": ct.Shape((ct.RangeDim(2, 5), 3))}
    enumerated = {"shape": ct.EnumeratedShapes([(2, 3), (4, 3)])}
    assert predict((5, 3), **ranges) and predict((4, 3), **enumerated) and predict((2, 3), shape=(2, 3))
    for size, options, words in (
        ((6, 3), ranges, r"Size \(6\) of dimension \(0\) is not in allowed range \(2\.\.5\): .*expected fp32"),
        ((3, 3), enumerated, r"MultiArray Shape \(3 x 3\) was not in enumerated set of allowed shapes: "),
        ((3, 3), {"shape": (2, 3)}, r"MultiArray shape \(3 x 3\) does not match the shape \(2 x 3\) specified in"),
    ):
        with pytest.raises(RuntimeError, match=f"^{words}"):
            predict(size, **options)

    def build(x: Any, indices: Any) -> Any:
        return mb.gather(x=x, indices=indices, validate_indices=True)

    indices = np.array([0, 1], np.int32)
    packages.save_program(tmp_path / "gather.mlpackage", build, {"x": X, "indices": indices})
    model = ct.models.MLModel(str(tmp_path / "gather.mlpackage"))
    assert model.predict({"x": X, "indices": indices})
    with pytest.raises(RuntimeError, match=r"^Unable to compute the prediction using ML Program: operation 'gather"):
        model.predict({"x": X, "indices": indices + 2})
    with pytest.raises(RuntimeError, match=r"^inputs named"):  # our own words, where nobody cites Core ML's
        model.predict({"x": X})


def test_a_model_that_was_just_converted_keeps_its_states(installed: None) -> None:
    traced = torch.jit.trace(packages.Sum().eval(), torch.zeros(3), check_trace=False)
    total = ct.StateType(wrapped_type=ct.TensorType(shape=(3,), dtype=np.float16), name="total")
    model = ct.convert(
        traced, inputs=[ct.TensorType("x", (3,), dtype=np.float16)], states=[total],
        outputs=[ct.TensorType("y", dtype=np.float16)], minimum_deployment_target=ct.target.iOS18,
    )  # fmt: skip
    state, other = model.make_state(), model.make_state()
    assert isinstance(state, theirs.MLState)
    for count in (1, 2, 3):
        np.testing.assert_array_equal(model.predict({"x": X}, state)["y"], count * X)
    np.testing.assert_array_equal(state.read_state("total"), 3 * X)
    state.write_state("total", np.ones(3, np.float32))
    np.testing.assert_array_equal(model.predict({"x": X}, state)["y"], X + 1)
    assert not other.read_state("total").any()
    with pytest.raises(RuntimeError, match="must be an MLState, but it was not found"):
        model.predict({"x": X})


def test_what_cannot_be_run_is_told_when_it_is_to_run(installed: None, tmp_path: Path) -> None:
    from coremltools.models.datatypes import Array
    from coremltools.models.neural_network import NeuralNetworkBuilder

    builder = NeuralNetworkBuilder([("x", Array(3))], [("y", Array(3))])
    builder.add_activation("a", "RELU", "x", "y")
    with pytest.warns(RuntimeWarning, match="neural network or another older model"):
        model = ct.models.MLModel(builder.spec)
    with pytest.raises(mil.MILError, match="neural network or another older model"):
        model.predict({"x": X})


def test_the_debugging_tools(installed: None, package: str) -> None:
    from coremltools.models.ml_program.experimental.debugging_utils import MLModelInspector

    async def inspected() -> dict[str, Any]:
        inspector = MLModelInspector(ct.models.MLModel(package))
        return {name: value async for name, value in inspector.inspect({"x": X})}

    found = asyncio.run(inspected())
    np.testing.assert_array_equal(found["doubled"], 2 * X)
    np.testing.assert_array_equal(found["y"], [2, 0, 6])


def test_an_unknown_policy() -> None:
    with pytest.raises(mil.MILError, match="unknown compute policy 'fp8'"):
        mil.install("fp8")
