"""Distances of a candidate from its reference: plain formulas in float64, in which NaN and infinity never look good.

A reference or candidate that is not finite gets the worst value of the metric. Arrays that cannot be compared
(empty, or of two shapes) raise ValueError: a comparison that cannot happen has no figure.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

_POSITIONS_AT_ONCE = 2  # a row of Qwen2's logits is 152 k values: float64 copies that stay in the processor's cache
_VALUES_AT_ONCE = 1 << 16  # an activation at 1024 x 1024 has 25 M values: parts that stay in the processor's cache
_ADDED_IN_FLOAT32 = 256  # of the squares of a part; their sums are added in float64
# Float32 loses squares below 1e-38. Where the mean square is larger than this, they are nothing beside the rest.
_LEAST_MEAN_SQUARE = 1e-30


def _pair(reference: Any, candidate: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(reference), np.asarray(candidate)
    if a.shape != b.shape:
        raise ValueError(f"cannot compare arrays of shapes {a.shape} and {b.shape}")
    if a.size == 0:
        raise ValueError("cannot compare empty arrays")
    return a, b


def _parts(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both arrays, flattened, part by part: without a copy where they lie in memory alike."""
    order: Literal["K", "C"] = "K" if a.strides == b.strides else "C"
    a, b = a.ravel(order), b.ravel(order)
    for start in range(0, a.size, _VALUES_AT_ONCE):
        part = slice(start, start + _VALUES_AT_ONCE)
        yield a[part], b[part]


