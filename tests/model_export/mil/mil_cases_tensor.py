"""Cases of operations that move, select and count elements; test_mil_tensor and test_mil_places have their edges."""

import mil_oracles_tensor as oracles
import numpy as np
from mil_case import INTS, Case, X, uniform

BOXES = np.concatenate([uniform(1, 6, 2, low=0), uniform(1, 6, 2, low=1)], -1)
SCORES = np.arange(12, dtype=np.float32).reshape(1, 6, 2)[:, ::-1].copy()


def places(op: str, *shape: int, size: int, axis: int = 0) -> list[Case]:
    """Every mode of scattering into X."""
    indices = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) * 7 % size
    updates = {
        "scatter": lambda: uniform(*X.shape[:axis], *shape, *X.shape[axis + 1 :], low=1),
        "scatter_along_axis": lambda: uniform(*shape, low=1),
        "scatter_nd": lambda: uniform(*shape[:-1], *X.shape[shape[-1] :], low=1),
    }[op]()
    given = {"data": X, "indices": indices, "updates": updates}
    parameters = {} if op == "scatter_nd" else {"axis": axis}
    oracle = getattr(oracles, f"np_{op}")
    modes = ("update", "add", "sub", "mul", "div", "max", "min")
    return [
        Case(op, given, parameters | {"mode": mode}, oracle, target) for mode in modes for target in ("iOS15", "iOS17")
    ]


def tensor() -> list[Case]:
    blocks = uniform(4, 8, 4, 6)
    flags = {"half": False}
    suppression = {"iou_threshold": np.float32(0.25), "max_boxes": 4, "per_class_suppression": True}
    scored = suppression | {"score_threshold": np.float32(2)}
    nd = np.array([[1, 3], [0, 2], [1, 0]], np.int32)
    cases = [
        Case("band_part", {"x": X}, {"lower": 1, "upper": 2}),
        Case("batch_to_space", {"x": blocks}, {"block_shape": [2, 2], "crops": [[1, 0], [0, 2]]},
             oracles.np_batch_to_space),
        Case("space_to_batch", {"x": blocks}, {"block_shape": [2, 3], "paddings": [[1, 1], [0, 0]]},
             oracles.np_space_to_batch),
        Case("depth_to_space", {"x": blocks}, {"block_size": 2}, oracles.np_depth_to_space),
        Case("space_to_depth", {"x": blocks}, {"block_size": 2}, oracles.np_space_to_depth),
        Case("fill_like", {"ref_tensor": X}, {"value": np.float32(0.5)}),
        Case("gather", {"x": X, "indices": INTS[1:, :2].copy() % 3}, {"axis": 2, "batch_dims": 1}),
        Case("gather_nd", {"x": X, "indices": nd}, {}, oracles.np_gather_nd),
        Case("non_zero", {"x": np.ones((2, 3), np.float32)}),
        Case("one_hot", {"indices": np.array([1, 0, 3], np.int32)},
             {"one_hot_vector_size": 4, "axis": 0, "on_value": np.float32(2), "off_value": np.float32(-1)},
             oracles.np_one_hot, **flags),
        Case("range_1d", {}, {"start": np.float32(-1), "end": np.float32(2), "step": np.float32(0.5)}, **flags),
        Case("reverse_sequence", {"x": X, "lengths": np.array([4, 1], np.int32)}, {"seq_axis": 2, "batch_axis": 0},
             oracles.np_reverse_sequence),
        Case("sliding_windows", {"x": X}, {"axis": 2, "size": 3, "stride": 2}, oracles.np_sliding_windows),
        Case("slice_update", {"x": X, "update": uniform(2, 2, 5, 3)},
             {"begin": [0, 1, -1, 0], "end": [2, 3, 0, 6], "stride": [1, 1, -1, 2],
              "end_mask": [False, False, True, False]}, target="iOS18"),
        Case("topk", {"x": X}, {"k": 2, "axis": 2, "sort": False, "return_indices": False}, target="iOS16"),
        Case("reshape", {"x": X}, {"shape": [0, 0, 0, -1, 0]}, lambda x, shape: x.reshape(1, 2, 4, 5, 6)),
        Case("reshape_like", {"x": X, "first": uniform(8, 1), "second": INTS[:, :1].repeat(30, 1)},
             {"begins": (0, 1), "ends": (1, 0), "end_masks": (False, True)}, lambda x, **_: x.reshape(8, 30)),
        Case("dequantize", {"input": INTS.astype(np.int8)},
             {"scale": np.array([0.5, 0.25, 2], np.float32), "zero_point": np.array([1, -2, 3], np.int8), "axis": 0},
             oracles.np_dequantize),
        Case("quantize", {"input": X},
             {"scale": np.float32(0.03), "zero_point": np.uint8(100), "output_dtype": "uint8"}, oracles.np_quantize),
        Case("non_maximum_suppression", {"boxes": BOXES, "scores": SCORES}, scored, oracles.np_nms, "iOS15"),
        Case("non_maximum_suppression", {"boxes": BOXES.swapaxes(1, 2).copy(), "scores": SCORES.swapaxes(1, 2).copy()},
             suppression, lambda boxes, scores, **p: [
                 array.swapaxes(1, 2) if array.ndim == 3 else array
                 for array in oracles.np_nms(boxes.swapaxes(1, 2), scores.swapaxes(1, 2), **p)[:3]]),
        Case("random_bernoulli", {}, {"shape": [2, 3], "prob": np.float32(1)}, lambda **_: np.ones((2, 3)), **flags),
        Case("random_normal", {}, {"shape": [2, 3], "mean": np.float32(2), "stddev": np.float32(0)},
             lambda **_: np.full((2, 3), 2.0), **flags),
        Case("random_uniform", {}, {"shape": [2, 3], "low": np.float32(3), "high": np.float32(3)},
             lambda **_: np.full((2, 3), 3.0), **flags),
        Case("random_categorical", {"x": np.array([[0, -200, -300], [-300, -300, 0]], np.float32)}, {"size": 2},
             lambda x, size: np.array([[0, 0], [2, 2]])),
    ]  # fmt: skip
    return [
        *cases,
        *places("scatter", 3, size=4, axis=1),
        *places("scatter_along_axis", 2, 4, 3, 6, size=5, axis=2),
        *places("scatter_nd", 4, 2, size=2),
    ]
