"""Weighted k-means over one axis, at its optimum or close to it, compiled by numba.

In one dimension a cluster is a run of neighbours in the sorted values, so k-means is the choice of k - 1 cuts. A run's
squared error is the sum of its weighted squares, which no choice of cuts changes, less S1²/S0, with S0 and S1 the sums
of weight and weight·value; both come from prefix sums. A dynamic program over the cuts finds the optimum (Wang and
Song, "Ckmeans.1d.dp", The R Journal 2011). Up to `_FEW` values it tries all places. Beyond, it tries a few places
around every cut, near and far, again and again until none gains, from cuts that follow the density and Lloyd's
iteration (Lloyd 1982) has moved.
"""

import math
from typing import Any

import numpy as np

from quantization.compiled import kernel, part

_FEW = 96  # places that a cut is tried at
_REACH = 2  # clusters on either side of a cut that its places reach
_MOST_STEPS = 300  # Lloyd's iteration ends by itself; this bounds the slow crawl, which the moves cut short
_MOST_MOVES = 30  # rounds of moves; they end by themselves
_GAIN = 1e-12  # a smaller relative gain is float64's rounding


@kernel
def cluster(values: Any, weights: Any, clusters: Any, in_half: Any) -> Any:
    """The centroids (clusters,) of a histogram, ascending; fp16 numbers if `in_half`.

    values, weights: (n,) float64; distinct values, ascending and within ±65504, and the positive weight of each. Of
    fewer values than clusters some centroids repeat. Deterministic.
    """
    count = len(values)
    mass, moment = np.zeros(count + 1), np.zeros(count + 1)
    mass[1:], moment[1:] = np.cumsum(weights), np.cumsum(weights * values)
    cuts = np.arange(clusters + 1) * count // clusters  # a value each
    if count > clusters:
        cuts = _first_cuts(values, weights, clusters)
    centroids = values[np.minimum(cuts[:-1], count - 1)]  # an empty cluster sits on a value, so the order is kept
    if count > clusters:
        _lloyd(values, mass, moment, cuts, centroids, False)
        before = 0.0
        for _ in range(_MOST_MOVES):
            explained = _move(mass, moment, _places(cuts, count), cuts)
            if explained <= before * (1 + _GAIN):
                break
            before = explained
    _lloyd(values, mass, moment, cuts, centroids, in_half)
    return centroids


@part
def _first_cuts(values: Any, weights: Any, clusters: Any) -> Any:
    """Cuts (clusters + 1,) between the sorted values: 0 before the first, n after the last.

    Half of the clusters follow the point density of a good quantizer, about the cube root of the density (Panter and
    Dite 1951; here its fourth root, from two fast square roots); half are even over the distinct values, so that no
    outlier can take the clusters of the bulk.
    """
    gaps = np.diff(values)
    width = np.concatenate((gaps[:1], gaps[1:] + gaps[:-1], gaps[-1:]))
    measure = np.cumsum(np.sqrt(width * np.sqrt(width * weights)))
    place = measure / measure[-1] + np.arange(1, len(values) + 1) / len(values)
    cuts = np.searchsorted(place, np.arange(clusters + 1) * (2 / clusters))
    cuts[-1] = len(values)
    return cuts


@part
def _lloyd(values: Any, mass: Any, moment: Any, cuts: Any, centroids: Any, in_half: Any) -> None:
    """Move every cut half-way between its neighbours' means, until none moves: in place, never to a larger error."""
    for _ in range(_MOST_STEPS):
        moved = False
        for j in range(len(centroids)):
            if cuts[j + 1] > cuts[j]:
                mean = (moment[cuts[j + 1]] - moment[cuts[j]]) / (mass[cuts[j + 1]] - mass[cuts[j]])
                centroids[j] = _half(mean) if in_half else mean
        for j in range(1, len(centroids)):
            place = np.searchsorted(values, (centroids[j - 1] + centroids[j]) / 2)
            moved |= place != cuts[j]
            cuts[j] = place
        if not moved:
            break


@part
def _half(value: Any) -> Any:
    """The nearest fp16 number, ties to even."""
    exponent = max(math.frexp(value)[1], -13) - 11  # of fp16's last bit; that of its subnormal numbers is 2^-24
    return math.ldexp(np.rint(math.ldexp(value, -exponent)), exponent)


@part
def _places(cuts: Any, count: Any) -> Any:
    """Places (k + 1, P), ascending, for each cut (k + 1,): all, or some at distances that grow geometrically."""
    clusters, arm = len(cuts) - 1, _FEW // 2
    places = np.empty((clusters + 1, min(count, 2 * arm) + 1), np.int64)
    places[:] = np.arange(places.shape[1])
    places[0], places[clusters] = 0, count
    if count <= _FEW:
        return places
    for j in range(1, clusters):
        left = cuts[j] - cuts[max(j - _REACH, 0)]
        right = cuts[min(j + _REACH, clusters)] - cuts[j]
        places[j, arm] = cuts[j]
        for step in range(1, arm + 1):
            places[j, arm - step] = cuts[j] - int(left ** (step / arm))
            places[j, arm + step] = cuts[j] + int(right ** (step / arm))
    return places


@part
def _move(mass: Any, moment: Any, places: Any, cuts: Any) -> Any:
    """Move all cuts (k + 1,) together, each to one of its places, to the least error. Returns the sum of S1²/S0.

    total[j, b] = max over a of total[j - 1, a] + S1²/S0 from place a to place b. The best a grows with b, so those of
    the places between two b that are known lie between their two a: divide and conquer.
    """
    clusters, count = len(cuts) - 1, places.shape[1]
    total, back = np.full((clusters + 1, count), -np.inf), np.zeros((clusters + 1, count), np.int64)
    total[0] = 0.0
    for j in range(1, clusters + 1):
        stride = 1 << int(math.log2(count))
        while stride:
            for b in range(stride - 1, count, 2 * stride):
                low = back[j, b - stride] if b >= stride else 0
                high = back[j, b + stride] if b + stride < count else count - 1
                for a in range(low, high + 1):
                    start, end = places[j - 1, a], places[j, b]
                    if start > end:
                        break
                    first = moment[end] - moment[start]
                    explained = total[j - 1, a] + (first * first / (mass[end] - mass[start]) if first else 0.0)
                    if explained > total[j, b]:
                        back[j, b], total[j, b] = a, explained
            stride //= 2
    at = 0
    for j in range(clusters, 0, -1):
        cuts[j], at = places[j, at], back[j, at]
    return total[clusters, 0]
