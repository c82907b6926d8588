"""What adapters make of a tensor, computed in float32 for the rows that are asked for.

Nothing here knows names or formats: `fastvlm.checkpoint.adapter` and its readers do. Memory is that of the rows and of
the adapter's factors, whatever the tensor's size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fastvlm.checkpoint.weights import TensorInfo, Weights
from fastvlm.common.dtypes import Array
from fastvlm.common.errors import UserError

_AT_ONCE = 1 << 22  # values that are merged at once: 16 MiB in float32
_ALONE = 1 << 18  # multiplications up to which OpenBLAS computes a product on the calling thread (interface/gemm.c)


@dataclass(frozen=True)
class Factors:
    """The product that LoRA adds: scale · left (rows, rank) @ right (rank, columns).

    Args:
        left: B of a linear layer's `y = W x + B A x`. right: A.
        scale: what the product is multiplied by.
        transposed: both are stored the other way round, (rank, rows) and (columns, rank).
        magnitude: DoRA's lengths, which the sum's rows or columns are brought to; None for LoRA.
        along: what has these lengths.
    """

    left: TensorInfo
    right: TensorInfo
    scale: float
    transposed: bool = False
    magnitude: TensorInfo | None = None
    along: Literal["rows", "columns"] = "rows"

    @property
    def rank(self) -> int:
        """The number of columns of the one and of rows of the other."""
        return self.right.shape[-1 if self.transposed else 0]


def _product(left: Array, right: Array) -> Array:
    """left @ right in pieces that BLAS gives to no second thread: where cores are busy, waiting for that one takes ten
    times as long as the product. And no sum depends on the number of threads."""
    left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
    (rows, rank), columns = left.shape, right.shape[1]
    result = np.empty((rows, columns), np.float32)
    height = min(rows, max(1, math.isqrt(_ALONE // rank)))
    width = max(1, _ALONE // (rank * height))
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            piece = np.s_[row : row + height, column : column + width]
            np.matmul(left[piece[0]], right[:, piece[1]], out=result[piece])
    return result


@dataclass(eq=False)
class LowRank:
    """A tensor (rows, ...) plus `factors`; a convolution's kernel is a row."""

    base: TensorInfo
    factors: Factors
    _lengths: Array | None = field(default=None, repr=False)

    def rows(self, weights: Weights, start: int, stop: int) -> Array:
        """See `weights.Change`."""
        merged = np.empty((stop - start, *self.base.shape[1:]), np.float32)
        factors = self.factors
        magnitude = None if factors.magnitude is None else weights.kept(factors.magnitude).reshape(-1)
        for first, part in self._sums(weights, start, stop):
            if magnitude is not None and factors.along == "rows":
                part *= self._shares(magnitude[first : first + len(part)], np.linalg.norm(part, axis=1))[:, None]
            elif magnitude is not None:
                part *= self._shares(magnitude, self._column_lengths(weights))
            merged[first - start : first - start + len(part)] = part.reshape(len(part), *merged.shape[1:])
        return merged

    def _sums(self, weights: Weights, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        """(first row, base + scale · left @ right, flattened to (n, columns)) for part after part."""
        factors = self.factors
        right = weights.kept(factors.right)
        right = right.T if factors.transposed else right.reshape(factors.rank, -1)
        step = max(1, _AT_ONCE // right.shape[1])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if factors.transposed:
                left = weights.kept(factors.left)[:, first:last].T
            else:
                left = weights.floats(factors.left, first, last).reshape(last - first, factors.rank)
            total = _product(left, right)
            total *= np.float32(factors.scale)
            total += weights.floats(self.base, first, last).reshape(total.shape)
            yield first, total

    def _shares(self, magnitude: Array, lengths: Array) -> Array:
        """Learnt lengths by those of the sum."""
        if not lengths.all():
            raise UserError(f"{self.base.source}: DoRA can't give a length to {self.factors.along} that are all zero")
        return np.asarray(magnitude / lengths)

    def _column_lengths(self, weights: Weights) -> Array:
        """The length of each column of the sum, which takes a pass through the whole tensor once."""
        if self._lengths is None:
            squares = np.zeros(self.base.shape[1], np.float64)
            for _, part in self._sums(weights, 0, self.base.shape[0]):
                squares += np.square(part, dtype=np.float64).sum(0)
            self._lengths = np.sqrt(squares).astype(np.float32)
        return self._lengths


@dataclass(eq=False)
class Replaced:
    """A tensor (rows, columns) with some of its rows replaced: row `index[i]` by row i of `values`."""

    base: TensorInfo
    index: tuple[int, ...]
    values: TensorInfo

    def rows(self, weights: Weights, start: int, stop: int) -> Array:
        """See `weights.Change`."""
        merged = weights.floats(self.base, start, stop)
        for place, row in enumerate(self.index):
            if start <= row < stop:
                merged[row - start] = weights.floats(self.values, place, place + 1)[0]
        return merged


@dataclass(eq=False)
class Added:
    """A tensor plus scale · `values`."""

    base: TensorInfo
    values: TensorInfo
    scale: float

    def rows(self, weights: Weights, start: int, stop: int) -> Array:
        """See `weights.Change`."""
        added = weights.floats(self.values, start, stop)
        return np.asarray(weights.floats(self.base, start, stop) + np.float32(self.scale) * added)
