"""NumPy oracles of resizing, cropping, resampling and suppression: coremltools' docstrings, point by point."""

import itertools
from typing import Any

import numpy as np


def points(mode: str, size: float, count: int) -> list[float]:
    """The docstring of resize_bilinear, number by number."""
    grid = []
    for i in range(count):
        if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
            point = i * (size - 1) / (count - 1) if count > 1 else 0.0
            point = (size - 1) / 2 if mode == "ALIGN_CORNERS" and count == 1 else point
        elif mode == "DEFAULT":
            point = i * (size - size / count) / (count - 1) if count > 1 else 0.0
        elif mode == "OFFSET_CORNERS":
            point = (0.5 + i) * max(1, size - 1) / count  # in one product, whose ties are exact
        else:
            assert mode == "UNALIGN_CORNERS"
            point = (i + 0.5) * size / count - 0.5
        grid.append(min(max(size - 1, 0), max(min(0, size - 1), point)))
    return grid


def interpolated(plane: np.ndarray, row: float, column: float, outside: float | None = None) -> float:
    """A picture (H, W) between its pixels; those that it doesn't have are `outside`."""
    total = 0.0
    top, left = int(np.floor(row)), int(np.floor(column))
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        share = (1 - abs(row - i)) * (1 - abs(column - j))
        inside = 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]
        if share:
            assert inside or outside is not None
            total += share * (float(plane[i, j]) if inside else float(outside or 0))
    return total


def linear(x: np.ndarray, rows: list[float], columns: list[float]) -> np.ndarray:
    planes = x.reshape(-1, *x.shape[-2:])
    result = [[[interpolated(plane, r, c) for c in columns] for r in rows] for plane in planes]
    return np.array(result).reshape(*x.shape[:-2], len(rows), len(columns))


