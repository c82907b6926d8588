"""Element-wise operations, reductions, casts, quantization: integers, division by zero, NaN, infinities, ranks 0 to 5.

The oracle is NumPy, in float64 for floats, whose result is rounded once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import mil_oracles_tensor as oracles
import numpy as np
import pytest
from mil_single import run

from model_export.mil.program import MILError

Case = tuple[str, str, dict[str, np.ndarray], dict[str, Any], np.ndarray]
RANDOM = np.random.default_rng(21)
LEAST, MOST = -(2**31), 2**31 - 1
SPECIAL = np.array([0, -0.0, 1, -1, 0.5, -2.5, 7, np.inf, -np.inf, np.nan])
INTEGERS = np.array([0, 1, -1, 2, -7, 7, 100, LEAST, MOST], np.int32)
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (0, 2), (2, 3), (1, 2, 3), (2, 1, 3, 2), (1, 2, 1, 2, 3))

FLOAT_BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide, "maximum": np.maximum,
    "minimum": np.minimum, "pow": np.power, "mod": np.mod, "floor_div": np.floor_divide,
}  # fmt: skip
COMPARED: dict[str, Callable[..., Any]] = {
    "equal": np.equal, "not_equal": np.not_equal, "greater": np.greater, "greater_equal": np.greater_equal,
    "less": np.less, "less_equal": np.less_equal,
}  # fmt: skip
LOGICAL: dict[str, Callable[..., Any]] = {
    "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor,
}  # fmt: skip


def truncated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / y towards zero, 0 where y is; the one quotient that does not fit wraps."""
    wide = np.trunc(np.float64(x) / np.where(y == 0, 1, y))
    return np.where(y == 0, 0, wide).astype(np.int64).astype(np.int32)


INTEGER_BINARY: dict[str, Callable[..., Any]] = {
    **{key: value for key, value in FLOAT_BINARY.items() if key not in ("pow", "real_div")}, "real_div": truncated,
}  # fmt: skip


def binary() -> Iterator[Case]:
    x, y = SPECIAL[:, None], SPECIAL[None, :]
    for dtype in ("float16", "float32"):
        a, b = x.astype(dtype), y.astype(dtype)
        for op, function in FLOAT_BINARY.items():
            yield op, "iOS15", {"x": a, "y": b}, {}, function(x, y).astype(dtype)
        for op, function in COMPARED.items():
            yield op, "iOS15", {"x": a, "y": b}, {}, function(x, y)
    n, m = INTEGERS[:, None], INTEGERS[None, :]
    for op, function in (INTEGER_BINARY | COMPARED).items():
        yield op, "iOS15", {"x": n, "y": m}, {}, function(n, m)
    powers = np.int32([0, 1, 2, 3])
    yield "pow", "iOS15", {"x": n[:7], "y": powers}, {}, n[:7] ** powers
    truths = np.array([False, True])
    for op, function in LOGICAL.items():
        yield op, "iOS15", {"x": truths[:, None], "y": truths}, {}, function(truths[:, None], truths)
    for one in SHAPES:
        other = [1 if place % 2 else size for place, size in enumerate(one)]
        a, b = RANDOM.integers(-9, 9, one).astype(np.int32), RANDOM.integers(-9, 9, other).astype(np.int32)
        yield "sub", "iOS15", {"x": a, "y": b}, {}, a - b
        yield "sub", "iOS15", {"x": a}, {"y": np.int32(3)}, a - np.int32(3)
    for dtype in ("bool", "int32", "float16", "float32"):
        a, b = np.array([[1, 0, 3]]).astype(dtype), np.array([[0], [5]]).astype(dtype)
        cond = np.array([[True, False, True], [False, True, True]])
        yield "select", "iOS15", {"cond": cond, "a": a, "b": b}, {}, np.where(cond, a, b)
        yield (
            "select",
            "iOS15",
            {"cond": cond, "a": a},
            {"b": np.zeros((), dtype)},
            np.where(cond, a, np.zeros((), dtype)),
        )
    yield "select", "iOS15", {"cond": cond}, {}, np.argwhere(cond).astype(np.int32)


