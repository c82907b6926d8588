"""Gathering, scattering, suppression, parameters that are only known at run time, and random numbers.

The oracles are NumPy, written from coremltools' documentation (mil_oracles_tensor).
"""

from collections.abc import Callable, Iterator
from typing import Any

import mil_oracles_tensor as oracles
import numpy as np
import pytest
from mil_single import run, single, type_of

from model_export.mil.program import MILError, TensorType

Case = tuple[str, dict[str, np.ndarray], dict[str, Any], Callable[..., Any]]
RANDOM = np.random.default_rng(20)
MODES = ("update", "add", "sub", "mul", "div", "max", "min")
GATHERS = ("gather", "gather_along_axis", "gather_nd")


def some(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Numbers without 0."""
    return (RANDOM.integers(1, 9, shape) * (1 if dtype.startswith("u") else RANDOM.choice((-1, 1), shape))).astype(
        dtype
    )


def below(size: int, *shape: int, low: int = 0) -> np.ndarray:
    return RANDOM.integers(low, size, shape).astype(np.int32)


def gathers(dtype: str) -> Iterator[Case]:
    """From iOS 16."""
    x = some(3, 4, 2, 5, dtype=dtype)
    for axis, indices in ((0, below(3, 2, 2)), (-1, below(5, 3)), (2, below(2, 1, 2, 1)), (1, below(4, 0))):
        yield "gather", {"x": x, "indices": indices}, {"axis": axis}, oracles.np_gather
    for axis, batch, shape in ((1, 1, (3, 2)), (2, 1, (3, 2, 2)), (-1, 1, (3,)), (3, 2, (3, 4, 2)), (2, 2, (3, 4))):
        given = {"x": x, "indices": below(x.shape[axis], *shape)}
        yield "gather", given, {"axis": axis, "batch_dims": batch}, oracles.np_gather
    for axis in range(-4, 4):
        shape = [7 if place == axis % 4 else size for place, size in enumerate(x.shape)]
        given = {"x": x, "indices": below(x.shape[axis], *shape)}
        yield "gather_along_axis", given, {"axis": axis}, lambda x, indices, axis: np.take_along_axis(x, indices, axis)
    for shape, batch in (
        ((2,), 0),
        ((4, 1), 0),
        ((2, 3, 4), 0),
        ((0, 2), 0),
        ((3, 2), 1),
        ((3, 4, 1), 2),
        ((3, 2, 3), 1),
    ):
        limits = x.shape[batch : batch + shape[-1]]
        indices = np.stack([below(size, *shape[:-1]) for size in limits], -1)
        yield "gather_nd", {"x": x, "indices": indices}, {"batch_dims": batch}, oracles.np_gather_nd


def scatters(dtype: str, mode: str) -> Iterator[Case]:
    """Several updates of one place among them."""
    data, given = some(3, 4, 2, dtype=dtype), {"mode": mode}
    for axis, count in ((0, 5), (-1, 3), (1, 0)):
        shape = [count if place == axis % 3 else size for place, size in enumerate(data.shape)]
        inputs = {"data": data, "indices": below(data.shape[axis], count), "updates": some(*shape, dtype=dtype)}
        yield "scatter", inputs, given | {"axis": axis}, oracles.np_scatter
    for axis in range(-3, 3):
        shape = [5 if place == axis % 3 else size for place, size in enumerate(data.shape)]
        inputs = {"data": data, "indices": below(data.shape[axis], *shape), "updates": some(*shape, dtype=dtype)}
        yield "scatter_along_axis", inputs, given | {"axis": axis}, oracles.np_scatter_along_axis
    for places in ((2,), (6, 1), (4, 3, 3), (5, 2)):
        indices = np.stack([below(size, *places[:-1]) for size in data.shape[: places[-1]]], -1)
        updates = some(*places[:-1], *data.shape[places[-1] :], dtype=dtype)
        yield "scatter_nd", {"data": data, "indices": indices, "updates": updates}, given, oracles.np_scatter_nd


def check(case: Case, target: str, known: bool = True) -> None:
    op, inputs, parameters, oracle = case
    wanted = np.asarray(oracle(**inputs, **parameters))
    (got,) = run(op, target, inputs, parameters, [wanted], known=known)
    # Rounded once to fp16, where NumPy's is after each of several updates of one place.
    close = {"float16": 4e-3, "float32": 2e-6}.get(str(got.dtype), 0)
    np.testing.assert_allclose(got, wanted, rtol=close, err_msg=f"{op} {parameters}")
    assert got.dtype == wanted.dtype


@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "int8", "uint16"])
def test_gathers(dtype: str, target: str) -> None:
    for case in gathers(dtype):
        check(case, target)
        check(case, target, known=False)


@pytest.mark.parametrize("target", ["iOS15", "iOS17"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "int32"])
def test_scatters(dtype: str, mode: str, target: str) -> None:
    for case in scatters(dtype, mode):
        check(case, target)


@pytest.mark.parametrize("target", ["iOS15", "iOS16"])
def test_negative_indices_count_from_the_end(target: str) -> None:
    for op, inputs, parameters, oracle in (*gathers("float32"), *scatters("float32", "add")):
        if parameters.get("batch_dims"):
            continue
        parameters = {key: value for key, value in parameters.items() if key != "batch_dims"}
        wanted = np.asarray(oracle(**inputs, **parameters))
        indices, shape = inputs["indices"], (inputs["x"] if "x" in inputs else inputs["data"]).shape
        sizes = shape[: indices.shape[-1]] if op.endswith("nd") else shape[parameters["axis"]]
        turned = np.where(RANDOM.random(indices.shape) < 0.5, indices - np.array(sizes), indices).astype(np.int32)
        (got,) = run(op, target, inputs | {"indices": turned}, parameters, [wanted])
        np.testing.assert_array_equal(got, wanted)


OUTSIDE: list[tuple[str, dict[str, np.ndarray], np.ndarray]] = [
    ("gather", {"x": some(3, 2), "indices": np.int32([0, -1, 2, 3])}, np.zeros((4, 2))),
    ("gather_along_axis", {"x": some(3, 2), "indices": np.int32([[0, -1], [3, 2]])}, np.zeros((2, 2))),
    ("gather_nd", {"x": some(3, 2), "indices": np.int32([[0, -1], [2, 1], [3, 0]])}, np.zeros(3)),
    ("scatter", {"data": some(3, 2), "indices": np.int32([-1, 3, 1]), "updates": some(3, 2)}, np.zeros((3, 2))),
    ("scatter_along_axis", {"data": some(3, 2), "indices": np.int32([[-1, 0]]), "updates": some(1, 2)},
     np.zeros((3, 2))),
    ("scatter_nd", {"data": some(3, 2), "indices": np.int32([[0, 2], [1, 1]]), "updates": some(2)}, np.zeros((3, 2))),
]  # fmt: skip


@pytest.mark.parametrize("op, inputs, like", OUTSIDE, ids=[item[0] for item in OUTSIDE])
def test_indices_out_of_range(op: str, inputs: dict[str, np.ndarray], like: np.ndarray) -> None:
    """Refused where they are validated, and before iOS 17; else 0 is read there, and nothing written."""
    like = like.astype(np.float32)
    (got,) = run(op, "iOS17", inputs, {}, [like])
    first = inputs.get("x", inputs.get("data"))
    assert first is not None
    sizes, indices = first.shape, inputs["indices"]
    places = indices if op.endswith("nd") else indices[..., None]
    inside = ((places >= 0) & (places < sizes[: places.shape[-1]])).all(-1)
    assert not inside.all() and inside.any()  # the control
    if op in GATHERS:
        assert (got[~inside] == 0).all() and (got[inside] != 0).all()
    else:
        changed = {"scatter": (slice(1, 2),), "scatter_along_axis": (0, 1), "scatter_nd": (1, 1)}[op]
        wanted = first.copy()
        wanted[changed] += inputs["updates"][inside].reshape(wanted[changed].shape)
        np.testing.assert_array_equal(got, wanted)
    with pytest.raises(MILError, match="out of range"):
        run(op, "iOS17", inputs, {"validate_indices": True}, [like])
    with pytest.raises(MILError, match="out of range"):
        run(op, "iOS16", inputs | {"indices": np.full_like(indices, 9)}, {}, [like])


# -- parameters known at run time -------------------------------------------------------------------------------------

GRID = np.arange(24, dtype=np.float32).reshape(4, 6)
AT_RUN_TIME: list[tuple[str, str, dict[str, Any], dict[str, Any], np.ndarray]] = [
    ("reshape", "iOS15", {"x": GRID, "shape": [3, -1]}, {}, GRID.reshape(3, 8)),
    ("reshape", "iOS17", {"x": GRID, "shape": [2, 2, 0]}, {}, GRID.reshape(2, 2, 6)),
    ("slice_by_index", "iOS15", {"x": GRID, "begin": [1, -2], "end": [3, -5]}, {"stride": [1, -1]},
     GRID[1:3, -2:-5:-1]),
    ("slice_by_size", "iOS15", {"x": GRID, "begin": [1, -2], "size": [-1, 2]}, {}, GRID[1:, -2:]),
    ("slice_update", "iOS18", {"x": GRID, "update": -GRID[:2, :3], "begin": [1, 0], "end": [3, 6]}, {"stride": [1, 2]},
     np.stack([GRID[0], *([[-a, b, -c, d, -e, f] for a, b, c, d, e, f in
              [[0, 7, 1, 9, 2, 11], [6, 13, 7, 15, 8, 17]]]), GRID[3]]).astype(np.float32)),
    ("tile", "iOS15", {"x": GRID, "reps": [2, 1]}, {}, np.tile(GRID, (2, 1))),
    ("pad", "iOS15", {"x": GRID, "pad": [1, 0, 0, 2]}, {"constant_val": 0.5},
     np.pad(GRID, ((1, 0), (0, 2)), constant_values=0.5)),
    ("pad", "iOS15", {"x": GRID, "pad": [3, 0, 0, 5]}, {"mode": "reflect"}, np.pad(GRID, ((3, 0), (0, 5)), "reflect")),
    ("pad", "iOS15", {"x": GRID, "pad": [3, 9, 0, 5]}, {"mode": "replicate"}, np.pad(GRID, ((3, 9), (0, 5)), "edge")),
    ("fill", "iOS15", {"shape": [2, 3]}, {"value": 7}, np.full((2, 3), 7, np.int32)),
    ("range_1d", "iOS15", {"start": 9, "end": 1, "step": -3}, {}, np.arange(9, 1, -3, np.int32)),
    ("one_hot", "iOS15", {"indices": [2, 0], "one_hot_vector_size": 3}, {}, np.eye(3, dtype=np.int32)[[2, 0]]),
    ("random_uniform", "iOS15", {"shape": [2, 2]}, {"low": 3.0, "high": 3.0}, np.full((2, 2), 3, np.float32)),
    ("split", "iOS15", {"x": GRID}, {"num_splits": 1, "axis": 0}, GRID),
]  # fmt: skip


@pytest.mark.parametrize("case", AT_RUN_TIME, ids=lambda case: f"{case[0]}-{case[1]}")
def test_parameters_known_at_run_time(case: tuple[str, str, dict[str, Any], dict[str, Any], np.ndarray]) -> None:
    op, target, inputs, parameters, wanted = case
    arrays = {k: v if isinstance(v, np.ndarray) else np.atleast_1d(np.int32(v)) for k, v in inputs.items()}
    (got,) = run(op, target, arrays, parameters, [wanted], known=False)
    np.testing.assert_array_equal(got, wanted)
    known = {k: v for k, v in arrays.items() if k in ("x", "update", "indices")}
    scalars = op == "range_1d" or "one_hot_vector_size" in arrays
    constants = {k: v.reshape(()) if scalars else v for k, v in arrays.items() if k not in known}
    np.testing.assert_array_equal(run(op, target, known, constants | parameters, [wanted])[0], wanted)


HUGE = 1 << 30
UNBOUNDED = [("fill", "shape", [HUGE, HUGE]), ("fill", "shape", [-1, 2]), ("random_normal", "shape", [HUGE, HUGE]),
             ("tile", "reps", [HUGE, HUGE]), ("pad", "pad", [0, HUGE, 0, HUGE])]  # fmt: skip


@pytest.mark.parametrize("op, key, values", UNBOUNDED)
def test_sizes_known_at_run_time_are_bounded(op: str, key: str, values: list[int]) -> None:
    inputs = {key: np.int32(values)} | ({"x": GRID} if op in ("tile", "pad") else {})
    model = single(op, "iOS15", inputs, {}, [TensorType("fp32", (None, None))])
    with pytest.raises(MILError, match=r"gives \["):
        model.predict(inputs)


# -- non-maximum suppression ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("per_class", [False, True])
def test_non_maximum_suppression(per_class: bool, dtype: str) -> None:
    centres, sides = RANDOM.uniform(0, 4, (2, 12, 2)), RANDOM.uniform(0.5, 3, (2, 12, 2))
    boxes = np.concatenate([centres, sides], -1).astype(dtype)
    boxes[0, 3] = 0  # without area
    scores = RANDOM.permutation(2 * 12 * 3).reshape(2, 12, 3).astype(dtype) / np.dtype(dtype).type(64)
    scores[0, :2] = scores[0, 2]  # ties: the first one comes first
    sizes = set()
    for iou, lowest, most in ((0.2, 0.5, 7), (0.5, 0.9, 3), (0.01, 2.0, 5), (0.9, -1.0, 20)):
        thresholds = {"iou_threshold": np.dtype(dtype).type(iou), "max_boxes": most, "per_class_suppression": per_class}
        given = thresholds | {"score_threshold": np.dtype(dtype).type(lowest)}
        wanted = oracles.np_nms(boxes, scores, **given)
        sizes.update(wanted[3])
        got = run("non_maximum_suppression", "iOS16", {"boxes": boxes, "scores": scores}, given, wanted)
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
        wanted = oracles.np_nms(boxes, scores, **thresholds)[:3]
        turned = {"boxes": boxes.swapaxes(1, 2).copy(), "scores": scores.swapaxes(1, 2).copy()}
        wanted = [array.swapaxes(1, 2) if array.ndim == 3 else array for array in wanted]
        for a, b in zip(run("non_maximum_suppression", "iOS17", turned, thresholds, wanted), wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(sizes) > 2


# -- random numbers ---------------------------------------------------------------------------------------------------

DRAWN = 20_000
DISTRIBUTIONS: dict[str, tuple[dict[str, Any], float, float]] = {  # parameters, mean, standard deviation
    "random_bernoulli": ({"prob": 0.3}, 0.3, (0.3 * 0.7) ** 0.5),
    "random_normal": ({"mean": 2.0, "stddev": 3.0}, 2, 3),
    "random_uniform": ({"low": -1.0, "high": 2.0}, 0.5, 3 / 12**0.5),
}


@pytest.mark.parametrize("op", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_distributions(op: str, dtype: str) -> None:
    parameters, mean, deviation = DISTRIBUTIONS[op]
    type, shape = TensorType(dtype, (2, DRAWN)), {"shape": [2, DRAWN]}
    seeded = single(op, "iOS16", {}, shape | parameters | {"seed": 7}, [type])
    (first,) = seeded.predict({}).values()
    np.testing.assert_array_equal(first, *seeded.predict({}).values())
    other = single(op, "iOS16", {}, shape | parameters | {"seed": 8}, [type])
    assert (first != next(iter(other.predict({}).values()))).mean() > 0.3
    free = single(op, "iOS16", {}, shape | parameters, [type])
    drawn = np.concatenate([*free.predict({}).values(), *free.predict({}).values()]).astype(np.float64)
    assert not np.array_equal(drawn[:2], drawn[2:])
    error = deviation / (4 * DRAWN) ** 0.5
    assert abs(drawn.mean() - mean) < 6 * error and abs(drawn.std() - deviation) < 0.03 * deviation
    if op == "random_uniform":
        assert drawn.min() >= -1 and drawn.max() < 2


def test_uniform_numbers_never_reach_the_upper_end() -> None:
    """2047 is the last fp16 number below 2048; nearly a half of (2046, 2048) is nearer to 2048."""
    given = {"shape": [1000], "low": np.float16(2046), "high": np.float16(2048)}
    (drawn,) = single("random_uniform", "iOS16", {}, given, [TensorType("fp16", (1000,))]).predict({}).values()
    assert set(drawn.tolist()) == {2046, 2047}


@pytest.mark.parametrize("mode", ["logits", "probs"])
def test_categories(mode: str) -> None:
    chances = np.array([[[0.1, 0.2, 0.7], [0.5, 0.0, 0.5]]], np.float32)
    with np.errstate(divide="ignore"):
        x = np.log(chances) + 3 if mode == "logits" else chances * 2
    wanted = type_of(np.zeros((1, 2, DRAWN), np.float32))
    (drawn,) = single("random_categorical", "iOS15", {"x": x}, {"mode": mode, "size": DRAWN}, [wanted]).predict(
        {"x": x}).values()  # fmt: skip
    counts = (drawn[..., None] == np.arange(3)).mean(2)
    np.testing.assert_allclose(counts, chances, atol=0.02)
    assert counts[0, 1, 1] == 0