def np_resize(x: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    return linear(x, points(mode, x.shape[-2], height), points(mode, x.shape[-1], width))


def np_resize_bilinear(
    x: np.ndarray, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> np.ndarray:
    return np_resize(x, target_size_height, target_size_width, sampling_mode)


def np_upsample(
    x: np.ndarray, scale_factor_height: float = 1, scale_factor_width: float = 1, align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> np.ndarray:  # fmt: skip
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = {(True, False): "STRICT_ALIGN_CORNERS", (False, True): "UNALIGN_CORNERS", (False, False): "DEFAULT"}
    sizes = [int(np.floor(size * s)) for size, s in zip(x.shape[-2:], (scale_factor_height, scale_factor_width))]
    return np_resize(x, *sizes, mode[align_corners, half])


def np_nearest(x: np.ndarray, sizes: Any, centre: bool) -> np.ndarray:
    """TensorFlow's ResizeNearestNeighbor with half_pixel_centers or without."""
    for axis, count in enumerate(sizes, start=x.ndim - len(sizes)):
        places = [(2 * i + centre) * x.shape[axis] // (2 * count) for i in range(count)]
        x = np.take(x, places, axis)
    return x


def np_resize_ios17(
    x: np.ndarray, shape: Any, resized_dims: int, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> np.ndarray:
    count = int(resized_dims)
    sizes = [own if size == 0 else int(size) for own, size in zip(x.shape[x.ndim - count :], shape[-count:])]
    if interpolation_mode == "LINEAR":
        # Of other numbers of dimensions than two: one after the other, each as a picture's columns.
        for axis, size in enumerate(sizes, start=x.ndim - count):
            moved = np.moveaxis(x, axis, -1)
            moved = np_resize(moved[..., None, :], 1, size, sampling_mode)[..., 0, :]
            x = np.moveaxis(moved, -1, axis)
        return x
    if sampling_mode == "DEFAULT":
        return np_nearest(x, sizes, centre=True)
    for axis, size in enumerate(sizes, start=x.ndim - count):
        places = [int(np.floor(point + 0.5)) for point in points(sampling_mode, x.shape[axis], size)]
        x = np.take(x, places, axis)
    return x


def np_crop_resize(
    x: np.ndarray, boxes: Any, box_indices: Any = None, target_height: int = 1, target_width: int = 1,
    normalized_coordinates: bool = False, spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST", sampling_mode: str = "DEFAULT", pad_value: float = 0.0,
) -> np.ndarray:  # fmt: skip
    (_, channels, height, width), result = x.shape, []
    for n, box in enumerate(np.asarray(boxes, np.float64) * spatial_scale):
        a, b, c, d = box if box_coordinate_mode.endswith("HEIGHT_FIRST") else box[[1, 0, 3, 2]]
        if box_coordinate_mode.startswith("CENTER"):
            a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
        if normalized_coordinates:
            a, b, c, d = a * (height - 1), b * (width - 1), c * (height - 1), d * (width - 1)
        rows = [a + point for point in points(sampling_mode, c - a + 1, target_height)]
        columns = [b + point for point in points(sampling_mode, d - b + 1, target_width)]
        crop = np.full((channels, target_height, target_width), float(pad_value))
        image = x[n if box_indices is None else int(box_indices[n])]
        for (i, r), (j, s) in itertools.product(enumerate(rows), enumerate(columns)):
            if 0 <= r <= height - 1 and 0 <= s <= width - 1:
                crop[:, i, j] = [interpolated(plane, r, s) for plane in image]
        result.append(crop)
    return np.stack(result)


def np_crop_resize_roi(x: np.ndarray, roi: np.ndarray, **parameters: Any) -> np.ndarray:
    if roi.shape[2] == 5:
        boxes = roi.reshape(-1, 5)
        return np_crop_resize(x, boxes[:, 1:], boxes[:, 0], **parameters)[:, None]
    crops = [np_crop_resize(x, [box] * len(x), **parameters) for box in roi.reshape(-1, 4)]
    return np.stack(crops)


def folded(place: float, first: float, last: float) -> float:
    while last > first and not first <= place <= last:
        place = 2 * first - place if place < first else 2 * last - place
    return min(max(place, first), last)


def np_resample(
    x: np.ndarray, coordinates: np.ndarray, sampling_mode: str, padding_mode: str, padding_value: float,
    coordinates_mode: str, align_corners: bool,
) -> np.ndarray:  # fmt: skip
    def pixel(value: float, size: int) -> float:
        if coordinates_mode == "normalized_minus_one_to_one":
            value = (value + 1) / 2
        if coordinates_mode != "unnormalized":
            value = value * (size - 1) if align_corners else value * size - 0.5
        if padding_mode == "reflection":
            value = folded(value, 0, size - 1)
        if padding_mode == "symmetric":
            value = folded(value, -0.5, size - 0.5)
        return value if padding_mode == "constant" else min(max(value, 0), size - 1)

    result = np.zeros((*x.shape[:2], *coordinates.shape[1:3]))
    for b, i, j in np.ndindex(*coordinates.shape[:3]):
        column, row = (pixel(float(v), size) for v, size in zip(coordinates[b, i, j], (x.shape[3], x.shape[2])))
        if sampling_mode == "nearest":
            row, column = np.round(row), np.round(column)
        result[b, :, i, j] = [interpolated(plane, row, column, padding_value) for plane in x[b]]
    return result


def np_affine(
    x: np.ndarray, transform_matrix: np.ndarray, output_height: int, output_width: int, align_corners: bool, **_: Any
) -> np.ndarray:
    def place(i: int, count: int) -> float:
        return -1 + 2 * i / (count - 1) if align_corners else (2 * i + 1) / count - 1

    matrices = np.broadcast_to(transform_matrix, (len(x), 6)).reshape(-1, 2, 3).astype(np.float64)
    coordinates = np.zeros((len(x), output_height, output_width, 2))
    for b, i, j in np.ndindex(*coordinates.shape[:3]):
        coordinates[b, i, j] = matrices[b] @ [place(j, output_width), place(i, output_height), 1]
    return np_resample(x, coordinates, "bilinear", "constant", 0, "normalized_minus_one_to_one", align_corners)


def np_nms(
    boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, max_boxes: int, score_threshold: float = -np.inf,
    per_class_suppression: bool = False,
) -> list[np.ndarray]:  # fmt: skip
    """boxes (n, B, 4), scores (n, B, K): a box stays unless one that stayed before it covers too much of both."""

    def ratio(a: np.ndarray, b: np.ndarray) -> float:
        sides = [min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2)
                 for i in (0, 1)]  # fmt: skip
        shared = max(sides[0], 0) * max(sides[1], 0)
        union = a[2] * a[3] + b[2] * b[3] - shared
        return shared / union if union > 0 else 0.0

    (n, _, k), wide = scores.shape, boxes.astype(np.float64)
    chosen, theirs = np.zeros((n, max_boxes, 4), boxes.dtype), np.zeros((n, max_boxes, k), scores.dtype)
    indices, counts = np.full((n, max_boxes), -1, np.int32), np.zeros(n, np.int32)
    for b in range(n):
        best, kind = scores[b].max(-1), scores[b].argmax(-1)
        order = sorted(range(len(best)), key=lambda i: -best[i])
        kept: list[int] = []
        for i in order:
            rivals = [j for j in kept if not per_class_suppression or kind[i] == kind[j]]
            if best[i] >= score_threshold and all(ratio(wide[b, i], wide[b, j]) <= iou_threshold for j in rivals):
                kept.append(i)
        kept = (kept or order[:1])[:max_boxes]
        counts[b] = count = len(kept)
        chosen[b, :count], theirs[b, :count], indices[b, :count] = boxes[b, kept], scores[b, kept], kept
    return [chosen, theirs, indices, counts]


def np_nms_ios17(boxes: np.ndarray, scores: np.ndarray, **parameters: Any) -> list[np.ndarray]:
    chosen, theirs, indices, _ = np_nms(boxes.swapaxes(1, 2), scores.swapaxes(1, 2), **parameters)
    return [chosen.swapaxes(1, 2), theirs.swapaxes(1, 2), indices]
