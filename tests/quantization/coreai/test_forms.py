"""Core AI's forms: what the parts mean, their sizes, and what cannot take a form."""

import re

import numpy as np
import pytest
from coreai_arrays import dequantized, squared_error

from quantization.coreai.forms import FORMS, PLAIN, by_name, decode, e4m3_values, fault, nbytes, store

COMPRESSING = [name for name in FORMS if name != PLAIN]
# Squared error of normal values, of their squares: that of a uniform or Lloyd-Max quantizer of so many bits, and slack.
WORST = {"int8": 2e-4, "int8-b32": 7e-5, "int4-b32": 1.2e-2, "fp8": 1e-3, "palette4": 1.3e-2, "palette6": 1e-3,
         "palette8": 7e-5, "palette4-g16": 1.3e-2, "palette6-g16": 1e-3}  # fmt: skip


def normal(*shape: int) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal(shape) * 0.03).astype(np.float16)


@pytest.mark.parametrize("shape", [(128, 192), (64, 96, 3, 3)])
@pytest.mark.parametrize("name", COMPRESSING)
def test_parts_mean_the_weight_and_are_as_large_as_predicted(name, shape):
    form, weight = FORMS[name], normal(*shape)
    parts = store(weight, form)
    assert np.array_equal(decode(parts, form), dequantized(parts)) and decode(parts, form).dtype == np.float32
    assert squared_error(weight, dequantized(parts)) < WORST[name]
    codes = parts.get("indices", parts.get("data"))
    assert codes.shape == shape and int(codes.max()) - int(codes.min()) < 2**form.bits
    floats = parts.get("lut", parts.get("scale"))
    assert floats.dtype == np.float16
    assert nbytes(shape, form) == weight.size * form.bits // 8 + floats.nbytes < weight.nbytes
    touched = parts | {"lut" if "lut" in parts else "scale": floats * np.float16(1.01)}
    assert not np.array_equal(decode(parts, form), decode(touched, form))


def test_e4m3_is_ocps_and_to_nearest():
    values = e4m3_values()
    expected = dequantized({"data": np.arange(256, dtype=np.uint8)[:, None], "scale": np.ones((256, 1), np.float16)})
    assert np.array_equal(values, expected.ravel(), equal_nan=True)
    weight = normal(64, 64)
    parts = store(weight, FORMS["fp8"])
    scaled = weight.astype(np.float32) / parts["scale"].astype(np.float32)
    finite = values[np.isfinite(values)]
    nearest = np.abs(scaled[..., None] - finite).min(-1)
    assert np.array_equal(np.abs(values[parts["data"]] - scaled), nearest)


def test_zeros_and_extremes_stay_finite():
    weight = normal(64, 64)
    weight[0], weight[1], weight[2] = 0, 65504, 6e-8
    for name in COMPRESSING:
        parts = store(weight, FORMS[name])
        assert np.isfinite(dequantized(parts).astype(np.float16)).all()
        assert "lut" in parts or not dequantized(parts)[0].any()


@pytest.mark.parametrize(
    ("shape", "name", "reason"),
    [
        ((128, 192), PLAIN, "a rule says so"),
        ((4096,), "int8", r"shape \[4096\]"),
        ((64, 3, 3, 3), "int8", "1728 values, fewer than 2048"),
        ((128, 100), "int4-b32", "100 input channels do not divide into blocks of 32"),
        ((100, 128), "palette4-g16", "100 output channels do not divide into groups of 16"),
        ((64, 1, 7, 7), "int8-b32", "1 input channels do not divide"),
        ((1024, 2), "palette6-g16", "9728 bytes are not fewer than the 4096"),
    ],
)
def test_says_why_a_weight_stays_float16(shape, name, reason):
    assert re.search(reason, fault(shape, FORMS[name]) or "")
    assert fault((128, 192), FORMS[name]) is None or name == PLAIN
    with pytest.raises(ValueError, match=f"as {name}: expected"):
        store(normal(*shape), FORMS[name])


def test_refuses_what_float16_cannot_hold_and_unknown_names():
    with pytest.raises(ValueError, match="expected finite float16"):
        store(normal(64, 64).astype(np.float32), FORMS["int8"])
    with pytest.raises(ValueError, match=r"expected fp16, int8, .*palette4\?"):
        by_name("pallete4")
