"""Weighted k-means of histograms over one axis: many at once, each at its optimum or close to it.

In one dimension a cluster is a run of neighbours in the sorted values, so k-means is the choice of k - 1 cuts, and what
a run costs comes from prefix sums: S2 - S1²/S0, with S0, S1, S2 the sums of weight, weight·value, weight·value². A
dynamic program over the cuts finds the optimum (Wang and Song, "Ckmeans.1d.dp", The R Journal 2011), in time that grows
with the square of the values. So it runs over at most `bins(k)` bins; then comes Lloyd's iteration (Lloyd 1982) over
all values; then the dynamic program over a few places around every cut, near and far, until no set of moves helps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike, NDArray

Array = NDArray[np.float64]
Cuts = NDArray[np.int64]  # positions in the sorted values: 0 before the first, n after the last

_BATCH = 2048  # bins worked on at once, over all histograms: what the dynamic program holds stays near a core's cache
_STRIDE = 2.0**17  # between the value ranges of two histograms in one sorted array: more than 2 · 65504
_MOST_STEPS = 300  # Lloyd's iteration ends by itself; this bounds the slow crawl, which the moves cut short
_MOST_MOVES = 30  # rounds of moves; they end by themselves
_WORTH = 80_000  # clusters times values from which moves are made: many small palettes take time and gain little
# places near a cut: in values, and in parts of the cluster beside it
_STEPS = np.array([0, -16, -8, -4, -2, -1, 1, 2, 4, 8, 16])
_PARTS = np.arange(-16, 17) / 32
_GAIN = 1e-12  # a smaller relative gain is float64's rounding


@dataclass(frozen=True)
class Histogram:
    """Distinct values, ascending and within ±65504 (n,), and the positive weight of each (n,), both float64."""

    values: Array
    weights: Array


def bins(clusters: int) -> int:
    """The number of bins of the first dynamic program: a histogram of no more values gets the optimum."""
    return min(max(96, 6 * clusters), 1024)


def cluster(histograms: Sequence[Histogram], clusters: int, dtype: DTypeLike = np.float64) -> Array:
    """The centroids (len(histograms), clusters) of each histogram, ascending, representable in `dtype`.

    Where a histogram has fewer values than clusters, some centroids repeat. Deterministic. Sums are float64: those of
    fp16 values with whole weights are exact below 2^29, the squares' good to 1e-16 of their sum.
    """
    step = max(1, _BATCH // bins(clusters))
    batches = [_Batch(histograms[i : i + step]) for i in range(0, len(histograms), step)]
    return np.concatenate([_cluster(batch, clusters, np.dtype(dtype)) for batch in batches])


class _Batch:
    """Some histograms in flat arrays: values, each shifted to a range of its own, and the three prefix sums."""

    def __init__(self, histograms: Sequence[Histogram]) -> None:
        self.histograms = histograms
        self.sizes = np.array([len(h.values) for h in histograms])
        self.first = np.cumsum(self.sizes) - self.sizes  # of each histogram in `keys`
        self.lead = self.first + np.arange(len(histograms))  # and in `prefix`, which has a zero before each
        self.shift = np.arange(len(histograms)) * _STRIDE
        self.keys = np.concatenate([h.values + shift for h, shift in zip(histograms, self.shift)])
        self.prefix = np.zeros((3, len(self.keys) + len(histograms)))
        for histogram, start in zip(histograms, self.lead):
            part = self.prefix[:, start + 1 : start + 1 + len(histogram.values)]
            power = histogram.weights
            for row in part:
                np.cumsum(power, out=row)
                power = power * histogram.values

    def sums(self, cuts: Cuts, which: slice | NDArray[np.int64] = slice(None)) -> Array:
        """The prefix sums (3, G, ...) at places (G, ...) of the histograms `which`."""
        return self.prefix[:, cuts + self.lead[which].reshape(-1, *[1] * (cuts.ndim - 1))]

    def error(self, cuts: Cuts) -> Array:
        """The squared error (G,) of the clusters between cuts (G, k + 1)."""
        return _cost(np.diff(self.sums(cuts))).sum(-1)


def _cluster(batch: _Batch, clusters: int, dtype: np.dtype) -> Array:
    most = bins(clusters)
    edges = np.stack([_bin_edges(histogram, most) for histogram in batch.histograms])
    cuts = _best_cuts(batch.sums(edges), np.minimum(batch.sizes, most), clusters)
    cuts = np.take_along_axis(edges, cuts, axis=1)
    _lloyd(batch, cuts, np.dtype(np.float64))
    _move(batch, cuts)
    return _lloyd(batch, cuts, dtype)


def _cost(run: Array) -> Array:
    """The squared error of runs with these sums (3, ...) around their means; 0 for an empty run."""
    weight, first, second = run
    mean_square = first * first
    mean_square /= np.where(weight > 0, weight, 1)  # an empty run's other sums are 0 too
    np.subtract(second, mean_square, out=mean_square)
    return np.maximum(mean_square, 0, out=mean_square)


def _bin_edges(histogram: Histogram, most: int) -> Cuts:
    """The start of each of `most` bins in the sorted values, and the end of the last one: (most + 1,).

    Half of the bins follow the point density of a good quantizer, about the cube root of the density (Panter and Dite
    1951; here its fourth root, from two fast square roots); half are even over the distinct values, so that no outlier
    can take the bins of the bulk.
    """
    count = len(histogram.values)
    if count <= most:
        return np.minimum(np.arange(most + 1), count)
    gaps = np.diff(histogram.values)
    width = np.concatenate((gaps[:1], gaps[1:] + gaps[:-1], gaps[-1:]))
    measure = np.cumsum(np.sqrt(width * np.sqrt(width * histogram.weights)))
    place = measure / measure[-1] + np.arange(1, count + 1) / count
    edges = np.searchsorted(place, np.arange(most + 1) * (2 / most))
    edges[-1] = count
    return edges


def _best_cuts(sums: Array, filled: Cuts, clusters: int) -> Cuts:
    """The optimal cuts (G, clusters + 1) of the first filled[g] bins, given the prefix sums (3, G, bins + 1).

    best[b] = min over i of best[i] + cost(i, b), once a cluster. No cluster of an optimum costs more than a whole
    solution, so i need not go back further than the longest run that costs no more than cuts at equal distances.
    """
    groups, width = sums.shape[1:]
    equal = np.arange(clusters + 1) * filled[:, None] // clusters
    bound = _cost(np.diff(np.take_along_axis(sums, np.broadcast_to(equal, (3, *equal.shape)), 2))).sum(-1)
    reach = _longest_run(sums, filled, bound * (1 + 1e-9))
    padded = np.concatenate((np.repeat(sums[..., :1], reach, -1), sums), -1)
    cost = _cost(sums[..., None] - sliding_window_view(padded, reach + 1, axis=-1))
    best = np.full((groups, reach + width), np.inf)
    best[:, reach] = 0
    window = sliding_window_view(best, reach + 1, axis=-1)
    back = np.empty((clusters, groups, width), np.int64)
    total = np.empty_like(cost)
    for j in range(clusters):
        np.add(cost, window, out=total)
        total.argmin(-1, out=back[j])
        best[:, reach:] = np.take_along_axis(total, back[j][..., None], -1)[..., 0]
    cuts = np.empty((groups, clusters + 1), np.int64)
    cuts[:, -1] = filled
    for j in reversed(range(clusters)):
        cuts[:, j] = cuts[:, j + 1] - reach + back[j, np.arange(groups), cuts[:, j + 1]]
    return np.where(filled[:, None] <= clusters, equal, cuts)  # a value each: free of rounding


def _longest_run(sums: Array, filled: Cuts, bound: Array) -> int:
    """The length in bins of the longest run that costs at most bound[g]: by bisection, since a longer run costs
    more."""
    groups, width = sums.shape[1:]
    high = np.minimum(np.arange(width), filled[:, None])
    low, end = np.zeros_like(high), high.copy()
    rows = np.arange(groups)[:, None]
    total = sums[:, rows, end]
    for _ in range(width.bit_length()):
        middle = (low + high) // 2
        dear = _cost(total - sums[:, rows, middle]) > bound[:, None]
        low, high = np.where(dear, middle + 1, low), np.where(dear, high, middle)
    return int((end - high).max())


def _lloyd(batch: _Batch, cuts: Cuts, dtype: np.dtype) -> Array:
    """Centroids, after moving every cut half-way between its neighbours' means, rounded to dtype, until none moves.

    cuts (G, k + 1): the start; moved in place. No step makes the error larger.
    """
    at = np.minimum(cuts[:, :-1], batch.sizes[:, None] - 1)  # an empty cluster sits on a value, so the order is kept
    centroids = np.take(batch.keys, batch.first[:, None] + at) - batch.shift[:, None]
    moving = np.arange(len(cuts))
    for _ in range(_MOST_STEPS):
        mass, moment = np.diff(batch.sums(cuts[moving], moving)[:2])
        mean = (moment / np.where(mass > 0, mass, 1)).astype(dtype).astype(np.float64)
        centroids[moving] = np.where(mass > 0, mean, centroids[moving])
        middle = (centroids[moving, 1:] + centroids[moving, :-1]) / 2
        found = np.searchsorted(batch.keys, middle + batch.shift[moving, None]) - batch.first[moving, None]
        moved = (found != cuts[moving, 1:-1]).any(1)
        cuts[moving, 1:-1] = found
        moving = moving[moved]
        if not len(moving):
            break
    return centroids


def _move(batch: _Batch, cuts: Cuts) -> None:
    """Move all cuts (G, k + 1) together, each to one of the places near it, to the least error, until nothing gains.

    In place. The dynamic program again, now over the places; the squares' sum is the same for all cuts and left out.
    """
    moving, error = np.flatnonzero(batch.sizes * (cuts.shape[1] - 1) >= _WORTH), batch.error(cuts)
    for _ in range(_MOST_MOVES):
        if not len(moving):
            break
        places = _places(cuts[moving], batch.sizes[moving])
        weight, first = batch.sums(places, moving)[:2]
        best = np.zeros((len(moving), places.shape[2]))
        back = np.empty((cuts.shape[1] - 1, *best.shape), np.int64)
        for j in range(len(back)):
            mass = weight[:, j + 1, :, None] - weight[:, j, None, :]
            total = first[:, j + 1, :, None] - first[:, j, None, :]
            total *= total
            with np.errstate(divide="ignore", invalid="ignore"):
                total /= mass
            np.subtract(best[:, None], total, out=total)
            np.copyto(total, np.inf, where=mass <= 0)  # no run, or an empty one
            total.argmin(-1, out=back[j])
            best[:] = np.take_along_axis(total, back[j][..., None], -1)[..., 0]
        moved, rows, at = cuts[moving], np.arange(len(moving)), back[-1, :, 0]
        for j in reversed(range(1, len(back))):
            moved[:, j] = places[rows, j, at]
            at = back[j - 1, rows, at]
        after = _cost(np.diff(batch.sums(moved, moving))).sum(-1)
        gained = after < error[moving] * (1 - _GAIN)
        moving = moving[gained]
        cuts[moving], error[moving] = moved[gained], after[gained]


def _places(cuts: Cuts, sizes: Cuts) -> Cuts:
    """Candidate places (G, k + 1, P) for each cut (G, k + 1): a few values either way, and parts of the clusters beside
    it."""
    clusters = cuts.shape[1] - 1
    beside = np.clip(np.arange(clusters + 1)[:, None] + _PARTS, 0, clusters)
    left = np.minimum(beside.astype(np.int64), clusters - 1)
    between = cuts[:, left] + ((cuts[:, left + 1] - cuts[:, left]) * (beside - left)).astype(np.int64)
    places = np.clip(np.concatenate((cuts[:, :, None] + _STEPS, between), -1), 0, sizes[:, None, None])
    places[:, 0], places[:, -1] = 0, sizes[:, None]
    return places
