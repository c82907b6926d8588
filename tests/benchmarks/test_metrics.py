"""The metrics against formulas written out in pure Python, and properties that any of them must have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn.functional import cross_entropy

from benchmarks import metrics

finite = st.floats(-1e3, 1e3, width=32)
vectors = st.integers(1, 40).flatmap(lambda n: st.tuples(*[arrays.arrays(np.float32, n, elements=finite)] * 2))
logit_pairs = arrays.arrays(np.float32, (2, 3, 7), elements=st.floats(-30, 30, width=32))


def slow_snr(a, b):
    signal = math.fsum(float(x) ** 2 for x in a)
    noise = math.fsum((float(x) - float(y)) ** 2 for x, y in zip(a, b))
    return math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def slow_kl(a, b):
    total = 0.0
    for p, q in zip(a.tolist(), b.tolist()):
        zp, zq = math.fsum(map(math.exp, p)), math.fsum(map(math.exp, q))
        total += math.fsum(math.exp(x) / zp * ((x - math.log(zp)) - (y - math.log(zq))) for x, y in zip(p, q))
    return total / len(a)


@given(vectors)
def test_snr_is_the_ratio_of_signal_to_noise(pair):
    a, b = pair
    got, expected = metrics.snr_db(a, b), slow_snr(a, b)
    assert got == expected or math.isclose(got, expected, abs_tol=1e-6)


@pytest.mark.parametrize("scale", [3e38, 1.0, 1e-13, 1e-15, 1e-19, 1e-30, 1e-42])
@pytest.mark.parametrize("noise", [3.0, 1e-3, 1e-7, 1e-20])
def test_snr_of_many_values_at_the_ends_of_float32(scale, noise):
    """Parts that float32 can add, parts that it cannot, silent and equal ones, and a last one that is not full."""
    rng = np.random.default_rng(0)
    size = 3 * metrics._VALUES_AT_ONCE + 333
    a, error = (rng.uniform(-1, 1, size) for _ in range(2))
    a[: metrics._VALUES_AT_ONCE] *= scale
    error[: metrics._VALUES_AT_ONCE] *= scale
    a[-200_000:-100_000] = error[-70_000:] = 0
    with np.errstate(over="ignore"):
        a, b = a.astype(np.float32), np.clip(a + noise * error, -3.4e38, 3.4e38).astype(np.float32)
    for x, y in ((a, b), (a[: metrics._VALUES_AT_ONCE], b[: metrics._VALUES_AT_ONCE])):
        got, expected = metrics.snr_db(x, y), slow_snr(x, y)
        assert got == expected or math.isclose(got, expected, abs_tol=1e-5)
        assert metrics.snr_db(x.reshape(-1, 1), y.reshape(-1, 1)) == got


def test_snr_does_not_depend_on_the_order_in_memory():
    a, b = np.random.default_rng(0).normal(size=(2, 512, 512)).astype(np.float32)
    expected = metrics.snr_db(a, b)
    assert metrics.snr_db(a.T, b.T) == expected
    assert metrics.snr_db(a.T, np.ascontiguousarray(b.T)) == pytest.approx(expected, abs=1e-6)
    assert metrics.snr_db(a, b.T) == pytest.approx(slow_snr(a.ravel(), b.T.ravel()), abs=1e-6) != expected


@given(vectors, st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**30]))
def test_snr_and_cosine_do_not_depend_on_the_unit(pair, scale):
    a, b = (x.astype(np.float64) for x in pair)
    assert metrics.snr_db(a * scale, b * scale) == pytest.approx(metrics.snr_db(a, b), abs=1e-9)
    assert metrics.cosine(a * scale, b) == pytest.approx(metrics.cosine(a, b), abs=1e-12)


def test_known_values():
    assert metrics.snr_db([10.0, 0.0], [9.0, 0.0]) == pytest.approx(20.0)
    assert metrics.cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(math.sqrt(0.5))
    assert metrics.max_abs([1.0, -2.0], [1.5, 2.0]) == 4.0
    assert metrics.kl_divergence([[0.0, 0.0]], [[math.log(3.0), 0.0]]) == pytest.approx(math.log(2) - 0.5 * math.log(3))
    assert metrics.top1_agreement([[1.0, 2.0], [3.0, 2.0]], [[0.0, 1.0], [0.0, 1.0]]) == 0.5
    assert metrics.snr_db([0.0], [0.0]) == math.inf
    assert metrics.snr_db([0.0], [1e-30]) == -math.inf
    assert metrics.cosine([0.0], [0.0]) == 1.0
    assert metrics.cosine([0.0], [1.0]) == 0.0
    half = np.full(4, 60000, dtype=np.float16)  # in float16 the difference would be infinite
    assert (
        metrics.snr_db(half, -half) == pytest.approx(10 * math.log10(1 / 4)) and metrics.max_abs(half, -half) == 120000
    )


def test_float64_does_not_overflow_and_the_parts_add_up():
    assert metrics.snr_db([1e200, 1e200], [1e200, 0.9e200]) == pytest.approx(10 * math.log10(2 / 0.01))
    a = np.random.default_rng(0).normal(size=metrics._VALUES_AT_ONCE + 5).astype(np.float32)
    b = a.copy()
    b[-1] += 1  # the last part counts
    assert metrics.snr_db(a, b) == pytest.approx(
        10 * math.log10(float(a.astype(np.float64) @ a) / float(b[-1] - a[-1]) ** 2), rel=1e-6
    )
    assert metrics.max_abs(a, b) == pytest.approx(1.0, rel=1e-6)
    c = b.astype(np.float64)
    exact = float(a @ c) / math.sqrt(float(a.astype(np.float64) @ a) * float(c @ c))
    assert 1 - metrics.cosine(a, b) == pytest.approx(1 - exact, rel=1e-4)


@given(vectors)
def test_symmetry_and_range(pair):
    a, b = pair
    assert metrics.max_abs(a, b) == metrics.max_abs(b, a) >= 0
    assert -1 <= metrics.cosine(a, b) <= 1
    assert metrics.snr_db(a, a) == math.inf
    assert metrics.max_abs(a, a) == 0


@settings(max_examples=60)
@given(logit_pairs, st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_kl_and_likelihoods_are_the_written_out_sums(pair, tokens):
    got = metrics.kl_divergence(*pair)
    assert got >= 0 and got == pytest.approx(slow_kl(*pair), abs=1e-9, rel=1e-9)
    assert metrics.kl_divergence(pair[0], pair[0] + 5) == pytest.approx(0, abs=1e-5)  # a shift is the same distribution
    expected = cross_entropy(torch.from_numpy(pair[0]).double(), torch.tensor(tokens), reduction="none")
    np.testing.assert_allclose(metrics.negative_log_likelihood(pair[0], tokens), expected, atol=1e-9)


def test_many_positions_and_none():
    a, b = np.random.default_rng(1).normal(size=(2, 1, 50, 9))
    each = [metrics.kl_divergence(a[:, i], b[:, i]) for i in range(50)]
    assert metrics.kl_divergence(a, b) == pytest.approx(sum(each) / 50)
    logits, tokens = a[0], np.arange(50) % 9
    expected = cross_entropy(torch.from_numpy(logits), torch.from_numpy(tokens), reduction="none")
    np.testing.assert_allclose(metrics.negative_log_likelihood(logits, tokens), expected)
    for bad in (logits[:0], logits[:3]):
        with pytest.raises(ValueError, match="cannot score"):
            metrics.negative_log_likelihood(bad, tokens[:2] if len(bad) else [])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_gets_the_worst_value(bad, side):
    pair = [np.ones((2, 3)), np.ones((2, 3))]
    pair[side][1, 2] = bad
    assert metrics.snr_db(*pair) == -math.inf
    assert metrics.cosine(*pair) == -1
    assert metrics.max_abs(*pair) == math.inf
    assert metrics.kl_divergence(*pair) == math.inf
    assert metrics.top1_agreement(*pair) == 0.5


@pytest.mark.parametrize("name", ["snr_db", "cosine", "max_abs", "kl_divergence", "top1_agreement"])
@pytest.mark.parametrize("pair", [(np.ones((1, 2)), np.ones((2, 1))), (np.ones((0, 3)), np.ones((0, 3)))])
def test_what_cannot_be_compared_is_refused(name, pair):
    with pytest.raises(ValueError, match="cannot compare"):
        getattr(metrics, name)(*pair)


tokens = st.lists(st.integers(0, 3), max_size=6)


@given(tokens, tokens)
def test_first_divergence(a, b):
    at = metrics.first_divergence(a, b)
    if at is None:
        assert a == b
    else:
        assert a[:at] == b[:at]
        assert a[at : at + 1] != b[at : at + 1]