FLOAT_UNARY: dict[str, Callable[..., Any]] = {
    "abs": np.abs, "sign": np.sign, "square": np.square, "exp2": np.exp2, "ceil": np.ceil, "floor": np.floor,
    "round": np.round, "exp": np.exp, "sqrt": np.sqrt, "acos": np.arccos, "asin": np.arcsin, "atanh": np.arctanh,
    "cosh": np.cosh, "sinh": np.sinh, "tan": np.tan,
}  # fmt: skip


def unary() -> Iterator[Case]:
    for dtype in ("float16", "float32"):
        for op, function in FLOAT_UNARY.items():
            yield op, "iOS15", {"x": SPECIAL.astype(dtype)}, {}, function(SPECIAL).astype(dtype)
        zeros = np.array([0.0, 1, np.inf, np.nan], dtype)
        default = np.dtype(dtype).type
        for target, epsilon in (("iOS15", {}), ("iOS17", {"epsilon": np.float32(0.25)})):
            shifts = {op: np.float64(epsilon.get("epsilon", default(value)))
                      for op, value in (("inverse", 1e-4), ("log", 1e-45), ("rsqrt", 1e-12))}  # fmt: skip
            wide = np.float64(zeros)
            yield "inverse", target, {"x": zeros}, epsilon, (1 / (wide + shifts["inverse"])).astype(dtype)
            yield "log", target, {"x": zeros}, epsilon, np.log(wide + shifts["log"]).astype(dtype)
            yield "rsqrt", target, {"x": zeros}, epsilon, (1 / np.sqrt(wide + shifts["rsqrt"])).astype(dtype)
        limits = {"alpha": default(-1), "beta": default(0.5)}
        yield "clip", "iOS17", {"x": SPECIAL.astype(dtype)}, limits, np.clip(SPECIAL, -1, 0.5).astype(dtype)
        yield "clip", "iOS15", {"x": SPECIAL.astype(dtype)}, {"alpha": default(1), "beta": default(-1)}, \
            np.minimum(np.maximum(SPECIAL, 1), -1).astype(dtype)  # fmt: skip
    yield "threshold", "iOS15", {"x": INTEGERS}, {"alpha": np.int32(2)}, np.maximum(INTEGERS, 2)
    for op in ("abs", "sign", "square"):
        yield op, "iOS15", {"x": INTEGERS}, {}, FLOAT_UNARY[op](INTEGERS)
    few = np.int32([-40, -1, 0, 1, 30])
    yield "exp2", "iOS15", {"x": few}, {}, np.int32([0, 0, 1, 2, 1 << 30])
    for dtype in ("int8", "uint8", "int16", "uint16", "int32", "bool", "fp16", "fp32"):
        kind = {"fp16": "float16", "fp32": "float32"}.get(dtype, dtype)
        for source in ("int8", "uint8", "int16", "uint16", "int32", "bool", "float16", "float32"):
            x = np.array([0, 1, 2, 100, 127], source)
            yield "cast", "iOS17", {"x": x}, {"dtype": dtype}, x.astype(kind)
    fractions = np.array([-2.7, -0.5, 0.5, 2.7, 1000.4], np.float32)
    yield "cast", "iOS15", {"x": fractions}, {"dtype": "int32"}, np.int32([-2, 0, 0, 2, 1000])
    yield "cast", "iOS17", {"x": fractions}, {"dtype": "int16"}, np.int16([-2, 0, 0, 2, 1000])
    yield "cast", "iOS15", {"x": SPECIAL.astype(np.float32)}, {"dtype": "bool"}, SPECIAL != 0
    yield "cast", "iOS17", {"x": np.int32([300, -1, 128])}, {"dtype": "uint8"}, np.uint8([44, 255, 128])


REDUCED: dict[str, Callable[..., Any]] = {
    "sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min, "prod": np.prod,
    "l1_norm": lambda x, axis, keepdims: np.abs(x).sum(axis, keepdims=keepdims),
    "l2_norm": lambda x, axis, keepdims: np.sqrt(np.square(x).sum(axis, keepdims=keepdims)),
    "log_sum": lambda x, axis, keepdims: np.log(np.sum(x, axis, keepdims=keepdims)),
    "log_sum_exp": lambda x, axis, keepdims: np.log(np.exp(x).sum(axis, keepdims=keepdims)),
    "sum_square": lambda x, axis, keepdims: np.square(x).sum(axis, keepdims=keepdims),
}  # fmt: skip


