"""MLX's affine quantization on NumPy arrays: the bytes of `mlx.core.quantize`, the values of `mlx.core.dequantize`.

Each group of `group_size` neighbours along a row keeps a scale and a bias: w ~ scale * q + bias, q in [0, 2^bits).
Source of the arithmetic and of the bit order: mlx 0.32.4, `mlx/backend/cpu/quantized.cpp` (quantize) and
`mlx/ops.cpp` (affine_dequantize); every intermediate is float32, as there. bfloat16 is held as its bits, uint16.
"""

import numpy as np

from fastvlm.common.dtypes import ARRAYS, Array, bits_of, kind_of

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def packed_columns(columns: int, bits: int) -> int:
    """The number of uint32 words in a row of `columns` values."""
    return columns * bits // 32


def quantize(
    weight: Array, bits: int, group_size: int, dtype: str | None = None
) -> tuple[tuple[Array, Array, Array], float]:
    """Quantize rows to nearest, byte for byte as `mlx.core.quantize(w, group_size, bits)` does on the CPU.

    weight: (O, I) float16, bfloat16 or float32, I divisible by group_size; rounded to `dtype` (None: its own) first.
    Returns (packed (O, I*bits/32) uint32, scales (O, I/group_size), biases (O, I/group_size)), the latter in `dtype`,
    and the largest magnitude in `dtype`: where that is not finite, neither are the parts.
    Raises ValueError for anything MLX would not quantize.
    """
    from quantization.mlx import kernels  # and with it numba

    _check(bits, group_size)
    kind = kind_of(weight)
    if weight.ndim != 2 or kind is None or weight.shape[1] % group_size:
        raise ValueError(
            f"cannot quantize {kind or weight.dtype} {weight.shape} in groups of {group_size}: "
            f"expected a float matrix whose rows divide by the group"
        )
    (rows, columns), stored = weight.shape, dtype or kind
    source = np.ascontiguousarray(weight)
    packed = np.empty((rows, packed_columns(columns, bits)), np.uint32)
    scales = np.empty((rows, columns // group_size), ARRAYS[stored])
    biases = np.empty_like(scales)

    def work(start: int, stop: int) -> float:
        part = slice(start, stop)
        kinds = kernels.KINDS[kind], kernels.KINDS[stored]
        stream, *edges = bits_of(packed[part], np.uint8), bits_of(scales[part]), bits_of(biases[part])
        return float(kernels.affine_quantize(bits_of(source[part]), *kinds, bits, group_size, stream, *edges))

    return (packed, scales, biases), kernels.greatest(kernels.spread(work, rows, columns))


def pack(codes: Array, bits: int) -> Array:
    """Codes (O, I) uint8 as MLX stores them, (O, I*bits/32) uint32."""
    from quantization.mlx import kernels

    packed = np.empty((codes.shape[0], packed_columns(codes.shape[1], bits)), np.uint32)
    kernels.pack(np.ascontiguousarray(codes).reshape(-1), bits, bits_of(packed, np.uint8))
    return packed


def dequantize(
    packed: Array, scales: Array, biases: Array, bits: int, group_size: int, as_float32: bool = False
) -> Array:
    """The values MLX computes with: (O, I) in the scales' dtype, bit for bit as `mlx.core.dequantize` on the CPU.

    packed: (O, I*bits/32) uint32; scales, biases: (O, I/group_size). The product and the sum are rounded to the
    scales' dtype one after the other, as MLX does; `as_float32` gives the same values as float32.
    Raises ValueError when the shapes or dtypes contradict each other.
    """
    from quantization.mlx import kernels

    _check(bits, group_size)
    rows, columns = scales.shape[0], scales.shape[-1] * group_size
    kind = kind_of(scales)
    if (
        packed.dtype != np.uint32
        or kind is None
        or biases.dtype != scales.dtype
        or biases.shape != scales.shape
        or packed.shape != (rows, packed_columns(columns, bits))
    ):
        raise ValueError(
            f"not a {bits}-bit matrix in groups of {group_size}: packed {packed.dtype} {packed.shape}, "
            f"scales {kind or scales.dtype} {scales.shape}, biases {kind_of(biases) or biases.dtype} {biases.shape}"
        )
    packed, scales, biases = map(np.ascontiguousarray, (packed, scales, biases))
    out = np.empty((rows, columns), np.float32 if as_float32 else scales.dtype)

    def work(start: int, stop: int) -> None:
        part = slice(start, stop)
        parts = bits_of(packed[part], np.uint8), bits_of(scales[part]), bits_of(biases[part])
        kernels.affine_dequantize(*parts, kernels.KINDS[kind], bits, group_size, as_float32, bits_of(out[part]))

    kernels.spread(work, rows, columns)
    return out


def _check(bits: int, group_size: int) -> None:
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"MLX has no affine {bits} bit in groups of {group_size}: bits {BITS}, groups {GROUP_SIZES}")
