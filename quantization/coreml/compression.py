"""The forms in which an encoder's weights are stored: named schemes and their sizes.

Palettes are `quantization.coreml.palettes`. The linear forms are symmetric integers with an fp16 scale: int8 for each
output channel (`constexpr_affine_dequantize`), int4 for blocks along the input axis
(`constexpr_blockwise_shift_scale`).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastvlm.common.dtypes import Array
from fastvlm.common.errors import UserError
from quantization.coreml.palettes import Palette, palettize, per_channel

_FP16 = 2  # bytes
_LARGEST = 65504  # fp16's largest number
# parts of the scale that reaches a block's largest value: clipping it can cost less than coarse steps for the rest
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_CHUNK = 1 << 16  # values worked on at once: 256 KiB in float32


@dataclass(frozen=True)
class Compression:
    """One form. `target` is the first system that reads it.

    group: output channels that share a palette (None: all). block: input channels that share a scale (None: all).
    """

    name: str
    kind: Literal["palette", "linear"]
    bits: int
    target: Literal["iOS16", "iOS18"]
    group: int | None = None
    block: int | None = None
    per_channel_scale: bool = False


COMPRESSIONS = {
    scheme.name: scheme
    for scheme in (
        Compression("palette4", "palette", 4, "iOS16"),
        Compression("palette6", "palette", 6, "iOS16"),
        Compression("palette8", "palette", 8, "iOS16"),
        Compression("palette4-g16", "palette", 4, "iOS18", group=16),
        Compression("palette6-g16", "palette", 6, "iOS18", group=16),
        Compression("palette8-g16", "palette", 8, "iOS18", group=16),
        Compression("palette4-g16-scaled", "palette", 4, "iOS18", group=16, per_channel_scale=True),
        Compression("int8", "linear", 8, "iOS16"),
        Compression("int4-b32", "linear", 4, "iOS18", block=32),
    )
}


@dataclass(frozen=True)
class Linear:
    """data int8 (O, I, ...) in [-2^(bits-1), 2^(bits-1)); scale fp16 (O,), or (O, I/block, 1, ...) for blocks."""

    data: NDArray[np.int8]
    scale: NDArray[np.float16]

    def decode(self) -> NDArray[np.float16]:
        """scale · data, rounded once to fp16, as both dequantizing operations compute it."""
        rank = self.data.ndim
        scale = self.scale if self.scale.ndim == rank else per_channel(self.scale, rank)
        return stretched(self.data.astype(np.float16), scale)


def stretched(data: Array, scale: Array) -> Array:
    """data (O, I, ...) times a scale (O, 1 or I/block, 1, ...) for each channel or block."""
    blocks = data.reshape(*scale.shape[:2], data.shape[1] // scale.shape[1], -1)
    return (blocks * scale.reshape(*scale.shape[:2], 1, 1)).reshape(data.shape)


@dataclass(frozen=True)
class Compressed:
    """A weight in one of the forms."""

    scheme: Compression
    stored: Palette | Linear

    def decode(self) -> NDArray[np.float16]:
        """The fp16 weights that Core ML computes with."""
        return self.stored.decode()


def nbytes(shape: tuple[int, ...], scheme: Compression) -> int:
    """Bytes of a weight of this shape, which the scheme applies to: packed indices or integers, tables, scales; without
    the file's headers and alignment."""
    channels = shape[0]
    if scheme.kind == "palette":
        tables = 1 if scheme.group is None else channels // scheme.group
        floats = (tables << scheme.bits) + channels * scheme.per_channel_scale
    else:
        floats = channels if scheme.block is None else channels * (shape[1] // scheme.block)
    return (math.prod(shape) * scheme.bits + 7) // 8 + floats * _FP16


def applies(shape: tuple[int, ...], scheme: Compression) -> str | None:
    """The reason why a weight of this shape stays in fp16 under the scheme, or None where the scheme shrinks it."""
    if len(shape) < 2 or 0 in shape:
        return f"shape {list(shape)}: expected output channels, input channels and a kernel"
    if scheme.group is not None and shape[0] % scheme.group:
        return f"{shape[0]} output channel(s) do not divide into groups of {scheme.group}"
    if scheme.block is not None and shape[1] % scheme.block:
        return f"{shape[1]} input channel(s) do not divide into blocks of {scheme.block}"
    compressed, plain = nbytes(shape, scheme), math.prod(shape) * _FP16
    return None if compressed < plain else f"{compressed} bytes are not fewer than the {plain} of fp16"


def compress(weight: NDArray[np.float16], scheme: Compression) -> Compressed:
    """Store a weight (O, I, ...) fp16, finite, by a scheme.

    Raises UserError when the scheme does not apply (`applies`), ValueError for other faults of the weight.
    """
    if fault := applies(weight.shape, scheme):
        raise UserError(f"cannot store a weight {list(weight.shape)} as {scheme.name}: {fault}")
    if weight.dtype != np.float16 or not np.isfinite(weight).all():
        raise ValueError(f"cannot compress {weight.dtype} {list(weight.shape)}: expected finite fp16 weights")
    if scheme.kind == "palette":
        stored: Palette | Linear = palettize(
            weight, scheme.bits, scheme.group, per_channel_scale=scheme.per_channel_scale
        )
    else:
        stored = linear(weight, scheme.bits, scheme.block)
    return Compressed(scheme, stored)


def linear(weight: NDArray[np.float16], bits: int, block: int | None) -> Linear:
    """Round to the nearest multiple of a scale, chosen for each channel or block for the least squared error.

    weight: (O, I, ...) float16, finite; block divides I.
    """
    channels, blocks = len(weight), 1 if block is None else weight.shape[1] // block
    rows = weight.reshape(channels * blocks, -1)
    data, scale = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float16)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = rows[part].astype(np.float32)
        scale[part] = _best_scale(values, bits)
        data[part] = _codes(values, scale[part], bits)
    shape = (channels,) if block is None else (channels, blocks, *[1] * (weight.ndim - 2))
    return Linear(data.reshape(weight.shape), scale.reshape(shape))


def _best_scale(values: NDArray[np.float32], bits: int) -> NDArray[np.float16]:
    """The scale of each row: from a few clips of its largest value, the best, then the least-squares scale of its
    codes."""
    reach = np.abs(values).max(1)
    best, least = np.ones(len(values), np.float16), np.full(len(values), np.inf)
    ideal = np.zeros(len(values))

    def consider(unclipped: NDArray[np.floating]) -> None:
        # the bounds: of a subnormal scale's rounding to zero, and of the lowest code times the scale
        scale = np.clip(unclipped, np.finfo(np.float16).smallest_subnormal, _LARGEST / 2 ** (bits - 1))
        scale = scale.astype(np.float16)
        codes = _codes(values, scale, bits)
        difference = codes * scale.astype(np.float32)[:, None]
        difference -= values
        error = np.einsum("ij,ij->i", difference, difference)
        better = error < least
        best[better], least[better] = scale[better], error[better]
        dot, square = np.einsum("ij,ij->i", codes, values), np.einsum("ij,ij->i", codes, codes)
        ideal[better] = (dot / np.maximum(square, 1))[better]

    for clip in _CLIPS:
        consider(reach * clip / (2 ** (bits - 1) - 1))
    consider(ideal)
    return np.where(reach > 0, best, 1).astype(np.float16)


def _codes(values: NDArray[np.float32], scale: NDArray[np.float16], bits: int) -> NDArray[np.float32]:
    codes = values / scale.astype(np.float32)[:, None]
    np.rint(codes, out=codes)
    return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, out=codes)
