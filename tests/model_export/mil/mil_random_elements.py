"""Families of random operations: on each element, reductions, sorting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from mil_random import DTYPES, MOST
from mil_random_draft import Draft, Test, floating, number, tensor

_PLAIN = (
    "abs", "atan", "ceil", "cos", "erf", "floor", "relu", "relu6", "round", "sigmoid", "sign", "silu", "sin",
    "softplus", "softsign", "square", "tanh",
)  # fmt: skip
ANY: dict[str, Test] = {
    **dict.fromkeys(_PLAIN, floating),
    **dict.fromkeys(("acos", "asin", "atanh"), lambda x: floating(x) and np.abs(x).max() < 0.99),
    "tan": lambda x: floating(x) and np.abs(x).max() < 1.4,
    **dict.fromkeys(("exp", "exp2", "cosh", "sinh"), lambda x: floating(x) and np.abs(x).max() < 8),
    "sqrt": lambda x: floating(x) and x.min() >= 0,
}  # fmt: skip


def unary(d: Draft) -> None:
    op = d.one(list(ANY))
    if x := d.pick(ANY[op]):
        d.add(op, {"x": x})


def integers(d: Draft) -> None:
    if x := d.pick(lambda v: v.dtype == np.int32):
        d.add(d.one(["abs", "sign", "square"] if d.target != "iOS15" else ["identity"]), {"x": x})


PARAMETRIC = (
    "leaky_relu", "elu", "thresholded_relu", "threshold", "clamped_relu", "linear_activation", "scaled_tanh",
    "sigmoid_hard", "clip", "gelu", "shifted", "prelu", "softmax", "fill_like",
)  # fmt: skip


def parametric(d: Draft) -> None:
    x = d.pick(floating)
    if x is None:
        return
    alpha, beta = (d.scalar(x, d.whole(1, 8) / 8) for _ in range(2))
    op = d.one(PARAMETRIC)
    rank = d.values[x].ndim
    if op in ("leaky_relu", "elu", "thresholded_relu", "threshold"):
        d.add(op, {"x": x}, alpha=alpha)
    elif op == "clip":
        d.add(op, {"x": x}, alpha=-alpha, beta=beta)
    elif op == "gelu":
        d.add(op, {"x": x}, mode=d.one(["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"]))
    elif op == "shifted":
        if x := d.pick(floating, lambda v: v.min() > 0.05):
            d.add(d.one(["log", "rsqrt", "inverse"]), {"x": x}, epsilon=d.scalar(x, 0.125))
    elif op == "prelu":
        if rank >= 3:  # coremltools: of other ranks than 4, the same for all channels
            slopes = d.array(d.values[x].shape[1:2], d.values[x].dtype, 0.25, 2)
            d.add(op, {"x": x}, alpha=slopes if rank == 4 else np.full_like(slopes, alpha))
    elif op == "softmax":
        if rank:
            d.add(op, {"x": x}, axis=d.axis(x))
    elif op == "fill_like":
        if d.target != "iOS15":
            d.add(op, {"ref_tensor": x}, value=alpha)
    else:
        d.add(op, {"x": x}, alpha=alpha, beta=beta)


def _partner(d: Draft, x: str, test: Test = number) -> dict[str, Any]:
    """Another operand: an earlier value that is broadcast with x, or a constant one."""
    value = d.values[x]

    def fits(other: np.ndarray) -> bool:
        try:
            whole = np.broadcast_shapes(value.shape, other.shape)
        except ValueError:
            return False
        return other.dtype == value.dtype and math.prod(whole) <= MOST

    if d.flag() and (y := d.pick(fits, test)):
        return {"operands": {"x": x, "y": y}}
    shape = [size if d.flag() else 1 for size in value.shape][d.whole(0, value.ndim) :]
    low = 1 if test is not number else -3
    return {"operands": {"x": x}, "y": d.array(shape, value.dtype, low, 3)}


def _nonzero(x: np.ndarray) -> bool:
    return number(x) and float(np.abs(x).min()) > 0.05


def binary(d: Draft) -> None:
    x = d.pick(number)
    if x is None:
        return
    ops = ["add", "sub", "mul", "maximum", "minimum"]
    op = d.one([*ops, "floor_div", "mod", *(["real_div", "pow"] if floating(d.values[x]) else [])])
    if op == "pow":
        x = d.pick(floating, lambda v: v.min() > 0.05)
    if x is None:
        return
    partner = _partner(d, x, number if op in [*ops, "pow"] else _nonzero)
    made = {line.results[0]: line.op for line in d.lines}
    if op == "mul" and "sigmoid" in map(made.get, partner["operands"].values()):
        return  # coremltools saves it as silu
    d.add(op, **partner)


def compare(d: Draft) -> None:
    if x := d.pick(number):
        d.add(d.one(["equal", "not_equal", "less", "less_equal", "greater", "greater_equal"]), **_partner(d, x))


def logical(d: Draft) -> None:
    x = d.pick(lambda v: v.dtype == bool)
    if x is None:
        return compare(d)
    op = d.one(["logical_and", "logical_or", "logical_xor", "logical_not"])
    d.add(op, **({"operands": {"x": x}} if op == "logical_not" else _partner(d, x, lambda v: True)))


def select(d: Draft) -> None:
    cond = d.pick(lambda v: v.dtype == bool)
    if cond is None:
        return compare(d)
    a = d.pick(number, lambda v: v.shape == d.values[cond].shape)
    if a is None:
        return
    b = d.pick(lambda v: v.shape == d.values[a].shape and v.dtype == d.values[a].dtype)
    d.add("select", {"cond": cond, "a": a, "b": b})


def cast(d: Draft) -> None:
    x = d.pick()
    dtype = d.one([name for name, kind in DTYPES.items() if kind != d.values[x].dtype])
    d.add("cast", {"x": x}, dtype=dtype)


def reduction(d: Draft) -> None:
    x = d.pick(number, tensor)
    if x is None:
        return
    ops = ["reduce_sum", "reduce_max", "reduce_min", "reduce_argmax", "reduce_argmin"]
    if floating(d.values[x]):
        ops += ["reduce_mean", "reduce_prod", "reduce_l1_norm", "reduce_l2_norm", "reduce_sum_square"]
        ops += ["reduce_log_sum_exp"] * bool(np.abs(d.values[x]).max() < 8)
        ops += ["reduce_log_sum"] * bool(d.values[x].min() > 0.05)
    op, keep = d.one(ops), d.flag()
    if op.startswith("reduce_arg"):
        d.add(op, {"x": x}, axis=d.axis(x), keep_dims=keep)
    else:
        d.add(op, {"x": x}, axes=d.axes(x), keep_dims=keep)


def sorting(d: Draft) -> None:
    x = d.pick(floating, tensor)
    if x is None:
        return
    axis, ascending = d.axis(x), d.flag()
    if d.flag():
        d.add("topk", {"x": x}, 2, k=d.whole(1, d.values[x].shape[axis]), axis=axis, ascending=ascending)
    else:
        d.add("argsort", {"x": x}, axis=axis, ascending=ascending)


def cumsum(d: Draft) -> None:
    if x := d.pick(number, tensor):
        d.add("cumsum", {"x": x}, axis=d.whole(0, d.values[x].ndim - 1), exclusive=d.flag(), reverse=d.flag())


ELEMENTS = (unary, integers, parametric, binary, compare, logical, select, cast, reduction, sorting, cumsum)
