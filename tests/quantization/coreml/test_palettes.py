"""Our palettes against the exact optimum, and against coremltools' tensor for tensor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from palette_oracle import coremltools_palette, decode_palette, squared_error

from quantization.coreml.kmeans import cluster
from quantization.coreml.palettes import Palette, palettize

# From 10,000 values on, coremltools' bundled kmeans1d finds the exact optimum. We come this close to it; below, it uses
# scikit-learn's k-means, and we have less error.
EXACT_FROM = 10_000
CLOSE = {4: 1 + 1e-3, 6: 1 + 2e-3, 8: 1 + 1e-2}
HALF = st.floats(-65504, 65504, width=16, allow_subnormal=True)


def normal(shape: tuple[int, ...], seed: int = 0, spread: float = 0.05) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float16)


def optimum(values: np.ndarray, weights: np.ndarray, clusters: int) -> float:
    """The least weighted squared error of any `clusters` centroids: the textbook program, every cut tried.

    A run's error grows value by value (Welford), so nothing cancels.
    """
    n = len(values)
    cost = np.zeros((n, n + 1))
    mass, mean, error = np.zeros(n), np.zeros(n), np.zeros(n)  # of the run from each start to the present end
    for end in range(n):
        mass[: end + 1] += weights[end]
        delta = values[end] - mean[: end + 1]
        mean[: end + 1] += delta * weights[end] / mass[: end + 1]
        error[: end + 1] += weights[end] * delta * (values[end] - mean[: end + 1])
        cost[: end + 1, end + 1] = error[: end + 1]
    best = np.array([0.0] + [np.inf] * n)
    for _ in range(clusters):
        best = np.array([0.0] + [(best[:b] + cost[:b, b]).min() for b in range(1, n + 1)])
    return float(best[n])


def error_of(values: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    nearest = np.abs(values[:, None] - centroids).min(1)
    return float((weights * nearest**2).sum())


@settings(max_examples=60)
@given(
    drawn=st.lists(HALF, min_size=1, max_size=40, unique=True),
    seed=st.integers(0, 2**31),
    clusters=st.sampled_from([1, 2, 3, 4, 8, 16]),
)
def test_few_values_get_the_optimum(drawn, seed, clusters):
    """Weights of any size; only float64's rounding of the largest square separates the two."""
    values = np.unique(np.array(drawn, np.float64))
    weights = np.random.default_rng(seed).integers(1, 1000, len(values)).astype(np.float64)
    ours = error_of(values, weights, cluster(values, weights, clusters, False))
    assert ours <= optimum(values, weights, clusters) + 1e-13 * float((weights * values**2).max())


@pytest.mark.parametrize("clusters", [4, 16, 64])
@pytest.mark.parametrize("spread", ["normal", "heavy", "clumps"])
def test_many_values_come_close_to_the_optimum(clusters, spread):
    rng = np.random.default_rng(clusters)
    drawn = {
        "normal": rng.standard_normal(1000),
        "heavy": rng.standard_t(2, 1000),
        "clumps": np.concatenate([rng.normal(at, 10.0**size, 125) for at, size in zip(range(8), range(-5, 3))]),
    }[spread]
    values, counts = np.unique(drawn.astype(np.float16).astype(np.float64), return_counts=True)
    weights = counts.astype(np.float64)
    best = optimum(values, weights, clusters)
    ours = error_of(values, weights, cluster(values, weights, clusters, False))
    assert best * (1 - 1e-9) <= ours <= best * 1.003
    equal = np.quantile(drawn, (np.arange(clusters) + 0.5) / clusters)  # the control: a start without clustering
    assert error_of(values, weights, equal) > best * 1.03


def test_centroids_are_the_nearest_fp16_numbers():
    values = np.array([-65504, -1e-3, 3 * 2.0**-25, 0.1, 1 + 2.0**-11, 60000.3])
    assert np.array_equal(cluster(values, np.ones(6), 8, True)[[1, 2, 3, 5, 6, 7]], values.astype(np.float16))


