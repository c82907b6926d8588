"""Cases of resizing, cropping, resampling and suppression."""

import itertools
from typing import Any

import numpy as np
from mil_case import Case, uniform
from mil_oracles_images import (
    np_affine,
    np_crop_resize,
    np_crop_resize_roi,
    np_nearest,
    np_nms,
    np_nms_ios17,
    np_resample,
    np_resize_bilinear,
    np_resize_ios17,
    np_upsample,
)

MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")
SMALL = uniform(2, 2, 3, 4)
F32 = np.float32


def resized() -> list[Case]:
    scales: list[tuple[float, float]] = [(2, 3), (2.5, 1.0), (0.67, 1.12), (3.17, 0.7)]
    cases = []
    for height, width in scales:
        factors = {"scale_factor_height": height, "scale_factor_width": width}
        sizes = [int(np.floor(3 * height)), int(np.floor(4 * width))]
        cases.append(
            Case(
                "upsample_nearest_neighbor", {"x": SMALL}, factors,
                lambda x, sizes=sizes, **_: np_nearest(x, sizes, centre=False), "iOS15",
            )
        )  # fmt: skip
        cases += [
            Case("upsample_bilinear", {"x": SMALL}, factors | {"align_corners": corners}, np_upsample, "iOS15")
            for corners in (True, False)
        ]
        cases += [
            Case(
                "upsample_bilinear", {"x": SMALL}, factors | {"align_corners": a, "half_pixel_centers": b}, np_upsample
            )
            for a, b in ((False, False), (False, True), (True, False))
        ]
    for mode, (height, width) in itertools.product(MODES, ((1, 1), (1, 5), (6, 2), (3, 4))):
        size = {"target_size_height": height, "target_size_width": width, "sampling_mode": mode}
        cases.append(Case("resize_bilinear", {"x": SMALL}, size, np_resize_bilinear, "iOS15"))
    cases += [Case("resize_bilinear", {"x": uniform(2, 3, 3)}, {}, np_resize_bilinear)]
    for height, width in ((2, 3), (5, 8), (1, 1)):
        size = {"target_size_height": height, "target_size_width": width}
        oracle = lambda x, target_size_height, target_size_width: np_nearest(  # noqa: E731
            x, [target_size_height, target_size_width], centre=True
        )
        cases.append(Case("resize_nearest_neighbor", {"x": SMALL}, size, oracle, "iOS15"))
    ints = np.arange(12, dtype=np.int32).reshape(1, 3, 4)
    shapes: list[tuple[list[int], int]] = [([5, 6], 2), ([9, 9, 0, 7], 2), ([2, 4, 0], 3), ([6], 1), ([7], 0)]
    for (shape, count), kind in itertools.product(shapes, ("LINEAR", "NEAREST_NEIGHBOR")):
        for mode in MODES if count == 2 else ("DEFAULT", "UNALIGN_CORNERS"):
            more = {"resized_dims": np.uint32(count), "interpolation_mode": kind, "sampling_mode": mode}
            if count:
                cases.append(Case("resize", {"x": SMALL}, {"shape": shape} | more, np_resize_ios17))
            else:
                cases.append(Case("resize", {"x": SMALL}, {"shape": shape} | more, lambda x, **_: x))
    nearest = {"resized_dims": np.uint32(2), "interpolation_mode": "NEAREST_NEIGHBOR"}
    cases += [Case("resize", {"x": ints}, {"shape": [5, 7]} | nearest, np_resize_ios17, half=False)]
    cases += [Case("resize", {"x": ints, "shape": np.array([5, 0], np.int32)}, nearest, np_resize_ios17, half=False)]
    runtime = {"x": SMALL, "shape": np.array([1, 0, 7], np.int32)}
    cases += [Case("resize", runtime, {"resized_dims": np.uint32(2), "sampling_mode": mode}, np_resize_ios17)
              for mode in ("DEFAULT", "UNALIGN_CORNERS")]  # fmt: skip
    crop = {"crop_height": [1, 0], "crop_width": [1, 2]}
    return [*cases, Case("crop", {"x": SMALL}, crop, lambda x, **_: x[..., 1:, 1:2], "iOS15")]


