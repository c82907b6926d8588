"""Named schemes: sizes, decoding as coremltools decodes, errors."""

import numpy as np
import pytest
from coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops import constexpr_affine_dequantize
from coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops import constexpr_lut_to_dense as lut_to_dense_16
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_blockwise_shift_scale
from coremltools.optimize import _utils as coremltools_utils
from palette_oracle import coremltools_linear, decode_palette, squared_error

from fastvlm.common.errors import UserError
from quantization.coreml.compression import COMPRESSIONS, Linear, applies, compress, nbytes
from quantization.coreml.palettes import Palette

SHAPES = [(32, 64, 1, 1), (48, 1, 7, 7), (32, 96), (96, 3, 3, 3), (64, 320, 1, 1), (40, 32, 1, 1)]


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(np.float16)


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decodes_as_coremltools_and_is_as_large_as_predicted(name, shape):
    scheme, weight = COMPRESSIONS[name], normal(shape)
    if applies(shape, scheme):
        with pytest.raises(UserError, match=f"as {name}: "):
            compress(weight, COMPRESSIONS[name])
        return
    compressed = compress(weight, COMPRESSIONS[name])
    stored = compressed.stored
    if isinstance(stored, Palette):
        packed = coremltools_utils.pack_elements_into_bits(stored.indices.ravel(), scheme.bits)
        if scheme.target == "iOS16":
            decoded = lut_to_dense_16.decompress(stored.lut.ravel(), packed, shape)
        else:
            decoded = decode_palette(stored.indices, stored.lut)
        if stored.scale is not None:
            scale = stored.scale.reshape(-1, *[1] * (len(shape) - 1))
            decoded = constexpr_blockwise_shift_scale.decompress(decoded, scale, None)
        tables = stored.lut.nbytes + (0 if stored.scale is None else stored.scale.nbytes)
    else:
        packed = coremltools_utils.pack_elements_into_bits(
            stored.data.ravel().view(np.uint8) & np.uint8(2**scheme.bits - 1), scheme.bits
        )
        if scheme.target == "iOS16":
            decoded = constexpr_affine_dequantize.decompress(stored.data, np.int8(0), stored.scale, 0)
        else:
            decoded = constexpr_blockwise_shift_scale.decompress(stored.data, stored.scale, None)
        tables = stored.scale.nbytes
    assert decoded.dtype == compressed.decode().dtype == np.float16
    assert np.array_equal(decoded, compressed.decode())
    assert nbytes(shape, scheme) == packed.nbytes + tables < weight.nbytes
    assert squared_error(weight, decoded) < 0.05 * squared_error(weight, np.zeros(shape))
    assert not np.array_equal(decoded, compress(weight + np.float16(0.01), COMPRESSIONS[name]).decode())


@pytest.mark.parametrize(
    ("shape", "name", "reason"),
    [
        (
            (40, 32, 1, 1),
            "palette4-g16",
            r"40 output channel\(s\) .* of 16",
        ),
        ((48, 1, 7, 7), "int4-b32", r"1 input channel\(s\) .* blocks of 32"),
        ((48, 1, 3, 3), "palette8-g16", r"1968 bytes are not fewer than the 864 of fp16"),
        ((16, 2), "palette4-g16-scaled", r"80 bytes are not fewer than the 64"),
        ((64,), "palette4", r"\[64\]: expected output channels"),
    ],
)
def test_says_why_a_weight_stays_in_fp16(shape, name, reason):
    with pytest.raises(UserError, match=reason):
        compress(normal(shape), COMPRESSIONS[name])
    assert applies((64, 64, 1, 1), COMPRESSIONS[name]) is None


def test_a_scale_costs_two_bytes_a_channel():
    """Theirs runs along the input axes and outgrew fp16; ours can't."""
    shape = (384, 1536, 1, 1)
    more = nbytes(shape, COMPRESSIONS["palette4-g16-scaled"]) - nbytes(shape, COMPRESSIONS["palette4-g16"])
    assert more == 2 * 384
    assert nbytes(shape, COMPRESSIONS["palette4-g16"]) == 384 * 1536 // 2 + 24 * 16 * 2


@pytest.mark.parametrize(("name", "bits", "block"), [("int8", 8, None), ("int4-b32", 4, 32)])
@pytest.mark.parametrize("shape", [(64, 320, 1, 1), (32, 96), (16, 32, 3, 3)])
@pytest.mark.parametrize("heavy", [False, True])
def test_no_more_error_than_coremltools_linear(name, bits, block, shape, heavy):
    weight = normal(shape, 1)
    if heavy:
        weight = (np.random.default_rng(2).standard_t(3, shape) * 0.02).astype(np.float16)
    stored = compress(weight, COMPRESSIONS[name]).stored
    assert isinstance(stored, Linear)
    assert -(2 ** (bits - 1)) <= stored.data.min() < 0 < stored.data.max() < 2 ** (bits - 1)
    data, scale = coremltools_linear(weight, bits, block)
    theirs = squared_error(weight, constexpr_blockwise_shift_scale.decompress(data, scale, None))
    assert squared_error(weight, stored.decode()) <= theirs
    moved = Linear(np.roll(stored.data, 1, axis=1), stored.scale)  # the control
    assert squared_error(weight, moved.decode()) > theirs


@pytest.mark.parametrize("name", ["int8", "int4-b32"])
@pytest.mark.parametrize("value", [0.0, 2.0**-24, 2.0**-20, 0.3, 65504.0])
def test_linear_at_the_ends_of_fp16(name, value):
    weight = np.full((2, 32, 1, 1), value, np.float16)
    weight[1] = 0
    decoded = compress(weight, COMPRESSIONS[name]).decode()
    assert np.isfinite(decoded).all()
    # half a step of 7 at most, and near 65504 the scale stays where -8 times it is finite
    assert np.abs(decoded.astype(float) - weight).max() <= value / 7
    assert not decoded[1].any()


@pytest.mark.parametrize("weight", [normal((8, 32)).astype(np.float32), np.full((8, 32), np.nan, np.float16)])
@pytest.mark.parametrize("name", ["int8", "palette4"])
def test_refuses_other_types_and_nan(weight, name):
    with pytest.raises(ValueError, match=r"fp16|NaN"):
        compress(weight, COMPRESSIONS[name])
