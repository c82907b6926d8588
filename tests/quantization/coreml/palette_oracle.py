"""Palettes and linear forms by coremltools: oracle of our palettes and linear forms, and the rival in benchmarks.

`palettize_weights` calls just these functions on each weight, on one core, so a measurement need not convert a model.
The recipe of the comparison, tensor by tensor and interleaved: time `coremltools_palette` and `palettize` on the same
fp16 weight with OMP_NUM_THREADS=1, and compare `squared_error` of both decoded tensors. It uses its bundled kmeans1d
(the exact optimum) for fp16 groups of 10,000 weights and more, scikit-learn's k-means (one start) for smaller ones.
"""

import logging
from typing import Any

import numpy as np

logging.getLogger("coremltools").setLevel(logging.ERROR)  # it advises installing kmeans1d once a group

from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense  # noqa: E402
from coremltools.optimize.coreml._quantization_passes import linear_quantize_weights, palettize_weights  # noqa: E402


def coremltools_palette(weight: np.ndarray, bits: int, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(indices, lut (groups, 2**bits)) of `palettize_weights` with kmeans, per tensor or per grouped channel."""
    params: Any = palettize_weights.blockwise_compress(
        weight, "KMEANS", bits, [group_size or 0] + [0] * (weight.ndim - 1), channel_axis=0
    )
    return params.indices, params.lut.reshape(-1, 1 << bits)


def decode_palette(indices: np.ndarray, lut: np.ndarray) -> np.ndarray:
    """coremltools' own decompression of indices (O, ...) and a table (groups, 2**bits)."""
    table = lut.reshape(len(lut), *[1] * (indices.ndim - 1), -1, 1)
    return constexpr_lut_to_dense.decompress(indices, table, None)


def coremltools_linear(weight: np.ndarray, bits: int, block: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(data, scale in the weight's rank) of `linear_quantize_weights`, linear_symmetric, per channel or per block."""
    params: Any = linear_quantize_weights.blockwise_compress(
        weight, bits, "LINEAR_SYMMETRIC", True, [1, block or 0] + [0] * (weight.ndim - 2)
    )
    return params.data, params.scale


def squared_error(weight: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.sum((weight.astype(np.float64) - decoded.astype(np.float64)) ** 2))
