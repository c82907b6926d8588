"""strict-fp16: composite operations step by step in np.float16, everything else as under "as-typed" to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
import torch
from mil_cases import CASES, HALF, Evaluate, differing, halved
from mil_oracles_recurrent import np_gru, np_lstm, np_rnn
from mil_oracles_windows import np_pool_nd

from model_export import mil
from model_export.mil.dtypes import POLICIES
from tests.helpers import snr_db

Half = np.ndarray


# -- the chains, written in np.float16: NumPy rounds after each operation; sums in float32 ----------------------------


def total(x: Half, axes: Any, keep: bool = True) -> Half:
    return x.sum(tuple(axes), dtype=np.float32, keepdims=keep).astype(np.float16)


def mean(x: Half, axes: Any) -> Half:
    return x.mean(tuple(axes), dtype=np.float32, keepdims=True).astype(np.float16)


def rsqrt(x: Half) -> Half:
    return (1 / np.sqrt(x.astype(np.float32))).astype(np.float16)


def per_channel(value: Half, x: Half) -> Half:
    return value.reshape(-1, *[1] * (x.ndim - 2))


def normalized(x: Half, axes: Any, epsilon: Any) -> Half:
    centred = x - mean(x, axes)
    return centred * rsqrt(mean(centred * centred, axes) + np.float16(epsilon))


def layer_norm(x: Half, axes: Any, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Half:
    if gamma is None:
        return normalized(x, axes, epsilon)
    shape = [x.shape[axis] if axis in [a % x.ndim for a in axes] else 1 for axis in range(x.ndim)]
    return normalized(x, axes, epsilon) * gamma.reshape(shape) + beta.reshape(shape)


def instance_norm(x: Half, gamma: Half, beta: Half) -> Half:
    return normalized(x, range(2, x.ndim), 1e-5) * per_channel(gamma, x) + per_channel(beta, x)


def batch_norm(x: Half, mean: Half, variance: Half, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Half:
    scaled = (x - per_channel(mean, x)) * rsqrt(per_channel(variance, x) + np.float16(epsilon))
    return scaled if gamma is None else scaled * per_channel(gamma, x) + per_channel(beta, x)


def l2_norm(x: Half, epsilon: Any = 1e-6) -> Half:
    return x * rsqrt(total(x * x, (-3, -2, -1)) + np.float16(epsilon))


def local_response_norm(x: Half, size: int, alpha: Half, beta: Half, k: Half) -> Half:
    around = [(0, 0), (size // 2, (size - 1) // 2), *[(0, 0)] * (x.ndim - 2)]
    squares = np.pad(x * x, around).astype(np.float32)
    summed = sum(squares[:, i : i + x.shape[1]] for i in range(size))
    return x / ((summed / np.float32(size)).astype(np.float16) * alpha + k) ** beta


def softmax(x: Half, axis: int) -> Half:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / total(powers, [axis])


def attention(query: Half, key: Half, value: Half, attn_mask: Any = None) -> Half:
    def product(a: Half, b: Half) -> Half:
        return (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float16)

    scores = product(query * np.float16(1 / np.sqrt(query.shape[-1])), key.swapaxes(-1, -2))
    if attn_mask is not None and attn_mask.dtype == bool:
        scores = np.where(attn_mask, scores, np.float16(-np.inf))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return product(softmax(scores, -1), value)


def softplus(x: Half) -> Half:
    return np.log(np.float16(1) + np.exp(x))


def softplus_parametric(x: Half, alpha: Half, beta: Half) -> Half:
    return per_channel(alpha, x) * softplus(x * per_channel(beta, x))


def l2_pool(x: Half, **windows: Any) -> Half:
    return np.sqrt(np_pool_nd(x * x, "sum", **windows).astype(np.float16))


def recurrent(oracle: Callable[..., list[np.ndarray]]) -> Callable[..., list[Half]]:
    return lambda **operands: [value.astype(np.float16) for value in oracle(**operands, half=True)]


CHAINS: dict[str, Callable[..., Half | list[Half]]] = {
    "batch_norm": batch_norm,
    "gru": recurrent(np_gru),
    "instance_norm": instance_norm,
    "inverse": lambda x: np.float16(1) / (x + np.float16(1e-4)),
    "l2_norm": l2_norm,
    "l2_pool": l2_pool,
    "layer_norm": layer_norm,
    "local_response_norm": local_response_norm,
    "lstm": recurrent(np_lstm),
    "log": lambda x: np.log(x + np.float16(1e-45)),
    "reduce_l2_norm": lambda x, axes, keep_dims: np.sqrt(total(x * x, axes, keep_dims)),
    "reduce_log_sum": lambda x, axes, keep_dims: np.log(total(x, axes, keep_dims)),
    "reduce_log_sum_exp": lambda x, axes, keep_dims: np.log(total(np.exp(x), axes, keep_dims)),
    "reduce_sum_square": lambda x, axes, keep_dims: total(x * x, axes, keep_dims),
    "rnn": recurrent(np_rnn),
    "rsqrt": lambda x, epsilon=0.0: rsqrt(x + np.float16(epsilon)),
    "scaled_dot_product_attention": attention,
    "softmax": softmax,
    "softplus": softplus,
    "softplus_parametric": softplus_parametric,
}
# Their added epsilon is 0 in fp16 (or the sum is exact), so that nothing lies between: the chain is the operation.
TRIVIAL = {"log", "rsqrt"}
# Each step starts from what the one before left.
CARRIED = {"gru", "lstm", "rnn"}


@pytest.mark.parametrize("index", HALF, ids=lambda index: str(CASES[index]))
def test_each_operation(index: int, evaluate: Evaluate) -> None:
    """Chains equal NumPy's and differ from the operation rounded once; all others equal it to the bit."""
    case = halved(CASES[index])
    strict, typed = evaluate("strict-fp16", index), evaluate("as-typed", index)
    if case.op not in CHAINS:
        for got, whole in zip(strict, typed, strict=True):
            np.testing.assert_array_equal(got, whole)
        return
    wanted = CHAINS[case.op](**case.inputs, **case.parameters)
    several = wanted if isinstance(wanted, list) else [wanted]
    for got, chain, whole in zip(strict, several, typed, strict=True):
        assert chain.dtype == np.float16
        # A sum or a function beside a rounding boundary may fall to the other side, and the chain carries it on.
        np.testing.assert_allclose(got, chain, rtol=4e-3, atol=1e-3)
        assert differing(got, chain) <= (0.1 if case.op in CARRIED else 0.02)
        if case.op not in TRIVIAL and got.size > 20:
            assert differing(got, whole) > 0.02  # so the assertion above tells the policies apart


