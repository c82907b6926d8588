"""Where a resized axis is sampled, and interpolation there. Semantics: coremltools defs `image_resizing.py`.

A grid is in pixels of the input, float64, so that points which fall on a pixel do so exactly.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..program import MOST_BYTES
from ..registry import Unsupported

MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")
# Names of our own: pixel i takes the input's i X / N, rounded down, or its (i + 0.5) X / N.
NEAREST_CORNER, NEAREST_CENTRE = "nearest corner", "nearest centre"
# As torch has them: align_corners.
_TORCH = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}


def checked(mode: str) -> str:
    """The sampling mode; Unsupported unless it is one of MODES."""
    if mode not in MODES:
        raise Unsupported(f"sampling_mode {mode!r}, expected one of {', '.join(MODES)}")
    return mode


def grid(mode: str, size: torch.Tensor, count: int) -> torch.Tensor:
    """`count` points in [0, size - 1], or from 0 down to it: size (...) float64 -> (..., count)."""
    size = size.unsqueeze(-1)
    last = size - 1
    place = torch.arange(count, dtype=torch.float64)
    if mode == "ALIGN_CORNERS" and count == 1:
        points = last / 2
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = place * last / max(count - 1, 1)
    elif mode == "DEFAULT":
        points = place * size / count
    elif mode == "OFFSET_CORNERS":
        points = (place + 0.5) * last.clamp(min=1) / count
    else:
        points = (place + 0.5) * size / count - 0.5
    return points.clamp(last.clamp(max=0), last.clamp(min=0))


@functools.lru_cache(maxsize=256)
def _grid(mode: str, size: int, count: int) -> torch.Tensor:
    return grid(mode, torch.tensor(float(size), dtype=torch.float64), count)


@functools.lru_cache(maxsize=256)
def _nearest(mode: str, size: int, count: int) -> torch.Tensor:
    """The pixels nearest to the grid's points, of two the higher; NEAREST_*: as written there."""
    if mode not in (NEAREST_CORNER, NEAREST_CENTRE):
        return (_grid(mode, size, count) + 0.5).floor().to(torch.int64)
    twice = 2 * torch.arange(count) + (mode == NEAREST_CENTRE)
    return torch.div(twice * size, 2 * count, rounding_mode="floor")


def resized(x: torch.Tensor, sizes: Sequence[int], mode: str, linear: bool) -> torch.Tensor:
    """x with its last dimensions in these sizes."""
    if math.prod(x.shape[: x.ndim - len(sizes)]) * math.prod(sizes) > MOST_BYTES:  # of sizes known only now
        raise ValueError(f"{list(sizes)} is too large")
    old = x.shape[x.ndim - len(sizes) :]
    if linear and mode in _TORCH and len(sizes) == 2:
        batch = x.flatten(0, -3).unsqueeze(1)
        result = F.interpolate(batch, list(sizes), mode="bilinear", align_corners=_TORCH[mode])
        return result.reshape(*x.shape[:-2], *sizes)
    for axis, (size, count) in enumerate(zip(old, sizes), start=x.ndim - len(sizes)):
        if size == count and mode != "OFFSET_CORNERS":  # every other one then takes each pixel as it is
            continue
        if linear:
            x = _interpolated(x, axis, _grid(mode, size, count))
        else:
            x = x.index_select(axis, _nearest(mode, size, count))
    return x


def _interpolated(x: torch.Tensor, axis: int, points: torch.Tensor) -> torch.Tensor:
    low = points.floor()
    part = (points - low).to(torch.float32).reshape(-1, *[1] * (x.ndim - 1 - axis))
    before, after = (x.index_select(axis, place.to(torch.int64)) for place in (low, points.ceil()))
    return (before * (1 - part) + after * part).to(x.dtype)


def between(a: torch.Tensor, b: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """From a (part 0) to b (part 1)."""
    return a * (1 - part) + b * part
