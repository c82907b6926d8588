"""A convolution's weights as indices into small tables of fp16 values: what Core ML calls palettization.

An fp16 tensor has at most 65,536 distinct values, so a group of output channels is a histogram over fp16 codes. It is
counted once, clustered (`quantization.coreml.kmeans`), and assigned through a table over codes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantization.coreml.kmeans import Histogram, cluster

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
        return out if self.scale is None else out * _per_channel(self.scale, out.ndim)


def palettize(
    weight: NDArray[np.float16],
    bits: int,
    group_size: int | None = None,
    per_channel_scale: bool = False,
) -> Palette:
    """Choose 2**bits fp16 values for each `group_size` output channels (None: for the whole tensor), least squares.

    weight: fp16 (O, I, ...), finite. per_channel_scale: each output channel is first divided by its root mean square,
    which Core ML multiplies back. Exact where a group has at most 2**bits distinct values (and no scale).
    Deterministic.
    Raises ValueError with what is wrong: dtype, shape, NaN or infinity, bits, a group that doesn't divide O.
    """
    size = _check(weight, bits, group_size)
    scale, counts = None, None
    if per_channel_scale:
        scale = _root_mean_square(weight)
        factor = _per_channel(scale, weight.ndim)
        weight = (weight.astype(np.float32) / factor).astype(np.float16)
        # an error of the scaled weight counts scale² in the weight itself
        counts = np.broadcast_to(factor.astype(np.float64) ** 2, weight.shape)
    codes = np.ascontiguousarray(weight).view(np.uint16).reshape(len(weight) // size, -1)
    weights = [None] * len(codes) if counts is None else counts.reshape(len(codes), -1)
    present, histograms = zip(*(_histogram(c, w) for c, w in zip(codes, weights, strict=True)), strict=True)
    lut = cluster(histograms, 1 << bits, np.float16).astype(np.float16)
    indices = np.empty(codes.shape, np.uint8)
    table = np.zeros(_CODES, np.uint8)
    for group, histogram in enumerate(histograms):
        levels = lut[group].astype(np.float64)
        table[present[group]] = np.searchsorted((levels[1:] + levels[:-1]) / 2, histogram.values)
        np.take(table, codes[group], out=indices[group])
    if scale is not None and (np.abs(lut).max(1).astype(np.float32).repeat(size) * scale).max() >= _ROUNDS_TO_INFINITY:
        raise ValueError("a per-channel scale cannot hold weights this close to 65504: palettize them without")
    return Palette(indices.reshape(weight.shape), lut, scale)


def group_fault(channels: int, group_size: int) -> str | None:
    """Why `channels` output channels can't be split into groups of `group_size`, or None."""
    if group_size > 0 and channels % group_size == 0:
        return None
    legal = ", ".join(str(size) for size in range(1, channels + 1) if channels % size == 0)
    return f"{channels} output channels do not divide into groups of {group_size} (sizes that do: {legal})"


def _check(weight: NDArray[np.float16], bits: int, group_size: int | None) -> int:
    """The group's size in output channels. Raises ValueError with every fault."""
    faults = []
    if weight.dtype != np.float16 or weight.ndim < 1 or not weight.size:
        faults.append(f"expected fp16 weights (O, ...), got {weight.dtype} {weight.shape}")
    elif not np.isfinite(weight).all():
        faults.append("the weights have NaN or infinity")
    if bits not in range(1, 9):
        faults.append(f"expected 1 to 8 bits, got {bits}")
    if weight.ndim and group_size is not None and (fault := group_fault(len(weight), group_size)):
        faults.append(fault)
    if faults:
        raise ValueError(f"cannot palettize: {'; '.join(faults)}")
    return len(weight) if group_size is None else group_size


def _histogram(codes: NDArray[np.uint16], weights: NDArray[np.float64] | None) -> tuple[NDArray[np.int64], Histogram]:
    """The codes present, ascending by value, and the histogram of their values."""
    counts = np.bincount(codes, minlength=_CODES)
    present = np.flatnonzero(counts > 0)  # a boolean array is scanned several times as fast
    split = np.searchsorted(present, _NEGATIVE)
    present = np.concatenate((present[split:][::-1], present[:split]))
    values = present.astype(np.uint16).view(np.float16).astype(np.float64)
    if weights is not None:
        counts = np.bincount(codes, weights, minlength=_CODES)
    return present, Histogram(values, counts[present].astype(np.float64))


def _root_mean_square(weight: NDArray[np.float16]) -> NDArray[np.float16]:
    """The root mean square of each output channel (O,); at least fp16's smallest positive number, 1 for a channel of
    zeros."""
    rows = weight.reshape(len(weight), -1).astype(np.float32)
    rms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64) / rows.shape[1])
    return np.where(rms > 0, np.maximum(rms, np.finfo(np.float16).smallest_subnormal), 1).astype(np.float16)


def _per_channel(scale: NDArray[np.float16], rank: int) -> NDArray[np.float16]:
    return scale.reshape(-1, *[1] * (rank - 1))
