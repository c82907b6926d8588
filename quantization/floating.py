"""MLX's floating-point modes in PyTorch: the bytes of `mlx.core.quantize`, the values of `mlx.core.dequantize`.

Each group of neighbours along a row shares a scale, and a value is a 4 or 8 bit float times that scale:
mxfp4 and mxfp8 (OCP Microscaling Formats 1.0) have a power of two (E8M0) for 32 values, nvfp4 an E4M3 for 16.
Source of the arithmetic: mlx, `fp_quantize` and `fp_dequantize` in `mlx/ops.cpp` (0.32.2) and `mx_scale_round_up` in
`mlx/backend/metal/kernels/fp8.h` (0.32.4); intermediates have the weight's type where MLX's have. Tests hold it to
mlx 0.32.4.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantization.affine import DTYPES


@dataclass(frozen=True)
class Format:
    """bits: of a value, E2M1 or E4M3. power: the scales are powers of two."""

    bits: int
    group_size: int
    power: bool

    @property
    def largest(self) -> float:
        """The largest value without its scale."""
        return 6.0 if self.bits == 4 else 448.0


FORMATS = {"mxfp4": Format(4, 32, True), "mxfp8": Format(8, 32, True), "nvfp4": Format(4, 16, False)}

_CHUNK = 1 << 18  # values worked on at once: 1 MiB in float32, about a core's L2 cache
_BIAS = 127  # of a power of two as it is stored
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MIDDLES = (_E2M1[1:] + _E2M1[:-1]) / 2
_HUGE = 2.0**24  # from here on, float32 differences to the fourteen values are no longer exact


def quantize(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Quantize rows to nearest, byte for byte as `mlx.core.quantize(w, mode=mode)` does on the CPU.

    weight: (O, I) float16, bfloat16 or float32, finite, I divisible by the mode's group size.
    Returns (packed (O, I*bits/32) uint32, scales (O, I/group_size) uint8). Raises ValueError for anything else.
    """
    form = _format(mode)
    if weight.ndim != 2 or weight.dtype not in DTYPES or weight.shape[1] % form.group_size:
        raise ValueError(
            f"cannot quantize {weight.dtype} {tuple(weight.shape)} as {mode}: "
            f"expected a float matrix whose rows divide into groups of {form.group_size}"
        )
    rows, columns = weight.shape
    packed = torch.empty(rows, columns * form.bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, columns // form.group_size, dtype=torch.uint8)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = weight[part].to(torch.float32).reshape(-1, columns // form.group_size, form.group_size)
        # as integers, floats without their signs keep their order; three times as fast for groups of 16
        largest = (groups.view(torch.int32) & 0x7FFFFFFF).amax(-1).view(torch.float32)
        scale = (largest / form.largest).to(weight.dtype)
        codes, divisor = _power_scales(scale) if form.power else _e4m3_scales(scale)
        values = (groups / divisor.unsqueeze(-1)).to(weight.dtype).to(torch.float32)
        encode = _e4m3 if form.bits == 8 else _e2m1_by_distance if (largest > _HUGE).any() else _e2m1_pairs
        packed[part] = encode(values).view(-1, packed.shape[1])
        scales[part] = codes
    return packed.view(torch.uint32), scales


def _power_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Stored scales and divisors (float32): the smallest powers of two that are no smaller, 1 for zeros."""
    mantissa, exponent = torch.frexp(scale.float())  # mantissa in [0.5, 1)
    exponent = (exponent - (mantissa == 0.5).int()).masked_fill_(mantissa == 0, 0)
    return (exponent + _BIAS).to(torch.uint8), exponent.double().exp2().float()


def _e4m3_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Stored scales and divisors (float32): the nearest E4M3. What is divided by zero is stored as zero."""
    codes = _e4m3(scale.float())
    divisor = _e4m3_values().index_select(0, codes.flatten().int()).view(codes.shape)
    return codes, divisor.masked_fill(divisor == 0, torch.inf)


def _e4m3(values: Tensor) -> Tensor:
    """float32 to E4M3's codes (uint8), to nearest and even; what is larger becomes the largest."""
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


def _e2m1_pairs(values: Tensor) -> Tensor:
    """float32 (..., even) to E2M1's codes, two in a byte, the first in the low half: to nearest, ties towards zero."""
    # a float32's upper 11 bits, rounded up, say between which of the middles it is: those have no lower bits
    upper = values.flatten().view(torch.int32) + ((1 << 21) - 1)
    codes = _e2m1_codes().index_select(0, (upper >> 21).bitwise_and_(0x7FF))
    pairs = codes.view(torch.int16)  # little-endian: 0x0b0a
    return (pairs | (pairs >> 4)).to(torch.uint8)


def _e2m1_by_distance(values: Tensor) -> Tensor:
    """The same, as MLX computes it: the first value of the smallest difference, rounded to float32."""
    table = torch.cat([_E2M1, -_E2M1])
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    best = values.abs()
    for code in range(1, 16):
        distance = (values - table[code]).abs()
        nearer = distance < best
        codes[nearer], best = code, torch.minimum(best, distance)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


@cache
def _e2m1_codes() -> Tensor:
    """The code of every float32 by its upper 11 bits rounded up, (2048,) uint8."""
    # the float32 with just these bits is the largest that is rounded up to them
    numbers = (torch.arange(2048, dtype=torch.int32) << 21).view(torch.float32).nan_to_num()
    codes = torch.bucketize(numbers.abs(), _MIDDLES)  # as many middles are below
    return torch.where((numbers < 0) & (codes > 0), codes + 8, codes).to(torch.uint8)


@cache
def _e4m3_values() -> Tensor:
    """What each byte stands for as an E4M3, (256,) float32; 0x7F and 0xFF are NaN."""
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()


@cache
def _byte_values(bits: int, dtype: torch.dtype) -> Tensor:
    """The values in each byte, (256, 8/bits)."""
    if bits == 8:
        return _e4m3_values().to(dtype).unsqueeze(1)
    table, codes = torch.cat([_E2M1, -_E2M1]).to(dtype), torch.arange(256)
    return torch.stack([table[codes & 0xF], table[codes >> 4]], 1)


@cache
def _scale_values(power: bool, dtype: torch.dtype) -> Tensor:
    """What each stored scale stands for, (256,); float16 has no powers of two below -24 (0) and above 15 (infinity)."""
    return (torch.exp2(torch.arange(256.0, dtype=torch.float64) - _BIAS) if power else _e4m3_values()).to(dtype)


def dequantize(packed: Tensor, scales: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    """The values MLX computes with: (O, I) in `dtype`, bit for bit as `mlx.core.dequantize(..., dtype=dtype)`.

    packed: (O, I*bits/32) uint32; scales: (O, I/group_size) uint8. MLX's own default dtype is bfloat16.
    Raises ValueError when the shapes or dtypes contradict each other.
    """
    form = _format(mode)
    rows, columns = scales.shape[0], scales.shape[-1] * form.group_size
    if (
        packed.dtype != torch.uint32
        or scales.dtype != torch.uint8
        or dtype not in DTYPES
        or packed.shape != (rows, columns * form.bits // 32)
    ):
        raise ValueError(
            f"not a matrix in {mode}: packed {packed.dtype} {tuple(packed.shape)}, scales {scales.dtype} "
            f"{tuple(scales.shape)}, to {dtype}"
        )
    stream = packed.contiguous().view(torch.uint8)
    values, factors = _byte_values(form.bits, dtype), _scale_values(form.power, dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scale = factors.index_select(0, scales[part].flatten().int())
        found = values.index_select(0, stream[part].flatten().int())
        out[part] = found.view(-1, form.group_size).mul_(scale.unsqueeze(1)).view(-1, columns)
    return out


def _format(mode: str) -> Format:
    if mode not in FORMATS:
        raise ValueError(f"MLX has no mode {mode!r} (known: {', '.join(FORMATS)})")
    return FORMATS[mode]
