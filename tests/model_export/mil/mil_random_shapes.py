"""Families of random operations: those that move and choose elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mil_random_draft import Draft, Test, floating, number, tensor


def shape(d: Draft) -> None:
    x = d.pick(number)
    if x is None:
        return
    value, op = d.values[x], d.one(["reshape", "transpose", "expand_dims", "squeeze", "flatten2d", "shape"])
    if op == "reshape":
        sizes, rest = [], value.size
        for _ in range(d.whole(0, 4)):
            sizes.append(d.one([n for n in range(1, rest + 1) if rest % n == 0]))
            rest //= sizes[-1]
        sizes.insert(d.whole(0, len(sizes)), rest)
        if d.flag():
            sizes[d.whole(0, len(sizes) - 1)] = -1
        d.add(op, {"x": x}, shape=sizes)
    elif op == "transpose" and value.ndim:
        d.add(op, {"x": x}, perm=d.draw(st.permutations(range(value.ndim))))
    elif op == "expand_dims" and value.ndim < 5:
        d.add(op, {"x": x}, axes=[d.whole(-value.ndim - 1, value.ndim)])
    elif op == "squeeze" and 1 in value.shape:
        ones = [axis for axis, size in enumerate(value.shape) if size == 1]
        d.add(op, {"x": x}, axes=d.draw(st.lists(st.sampled_from(ones), unique=True, min_size=1)))
    elif op == "flatten2d" and value.ndim and floating(value):  # coremltools 9.0's builder fails at integers
        d.add(op, {"x": x}, axis=d.whole(0, value.ndim))
    elif op == "shape" and value.ndim:
        d.add(op, {"x": x})


def slices(d: Draft) -> None:
    x = d.pick(number, tensor)
    if x is None:
        return
    if d.flag():
        begin = [d.whole(0, length - 1) for length in d.values[x].shape]
        size = [d.one([d.whole(1, n - a), -1]) for a, n in zip(begin, d.values[x].shape)]
        d.add("slice_by_size", {"x": x}, begin=begin, size=size)
        return
    columns = zip(*(_one_slice(d, length) for length in d.values[x].shape), strict=True)
    names = ("begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask")
    d.add("slice_by_index", {"x": x}, **dict(zip(names, map(list, columns))))


def _one_slice(d: Draft, length: int) -> tuple[int, int, int, bool, bool, bool]:
    """Begin, end, stride and the three masks of an axis, with something between."""
    first, kind = d.whole(0, length - 1), d.one(["forward", "backward", "one"])
    begin = first - length * d.flag()
    if kind == "one":
        return begin, first + 1, 1, False, False, True
    if kind == "forward":
        end = d.whole(first + 1, length)
        return begin, end - length * (end < length and d.flag()), d.whole(1, 3), d.flag(), d.flag(), False
    end = d.whole(-1, first - 1)  # -1: to the first element, which only the mask can say
    open_end = end < 0 or d.flag()
    return begin, max(end, 0) - length * d.flag(), -d.whole(1, 2), d.flag(), open_end, False


def join(d: Draft) -> None:
    x = d.pick(number)
    if x is None:
        return
    value = d.values[x]
    same = tuple(d.pick(lambda v: v.shape == value.shape and v.dtype == value.dtype) for _ in range(d.whole(1, 2)))
    if d.flag():
        d.add("stack", {"values": (x, *same)}, axis=d.whole(-value.ndim - 1, value.ndim))
    elif value.ndim:
        axis = d.axis(x)
        interleave = d.whole(0, 3) == 3
        if not interleave:
            rest = [n for i, n in enumerate(value.shape) if i != axis % value.ndim]
            same = tuple(
                d.pick(lambda v: v.dtype == value.dtype and v.ndim == value.ndim
                       and [n for i, n in enumerate(v.shape) if i != axis % v.ndim] == rest) for _ in same
            )  # fmt: skip
        d.add("concat", {"values": (x, *same)}, axis=axis, interleave=interleave)


def split(d: Draft) -> None:
    x = d.pick(number, lambda v: max(v.shape, default=0) > 1)
    if x is None:
        return
    axis = d.one([axis for axis, size in enumerate(d.values[x].shape) if size > 1])
    size = d.values[x].shape[axis]
    axis -= d.values[x].ndim * d.flag()
    if d.flag():
        first = d.whole(1, size - 1)
        d.add("split", {"x": x}, 2, axis=axis, split_sizes=[first, size - first])
    else:
        count = d.one([n for n in range(2, size + 1) if size % n == 0])
        d.add("split", {"x": x}, count, axis=axis, num_splits=count)


def _indices(d: Draft, shape: Sequence[int], size: int) -> dict[str, Any]:
    """Numbers below size: a value of the program's, or a constant."""
    name = d.pick(lambda v: v.dtype == np.int32 and v.shape == tuple(shape) and v.min() >= 0 and v.max() < size)
    if name is not None and d.flag():
        return {"operands": {"indices": name}}
    return {"operands": {}, "indices": d.array(shape, np.int32, 0, size - 1)}


