"""What a stored weight means, written down apart: the oracle of Core AI's forms."""

import math

import numpy as np


def dequantized(parts: dict[str, np.ndarray]) -> np.ndarray:
    """The float32 weight of `quantization.coreai.forms.store`'s parts, value by value as Core AI's operations have it
    (`coreai_torch/_compression/custom_layers.py`, 0.4.3)."""
    if "lut" in parts:
        indices, lut = parts["indices"], parts["lut"]
        rows = len(indices) // len(lut)
        return np.stack([lut[row // rows].ravel()[codes] for row, codes in enumerate(indices)]).astype(np.float32)
    data, scale = parts["data"], parts["scale"].astype(np.float32)
    if data.dtype == np.uint8:
        data = np.vectorize(_e4m3)(data)
    for axis in range(data.ndim):
        scale = np.repeat(scale, data.shape[axis] // scale.shape[axis], axis)
    return data.astype(np.float32) * scale


def _e4m3(code: int) -> float:
    """OCP 8-bit floating point, E4M3: a sign, 4 bits of exponent with a bias of 7, 3 of fraction; 127 is NaN."""
    sign, exponent, fraction = -1.0 if code & 128 else 1.0, (int(code) >> 3) & 15, int(code) & 7
    if (exponent, fraction) == (15, 7):
        return math.nan
    return sign * (math.ldexp(1 + fraction / 8, exponent - 7) if exponent else math.ldexp(fraction / 8, -6))


def squared_error(weight: np.ndarray, other: np.ndarray) -> float:
    """The sum of the squared differences, of the weight's own squares."""
    weight = weight.astype(np.float64)
    return float(((weight - other) ** 2).sum() / (weight**2).sum())
