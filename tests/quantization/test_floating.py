"""mxfp4, mxfp8 and nvfp4 against MLX's own, byte for byte."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_affine import DTYPES, dtypes, mlx_bytes, on_the_cpu, to_mlx, torch_bytes  # noqa: F401

from fastvlm.common.dtypes import as_array, as_tensor, dtype_name
from quantization.mlx import floating
from quantization.mlx.floating import FORMATS

modes = pytest.mark.parametrize("mode", FORMATS)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Integers, equal where the values are; a NaN's sign and payload are nobody's promise."""
    kind = torch.int16 if tensor.element_size() == 2 else torch.int32
    return tensor.contiguous().view(kind).masked_fill(tensor.isnan(), -1)


def quantize(weight: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, on tensors."""
    packed, scales = floating.quantize(as_array(weight), mode)[0]
    return as_tensor(packed), as_tensor(scales)


def dequantize(packed: torch.Tensor, scales: torch.Tensor, mode: str, dtype: torch.dtype) -> torch.Tensor:
    return as_tensor(floating.dequantize(as_array(packed), as_array(scales), mode, dtype_name(dtype)))


def assert_dequantized_as_mlx(packed: torch.Tensor, scales: torch.Tensor, mode: str) -> None:
    for dtype, theirs in DTYPES.items():
        expected = mx.dequantize(mx.array(packed.numpy()), mx.array(scales.numpy()), mode=mode, dtype=theirs)
        expected = torch.from_numpy(np.array(expected.view(mx.uint8))).view(dtype)
        assert torch.equal(as_bits(dequantize(packed, scales, mode, dtype)), as_bits(expected))
        wide = floating.dequantize(as_array(packed), as_array(scales), mode, dtype_name(dtype), wide=True)
        assert torch.equal(as_bits(as_tensor(wide)), as_bits(expected.float()))


def assert_as_mlx(weight: torch.Tensor, mode: str) -> None:
    before = weight.clone()
    packed, scales = quantize(weight, mode)
    theirs = mx.quantize(to_mlx(weight), mode=mode)
    assert [packed.shape, scales.shape] == [tuple(part.shape) for part in theirs]
    assert torch_bytes(packed) == mlx_bytes(theirs[0])
    assert torch_bytes(scales) == mlx_bytes(theirs[1])
    assert torch.equal(weight, before)
    assert_dequantized_as_mlx(packed, scales, mode)


@dtypes
@modes
@pytest.mark.parametrize("exponent", [-45, -40, -38, -30, -8, -5, -3, -2, -1, 0, 1, 3, 5, 9, 12, 30, 38])
def test_every_order_of_magnitude_as_mlx(dtype, mode, exponent):
    generator = torch.Generator().manual_seed(exponent + 100)
    largest = torch.finfo(dtype).max
    weight = torch.randn(33, 192, generator=generator, dtype=torch.float64) * 10.0**exponent
    assert_as_mlx(weight.clamp(-largest, largest).to(dtype), mode)


@dtypes
@modes
def test_edge_cases_as_mlx(dtype, mode):
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(12, 64, generator=generator)
    rows[0] = 0.0
    rows[1, ::2], rows[1, 1::2] = 0.0, -0.0
    rows[2], rows[3] = 5.0, -3.0  # equal values
    rows[4] *= 1e-7
    rows[4, ::16] = 0.0
    rows[5, 0] = 6e4  # an outlier: the rest of its group becomes zeros of either sign
    rows[6] = torch.arange(64) / 4 - 8.0  # on E2M1's grid and in the middle of its steps
    rows[7] = torch.arange(64) / 8 - 2.0
    rows[8] = torch.arange(64) * 16.0 - 512.0  # E4M3's steps of 32, and half of them
    rows[9] = torch.nextafter(rows[6], torch.tensor(9.0))  # a little above and below a middle
    rows[10] = torch.nextafter(rows[6], torch.tensor(-9.0))
    rows[11] = 2.0**-24 * torch.arange(64)  # float16's subnormals
    assert_as_mlx(rows.to(dtype), mode)


@dtypes
@modes
@pytest.mark.parametrize("power", range(-20, 7, 3))
def test_scales_at_the_edge_between_two_as_mlx(dtype, mode, power):
    """Groups whose largest value is just below, at and above what a scale reaches."""
    edge = torch.tensor(FORMATS[mode].largest * 2.0**power).to(dtype)
    steps = torch.arange(-8, 9, dtype=torch.int32)
    bits = edge.view(torch.int32 if dtype == torch.float32 else torch.int16)
    tops = (bits + steps.to(bits.dtype)).view(dtype)
    assert tops.isfinite().all() and len(set(tops.tolist())) == 17
    rows = torch.linspace(-1, 1, 16).repeat(17, 2).to(dtype) * tops.unsqueeze(1)
    assert_as_mlx(rows, mode)


@modes
def test_every_float16_as_mlx(mode):
    """All of them, under a scale of about one: what each is rounded to."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    values = values[values.abs() <= FORMATS[mode].largest]
    group = FORMATS[mode].group_size
    count = 2 * -(-len(values) // (2 * (group - 1)))  # MLX's CPU takes an even number of groups in nvfp4
    rows = torch.zeros(count, group, dtype=torch.float16)
    rows[:, 0] = FORMATS[mode].largest  # decides the scale
    rows[:, 1:] = torch.nn.functional.pad(values, (0, rows[:, 1:].numel() - len(values))).view(-1, group - 1)
    assert_as_mlx(rows, mode)


@settings(max_examples=80)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32),
    mode=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(list(DTYPES)),
)
@example([2.0**25 + 4.0] * 31 + [3e38], "nvfp4", torch.float32)  # all the values are equally far in float32
@example([-(2.0**35 + 2.0**30)] * 31 + [2.0**36], "nvfp4", torch.bfloat16)
def test_any_finite_values_as_mlx(values, mode, dtype):
    weight = torch.tensor([values]).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    assert_as_mlx(weight, mode)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    columns=st.sampled_from([32, 64, 96]),
    mode=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(list(DTYPES)),
    exponent=st.floats(-6, 4),
)
def test_random_matrices_as_mlx(seed, rows, columns, mode, dtype, exponent):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    assert_as_mlx(values.clamp(-6e4, 6e4).to(dtype), mode)


