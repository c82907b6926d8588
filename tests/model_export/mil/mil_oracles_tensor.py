"""NumPy oracles of the operations that move, select and count elements, written from coremltools' documentation."""

import itertools
from typing import Any

import numpy as np

SCATTERS: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
}  # fmt: skip


def _apply(target: np.ndarray, where: Any, update: Any, mode: str) -> None:
    """target[where] changed by one update."""
    if mode == "update":
        target[where] = update
    elif mode == "div":
        with np.errstate(divide="ignore"):
            quotient = target[where] / update
        target[where] = np.trunc(quotient) if target.dtype.kind == "i" else quotient
    else:
        with np.errstate(over="ignore"):
            target[where] = SCATTERS[mode](target[where], update)


def np_scatter(
    data: np.ndarray, indices: np.ndarray, updates: np.ndarray, axis: int = 0, mode: str = "add", **_: Any
) -> np.ndarray:
    result = data.copy()
    turned, values = np.moveaxis(result, axis, 0), np.moveaxis(updates, axis, 0)
    for place, index in enumerate(indices):
        _apply(turned, index, values[place], mode)
    return result


def np_scatter_along_axis(
    data: np.ndarray, indices: np.ndarray, updates: np.ndarray, axis: int = 0, mode: str = "add", **_: Any
) -> np.ndarray:
    result = data.copy()
    for place in np.ndindex(indices.shape):
        where = list(place)
        where[axis] = indices[place]
        _apply(result, tuple(where), updates[place], mode)
    return result


def np_scatter_nd(data: np.ndarray, indices: np.ndarray, updates: np.ndarray, mode: str = "add", **_: Any) -> Any:
    result = data.copy()
    for place in np.ndindex(indices.shape[:-1]):
        _apply(result, tuple(indices[place]), updates[place], mode)
    return result


def np_gather(x: np.ndarray, indices: np.ndarray, axis: int = 0, batch_dims: int = 0, **_: Any) -> np.ndarray:
    if not batch_dims:
        return np.take(x, indices, axis)
    parts = [np_gather(a, b, axis % x.ndim - 1, batch_dims - 1) for a, b in zip(x, indices, strict=True)]
    return np.stack(parts)


def np_gather_nd(x: np.ndarray, indices: np.ndarray, batch_dims: int = 0, **_: Any) -> np.ndarray:
    outer, inner = indices.shape[:-1], x.shape[batch_dims + indices.shape[-1] :]
    result = np.zeros((*outer, *inner), x.dtype)
    for place in np.ndindex(outer):
        result[place] = x[(*place[:batch_dims], *indices[place])]
    return result