def _place(d: Draft, op: str, operands: dict[str, Any], given: dict[str, Any], **more: Any) -> None:
    rest = {key: value for key, value in given.items() if key != "operands"}
    d.add(op, {**operands, **given["operands"]}, **rest, **more)


def gather(d: Draft) -> None:
    x = d.pick(number, tensor)
    if x is None:
        return
    value, axis = d.values[x], d.axis(x)
    op = d.one(["gather", "gather_along_axis", "gather_nd"])
    if op == "gather":
        sizes = [d.whole(1, 3) for _ in range(d.whole(1, 2))]
        _place(d, op, {"x": x}, _indices(d, sizes, value.shape[axis]), axis=axis)
    elif op == "gather_along_axis":
        sizes = list(value.shape)
        sizes[axis] = d.whole(1, 4)
        _place(d, op, {"x": x}, _indices(d, sizes, value.shape[axis]), axis=axis)
    else:
        depth = d.whole(1, value.ndim)
        _place(d, op, {"x": x}, _indices(d, [d.whole(1, 3), depth], min(value.shape[:depth])))


def scatter(d: Draft) -> None:
    x = d.pick(number, tensor)
    if x is None:
        return
    value, axis, mode = d.values[x], d.axis(x), d.one(["update", "add", "max", "min"])
    op = d.one(["scatter", "scatter_along_axis", "scatter_nd"])
    if op == "scatter":
        places = d.draw(st.permutations(range(value.shape[axis])))[: d.whole(1, 3)]
        sizes = list(value.shape)
        sizes[axis] = len(places)
        d.add(op, {"data": x}, indices=np.int32(places), updates=d.array(sizes, value.dtype), axis=axis, mode=mode)
    elif op == "scatter_along_axis":
        count = d.whole(1, value.shape[axis])
        order = np.argsort(d.array(value.shape, np.float32), axis)  # no place twice: their order is not defined
        places = np.take(order, range(count), axis).astype(np.int32)
        d.add(op, {"data": x}, indices=places, updates=d.array(places.shape, value.dtype), axis=axis, mode=mode)
    else:
        places = np.int32([[place] for place in d.draw(st.permutations(range(value.shape[0])))[: d.whole(1, 3)]])
        updates = d.array([len(places), *value.shape[1:]], value.dtype)
        d.add(op, {"data": x}, indices=places, updates=updates, mode=mode)


def move(d: Draft) -> None:
    x = d.pick(number, tensor)
    if x is None:
        return
    value = d.values[x]
    op = d.one(["reverse", "tile", "pad", "band_part", "sliding_windows", "one_hot", "reverse_sequence"])
    if op == "reverse":
        d.add(op, {"x": x}, axes=d.axes(x))
    elif op == "tile":
        d.add(op, {"x": x}, reps=[d.whole(1, 2) for _ in value.shape])
    elif op == "pad" and floating(value):
        mode = d.one(["constant", "reflect", "replicate"])
        axes = d.whole(1, value.ndim if mode == "constant" else min(2, value.ndim))
        most = [min(2, size - 1) if mode == "reflect" else 2 for size in value.shape[value.ndim - axes :]]
        amounts = [d.whole(0, size) for size in most for _ in range(2)]
        constant = {"constant_val": d.scalar(x, 1.5)} if mode == "constant" else {}
        d.add(op, {"x": x}, pad=amounts, mode=mode, **constant)
    elif op == "band_part" and value.ndim > 1:
        d.add(op, {"x": x}, lower=d.whole(-1, 2), upper=d.whole(-1, 2))
    elif op == "sliding_windows" and value.ndim < 5:
        axis = d.axis(x)
        d.add(op, {"x": x}, axis=axis, size=d.whole(1, value.shape[axis]), stride=d.whole(1, 2))
    elif op == "one_hot" and value.dtype == np.int32 and value.min() >= 0 and value.max() < 6:
        d.add(op, {"indices": x}, one_hot_vector_size=6)
    elif op == "reverse_sequence" and value.ndim > 1:
        lengths = d.array(value.shape[:1], np.int32, 1, value.shape[1])
        d.add(op, {"x": x}, lengths=lengths, seq_axis=1, batch_axis=0)


def blocks_of_space(d: Draft) -> None:
    ops: dict[str, Test] = {
        "depth_to_space": lambda v: v.shape[1] % 4 == 0, "pixel_shuffle": lambda v: v.shape[1] % 4 == 0,
        "space_to_depth": lambda v: v.shape[2] % 2 == v.shape[3] % 2 == 0,
    }  # fmt: skip
    op = d.one(list(ops))
    if x := d.pick(floating, lambda v: v.ndim == 4, ops[op]):
        d.add(op, {"x": x}, **{"upscale_factor" if op == "pixel_shuffle" else "block_size": 2})


SHAPES = (shape, slices, join, split, gather, scatter, move, blocks_of_space)
