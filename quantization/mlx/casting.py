"""Conversion between floating-point types as in PyTorch and MLX: to nearest even, infinity past the largest."""

import numpy as np

from fastvlm.common.dtypes import ARRAYS, Array, bits_of, kind_of


def cast(values: Array, dtype: str) -> tuple[Array, float]:
    """float16, bfloat16 (its bits, uint16) or float32 as `dtype`, and the largest magnitude of the results."""
    from quantization.mlx import kernels  # and with it numba

    kind = kind_of(values)
    if kind is None:
        raise ValueError(f"cannot convert {values.dtype} to {dtype}: expected a floating-point type")
    source = bits_of(np.ascontiguousarray(values))
    target = np.empty(values.shape, ARRAYS[dtype])
    out = bits_of(target)

    def work(start: int, stop: int) -> float:
        part = slice(start, stop)
        return float(kernels.cast(source[part], kernels.KINDS[kind], kernels.KINDS[dtype], out[part]))

    return target, kernels.greatest(kernels.spread(work, source.size, 1))
