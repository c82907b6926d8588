"""Families of random operations: products, convolutions, normalizations, branches and loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mil_random import Line
from mil_random_draft import Draft, floating, number, tensor


def products(d: Draft) -> None:
    x = d.pick(floating, lambda v: v.ndim > 1)
    if x is None:
        return
    value, op, width = d.values[x], d.one(["linear", "matmul", "einsum"]), d.whole(1, 4)
    if op == "linear" and value.ndim <= 3:
        bias = {"bias": d.array([width], value.dtype)} if d.flag() else {}
        d.add(op, {"x": x}, weight=d.array([width, value.shape[-1]], value.dtype), **bias)
    elif op == "matmul":
        swaps = {"transpose_x": d.flag(), "transpose_y": d.flag()}
        inner = value.shape[-2 if swaps["transpose_x"] else -1]

        def fits(y: np.ndarray) -> bool:
            same = y.ndim == value.ndim and y.shape[:-2] == value.shape[:-2]
            return same and y.dtype == value.dtype and y.shape[-1 if swaps["transpose_y"] else -2] == inner

        if d.flag() and (y := d.pick(fits)):
            d.add(op, {"x": x, "y": y}, **swaps)
        else:
            y = d.array([width, inner] if swaps["transpose_y"] else [inner, width], value.dtype)
            d.add(op, {"x": x}, y=y, **swaps)
    elif op == "einsum" and value.ndim == 4:
        n, c, _, w = value.shape

        def suits(y: np.ndarray) -> bool:
            return y.ndim == 4 and y.shape[:3] == (n, w, value.shape[2]) and y.dtype == value.dtype

        del c
        if y := d.pick(suits):
            d.add(op, {"values": (x, y)}, equation="nchw,nwhu->nchu")


def _padding(d: Draft, spatial: Sequence[int], reach: Sequence[int]) -> dict[str, Any]:
    kind = d.one(["valid", "same", "custom", *(["same_lower"] if d.target != "iOS15" else [])])
    if kind == "valid" and any(size < needed for size, needed in zip(spatial, reach)):
        kind = "same"
    if kind != "custom":
        return {"pad_type": kind}
    least = [max(0, needed - size) for size, needed in zip(spatial, reach)]
    return {"pad_type": kind, "pad": [d.whole(extra, max(extra, 1)) for extra in least for _ in range(2)]}


def windows(d: Draft) -> None:
    x = d.pick(floating, lambda v: 3 <= v.ndim <= 5)
    if x is None:
        return
    value = d.values[x]
    (channels, *spatial), op = value.shape[1:], d.one(["conv", "conv", "conv_transpose", "max_pool", "avg_pool"])
    kernel = [d.whole(1, 3) for _ in spatial]
    strides = [d.whole(1, 2) for _ in spatial]
    if op.endswith("pool"):
        if value.ndim != 4:
            return
        kernel = [min(pair) for pair in zip(kernel, spatial)]
        padding = _padding(d, spatial, kernel)
        if "pad" in padding:  # no window of nothing but padding
            padding["pad"] = [min(pad, kernel[place // 2] - 1) for place, pad in enumerate(padding["pad"])]
        more = {"exclude_padding_from_average": d.flag()} if op == "avg_pool" else {}
        d.add(op, {"x": x}, kernel_sizes=kernel, strides=strides, **padding, **more)
        return
    groups = d.one([n for n in range(1, channels + 1) if channels % n == 0])
    width = d.whole(1, 2)
    dilations = [d.whole(1, 2) for _ in spatial]
    more = {"strides": strides, "dilations": dilations, "groups": groups}
    if d.flag():
        more["bias"] = d.array([groups * width], value.dtype)
    if op == "conv":
        reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations)]
        weight = d.array([groups * width, channels // groups, *kernel], value.dtype)
        d.add(op, {"x": x}, weight=weight, **_padding(d, spatial, reach), **more)
    elif value.ndim < 5:
        weight = d.array([channels, width, *kernel], value.dtype)
        d.add(op, {"x": x}, weight=weight, pad_type="valid", **more)


def norms(d: Draft) -> None:
    x = d.pick(floating, tensor)
    if x is None:
        return
    value, op = d.values[x], d.one(["layer_norm", "batch_norm", "instance_norm", "l2_norm"])
    epsilon, kind = d.scalar(x, d.one([0.125, 0.01, 0.001])), value.dtype
    channels = value.shape[1:2]
    if op == "layer_norm":
        first = d.whole(0, value.ndim - 1)
        axes = list(range(first, value.ndim))
        affine = {key: d.array(value.shape[first:], kind) for key in ("gamma", "beta")} if d.flag() else {}
        d.add(op, {"x": x}, axes=axes, epsilon=epsilon, **affine)
    elif op == "batch_norm" and value.ndim >= 3:
        statistics = {"mean": d.array(channels, kind), "variance": d.array(channels, kind, 0.5, 2)}
        affine = {key: d.array(channels, kind) for key in ("gamma", "beta")} if d.flag() else {}
        d.add(op, {"x": x}, **statistics, epsilon=epsilon, **affine)
    elif op == "instance_norm" and value.ndim in (3, 4):
        affine = {key: d.array(channels, kind) for key in ("gamma", "beta")}
        d.add(op, {"x": x}, epsilon=epsilon, **affine)
    elif op == "l2_norm" and value.ndim >= 3:
        d.add(op, {"x": x}, epsilon=epsilon)


def _chain(d: Draft, x: str, prefix: str) -> tuple[Line, ...]:
    """A block: operations of one rounding on x, the last one's result is what it gives."""
    value, lines, here = d.values[x], [], x
    for place in range(d.whole(1, 3)):
        op = d.one(["sub", "maximum", "minimum", "identity", "add"])
        operands, parameters = {"x": here}, {}
        other = d.pick(lambda v: v.shape == value.shape and v.dtype == value.dtype)
        if op != "identity" and other is not None and d.flag():
            operands["y"] = other
        elif op != "identity":
            parameters["y"] = d.scalar(x, d.whole(-3, 3))
        here = f"{prefix}{place}"
        lines.append(Line(op, (here,), operands, parameters))
    return tuple(lines)


def branch(d: Draft) -> None:
    x = d.pick(number, tensor)
    if x is None:
        return
    top = d.add("reduce_max", {"x": x}, axes=list(range(d.values[x].ndim)), keep_dims=False)
    pred = d.add("greater", {"x": top}, y=d.scalar(x, d.whole(-2, 3)))
    name = f"v{len(d.lines)}"
    d.add("cond", {"pred": pred, "x": x}, blocks=(_chain(d, x, f"{name}a"), _chain(d, x, f"{name}b")))


def loop(d: Draft) -> None:
    if x := d.pick(number):
        name = f"v{len(d.lines)}"
        d.add("while_loop", {"x": x}, blocks=(_chain(d, x, f"{name}c"),), count=d.whole(0, 3))


LAYERS = (products, windows, norms, branch, loop)