def _float64_parts(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for r, c in _parts(a, b):
        yield r.astype(np.float64), c.astype(np.float64)


def _finite(*arrays: np.ndarray) -> bool:
    return all(bool(np.isfinite(array).all()) for array in arrays)


def _largest(array: np.ndarray) -> float:
    return max(abs(float(array.max())), abs(float(array.min())))


def snr_db(reference: Any, candidate: Any) -> float:
    """Signal-to-noise ratio in dB: 10 log10(Σ r² / Σ (r − c)²).

    Equal arrays give +inf; a candidate (or reference) that is not finite, and noise on a silent reference, −inf.
    Float32 arrays are read once, and their squares added in float32 256 at a time, where those cannot leave its range:
    within 2e-4 dB of the formula at the very worst, 1e-6 dB as a rule. Everything else is computed in float64.
    """
    a, b = _pair(reference, candidate)
    # A ratio does not change with the unit, and in this one no square of what is wider than float32 overflows.
    unit = 1.0 if a.dtype.itemsize <= 4 and b.dtype.itemsize <= 4 else max(_largest(a), _largest(b)) or 1.0
    signal = noise = 0.0
    for r, c in _parts(a, b):
        squares = _squares_in_float32(r, c) or _squares(r, c, unit)
        if squares is None:
            return -math.inf
        signal, noise = signal + squares[0], noise + squares[1]
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf


def _squares_in_float32(r: np.ndarray, c: np.ndarray) -> tuple[float, float] | None:
    """Σ r² and Σ (r − c)² of a full part in float32; None where they might leave its range, or nothing is finite."""
    if not r.dtype == c.dtype == np.float32 or r.size % _ADDED_IN_FLOAT32:
        return None
    with np.errstate(all="ignore"):
        rows = r.reshape(-1, _ADDED_IN_FLOAT32)
        difference = np.subtract(rows, c.reshape(rows.shape))
        signal, noise = (float(np.vecdot(x, x).sum(dtype=np.float64)) for x in (rows, difference))
    least = _LEAST_MEAN_SQUARE * r.size
    sound = least <= signal < math.inf and (least <= noise < math.inf or (noise == 0 and np.array_equal(r, c)))
    return (signal, noise) if sound else None


def _squares(r: np.ndarray, c: np.ndarray, unit: float) -> tuple[float, float] | None:
    """The same in float64 and this unit; None where something is not finite. Noise is 0 for equal arrays only."""
    if not _finite(r, c):
        return None
    x, y = r.astype(np.float64) / unit, c.astype(np.float64) / unit
    noise = float(np.sum(np.square(x - y)))
    return float(x @ x), noise if noise or np.array_equal(r, c) else 5e-324  # so small that its square is 0


def cosine(reference: Any, candidate: Any) -> float:
    """Cosine similarity of the flattened arrays: r·c / (|r| |c|), in −1…1.

    Two zero vectors give 1, one zero vector 0, anything not finite −1.
    """
    a, b = _pair(reference, candidate)
    if not _finite(a, b):
        return -1.0
    sizes = _largest(a), _largest(b)
    if 0 in sizes:
        return 1.0 if sizes == (0, 0) else 0.0
    product = square_a = square_b = 0.0
    for r, c in _float64_parts(a, b):
        r, c = r / sizes[0], c / sizes[1]  # so that no square overflows
        product, square_a, square_b = product + float(r @ c), square_a + float(r @ r), square_b + float(c @ c)
    return max(-1.0, min(1.0, product / math.sqrt(square_a * square_b)))


def max_abs(reference: Any, candidate: Any) -> float:
    """Largest absolute difference, max |r − c|, in the arrays' own unit; +inf if anything is not finite."""
    a, b = _pair(reference, candidate)
    return max(float(np.abs(r - c).max()) for r, c in _float64_parts(a, b)) if _finite(a, b) else math.inf


def log_softmax(logits: Any) -> np.ndarray:
    """x − log Σ exp x over the last axis, in float64, shifted by the maximum so that nothing overflows."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_divergence(reference: Any, candidate: Any) -> float:
    """Kullback-Leibler divergence in nats, mean over positions: Σ_v p (log p − log q), with p and q the softmax of
    reference and candidate logits (..., V). 0 for equal logits (and any shift of a row), +inf if anything isn't finite.
    """
    return float(np.mean(kl_positions(reference, candidate)))


def kl_positions(reference: Any, candidate: Any) -> np.ndarray:
    """The divergence of `kl_divergence` at each position: logits (..., V) -> (positions,) float64."""
    a, b = _pair(reference, candidate)
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    if not _finite(a, b):
        return np.full(len(a), math.inf)
    divergences = np.empty(len(a))
    for start in range(0, len(a), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        x, y = (values[part].astype(np.float64) for values in (a, b))
        for shifted in (x, y):
            shifted -= shifted.max(axis=-1, keepdims=True)  # so that nothing overflows
        weights = np.exp(x)
        total, other = weights.sum(axis=-1), np.exp(y).sum(axis=-1)
        divergences[part] = np.vecdot(weights, x - y) / total - np.log(total / other)
    return np.maximum(divergences, 0.0)  # rounding can leave −1e-17


def negative_log_likelihood(logits: Any, tokens: Any) -> np.ndarray:
    """−log p(token) in nats at each position, p the softmax of logits (T, V), tokens (T,) -> (T,) float64.

    The exponential of its mean over a text is the perplexity.
    """
    x, chosen = np.asarray(logits), np.asarray(tokens)
    if len(x) != len(chosen) or len(x) == 0:
        raise ValueError(f"cannot score {len(chosen)} tokens by {len(x)} positions")
    nats = np.empty(len(x))
    for start in range(0, len(x), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        nats[part] = -np.take_along_axis(log_softmax(x[part]), chosen[part, None], axis=-1)[:, 0]
    return nats


def top1_agreement(reference: Any, candidate: Any) -> float:
    """Fraction of positions whose largest logit (..., V) is the same token; a row that is not finite disagrees."""
    a, b = _pair(reference, candidate)
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    sound = np.isfinite(a).all(axis=-1) & np.isfinite(b).all(axis=-1)
    return float(np.mean(sound & (a.argmax(axis=-1) == b.argmax(axis=-1))))


def first_divergence(reference: Sequence[int], candidate: Sequence[int]) -> int | None:
    """Index of the first token that differs, None when the sequences are equal.

    Where one sequence is the start of the other it is the length of the shorter one: there one of them stops.
    """
    for index, (a, b) in enumerate(zip(reference, candidate)):
        if a != b:
            return index
    return None if len(reference) == len(candidate) else min(len(reference), len(candidate))
