"""A convolution's weights as indices into small tables of fp16 values: what Core ML calls palettization.

An fp16 tensor has at most 65,536 distinct values, so a group of output channels is a histogram over fp16 codes. It is
counted once, clustered (`quantization.coreml.kmeans`), and assigned through a table over codes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CODES = 1 << 16
_ROUNDS_TO_INFINITY = 65520  # the smallest number that does so in fp16
_NEGATIVE = 1 << 15  # the sign bit: from here on a larger code is a smaller value


@dataclass(frozen=True)
class Palette:
    """indices uint8 in the weight's shape (O, ...), lut fp16 (groups, 2**bits) ascending, scale fp16 (O,) or None.

    Output channel o belongs to group o // (O / groups).
    """

    indices: NDArray[np.uint8]
    lut: NDArray[np.float16]
    scale: NDArray[np.float16] | None

    def decode(self) -> NDArray[np.float16]:
        """The fp16 weights of `constexpr_lut_to_dense`, and of `constexpr_blockwise_shift_scale` over it if scaled."""
        out = np.empty(self.indices.shape, np.float16)
        rows = len(self.indices) // len(self.lut)
        for group, lut in enumerate(self.lut):
            part = slice(group * rows, (group + 1) * rows)
            out[part] = lut[self.indices[part]]
        return out if self.scale is None else out * per_channel(self.scale, out.ndim)


def palettize(
    weight: NDArray[np.float16],
    bits: int,
    group_size: int | None = None,
    per_channel_scale: bool = False,
) -> Palette:
    """Choose 2**bits fp16 values for each `group_size` output channels (None: for the whole tensor), least squares.

    weight: fp16 (O, I, ...), finite; 1 to 8 bits; group_size divides O. per_channel_scale: each output channel is first
    divided by its root mean square, which Core ML multiplies back. Exact where a group has at most 2**bits distinct
    values (and no scale). Deterministic.
    Raises ValueError for weights that a scale would overflow.
    """
    from quantization.coreml.kmeans import cluster  # and with it numba

    size = group_size or len(weight)
    scale, costs = None, None
    if per_channel_scale:
        scale = _root_mean_square(weight)
        factor = per_channel(scale, weight.ndim)
        weight = (weight.astype(np.float32) / factor).astype(np.float16)
        # an error of the scaled weight counts scale² in the weight itself
        costs = np.broadcast_to(factor.astype(np.float64) ** 2, weight.shape).reshape(len(weight) // size, -1)
    codes = np.ascontiguousarray(weight).view(np.uint16).reshape(len(weight) // size, -1)
    lut = np.empty((len(codes), 1 << bits), np.float16)
    indices = np.empty(codes.shape, np.uint8)
    table = np.zeros(_CODES, np.uint8)
    for group, group_codes in enumerate(codes):
        present, values, counts = _histogram(group_codes, None if costs is None else costs[group])
        levels = lut[group] = cluster(values, counts, 1 << bits, True)
        table[present] = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
        np.take(table, group_codes, out=indices[group])
    if scale is not None and (np.abs(lut).max(1).astype(np.float32).repeat(size) * scale).max() >= _ROUNDS_TO_INFINITY:
        raise ValueError("a per-channel scale cannot hold weights this close to 65504: palettize them without")
    return Palette(indices.reshape(weight.shape), lut, scale)


def _histogram(
    codes: NDArray[np.uint16], costs: NDArray[np.float64] | None
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The codes present, ascending by value; their values; how often each is there, or what those cost in all."""
    counts = np.bincount(codes, minlength=_CODES)
    present = np.flatnonzero(counts > 0)  # a boolean array is scanned several times as fast
    split = np.searchsorted(present, _NEGATIVE)
    present = np.concatenate((present[split:][::-1], present[:split]))
    values = present.astype(np.uint16).view(np.float16).astype(np.float64)
    if costs is not None:
        counts = np.bincount(codes, costs, minlength=_CODES)
    return present, values, counts[present].astype(np.float64)


def _root_mean_square(weight: NDArray[np.float16]) -> NDArray[np.float16]:
    """The root mean square of each output channel (O,); at least fp16's smallest positive number, 1 for a channel of
    zeros."""
    rows = weight.reshape(len(weight), -1).astype(np.float32)
    rms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64) / rows.shape[1])
    return np.where(rms > 0, np.maximum(rms, np.finfo(np.float16).smallest_subnormal), 1).astype(np.float16)


def per_channel(scale: NDArray[np.float16], rank: int) -> NDArray[np.float16]:
    """Scales (O,) as (O, 1, ...) of `rank` dimensions, to multiply a weight's output channels by."""
    return scale.reshape(-1, *[1] * (rank - 1))