def np_depth_to_space(x: np.ndarray, block_size: int) -> np.ndarray:
    (n, c, h, w), b = x.shape, block_size
    result = np.zeros((n, c // b**2, h * b, w * b), x.dtype)
    for channel, row, column in np.ndindex(c // b**2, h * b, w * b):
        source = (row % b * b + column % b) * (c // b**2) + channel
        result[:, channel, row, column] = x[:, source, row // b, column // b]
    return result


def np_space_to_depth(x: np.ndarray, block_size: int) -> np.ndarray:
    (n, c, h, w), b = x.shape, block_size
    result = np.zeros((n, c * b**2, h // b, w // b), x.dtype)
    for channel, row, column in np.ndindex(c, h, w):
        result[:, (row % b * b + column % b) * c + channel, row // b, column // b] = x[:, channel, row, column]
    return result


def np_space_to_batch(x: np.ndarray, block_shape: Any, paddings: Any) -> np.ndarray:
    x = np.pad(x, [(0, 0), (0, 0), *map(tuple, paddings)])
    rows, columns = block_shape
    return np.concatenate([x[:, :, a::rows, b::columns] for a, b in itertools.product(range(rows), range(columns))])


def np_batch_to_space(x: np.ndarray, block_shape: Any, crops: Any) -> np.ndarray:
    rows, columns = block_shape
    n, c, h, w = x.shape
    whole = np.zeros((n // (rows * columns), c, h * rows, w * columns), x.dtype)
    parts = np.split(x, rows * columns)
    for part, (a, b) in zip(parts, itertools.product(range(rows), range(columns)), strict=True):
        whole[:, :, a::rows, b::columns] = part
    (top, bottom), (left, right) = crops
    return whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]


def np_reverse_sequence(x: np.ndarray, lengths: np.ndarray, seq_axis: int = 0, batch_axis: int = 0) -> np.ndarray:
    result = x.copy()
    for place, length in enumerate(lengths):
        where: list[Any] = [slice(None)] * x.ndim
        where[batch_axis], where[seq_axis] = slice(place, place + 1), slice(0, length)
        result[tuple(where)] = np.flip(x[tuple(where)], seq_axis)
    return result


def np_sliding_windows(x: np.ndarray, axis: int, size: int, stride: int = 1) -> np.ndarray:
    axis %= x.ndim
    windows = [np.take(x, range(a, a + size), axis) for a in range(0, x.shape[axis] - size + 1, stride)]
    return np.stack(windows, axis)


def np_one_hot(
    indices: np.ndarray, one_hot_vector_size: int, axis: int = -1, on_value: Any = 1, off_value: Any = 0
) -> np.ndarray:
    result = np.full((*indices.shape, int(one_hot_vector_size)), off_value)
    for place in np.ndindex(indices.shape):
        if 0 <= indices[place] < one_hot_vector_size:
            result[(*place, indices[place])] = on_value
    return np.moveaxis(result, -1, axis).astype(getattr(on_value, "dtype", np.int32))


def np_band_part(x: np.ndarray, lower: int = -1, upper: int = -1) -> np.ndarray:
    m, n = np.indices(x.shape[-2:])
    band = ((lower < 0) | (m - n <= lower)) & ((upper < 0) | (n - m <= upper))
    return np.where(band, x, np.zeros((), x.dtype))


def np_interleaved(x: np.ndarray, y: np.ndarray, axis: int, **_: Any) -> np.ndarray:
    axis %= x.ndim
    result = np.zeros([2 * size if place == axis else size for place, size in enumerate(x.shape)], x.dtype)
    for first, part in enumerate((x, y)):
        result[(*[slice(None)] * axis, slice(first, None, 2))] = part
    return result


def np_quantize(
    input: np.ndarray, scale: Any, output_dtype: str, zero_point: Any = 0, axis: int | None = None
) -> np.ndarray:
    shape = [1] * input.ndim
    if axis is not None:
        shape[axis] = -1
        scale, zero_point = (np.reshape(v, shape) if np.ndim(v) else v for v in (scale, zero_point))
    limits = np.iinfo(output_dtype)
    quotient = np.round(np.float64(input) / np.float64(scale)) + np.float64(zero_point)
    return np.clip(quotient, limits.min, limits.max).astype(output_dtype)


def np_dequantize(input: np.ndarray, scale: Any, zero_point: Any = 0, axis: int | None = None) -> np.ndarray:
    shape = [1] * input.ndim
    dtype = np.asarray(scale).dtype
    if axis is not None:
        shape[axis] = -1
        scale, zero_point = (np.reshape(v, shape) if np.ndim(v) else v for v in (scale, zero_point))
    return (np.float64(scale) * (np.float64(input) - np.float64(zero_point))).astype(dtype)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = [
        min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2) for i in (0, 1)
    ]
    shared = max(0, sides[0]) * max(0, sides[1])
    union = a[2] * a[3] + b[2] * b[3] - shared
    return shared / union if union > 0 else 0.0


def np_nms(
    boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, max_boxes: int, score_threshold: float = -np.inf,
    per_class_suppression: bool = False,
) -> list[np.ndarray]:  # fmt: skip
    """Boxes (n, count, 4): each one, best first, against those that have stayed."""
    n, count, classes = scores.shape
    result = [np.zeros((n, max_boxes, 4), boxes.dtype), np.zeros((n, max_boxes, classes), scores.dtype),
              np.full((n, max_boxes), -1, np.int32), np.zeros(n, np.int32)]  # fmt: skip
    for item in range(n):
        best, kind = scores[item].max(1), scores[item].argmax(1)
        kept: list[int] = []
        for box in sorted(range(count), key=lambda box: -best[box]):
            rivals = [k for k in kept if kind[k] == kind[box] or not per_class_suppression]
            if best[box] >= score_threshold and all(
                _iou(boxes[item, k], boxes[item, box]) <= iou_threshold for k in rivals
            ):
                kept.append(box)
        kept = (kept or [int(best.argmax())])[:max_boxes]
        result[0][item, : len(kept)] = boxes[item, kept]
        result[1][item, : len(kept)] = scores[item, kept]
        result[2][item, : len(kept)], result[3][item] = kept, len(kept)
    return result
