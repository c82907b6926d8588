"""MLX's affine quantization in PyTorch: the bytes of `mlx.core.quantize`, the values of `mlx.core.dequantize`.

Each group of `group_size` neighbours along a row keeps a scale and a bias: w ~ scale * q + bias, q in [0, 2^bits).
Source of the arithmetic and of the bit order: mlx 0.32.4, `mlx/backend/cpu/quantized.cpp` (quantize) and
`mlx/ops.cpp` (affine_dequantize); every intermediate is float32, as there.
"""

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_SMALLEST_SCALE = 1e-7  # mlx's eps: keeps a group of equal values from dividing by zero
_CHUNK = 1 << 18  # values worked on at once: 1 MiB in float32, about a core's L2 cache


def packed_columns(columns: int, bits: int) -> int:
    """How many uint32 words hold a row of `columns` values."""
    return columns * bits // 32


def quantize(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows to nearest, byte for byte as `mlx.core.quantize(w, group_size, bits)` does on the CPU.

    weight: (O, I) float16, bfloat16 or float32, finite, I divisible by group_size.
    Returns (packed (O, I*bits/32) uint32, scales (O, I/group_size), biases (O, I/group_size)), both in weight's dtype.
    Raises ValueError for anything MLX would not quantize.
    """
    _check(bits, group_size)
    if weight.ndim != 2 or weight.dtype not in DTYPES or weight.shape[1] % group_size:
        raise ValueError(
            f"cannot quantize {weight.dtype} {tuple(weight.shape)} in groups of {group_size}: "
            f"expected a float matrix whose rows divide by the group"
        )
    rows, columns = weight.shape
    packed = torch.empty(rows, columns * bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, columns // group_size, dtype=weight.dtype)
    biases = torch.empty_like(scales)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = weight[part].to(torch.float32).reshape(-1, columns // group_size, group_size)
        scale, bias = scale_and_bias(groups, 2**bits - 1)
        q = (groups - bias.unsqueeze(-1)).div_(scale.unsqueeze(-1)).round_().clamp_(0, 2**bits - 1)
        packed[part] = pack(q.to(torch.uint8).reshape(-1, columns), bits)
        scales[part], biases[part] = scale, bias
    return packed.view(torch.uint32), scales, biases


def scale_and_bias(groups: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The scale and bias of each group: the edge of larger magnitude is representable exactly, and so is zero."""
    low, high = groups.amin(-1), groups.amax(-1)  # nine times as fast as aminmax along a short dimension
    from_low = low.abs() > high.abs()
    scale = ((high - low) / bins).clamp_(min=_SMALLEST_SCALE)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = (edge / scale).round()
    at_zero = steps == 0
    return torch.where(at_zero, scale, edge / steps), edge.masked_fill(at_zero, 0.0)


def pack(q: Tensor, bits: int) -> Tensor:
    """Values (R, I) uint8 to a little-endian bit stream (R, I*bits/8) uint8, the first value in the lowest bits."""
    rows = q.shape[0]
    if bits == 8:
        return q
    if 8 % bits == 0:
        q = q.view(rows, -1, 8 // bits)
        out = q[..., 0].clone()
        for i in range(1, 8 // bits):
            out |= q[..., i] << (bits * i)
        return out
    eights = q.view(rows, -1, 8).to(torch.int64)  # eight values fill exactly `bits` bytes
    words = (eights << (torch.arange(8) * bits)).sum(-1, keepdim=True)
    return words.view(torch.uint8)[..., :bits].reshape(rows, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: (R, I*bits/8) uint8 to (R, I) uint8."""
    rows = packed.shape[0]
    if 8 % bits == 0:
        return ((packed.unsqueeze(-1) >> (torch.arange(8 // bits, dtype=torch.uint8) * bits)) & (2**bits - 1)).view(
            rows, -1
        )
    words = torch.zeros(rows, packed.shape[1] // bits, 8, dtype=torch.uint8)
    words[..., :bits] = packed.view(rows, -1, bits)
    return ((words.view(torch.int64) >> (torch.arange(8) * bits)) & (2**bits - 1)).to(torch.uint8).view(rows, -1)


def dequantize(packed: Tensor, scales: Tensor, biases: Tensor, bits: int, group_size: int) -> Tensor:
    """The values MLX computes with: (O, I) in the scales' dtype, bit for bit as `mlx.core.dequantize` on the CPU.

    packed: (O, I*bits/32) uint32; scales, biases: (O, I/group_size). The product and the sum are rounded to the
    scales' dtype one after the other, as MLX does. Raises ValueError when the shapes or dtypes contradict each other.
    """
    _check(bits, group_size)
    rows, columns = scales.shape[0], scales.shape[-1] * group_size
    if (
        packed.dtype != torch.uint32
        or scales.dtype not in DTYPES
        or biases.dtype != scales.dtype
        or biases.shape != scales.shape
        or packed.shape != (rows, packed_columns(columns, bits))
    ):
        raise ValueError(
            f"not a {bits}-bit matrix in groups of {group_size}: packed {packed.dtype} "
            f"{tuple(packed.shape)}, scales {scales.dtype} {tuple(scales.shape)}, "
            f"biases {biases.dtype} {tuple(biases.shape)}"
        )
    stream = packed.contiguous().view(torch.uint8)
    out = torch.empty(rows, columns, dtype=scales.dtype)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        q = unpack(stream[part], bits).view(-1, columns // group_size, group_size).to(scales.dtype)
        q.mul_(scales[part].unsqueeze(-1)).add_(biases[part].unsqueeze(-1))
        out[part] = q.view(-1, columns)
    return out


def _check(bits: int, group_size: int) -> None:
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"MLX has no affine {bits} bit in groups of {group_size}: bits {BITS}, groups {GROUP_SIZES}")