def test_chains_are_tested() -> None:
    assert set(CHAINS) <= {case.op for case in CASES if case.half}


# -- what it is for ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def norm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, np.ndarray], np.ndarray]:
    """`norm(compute, x)`: layer_norm over the channels of x (1, 64, 4, 4)."""
    path = tmp_path_factory.mktemp("norm") / "norm.mlpackage"

    def build(x: Any) -> Any:
        ones = np.ones(64, np.float16)
        return packages.mb.layer_norm(x=x, axes=[1], gamma=ones, beta=0 * ones, epsilon=np.float16(1e-5), name="y")

    packages.save_program(path, build, {"x": np.zeros((1, 64, 4, 4), np.float16)})
    return lambda compute, x: mil.load(path, compute=compute).predict({"x": x})["y"]


def stream(peak: float) -> np.ndarray:
    x = np.random.default_rng(0).uniform(-1, 1, (1, 64, 4, 4)).astype(np.float32)
    return (x * peak).astype(np.float16)


def reference(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


def test_an_overflowing_square_shows(norm: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Every value fits in fp16 and so does the result; at a peak of 300 the squares (9e4) do not."""
    for peak, fits in ((100, True), (300, False), (30000, False)):
        x = stream(peak)
        assert snr_db(reference(x), norm("as-typed", x)) > 60
        strict = norm("strict-fp16", x)
        assert (np.isfinite(strict).all() and snr_db(reference(x), strict) > 50) == fits
        small = norm("strict-fp16", (x / 256).astype(np.float16))  # a power of two brings the squares back into range
        assert peak < 30000 or snr_db(reference(x), small) > 50


def test_subnormal_squares_are_kept(norm: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Squares around 1e-5 are subnormal in fp16; flushed to zero only beta would be left."""
    x = stream(4e-3)
    got, typed = norm("strict-fp16", x), norm("as-typed", x)
    assert snr_db(typed, got) > 30
    assert snr_db(typed, 0 * got) < 1


@pytest.mark.parametrize(("op", "parameters", "largest"), [
    ("softplus", {}, 11.09), ("reduce_log_sum_exp", {"axes": [1], "keep_dims": True}, 7.62),
])  # fmt: skip
def test_overflows_found_on_devices_show(op: str, parameters: dict[str, Any], largest: float, tmp_path: Path) -> None:
    """coremltools #2687 and #2690 (32 channels of the same number): log 65503 and log(65504 / 32)."""
    x = np.repeat(np.array([largest - 0.02, largest + 0.02], np.float16).reshape(1, 1, 2), 32, 1)
    build = lambda x: getattr(packages.mb, op)(x=x, name="y", **parameters)  # noqa: E731
    packages.save_program(tmp_path / "p.mlpackage", build, {"x": x})
    strict, typed = (
        mil.load(tmp_path / "p.mlpackage", compute=name).predict({"x": x})["y"] for name in ("strict-fp16", "as-typed")
    )
    assert np.isfinite(typed).all()
    assert np.isfinite(strict[..., 0]).all() and np.isinf(strict[..., 1]).all()


def test_operations_typed_fp32_stay_whole(tmp_path: Path) -> None:
    """In a program of both types only the fp16 operations follow the policy."""
    x = stream(300)

    def build(x: Any) -> Any:
        wide = packages.mb.layer_norm(x=packages.mb.cast(x=x, dtype="fp32"), axes=[1], name="wide")
        return wide, packages.mb.layer_norm(x=x, axes=[1], name="narrow")

    packages.save_program(tmp_path / "p.mlpackage", build, {"x": x})
    proofs = [name for name, policy in POLICIES.items() if policy.half is torch.float32 and not policy.int8]
    outputs = {name: mil.load(tmp_path / "p.mlpackage", compute=name).predict({"x": x}) for name in proofs}
    assert set(outputs) == {"as-typed", "strict-fp16", "float32"}
    for compute in outputs:
        np.testing.assert_array_equal(outputs[compute]["wide"], outputs["float32"]["wide"])
        assert snr_db(reference(x), outputs[compute]["wide"]) > 100
    assert snr_db(reference(x), outputs["strict-fp16"]["narrow"]) < 20
    assert snr_db(reference(x), outputs["as-typed"]["narrow"]) > 60
