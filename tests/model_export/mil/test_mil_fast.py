"""The policies for speed: what 8-bit operands and bfloat16 compute, against NumPy in float64."""

from pathlib import Path

import mil_packages as packages
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_export import mil
from model_export.mil import int8, onednn
from tests.helpers import snr_db

needs_int8 = pytest.mark.skipif(not int8.AVAILABLE, reason="this processor or PyTorch has no 8-bit products (VNNI)")


def gelu(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return x / 2 * (1 + erf(x / np.sqrt(2)))


@given(low=st.floats(-1e4, 1e4), width=st.floats(1e-3, 1e4), seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_quantized_holds_every_value_to_half_a_step_and_zero_exactly(low: float, width: float, seed: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).uniform(low, low + width, 200).astype(np.float32))
    found = int8.Quantized.of(x)
    assert found.data.dtype == torch.uint8 and 0 <= found.zero <= 255
    held = (found.data.numpy().astype(np.float64) - found.zero) * found.scale
    assert np.abs(held - x.numpy()).max() <= 0.5001 * found.scale + 1e-6 * np.abs(x.numpy()).max()
    span = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
    assert found.scale == pytest.approx(span / 255, rel=1e-5)


@needs_int8
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_layer_computes_with_the_rounded_operands(activation: str) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((48, 32)), rng.standard_normal(48)
    weight *= rng.uniform(0.1, 10, (48, 1))  # each output has a scale of its own
    layer = int8.Int8Linear(torch.from_numpy(weight), torch.from_numpy(bias), 20)
    x = int8.Quantized.of(torch.from_numpy(rng.standard_normal((20, 32)).astype(np.float32)))
    scales = np.abs(weight).max(1) / 127
    exact = (x.data.numpy().astype(np.float64) - x.zero) * x.scale @ (np.rint(weight / scales[:, None]).T * scales)
    exact = exact + bias if activation == "none" else gelu(exact + bias)
    np.testing.assert_allclose(layer(x, activation).float().numpy(), exact, rtol=2**-8, atol=1e-3)
    to_8_bit = layer(x, activation, int8.span(exact.min(), exact.max()))
    scale, zero = int8.span(exact.min(), exact.max())
    np.testing.assert_allclose((to_8_bit.numpy().astype(float) - zero) * scale, exact, atol=0.51 * scale)


@needs_int8
@pytest.mark.parametrize("side", [4, 64])
def test_a_pair_is_two_layers_with_an_activation_between(side: int) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((64, 16)) / 4, rng.standard_normal((16, 64)) / 8
    shape = (1, 16, side, side)
    values = rng.standard_normal(shape).astype(np.float32)
    if side == 4:
        values[..., 1, 2] *= 8  # of few pixels, every one decides the range
    x = torch.from_numpy(values).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    layers = [int8.Int8Linear(torch.from_numpy(weight), None, side * side) for weight in (first, second)]
    rows = x.permute(0, 2, 3, 1).reshape(-1, 16).double().numpy()
    expected = (gelu(rows @ first.T) @ second.T).reshape(1, side, side, 16).transpose(0, 3, 1, 2)
    result = int8.pair(*layers, "gelu")(x)
    assert result.shape == shape and result.is_contiguous(memory_format=torch.channels_last)
    assert snr_db(expected, result.double().numpy()) > 25
    without = (rows @ first.T @ second.T).reshape(1, side, side, 16).transpose(0, 3, 1, 2)
    assert snr_db(without, result.double().numpy()) < 10


@pytest.mark.skipif(not onednn.AVAILABLE, reason="PyTorch without oneDNN")
@pytest.mark.parametrize("several", [2, 3])
def test_several_outputs_of_each_channel_stand_side_by_side(several: int) -> None:
    rng = np.random.default_rng(4)
    weight, bias = rng.standard_normal((several * 5, 1, 3, 3)), rng.standard_normal(several * 5)
    x = rng.standard_normal((1, 5, 9, 7))
    padded = np.pad(x[0], ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
    sums = np.einsum("cyxij,coij->coyx", windows, weight.reshape(5, several, 3, 3)).reshape(several * 5, 5, 4)
    expected = gelu(sums + bias[:, None, None])
    given = [torch.from_numpy(array).float() for array in (weight, bias, x)]
    run = onednn.conv2d(*given[:2], [2, 2], [1, 1], [1, 1], 5, x.shape)
    result = run(given[2], "gelu")
    assert result.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(result[0].numpy(), expected, atol=1e-5)
    assert np.abs(result[0].numpy() - expected.reshape(5, several, 5, 4).swapaxes(0, 1).reshape(-1, 5, 4)).max() > 1


@pytest.mark.parametrize(
    "compute, least",
    [
        ("bfloat16", 30),
        pytest.param("int8", 20, marks=needs_int8),
        pytest.param("int8-float32", 20, marks=needs_int8),
    ],
)
def test_a_saved_encoder_keeps_its_features(
    tiny_artefact: Path, pixels: np.ndarray, compute: str, least: float
) -> None:
    package = tiny_artefact / "fastvithd.mlpackage"
    exact = mil.load(package, compute="float32").predict({"images": pixels})["image_features"]
    fast = mil.load(package, compute=compute)
    found = fast.predict({"images": pixels})["image_features"]
    assert found.dtype == np.float32 and least < snr_db(exact, found) < 60
    np.testing.assert_array_equal(found, fast.predict({"images": pixels})["image_features"])
    other = mil.load(package, compute=compute).predict({"images": pixels[..., ::-1].copy()})["image_features"]
    assert snr_db(exact, other) < 15


@needs_int8
def test_layers_of_the_mlps_are_paired(tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paired: list[str] = []
    pair = int8.pair
    monkeypatch.setattr(int8, "pair", lambda *given: (paired.append(given[2]), pair(*given))[1])
    program = mil.read_package(tiny_artefact / "fastvithd.mlpackage")
    executor = mil.MILExecutor(program, "int8")
    blocks = {name for name in (step.operation.name for step in executor._plan.steps) if "gelu" in name}
    assert 5 <= len(paired) < len(blocks) and set(paired) == {"gelu"}  # the stem's and the downsamplings' aren't pairs
    before = len(paired)
    mil.MILExecutor(program, "bfloat16")
    assert len(paired) == before


@needs_int8
@pytest.mark.parametrize("change", [{"pad": [1, 1, 1, 1]}, {"strides": [2, 2]}, {"groups": 2}, {}])
def test_only_plain_1_x_1_convolutions_have_8_bit_operands(
    change: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((8, 8 // change.get("groups", 1), 1, 1)).astype(np.float32)

    def build(x):
        padding = {"pad_type": "custom"} if "pad" in change else {}
        return packages.mb.conv(x=x, weight=weight, name="y", **padding, **change)

    x = {"x": rng.standard_normal((1, 8, 6, 6)).astype(np.float32)}
    packages.save_program(tmp_path / "m.mlpackage", build, x)
    made = []
    pointwise = int8.pointwise
    monkeypatch.setattr(int8, "pointwise", lambda *given: (made.append(given), pointwise(*given))[1])
    exact = mil.load(tmp_path / "m.mlpackage", compute="float32").predict(x)["y"]
    found = mil.load(tmp_path / "m.mlpackage", compute="int8").predict(x)["y"]
    assert bool(made) == (not change) and snr_db(exact, found) > 30
