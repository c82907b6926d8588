"""Every format of MLX against MLX's own functions, byte for byte."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_arrays import DTYPES, mlx_bytes, on_the_cpu, to_mlx, torch_bytes  # noqa: F401

from fastvlm.common.dtypes import as_array, as_tensor, dtype_name
from quantization.mlx import affine, floating, kernels
from quantization.mlx.affine import BITS, GROUP_SIZES
from quantization.mlx.floating import FORMATS

Form = tuple[int, int, str]  # bits, group size, mode
AFFINE = [(bits, group, "affine") for bits in BITS for group in GROUP_SIZES]
FLOATING = {mode: (form.bits, form.group_size, mode) for mode, form in FORMATS.items()}
LARGEST = {"mxfp4": 6.0, "mxfp8": 448.0, "nvfp4": 6.0}  # without a scale
FORMS = [*AFFINE, *FLOATING.values()]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
forms = pytest.mark.parametrize("form", FORMS, ids=str)
modes = pytest.mark.parametrize("mode", FORMATS)


def quantize(weight: torch.Tensor, form: Form, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Ours, on tensors: packed values, scales and, but for floating-point modes, biases."""
    bits, group, mode = form
    name = None if dtype is None else dtype_name(dtype)
    parts: tuple[np.ndarray, ...]
    if mode == "affine":
        parts, largest = affine.quantize(as_array(weight), bits, group, name)
    else:
        parts, largest = floating.quantize(as_array(weight), mode, name)
    assert largest == weight.to(dtype or weight.dtype).abs().max() or not np.isfinite(largest)
    return [as_tensor(part) for part in parts]