@settings(max_examples=60)
@given(
    weight=arrays.arrays(np.float16, st.tuples(st.sampled_from([2, 4]), st.integers(1, 6)), elements=HALF),
    bits=st.sampled_from([1, 2, 4, 8]),
    group=st.sampled_from([None, 1, 2]),
)
def test_each_element_gets_the_nearest_entry(weight, bits, group):
    palette = palettize(weight, bits, group)
    assert palette.lut.shape == (len(weight) // (group or len(weight)), 2**bits)
    assert palette.indices.dtype == np.uint8
    assert palette.indices.max() < 2**bits
    for row, lut in zip(np.split(weight, len(palette.lut)), palette.lut):
        decoded = palettize(row, bits).decode().astype(np.float64)
        distance = np.abs(row.astype(np.float64)[..., None] - lut.astype(np.float64)).min(-1)
        assert np.array_equal(np.abs(row.astype(np.float64) - decoded), distance)
        if len(np.unique(row)) <= 2**bits:
            assert np.array_equal(decoded, row)


@pytest.mark.parametrize(
    ("shape", "bits", "group"),
    [((64, 48, 1, 1), 4, 16), ((48, 1, 7, 7), 4, 16), ((32, 96), 4, 16), ((96, 3, 3, 3), 4, 16),
     ((64, 64, 1, 1), 4, None), ((64, 64, 1, 1), 6, None), ((64, 64, 1, 1), 8, None), ((64, 96, 1, 1), 6, 16),
     ((32, 1024, 1, 1), 4, 16), ((128, 96, 1, 1), 4, None), ((128, 96, 1, 1), 6, None), ((128, 96, 1, 1), 8, None)],
)  # fmt: skip
@pytest.mark.parametrize("spread", ["normal", "heavy"])
def test_no_more_error_than_coremltools(shape, bits, group, spread):
    """The bar, on small tensors; `benchmarks encoder` measures it on the real shape, with the times."""
    weight = normal(shape, bits)
    if spread == "heavy":
        weight = (np.random.default_rng(bits).standard_t(3, shape) * 0.02).astype(np.float16)
    palette = palettize(weight, bits, group)
    assert np.array_equal(palette.decode(), decode_palette(palette.indices, palette.lut))
    indices, lut = coremltools_palette(weight, bits, group)
    theirs = squared_error(weight, decode_palette(indices, lut))
    exact = weight[:group].size >= EXACT_FROM
    assert squared_error(weight, palette.decode()) <= theirs * (CLOSE[bits] if exact else 1)
    off = Palette(
        ((palette.indices.astype(int) + 1) % 2**bits).astype(np.uint8), palette.lut, None
    )  # the control: other indices
    assert squared_error(weight, off.decode()) > theirs


def test_a_scale_per_channel_serves_unequal_channels():
    weight = normal((32, 200, 1, 1)) * (2.0 ** np.arange(-4, 4).repeat(4)).astype(np.float16)[:, None, None, None]
    plain, scaled = palettize(weight, 4, 16), palettize(weight, 4, 16, per_channel_scale=True)
    relative = ((scaled.decode().astype(float) - weight) ** 2).sum((1, 2, 3)) / (weight.astype(float) ** 2).sum(
        (1, 2, 3)
    )
    assert relative.max() < 0.02
    assert squared_error(weight, scaled.decode()) < 0.8 * squared_error(weight, plain.decode())
    assert scaled.scale is not None
    dense = decode_palette(scaled.indices, scaled.lut)
    assert np.array_equal(scaled.decode(), dense * scaled.scale.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -65504.0, 6e-8])
@pytest.mark.parametrize("scaled", [False, True])
def test_constant_weights_come_back(value, scaled):
    weight = np.full((32, 4, 1, 1), value, np.float16)
    if scaled and abs(value) == 65504:
        weight /= np.float16(2)
    assert np.array_equal(palettize(weight, 4, 16, per_channel_scale=scaled).decode(), weight)


def test_deterministic_and_leaves_the_weight_alone():
    weight = normal((32, 300, 1, 1))
    before = weight.copy()
    one, two = palettize(weight, 4, 16), palettize(np.asfortranarray(weight), 4, 16)
    assert np.array_equal(one.indices, two.indices)
    assert np.array_equal(one.lut, two.lut)
    assert np.array_equal(weight, before)
    assert not np.array_equal(one.indices, palettize(weight + np.float16(0.01), 4, 8).indices)


def test_refuses_scales_it_cannot_use():
    near = np.array([[2000, 65504, 65504]], np.float16)  # 65504 / rms is rounded up
    with pytest.raises(ValueError, match="close to 65504"):
        palettize(near, 4, per_channel_scale=True)