@modes
def test_every_byte_with_every_scale_dequantized_as_mlx(mode):
    form = FORMATS[mode]
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(torch.uint32)
    groups = 256 * 8 // form.bits // form.group_size
    assert_dequantized_as_mlx(packed, torch.arange(256).to(torch.uint8).unsqueeze(1).repeat(1, groups), mode)


@modes
def test_more_rows_than_are_worked_on_at_once(mode, monkeypatch):
    monkeypatch.setattr("quantization.mlx.kernels._LEAST", 64)
    monkeypatch.setattr("quantization.mlx.kernels.threads.count", lambda: 3)
    assert_as_mlx(torch.randn(11, 3 * 640, generator=torch.Generator().manual_seed(1)), mode)


@modes
def test_other_bytes_are_noticed(mode):
    """The negative control: one value moved to the next code, one scale, one bit."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    weight[:, ::16] = 1.0
    moved = weight.clone()
    moved[2, 10] += 0.34 if moved[2, 10] < 0 else -0.34
    assert (quantize(weight, mode)[0].view(torch.uint8) != quantize(moved, mode)[0].view(torch.uint8)).sum() == 1
    assert not torch.equal(quantize(weight, mode)[1], quantize(weight * 2, mode)[1])
    with pytest.raises(AssertionError):
        assert torch_bytes(quantize(weight, mode)[0]) == mlx_bytes(mx.quantize(to_mlx(moved), mode=mode)[0])
    packed, scales = quantize(weight, mode)
    with pytest.raises(AssertionError):
        expected = mx.dequantize(mx.array(packed.numpy()), mx.array(scales.numpy()), mode=mode, dtype=mx.float32)
        packed.view(torch.uint8)[0, 0] ^= 1
        assert torch_bytes(dequantize(packed, scales, mode, torch.float32)) == mlx_bytes(expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "mode"),
    [((2, 48), torch.float32, "mxfp4"), ((2, 24), torch.float32, "nvfp4"), ((32,), torch.float32, "mxfp8"),
     ((2, 32), torch.float64, "mxfp4"), ((2, 32), torch.float32, "affine"), ((2, 32), torch.float32, "mxfp6")],
)  # fmt: skip
def test_refuses_what_mlx_would_not_quantize(shape, dtype, mode):
    with pytest.raises(ValueError, match=r"cannot quantize|no mode"):
        quantize(torch.ones(shape, dtype=dtype), mode)


def test_dequantize_refuses_parts_that_contradict_each_other():
    packed, scales = quantize(torch.randn(4, 128), "mxfp4")
    for parts in (
        (packed[:, :-1], scales, "mxfp4", torch.float32),
        (packed, scales[:, :1], "mxfp4", torch.float32),
        (packed, scales, "mxfp8", torch.float32),
        (packed, scales.float(), "mxfp4", torch.float32),
        (packed.view(torch.int32), scales, "mxfp4", torch.float32),
        (packed, scales, "mxfp4", torch.float64),
    ):
        with pytest.raises(ValueError, match="not a matrix"):
            dequantize(*parts)