def dequantize(parts: list[torch.Tensor], form: Form, dtype: torch.dtype, as_float32: bool = False) -> torch.Tensor:
    bits, group, mode = form
    arrays = [as_array(part) for part in parts]
    if mode == "affine":
        return as_tensor(affine.dequantize(*arrays, bits, group, as_float32))
    return as_tensor(floating.dequantize(*arrays, mode, dtype_name(dtype), as_float32))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Integers, equal where the values are; a NaN's sign and payload are nobody's promise."""
    kind = torch.int16 if tensor.element_size() == 2 else torch.int32
    return tensor.contiguous().view(kind).masked_fill(tensor.isnan(), -1)


def assert_dequantized_as_mlx(parts: list[torch.Tensor], form: Form, dtype: torch.dtype) -> None:
    bits, group, mode = form
    theirs = [to_mlx(part).view(mx.uint32) if part.dtype == torch.uint32 else to_mlx(part) for part in parts]
    theirs = [value.reshape(part.shape) for value, part in zip(theirs, parts)]
    expected = mx.dequantize(*theirs, group_size=group, bits=bits, mode=mode, dtype=DTYPES[dtype])
    values = torch.from_numpy(np.array(expected.view(mx.uint8))).view(dtype)
    assert torch.equal(as_bits(dequantize(parts, form, dtype)), as_bits(values))
    assert torch.equal(as_bits(dequantize(parts, form, dtype, as_float32=True)), as_bits(values.float()))


def assert_as_mlx(weight: torch.Tensor, form: Form, dtype: torch.dtype | None = None) -> None:
    bits, group, mode = form
    before, rounded = weight.clone(), weight.to(dtype or weight.dtype)
    ours = quantize(weight, form, dtype)
    theirs = mx.quantize(to_mlx(rounded), group_size=group, bits=bits, mode=mode)
    assert [tuple(part.shape) for part in ours] == [tuple(part.shape) for part in theirs]
    for name, a, b in zip(("packed", "scales", "biases"), ours, theirs):
        assert torch_bytes(a) == mlx_bytes(b), name
    assert torch.equal(weight, before)
    for kind in [rounded.dtype] if mode == "affine" else DTYPES:
        assert_dequantized_as_mlx(ours, form, kind)


def normal(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dtypes
@forms
def test_random_and_edge_cases_as_mlx(dtype, form):
    assert_as_mlx(normal(37, 256).mul(0.05).to(dtype), form)
    rows = normal(20, 128)
    rows[0] = 0.0
    rows[1], rows[2] = 5.0, -3.0  # equal values, of either sign
    rows[3], rows[4] = rows[3].abs(), -rows[4].abs()  # one sign only
    rows[5, ::2], rows[5, 1::2] = 0.0, -0.0
    for row, factor in enumerate((1e-4, 1e-7, 1e-9, 2e4), 6):  # around the smallest scale, and below it
        rows[row] *= factor
    rows[7, ::16] = 0.0
    rows[10, 0], rows[10, 1] = 65504.0, -65504.0
    rows[11, 0] = 6e4  # an outlier: the rest of its group falls into one step, or becomes zeros of either sign
    rows[12] = torch.arange(128) - 64.0  # symmetric: both edges are equally far
    rows[13] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    rows[14] = torch.arange(128) / 8 - 8.0  # on E2M1's grid and in the middle of its steps
    rows[15] = torch.arange(128) * 8.0 - 512.0  # E4M3's steps of 32, and parts of them
    rows[16] = torch.nextafter(rows[14], torch.tensor(9.0))  # a little above and below a middle
    rows[17] = torch.nextafter(rows[14], torch.tensor(-9.0))
    rows[18] = 2.0**-25 * torch.arange(128)  # float16's subnormals and halves of them
    rows[19] = 1.0 + torch.arange(128) * 2.0**-12  # halves of float16's steps, and of bfloat16's
    assert_as_mlx(rows.clamp(-65504, 65504).to(dtype), form)


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(list(DTYPES)),
    exponent=st.floats(-9, 4),
    shift=st.floats(-3, 3),
)
def test_random_matrices_as_mlx(seed, rows, groups, form, dtype, exponent, shift):
    columns = groups * max(form[1], 32)  # MLX's CPU takes an even number of groups in nvfp4
    values = (normal(rows, columns, seed=seed) + shift) * 10**exponent
    assert_as_mlx(values.clamp(-6e4, 6e4).to(dtype), form)


@dtypes
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("form", [(4, 64, "affine"), FLOATING["nvfp4"]], ids=str)
def test_rounds_to_another_type_first(source, dtype, form):
    """The casts that torch does: subnormal numbers, the largest ones, halves between two."""
    rows = normal(64, 64, seed=5) * 10.0 ** torch.arange(-32.0, 32.0).div(4).unsqueeze(1)
    rows[0] = 2.0**-25 * torch.arange(64)
    rows[1] = 1.0 + torch.arange(64) * 2.0**-12
    rows[2] = 1.0 + torch.arange(64) * 2.0**-9
    assert_as_mlx(rows.clamp(-6e4, 6e4).to(source), form, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_finite_is_reported(value):
    weight = normal(4, 64, seed=6)
    for largest in (lambda: affine.quantize(as_array(weight), 4, 64, "float16")[1],
                    lambda: floating.quantize(as_array(weight), "mxfp4", "float16")[1]):  # fmt: skip
        weight[3, 5] = 1.0
        assert np.isfinite(largest())
        weight[3, 5] = value
        assert not np.isfinite(largest())


@pytest.mark.parametrize("form", [(3, 32, "affine"), *FLOATING.values()], ids=str)
def test_threads_and_blocks_change_nothing(form, monkeypatch):
    """Rows on three threads, in blocks that end in the middle of a row."""
    monkeypatch.setattr("quantization.mlx.kernels._LEAST", 64)
    monkeypatch.setattr("quantization.mlx.kernels.threads.count", lambda: 3)
    threads = []
    pool = kernels.ThreadPoolExecutor
    monkeypatch.setattr(kernels, "ThreadPoolExecutor", lambda count: threads.append(count) or pool(count))
    assert_as_mlx(normal(11, 3 * 640, seed=1), form)
    assert set(threads) == {3}


@pytest.mark.parametrize("form", [(4, 64, "affine"), *FLOATING.values()], ids=str)
def test_other_bytes_are_noticed(form):
    """The negative control of every comparison above: one value moved by a step, another scale, one bit."""
    weight = normal(4, 64, seed=2).clamp(-1, 1)
    weight[:, ::16], weight[:, 1::16] = 1.0, -1.0
    moved = weight.clone()
    moved[2, 10] += 0.34 if moved[2, 10] < 0 else -0.34
    parts = quantize(weight, form)
    assert (parts[0].view(torch.uint8) != quantize(moved, form)[0].view(torch.uint8)).sum() == 1
    assert not torch.equal(parts[1], quantize(weight * 2, form)[1])
    theirs = mx.quantize(to_mlx(moved), group_size=form[1], bits=form[0], mode=form[2])
    assert torch_bytes(parts[0]) != mlx_bytes(theirs[0])
    before = dequantize(parts, form, torch.float32)
    parts[0].view(torch.uint8)[0, 0] ^= 1
    assert not torch.equal(dequantize(parts, form, torch.float32), before)


@dtypes
@modes
@pytest.mark.parametrize("power", (-20, -11, -2, 4))
def test_scales_at_the_edge_between_two_as_mlx(dtype, mode, power):
    """Groups whose largest value is just below, at and above what a scale reaches."""
    edge = torch.tensor(LARGEST[mode] * 2.0**power).to(dtype)
    steps = torch.arange(-8, 9, dtype=torch.int32)
    bits = edge.view(torch.int32 if dtype == torch.float32 else torch.int16)
    tops = (bits + steps.to(bits.dtype)).view(dtype)
    assert tops.isfinite().all() and len(set(tops.tolist())) == 17
    assert_as_mlx(torch.linspace(-1, 1, 16).repeat(17, 2).to(dtype) * tops.unsqueeze(1), FLOATING[mode])


@modes
def test_every_float16_as_mlx(mode):
    """All of them, under a scale of about one: what each is rounded to."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    values = values[values.abs() <= LARGEST[mode]]
    group = FORMATS[mode].group_size
    count = 2 * -(-len(values) // (2 * (group - 1)))
    rows = torch.zeros(count, group, dtype=torch.float16)
    rows[:, 0] = LARGEST[mode]  # decides the scale
    rows[:, 1:] = torch.nn.functional.pad(values, (0, rows[:, 1:].numel() - len(values))).view(-1, group - 1)
    assert_as_mlx(rows, FLOATING[mode])


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
    assert_as_mlx(weight, FLOATING[mode])


@dtypes
@modes
def test_every_byte_with_every_scale_dequantized_as_mlx(mode, dtype):
    form = FORMATS[mode]
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(torch.uint32)
    groups = 256 * 8 // form.bits // form.group_size
    scales = torch.arange(256).to(torch.uint8).unsqueeze(1).repeat(1, groups)
    assert_dequantized_as_mlx([packed, scales], FLOATING[mode], dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [((2, 96), torch.float32, (4, 64, "affine")), ((64,), torch.float32, (4, 64, "affine")),
     ((2, 64), torch.float64, (4, 64, "affine")), ((2, 64), torch.int32, (4, 64, "affine")),
     ((2, 64), torch.float32, (7, 64, "affine")), ((2, 64), torch.float32, (4, 16, "affine")),
     ((2, 48), torch.float32, FLOATING["mxfp4"]), ((2, 24), torch.float32, FLOATING["nvfp4"]),
     ((32,), torch.float32, FLOATING["mxfp8"]), ((2, 32), torch.float64, FLOATING["mxfp4"]),
     ((2, 32), torch.float32, (6, 32, "mxfp6"))],
)  # fmt: skip
def test_refuses_what_mlx_would_not_quantize(shape, dtype, form):
    with pytest.raises(ValueError, match=r"cannot quantize|no affine|no mode"):
        quantize(torch.ones(shape, dtype=dtype), form)


def test_dequantize_refuses_parts_that_contradict_each_other():
    form = 4, 64, "affine"
    packed, scales, biases = quantize(normal(4, 128), form)
    for parts in ((packed[:, :-1], scales, biases), (packed, scales[:, :1], biases[:, :1]),
                  (packed, scales, biases.half()), (packed.view(torch.int32), scales, biases)):  # fmt: skip
        with pytest.raises(ValueError, match="not a 4-bit matrix"):
            dequantize(list(parts), form, torch.float32)
    packed, scales = quantize(normal(4, 128), FLOATING["mxfp4"])
    for parts, mode, dtype in (
        ((packed[:, :-1], scales), "mxfp4", torch.float32), ((packed, scales[:, :1]), "mxfp4", torch.float32),
        ((packed, scales), "mxfp8", torch.float32), ((packed, scales.float()), "mxfp4", torch.float32),
        ((packed.view(torch.int32), scales), "mxfp4", torch.float32), ((packed, scales), "mxfp4", torch.float64),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="not a matrix"):
            dequantize(list(parts), FLOATING[mode], dtype)
