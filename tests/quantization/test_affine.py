"""Our affine quantization against MLX's own, byte for byte."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.common.dtypes import as_array, as_tensor, dtype_name
from quantization.mlx import affine, kernels
from quantization.mlx.affine import BITS, GROUP_SIZES

DTYPES = {torch.float16: mx.float16, torch.bfloat16: mx.bfloat16, torch.float32: mx.float32}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
COMBINATIONS = [(bits, group) for bits in BITS for group in GROUP_SIZES]


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def to_mlx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.contiguous().view(torch.uint8).numpy()).view(DTYPES[tensor.dtype])


def mlx_bytes(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint8)).tobytes()


def torch_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def quantize(weight: torch.Tensor, bits: int, group: int, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Ours, on tensors."""
    name = None if dtype is None else dtype_name(dtype)
    return [as_tensor(part) for part in affine.quantize(as_array(weight), bits, group, name)[0]]


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int, wide: bool = False
) -> torch.Tensor:
    return as_tensor(affine.dequantize(*map(as_array, (packed, scales, biases)), bits, group, wide))


def assert_as_mlx(weight: torch.Tensor, bits: int, group: int, dtype: torch.dtype | None = None) -> None:
    before, rounded = weight.clone(), weight.to(dtype or weight.dtype)
    ours, theirs = quantize(weight, bits, group, dtype), mx.quantize(to_mlx(rounded), group, bits)
    assert [t.shape for t in ours] == [a.shape for a in theirs]
    for name, a, b in zip(("packed", "scales", "biases"), ours, theirs, strict=True):
        assert torch_bytes(a) == mlx_bytes(b), name
    values = dequantize(*ours, bits, group)
    assert torch_bytes(values) == mlx_bytes(mx.dequantize(*theirs, group, bits))
    assert torch.equal(dequantize(*ours, bits, group, wide=True), values.float())
    assert torch.equal(weight, before)
    _, largest = affine.quantize(as_array(weight), bits, group, dtype_name(rounded.dtype))
    assert largest == rounded.abs().max()


@dtypes
@pytest.mark.parametrize(("bits", "group"), COMBINATIONS)
def test_every_combination_as_mlx(dtype, bits, group):
    generator = torch.Generator().manual_seed(bits * group)
    assert_as_mlx(torch.randn(37, 256, generator=generator).mul(0.05).to(dtype), bits, group)


@dtypes
@pytest.mark.parametrize("bits", BITS)
def test_edge_cases_as_mlx(dtype, bits):
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(14, 128, generator=generator)
    rows[0] = 0.0
    rows[1] = 5.0  # equal values, of either sign
    rows[2] = -3.0
    rows[3] = rows[3].abs()  # one sign only
    rows[4] = -rows[4].abs()
    rows[5, ::2], rows[5, 1::2] = 0.0, -0.0
    rows[6] *= 1e-4
    rows[7] *= 1e-7  # around the smallest scale, and below it
    rows[8] *= 1e-9
    rows[9] *= 2e4
    rows[10, 0], rows[10, 1] = 65504.0, -65504.0
    rows[11, 0] = 1e4  # an outlier: the rest of its group falls into one step
    rows[12] = torch.arange(128) - 64.0  # symmetric: both edges are equally far
    rows[13] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert_as_mlx(rows.to(dtype), bits, 64)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    combination=st.sampled_from(COMBINATIONS),
    dtype=st.sampled_from(list(DTYPES)),
    exponent=st.floats(-9, 4),
    shift=st.floats(-3, 3),
)
def test_random_matrices_as_mlx(seed, rows, groups, combination, dtype, exponent, shift):
    bits, group = combination
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, groups * group, generator=generator) + shift) * 10**exponent
    assert_as_mlx(values.clamp(-6e4, 6e4).to(dtype), bits, group)


@dtypes
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_rounds_to_another_type_first(source, dtype):
    """What torch's own casts make of the weight: subnormal numbers, the largest ones, halves between two."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(64, 64, generator=generator) * 10.0 ** torch.arange(-32.0, 32.0).div(4).unsqueeze(1)
    rows[0] = 2.0**-25 * torch.arange(64)  # float16's subnormals and halves of them
    rows[1] = 1.0 + torch.arange(64) * 2.0**-12  # halves of float16's steps, and of bfloat16's
    rows[2] = 1.0 + torch.arange(64) * 2.0**-9
    assert_as_mlx(rows.clamp(-6e4, 6e4).to(source), 4, 64, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_finite_is_reported(value):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
    assert np.isfinite(affine.quantize(as_array(weight), 4, 64, "float16")[1])
    weight[3, 5] = value
    assert not np.isfinite(affine.quantize(as_array(weight), 4, 64, "float16")[1])


def test_threads_and_blocks_change_nothing(monkeypatch):
    """Rows on three threads, in blocks that end in the middle of a row, give MLX's bytes, too."""
    monkeypatch.setattr("quantization.mlx.kernels._LEAST", 64)
    monkeypatch.setattr("quantization.mlx.kernels.threads.count", lambda: 3)
    threads = []
    pool = kernels.ThreadPoolExecutor
    monkeypatch.setattr(kernels, "ThreadPoolExecutor", lambda count: threads.append(count) or pool(count))
    assert_as_mlx(torch.randn(11, 3 * 640, generator=torch.Generator().manual_seed(1)), 3, 32)
    assert set(threads) == {3}


def test_other_bytes_are_noticed():
    """The negative control of every comparison above: one value moved by one step changes exactly one code."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    packed, scales, biases = quantize(weight, 4, 64)
    moved = weight.clone()
    moved[2, 10] += 1.01 * scales[2, 0].abs() * (1 if weight[2, 10] < 0 else -1)
    other = quantize(moved, 4, 64)
    assert torch_bytes(packed) != torch_bytes(other[0])
    with pytest.raises(AssertionError):
        assert torch_bytes(packed) == mlx_bytes(mx.quantize(to_mlx(moved), 64, 4)[0])
    flipped = packed.view(torch.uint8).clone()
    flipped[0, 0] ^= 1
    assert not torch.equal(
        dequantize(flipped.view(torch.uint32), scales, biases, 4, 64), dequantize(packed, scales, biases, 4, 64)
    )


def test_error_is_at_most_half_a_step():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    for bits in BITS:
        packed, scales, biases = quantize(weight, bits, 64)
        error = (dequantize(packed, scales, biases, bits, 64) - weight).abs().view(8, 2, 64)
        assert (error <= scales.abs().unsqueeze(-1) * 1.001).all()  # a step, not half: zero is moved onto the grid
        assert error.max() > 0


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "group"),
    [((2, 96), torch.float32, 4, 64), ((64,), torch.float32, 4, 64), ((2, 64), torch.float64, 4, 64),
     ((2, 64), torch.int32, 4, 64), ((2, 64), torch.float32, 7, 64), ((2, 64), torch.float32, 4, 16)],
)  # fmt: skip
def test_refuses_what_mlx_would_not_quantize(shape, dtype, bits, group):
    with pytest.raises(ValueError, match=r"cannot quantize|no affine"):
        quantize(torch.ones(shape, dtype=dtype), bits, group)


def test_dequantize_refuses_parts_that_contradict_each_other():
    packed, scales, biases = quantize(torch.randn(4, 128), 4, 64)
    for parts in (
        (packed[:, :-1], scales, biases),
        (packed, scales[:, :1], biases[:, :1]),
        (packed, scales, biases.half()),
        (packed.view(torch.int32), scales, biases),
    ):
        with pytest.raises(ValueError, match="not a 4-bit matrix"):
            dequantize(*parts, 4, 64)
