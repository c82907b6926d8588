"""MLX's floating-point modes on NumPy arrays: the bytes of `mlx.core.quantize`, the values of `mlx.core.dequantize`.

Each group of neighbours along a row shares a scale, and a value is a 4 or 8 bit float times that scale:
mxfp4 and mxfp8 (OCP Microscaling Formats 1.0) have a power of two (E8M0) for 32 values, nvfp4 an E4M3 for 16.
Source of the arithmetic: mlx, `fp_quantize` and `fp_dequantize` in `mlx/ops.cpp` (0.32.2) and `mx_scale_round_up` in
`mlx/backend/metal/kernels/fp8.h` (0.32.4); intermediates have the weight's type where MLX's have. Tests hold it to
mlx 0.32.4. bfloat16 is held as its bits, uint16.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from fastvlm.common.dtypes import ARRAYS, Array, bits_of, kind_of


@dataclass(frozen=True)
class Format:
    """bits: of a value, E2M1 or E4M3. power: the scales are powers of two."""

    bits: int
    group_size: int
    power: bool


FORMATS = {"mxfp4": Format(4, 32, True), "mxfp8": Format(8, 32, True), "nvfp4": Format(4, 16, False)}

_BIAS = 127  # of a power of two as it is stored


def quantize(weight: Array, mode: str, dtype: str | None = None) -> tuple[tuple[Array, Array], float]:
    """Quantize rows to nearest, byte for byte as `mlx.core.quantize(w, mode=mode)` does on the CPU.

    weight: (O, I) float16, bfloat16 or float32, I divisible by the mode's group size; rounded to `dtype` (None: its
    own) first. Returns (packed (O, I*bits/32) uint32, scales (O, I/group_size) uint8), and the largest magnitude in
    `dtype`: where that is not finite, the parts mean nothing. Raises ValueError for anything else.
    """
    from quantization.mlx import kernels  # and with it numba

    form, kind = _format(mode), kind_of(weight)
    if weight.ndim != 2 or kind is None or weight.shape[1] % form.group_size:
        raise ValueError(
            f"cannot quantize {kind or weight.dtype} {weight.shape} as {mode}: "
            f"expected a float matrix whose rows divide into groups of {form.group_size}"
        )
    (rows, columns), source = weight.shape, np.ascontiguousarray(weight)
    packed = np.empty((rows, columns * form.bits // 32), np.uint32)
    scales = np.empty((rows, columns // form.group_size), np.uint8)

    def work(start: int, stop: int) -> float:
        part = slice(start, stop)
        settings = kernels.KINDS[kind], kernels.KINDS[dtype or kind], form.bits, form.group_size, form.power
        outputs = bits_of(packed[part], np.uint8), bits_of(scales[part], np.uint8)
        return float(kernels.floating_quantize(bits_of(source[part]), *settings, _e4m3_values(), *outputs))

    return (packed, scales), kernels.greatest(kernels.spread(work, rows, columns))


@cache
def _e4m3_values() -> Array:
    """The value of each byte as an E4M3, (256,) float32; 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    values = np.where(exponents > 0, np.ldexp(1 + mantissas / 8, exponents - 7), np.ldexp(mantissas / 8, -6))
    values[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


@cache
def _values(bits: int) -> Array:
    """The value of each code, float32."""
    if bits == 8:
        return _e4m3_values()
    half = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
    return np.concatenate([half, -half])


@cache
def _scale_values(power: bool, dtype: str) -> Array:
    """The value of each stored scale in `dtype`, (256,) float32; float16 has no powers of two below -24 (0) and
    above 15 (infinity)."""
    if not power:
        return _e4m3_values()
    values = np.exp2(np.arange(256.0) - _BIAS)
    with np.errstate(over="ignore"):
        return values.astype(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


def dequantize(packed: Array, scales: Array, mode: str, dtype: str, as_float32: bool = False) -> Array:
    """The values MLX computes with: (O, I) in `dtype`, bit for bit as `mlx.core.dequantize(..., dtype=dtype)`.

    packed: (O, I*bits/32) uint32; scales: (O, I/group_size) uint8. MLX's own default dtype is bfloat16. `as_float32`
    gives the same values as float32. Raises ValueError when the shapes or dtypes contradict each other.
    """
    from quantization.mlx import kernels

    form = _format(mode)
    rows, columns = scales.shape[0], scales.shape[-1] * form.group_size
    if (
        packed.dtype != np.uint32
        or scales.dtype != np.uint8
        or dtype not in ARRAYS
        or packed.shape != (rows, columns * form.bits // 32)
    ):
        raise ValueError(
            f"not a matrix in {mode}: packed {packed.dtype} {packed.shape}, scales {scales.dtype} {scales.shape}, "
            f"to {dtype}"
        )
    packed, scales = np.ascontiguousarray(packed), np.ascontiguousarray(scales)
    tables = _scale_values(form.power, dtype), _values(form.bits)
    out = np.empty((rows, columns), np.float32 if as_float32 else ARRAYS[dtype])

    def work(start: int, stop: int) -> None:
        part = slice(start, stop)
        parts = bits_of(packed[part], np.uint8), bits_of(scales[part], np.uint8)
        settings = kernels.KINDS[dtype], form.bits, form.group_size, as_float32
        kernels.floating_dequantize(*parts, *tables, *settings, bits_of(out[part]))

    kernels.spread(work, rows, columns)
    return out


def _format(mode: str) -> Format:
    if mode not in FORMATS:
        raise ValueError(f"MLX has no mode {mode!r} (known: {', '.join(FORMATS)})")
    return FORMATS[mode]
