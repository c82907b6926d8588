"""Operations that move, select and count elements: every element type, ranks, empty tensors, negative axes, ties, NaN.

The oracles are NumPy, written from coremltools' documentation (mil_oracles_tensor); results are compared to the bit.
"""

from collections.abc import Callable, Iterator
from typing import Any

import mil_oracles_tensor as oracles
import numpy as np
import pytest
from mil_single import run

FLOATS = ("float16", "float32")
SMALL = ("int8", "uint8", "int16", "uint16")
OLD = (*FLOATS, "int32", "bool")
Case = tuple[str, str, dict[str, np.ndarray], dict[str, Any], Callable[..., Any]]

RANDOM = np.random.default_rng(19)


def some(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Integers from -9 (0 where there are no negative numbers) to 9."""
    low = 0 if dtype in ("bool", "uint8", "uint16") else -9
    return RANDOM.integers(low, 2 if dtype == "bool" else 10, shape).astype(dtype)


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def plain(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """A NumPy function of x alone."""
    return lambda x, **_: function(x, **fixed)


def moved() -> Iterator[Case]:
    for dtype in (*OLD, *SMALL):
        x, target = some(2, 3, 4, dtype=dtype), "iOS15" if dtype in OLD else "iOS17"
        yield "transpose", target, {"x": x}, {"perm": [-1, 0, 1]}, plain(np.transpose, axes=(2, 0, 1))
        yield "expand_dims", target, {"x": x}, {"axes": [0, -1]}, lambda x, axes: x[None, ..., None]
        yield "reverse", target, {"x": x}, {"axes": [-1, 0]}, plain(np.flip, axis=(2, 0))
        yield "reverse_sequence", target, {"x": x, "lengths": ints(0, 3, 1)}, {"seq_axis": 2, "batch_axis": 1}, \
            oracles.np_reverse_sequence  # fmt: skip
        yield "reverse_sequence", target, {"x": x, "lengths": ints(2, 1, 0, 2)}, {"seq_axis": 0, "batch_axis": 2}, \
            oracles.np_reverse_sequence  # fmt: skip
        yield "tile", target, {"x": x}, {"reps": [2, 1, 3]}, plain(np.tile, reps=(2, 1, 3))
        yield "sliding_windows", target, {"x": x}, {"axis": -1, "size": 2}, oracles.np_sliding_windows
        yield "sliding_windows", target, {"x": x}, {"axis": 1, "size": 2, "stride": 2}, oracles.np_sliding_windows
        yield "identity", target, {"x": x}, {}, lambda x: x
        yield "split", target, {"x": x}, {"num_splits": 2, "axis": -1}, lambda x, **_: np.split(x, 2, 2)
        yield "split", target, {"x": x}, {"split_sizes": [1, 0, 2], "num_splits": 3, "axis": 1}, \
            lambda x, **_: np.split(x, [1, 1], 1)  # fmt: skip
        yield "concat", target, {"x": x, "y": x + x}, {"values": ("x", "y"), "axis": -2}, \
            lambda x, y, **_: np.concatenate([x, y], 1)  # fmt: skip
        yield "concat", target, {"x": x, "y": x + x}, {"values": ("x", "y"), "axis": -2, "interleave": True}, \
            oracles.np_interleaved  # fmt: skip
        yield "stack", target, {"x": x, "y": x + x}, {"values": ("x", "y"), "axis": -1}, \
            lambda x, y, **_: np.stack([x, y], -1)  # fmt: skip
        yield "band_part", target, {"x": x}, {"lower": 0, "upper": 1}, oracles.np_band_part
        yield "band_part", target, {"x": x}, {"lower": 1}, oracles.np_band_part
        yield "flatten2d", target, {"x": x}, {"axis": -1}, lambda x, axis: x.reshape(6, 4)
        yield "shape", target, {"x": x}, {}, lambda x: ints(2, 3, 4)
        yield "non_zero", target, {"x": x}, {}, lambda x: np.argwhere(x).astype(np.int32)
        yield "reshape", target, {"x": x}, {"shape": [0, -1, 2]}, lambda x, shape: x.reshape(2, 6, 2)
        yield "reshape", "iOS17", {"x": x}, {"shape": [0, 0, -1, 0]}, lambda x, shape: x.reshape(1, 2, 3, 4)
        yield "reshape", "iOS17", {"x": x}, {"shape": [-1, 0]}, lambda x, shape: x.reshape(6, 4)
        like = {"ref_tensors": ("a", "b"), "begins": (0, 1), "ends": (1, 0), "end_masks": (False, True)}
        a, b = some(4, 1), some(9, 3, 2, dtype="int32")
        yield "reshape_like", "iOS16", {"x": x, "a": a, "b": b}, like, lambda x, **_: x.reshape(4, 3, 2)
    blocks, pairs = some(4, 8, 4, 6), [[1, 1], [0, 2]]
    yield "depth_to_space", "iOS15", {"x": blocks}, {"block_size": 2}, oracles.np_depth_to_space
    yield "space_to_depth", "iOS15", {"x": blocks}, {"block_size": 2}, oracles.np_space_to_depth
    yield (
        "space_to_batch",
        "iOS15",
        {"x": blocks},
        {"block_shape": [3, 2], "paddings": pairs},
        oracles.np_space_to_batch,
    )
    yield "batch_to_space", "iOS15", {"x": blocks}, {"block_shape": [2, 2], "crops": pairs}, oracles.np_batch_to_space


def of_odd_shapes() -> Iterator[Case]:
    empty, five = some(2, 0, 3), some(1, 2, 3, 2, 2)
    scalar = np.array(3, np.float32)  # a constant: an input has at least one axis
    yield "transpose", "iOS15", {"x": empty}, {"perm": [2, 0, 1]}, plain(np.transpose, axes=(2, 0, 1))
    yield "transpose", "iOS15", {"x": five}, {"perm": [4, 3, 2, 1, 0]}, plain(np.transpose)
    yield "expand_dims", "iOS15", {}, {"x": scalar, "axes": [-2, 1]}, lambda x, axes: x.reshape(1, 1)
    yield "squeeze", "iOS15", {"x": some(1)}, {"axes": [0]}, plain(np.squeeze)
    yield "squeeze", "iOS15", {"x": five}, {"axes": [0, 1]}, lambda x, axes: x[0]  # one that isn't 1 stays
    yield "squeeze", "iOS15", {"x": some(2, 3)}, {}, lambda x: x
    yield "reshape", "iOS15", {"x": some(1, 1)}, {"shape": np.zeros(0, np.int32)}, lambda x, shape: x.reshape(())
    yield "reshape", "iOS15", {}, {"x": scalar, "shape": [1, -1]}, lambda x, shape: x.reshape(1, 1)
    yield "reshape", "iOS17", {"x": empty}, {"shape": [0, 0, 0]}, lambda x, shape: x
    yield "reverse", "iOS15", {"x": empty}, {}, lambda x: x
    yield "concat", "iOS15", {"x": empty, "y": some(2, 1, 3)}, {"values": ("x", "y"), "axis": 1}, lambda x, y, **_: y
    yield (
        "concat",
        "iOS15",
        {},
        {"values": (scalar, scalar + np.float32(1)), "axis": 0},
        lambda values, axis: np.stack(values),
    )
    yield (
        "stack",
        "iOS15",
        {},
        {"values": (scalar, scalar + np.float32(1)), "axis": 0},
        lambda values, axis: np.stack(values),
    )
    yield "shape", "iOS15", {}, {"x": scalar}, lambda x: np.zeros(0, np.int32)
    yield "non_zero", "iOS15", {"x": np.zeros((2, 3), np.float32)}, {}, lambda x: np.zeros((0, 2), np.int32)
    yield "non_zero", "iOS15", {"x": np.array([np.nan, -0.0, np.inf], np.float32)}, {}, lambda x: ints([0], [2])
    yield "tile", "iOS15", {"x": empty}, {"reps": [1, 5, 2]}, plain(np.tile, reps=(1, 5, 2))
    yield "band_part", "iOS15", {"x": np.array([[1, np.inf], [np.nan, 2]], np.float32)}, {"lower": 0, "upper": 0}, \
        oracles.np_band_part  # fmt: skip
    yield "cumsum", "iOS15", {"x": empty}, {"axis": 1, "exclusive": True}, lambda x, **_: x
    yield "cumsum", "iOS15", {"x": np.array([1e8, 1, np.inf, 1], np.float32)}, {"axis": -1, "exclusive": True}, \
        lambda x, **_: np.array([0, 1e8, 1e8, np.inf], np.float32)  # fmt: skip
    yield "cumsum", "iOS15", {"x": ints(4, 6, 7)}, {"exclusive": True, "reverse": True}, lambda x, **_: ints(13, 7, 0)
    for begin, end, stride in ([-5, 9, 1], [-1, -9, -1], [3, 0, -2], [2, 2, 1], [0, -1, 2]):
        given = {"begin": [begin], "end": [end], "stride": [stride]}
        yield "slice_by_index", "iOS15", {"x": some(4)}, given, lambda x, a=begin, b=end, c=stride, **_: x[a:b:c]
    masked = {
        "begin": [9, -1],
        "end": [9, 0],
        "stride": [-1, 1],
        "begin_mask": [True, False],
        "end_mask": [True, False],
    }
    squeezed = masked | {"squeeze_mask": [False, True]}
    yield "slice_by_index", "iOS17", {"x": some(3, 4, dtype="int8")}, squeezed, lambda x, **_: x[::-1, -1]
    both = {"begin": [1, -1], "end": [0, 0], "squeeze_mask": [True, True]}
    yield "slice_by_index", "iOS15", {"x": some(3, 4)}, both, lambda x, **_: x[1, -1]
    yield "slice_by_size", "iOS15", {"x": some(4, 5)}, {"begin": [-2, 1], "size": [2, -1]}, lambda x, **_: x[-2:, 1:]
    yield "slice_by_size", "iOS15", {"x": some(4, 5)}, {"begin": [0, 5], "size": [0, -1]}, lambda x, **_: x[:0, 5:]


def counted() -> Iterator[Case]:
    yield "fill", "iOS15", {}, {"shape": [2, 0], "value": True}, lambda **_: np.ones((2, 0), bool)
    yield "fill", "iOS15", {}, {"shape": [3], "value": -7}, lambda **_: np.full(3, -7, np.int32)
    yield "fill", "iOS15", {}, {"shape": [1, 2]}, lambda **_: np.zeros((1, 2), np.float32)
    for value in (True, 3, np.float32(0.5), np.float16(-2)):
        yield "fill_like", "iOS16", {"ref_tensor": some(2, 3, dtype="int32")}, {"value": value}, \
            lambda ref_tensor, value: np.full((2, 3), np.int32(value) if type(value) is int else value)  # fmt: skip
    for start, end, step in ((0, 10, 3), (5, -5, -4), (3, 3, 1), (7, 0, 1), (-(2**31), 2**31 - 1, 2**30)):
        given = {"start": start, "end": end, "step": step}
        yield "range_1d", "iOS15", {}, given, lambda start, end, step: np.arange(start, end, step, np.int32)
    for dtype in FLOATS:
        given = {key: np.array(value, dtype) for key, value in (("start", -1), ("end", 2.1), ("step", 0.25))}
        yield "range_1d", "iOS15", {}, given, lambda start, end, step: (np.arange(13) / 4 - 1).astype(start.dtype)
    hot: dict[str, Any] = {"one_hot_vector_size": 4}
    for axis, indices in ((-1, ints(0, 3, -1, 4)), (0, ints([1, 2], [3, 0])), (-2, ints([1, 2]))):
        yield "one_hot", "iOS15", {"indices": indices}, hot | {"axis": axis}, oracles.np_one_hot
    for on, off in ((np.float32(2.5), np.float32(-1)), (np.float16(1), np.float16(0)), (np.bool_(1), np.bool_(0))):
        yield "one_hot", "iOS15", {"indices": ints(2, 0)}, hot | {"on_value": on, "off_value": off}, oracles.np_one_hot
    yield "one_hot", "iOS15", {}, hot | {"indices": np.array(2, np.int32)}, oracles.np_one_hot


def sort(x: np.ndarray, ascending: bool) -> np.ndarray:
    """Indices along the last axis: equal ones in their order, NaN last."""
    keys = np.float64(x) if ascending else -np.float64(x)
    return np.argsort(keys, -1, kind="stable").astype(np.int32)


def sorted_() -> Iterator[Case]:
    ties = np.array([[2, np.nan, 2, -np.inf], [np.inf, 1, np.nan, 1]])
    for ascending in (True, False):
        for dtype in (*FLOATS, "int32", *SMALL):
            x = ties.astype(dtype) if dtype in FLOATS else some(3, 6, dtype=dtype)
            if dtype not in SMALL:
                yield "argsort", "iOS15", {"x": x}, {"ascending": ascending}, sort
            given = {"k": -1, "ascending": ascending, "output_indices_dtype": "uint16"}
            yield "topk", "iOS17", {"x": x}, given, lambda x, ascending, **_: (
                np.take_along_axis(x, sort(x, ascending), -1), sort(x, ascending).astype(np.uint16))  # fmt: skip
        few: dict[str, Any] = {"k": 2, "axis": -1, "ascending": ascending, "sort": False}
        yield "topk", "iOS16", {"x": ties.astype(np.float32)}, few | {"return_indices": False}, \
            lambda x, ascending, **_: np.take_along_axis(x, sort(x, ascending)[:, :2], -1)  # fmt: skip
    for op, function in (("reduce_argmax", np.argmax), ("reduce_argmin", np.argmin)):
        for x in (np.float32([[1, 3, 3], [np.nan, 1, 0]]), some(2, 5, dtype="int32")):
            yield op, "iOS15", {"x": x}, {}, lambda x, function=function: function(x, -1).astype(np.int32)
        yield op, "iOS17", {"x": some(2, 5)}, {"axis": 0, "keep_dims": True, "output_dtype": "uint16"}, \
            lambda x, function=function, **_: function(x, 0)[None].astype(np.uint16)  # fmt: skip


CASES = [*moved(), *of_odd_shapes(), *counted(), *sorted_()]


def name(case: Case) -> str:
    op, target, inputs, _, _ = case
    return f"{op}-{target}-" + "-".join(f"{x.dtype}{list(x.shape)}".replace(" ", "") for x in inputs.values())


@pytest.mark.parametrize("known", [True, False], ids=["sizes", "ranks"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_to_the_bit(case: Case, known: bool) -> None:
    """Whether the program declares its results' sizes or only their number."""
    op, target, inputs, parameters, oracle = case
    wanted = oracle(**inputs, **parameters)
    wanted = [np.asarray(array) for array in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]
    for got, array in zip(run(op, target, inputs, parameters, wanted, known=known), wanted, strict=True):
        assert got.dtype == array.dtype and got.shape == array.shape
        np.testing.assert_array_equal(got, array)
        assert array.size < 4 or not np.array_equal(np.roll(got, 1), array) or (array == array.flat[0]).all()