def reductions() -> Iterator[Case]:
    for name, function in REDUCED.items():
        for dtype in ("float16", "float32", "int32"):
            x = RANDOM.integers(1, 6, (2, 3, 1, 4)).astype(dtype)
            if dtype != "int32":
                x[0, 0, 0, 0] = np.nan
            for axes, keep in (([-1], True), ([0, -3], False), ([2], False), ([], False), (None, False), (None, True)):
                given: dict[str, Any] = {"keep_dims": keep} | ({} if axes is None else {"axes": axes})
                wide = x.astype(np.float64)
                result = function(wide, None if axes is None else tuple(axes), keepdims=keep)
                exact = np.asarray(np.trunc(result + 1e-12) if dtype == "int32" else result)
                yield f"reduce_{name}", "iOS15", {"x": x}, given, exact.astype(dtype)
        if name in ("sum", "prod", "l1_norm", "l2_norm", "sum_square"):
            empty = np.zeros((2, 0), np.float32)
            yield f"reduce_{name}", "iOS15", {"x": empty}, {"axes": [1]}, function(empty, 1, keepdims=False)
    wide = np.int32([MOST, MOST, 2])
    yield "reduce_sum", "iOS15", {"x": wide}, {}, np.asarray(0, np.int32)  # wraps around
    yield "reduce_mean", "iOS15", {"x": np.int32([-3, -4])}, {}, np.asarray(-3, np.int32)  # towards zero


def quantization() -> Iterator[Case]:
    for dtype in ("float16", "float32"):
        kind = np.dtype(dtype).type
        x = np.array([[0, 0.25, 0.75, 1.25], [-1, 100, -100, 7], [np.inf, -np.inf, 3, 2]], dtype)
        for out in ("int8", "uint8"):
            zero = np.dtype(out).type(7)
            q = RANDOM.integers(0 if out == "uint8" else -128, 128, (3, 4)).astype(out)
            vector, zeros = np.array([0.5, 2, 0.25], dtype), np.array([1, 0, 9], out)
            for given in (
                {"scale": kind(0.5)},
                {"scale": kind(0.5), "zero_point": zero},
                {"scale": vector, "axis": 0},
                {"scale": vector, "zero_point": zeros, "axis": -2},
            ):
                to = given | {"output_dtype": out}
                yield "quantize", "iOS17", {"input": x}, to, oracles.np_quantize(x, **to)  # type: ignore[arg-type]
                yield "dequantize", "iOS17", {"input": q}, given, oracles.np_dequantize(q, **given)  # type: ignore[arg-type]
        nan = np.array([np.nan], dtype)
        yield "quantize", "iOS17", {"input": nan}, {"scale": kind(1), "output_dtype": "int8"}, np.int8([0])


with np.errstate(all="ignore"):
    CASES = [*binary(), *unary(), *reductions(), *quantization()]


def name(case: Case) -> str:
    op, target, inputs, parameters, wanted = case
    given = "-".join(f"{key}={np.shape(value)}" for key, value in parameters.items())
    return f"{op}-{target}-{next(iter(inputs.values())).dtype}-{given}-{wanted.dtype}{list(wanted.shape)}".replace(
        " ", ""
    )


@pytest.mark.parametrize("case", CASES, ids=name)
def test_rounded_once(case: Case) -> None:
    op, target, inputs, parameters, wanted = case
    for compute in ("as-typed", "strict-fp16") if wanted.dtype.kind in "iub" else ("as-typed",):
        (got,) = run(op, target, inputs, parameters, [wanted], compute)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        if wanted.dtype.kind == "f":
            limit = 1.1e-3 if wanted.dtype == np.float16 else 1e-6
            np.testing.assert_allclose(got, wanted, rtol=limit, atol=1e-7)
        else:
            np.testing.assert_array_equal(got, wanted)


def test_limits_of_clip_since_ios_17() -> None:
    limits = {"alpha": np.float32(1), "beta": np.float32(1)}
    x = np.float32([3])
    assert run("clip", "iOS16", {"x": x}, limits, [x]) == [1]
    with pytest.raises(MILError, match=r"alpha 1\.0, expected less than beta 1\.0"):
        run("clip", "iOS17", {"x": x}, limits, [x])