def cropped() -> list[Case]:
    x = uniform(3, 2, 5, 4)
    corners = np.array([[1, 1, 2, 2], [0.25, 0.5, 4, 3], [3.5, 2, 1, 0.5], [-1, 2, 3, 5], [2, 2, 2, 2]], F32)
    centres = np.array([[2, 1.5, 2, 1], [1, 1, 4, 3], [2, 2, 0, 0]], F32)
    cases = []
    for mode in MODES:
        for height, width in ((2, 3), (1, 1)):
            size = {"target_height": height, "target_width": width, "sampling_mode": mode}
            indices = {"box_indices": np.array([0, 2, 1, 2, 0], np.int32)}
            cases.append(
                Case("crop_resize", {"x": x, "boxes": corners}, size | indices | {"pad_value": F32(9)}, np_crop_resize)
            )
            roi = corners.reshape(-1, 1, 4, 1, 1)
            cases.append(Case("crop_resize", {"x": x, "roi": roi}, size, np_crop_resize_roi, "iOS15"))
    for kind in ("CORNERS_WIDTH_FIRST", "CENTER_SIZE_HEIGHT_FIRST", "CENTER_SIZE_WIDTH_FIRST"):
        size = {"target_height": 3, "target_width": 2, "box_coordinate_mode": kind, "sampling_mode": "ALIGN_CORNERS"}
        scaled = {"spatial_scale": 0.5}
        cases.append(Case("crop_resize", {"x": x, "boxes": centres}, size | scaled, np_crop_resize))
    normalized = {"normalized_coordinates": True, "target_height": 2, "target_width": 2}
    boxes = np.array([[0, 0.25, 1, 0.75], [0.5, 0.5, 1.5, 1], [0.75, 0.25, 0.25, 1]], F32)
    cases.append(Case("crop_resize", {"x": x, "boxes": boxes}, normalized, np_crop_resize))
    whole = {"boxes": np.array([[1, 0, 3, 3]], np.uint16), "box_indices": np.array([1], np.uint16)}
    cases.append(Case("crop_resize", {"x": x}, whole | {"target_height": 4, "target_width": 3}, np_crop_resize))
    # One picture: coremltools declares the second size as the number of pictures.
    roi = np.concatenate([np.zeros((3, 1), F32), boxes], 1).reshape(3, 1, 5, 1, 1)
    padded = normalized | {"pad_value": F32(10), "sampling_mode": "ALIGN_CORNERS"}
    return [*cases, Case("crop_resize", {"x": x[:1].copy()}, padded | {"roi": roi}, np_crop_resize_roi, "iOS16")]


def resampled() -> list[Case]:
    x = uniform(2, 2, 3, 4)
    grids = {
        "unnormalized": uniform(2, 2, 3, 2, low=-2, high=5),
        "normalized_minus_one_to_one": uniform(2, 2, 3, 2, low=-2.5, high=2.5),
        "normalized_zero_to_one": uniform(2, 2, 3, 2, low=-1.5, high=2.5),
    }
    cases = []
    for kind, sampling, padding, corners in itertools.product(
        grids, ("bilinear", "nearest"), ("constant", "border", "reflection", "symmetric"), (True, False)
    ):
        parameters = {"sampling_mode": sampling, "padding_mode": padding, "coordinates_mode": kind,
                      "align_corners": corners, "padding_value": F32(0.5)}  # fmt: skip
        cases.append(Case("resample", {"x": x, "coordinates": grids[kind]}, parameters, np_resample))
    zero = {"padding_mode": "constant", "padding_value": F32(0), "coordinates_mode": "normalized_minus_one_to_one"}
    cases += [
        Case("resample", {"x": x, "coordinates": grids[zero["coordinates_mode"]]},  # type: ignore[index]
             zero | {"sampling_mode": sampling, "align_corners": corners}, np_resample)
        for sampling, corners in itertools.product(("bilinear", "nearest"), (True, False))
    ]  # fmt: skip
    whole = {"sampling_mode": "bilinear", "padding_mode": "border", "padding_value": F32(0), "align_corners": True}
    places = np.array([[0, 0], [3, 2], [-1, 5], [2, 1]], np.int32).reshape(1, 2, 2, 2)
    integral = {"x": x[:1].copy(), "coordinates": places}
    cases.append(Case("resample", integral, whole | {"coordinates_mode": "unnormalized"}, np_resample, "iOS15"))
    fixed = {"sampling_mode": "bilinear", "padding_mode": "constant", "padding_value": F32(0),
             "coordinates_mode": "normalized_minus_one_to_one"}  # fmt: skip
    for corners, count in itertools.product((True, False), (1, 2)):
        matrix = uniform(count, 6, low=-1, high=1, seed=count)
        size = {"output_height": 3, "output_width": 5, "align_corners": corners}
        cases.append(Case("affine", {"x": x, "transform_matrix": matrix}, fixed | size, np_affine, "iOS15"))
    return cases


def suppressed() -> list[Case]:
    boxes = np.concatenate([uniform(2, 9, 2, low=0, high=6), uniform(2, 9, 2, low=1, high=5, seed=1)], -1)
    boxes[0, 3] = boxes[0, 5]  # the same box twice
    boxes[1, 2, 2:] = 0  # no area
    scores = uniform(2, 9, 3, seed=2)
    scores[0, 1] = scores[0, 4]  # a tie
    settings: list[dict[str, Any]] = [
        {"iou_threshold": F32(0.25), "max_boxes": 4},
        {"iou_threshold": F32(0.5), "max_boxes": 12, "per_class_suppression": True},
        {"iou_threshold": F32(0), "max_boxes": 3},
        {"iou_threshold": F32(0.99), "max_boxes": 9},
    ]
    cases = []
    for setting in settings:
        turned = {"boxes": boxes.swapaxes(1, 2).copy(), "scores": scores.swapaxes(1, 2).copy()}
        cases.append(Case("non_maximum_suppression", turned, setting, np_nms_ios17))
        cases += [
            Case("non_maximum_suppression", {"boxes": boxes, "scores": scores},
                 setting | {"score_threshold": F32(least)}, np_nms, "iOS15")
            for least in (-5, 1.5, 5)
        ]  # fmt: skip
    return cases


def images() -> list[Case]:
    return [*resized(), *cropped(), *resampled(), *suppressed()]
