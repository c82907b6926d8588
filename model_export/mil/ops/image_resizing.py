"""Resizing, cropping and resampling of the last two dimensions. Semantics: coremltools defs `image_resizing.py`."""

from collections.abc import Callable

import torch

from ..registry import Kernel, Node, Unsupported, mil_op
from . import _sampling

# -- to a size or by a factor ----------------------------------------------------------------------------------------


def _to_size(node: Node, sizes: list[int], mode: str, linear: bool) -> Kernel:
    node.expects(*node.type_of("x").shape[:-2], *sizes)
    return node.kernel(lambda x: _sampling.resized(x, sizes, mode, linear), "x", exact=not linear)


def _by_scale(node: Node, mode: str, linear: bool) -> Kernel:
    """The output size is floor(size * scale), and the distance between the points is the quotient of the sizes."""
    scales = [node.const("scale_factor_height", 1), node.const("scale_factor_width", 1)]

    def scaled(size: int, scale: float) -> int:
        return int(torch.tensor(scale, dtype=torch.float32).mul(size).floor())

    def declared(size: int | None, scale: float, given: int | None) -> int | None:
        if size is None:
            return None
        # Whether the product was rounded to float32 depends on the version of NumPy that coremltools ran with.
        return given if given == int(scale * size // 1) else scaled(size, scale)

    promised = (None, None) if node.type.variadic else node.type.shape[-2:]
    sizes = [declared(*item) for item in zip(node.type_of("x").shape[-2:], scales, promised)]
    node.expects(*node.type_of("x").shape[:-2], *sizes)

    def run(x: torch.Tensor) -> torch.Tensor:
        known = [scaled(x.shape[i - 2], scales[i]) if size is None else size for i, size in enumerate(sizes)]
        return _sampling.resized(x, known, mode, linear)

    return node.kernel(run, "x", exact=not linear)


@mil_op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(node: Node) -> Kernel:
    """Pixel i takes the input's i X / N, rounded down."""
    return _by_scale(node, _sampling.NEAREST_CORNER, linear=False)


@mil_op("upsample_bilinear")
def upsample_bilinear(node: Node) -> Kernel:
    corners = node.const("align_corners", True)
    return _by_scale(node, "STRICT_ALIGN_CORNERS" if corners else "UNALIGN_CORNERS", linear=True)


@mil_op("upsample_bilinear", since="CoreML6")
def upsample_bilinear_ios16(node: Node) -> Kernel:
    """Without half-pixel centres and aligned corners the points are multiples of X / N."""
    corners = node.const("align_corners", True)
    centres = node.const("half_pixel_centers", not corners)
    if corners and centres:
        raise Unsupported("align_corners with half_pixel_centers")
    mode = "STRICT_ALIGN_CORNERS" if corners else "UNALIGN_CORNERS" if centres else "DEFAULT"
    return _by_scale(node, mode, linear=True)


@mil_op("resize_nearest_neighbor")
def resize_nearest_neighbor(node: Node) -> Kernel:
    """By the pixels' centres: coremltools maps TensorFlow's operation with half_pixel_centers to it."""
    sizes = [node.const("target_size_height"), node.const("target_size_width")]
    return _to_size(node, sizes, _sampling.NEAREST_CENTRE, linear=False)


@mil_op("resize_bilinear")
def resize_bilinear(node: Node) -> Kernel:
    sizes = [node.const("target_size_height", 1), node.const("target_size_width", 1)]
    return _to_size(node, sizes, _sampling.checked(node.const("sampling_mode", "DEFAULT")), linear=True)


@mil_op("resize", since="CoreML7")
def resize(node: Node) -> Kernel:
    """The last `resized_dims` sizes are the last ones of `shape`, 0 being the input's own."""
    count, mode = node.const("resized_dims"), _sampling.checked(node.const("sampling_mode", "DEFAULT"))
    interpolation = node.const("interpolation_mode", "LINEAR")
    if interpolation not in ("LINEAR", "NEAREST_NEIGHBOR"):
        raise Unsupported(f"interpolation_mode {interpolation!r}")
    linear = interpolation == "LINEAR"
    type, (given,) = node.type_of("x"), node.type_of("shape").shape
    if linear and type.dtype == "int32":
        raise Unsupported("LINEAR of int32: how it is rounded is not specified")
    if not linear and mode == "DEFAULT":
        mode = _sampling.NEAREST_CENTRE  # it is what resize_nearest_neighbor does
    if count > (count if given is None else given) or max(count, given or 0) > len(type.shape):
        raise Unsupported(f"resized_dims {count} of a shape of {given} numbers for {type}")
    if count == 0:
        return node.kernel(lambda x, shape: x, "x", "shape", exact=True, view=True)

    old = type.shape[len(type.shape) - count :]
    known = node.raw("shape")
    sizes = known.tolist()[-count:] if isinstance(known, torch.Tensor) else [None] * count
    node.expects(*type.shape[: len(type.shape) - count], *(a if b == 0 else b for a, b in zip(old, sizes)))

    def run(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        wanted = zip(x.shape[x.ndim - count :], shape.tolist()[-count:])
        return _sampling.resized(x, [own if size == 0 else size for own, size in wanted], mode, linear)

    return node.kernel(run, "x", "shape", exact=not linear)


# -- parts -----------------------------------------------------------------------------------------------------------


@mil_op("crop")
def crop(node: Node) -> Kernel:
    """Without so many rows at the top and at the bottom, columns on the left and on the right."""
    amounts = [node.const("crop_height"), node.const("crop_width")]
    if any(len(pair) != 2 or min(pair) < 0 for pair in amounts):
        raise Unsupported(f"crop_height {amounts[0]}, crop_width {amounts[1]}, expected pairs of numbers from 0")
    sizes = node.type_of("x").shape
    left = [None if size is None else size - sum(pair) for size, pair in zip(sizes[-2:], amounts)]
    node.expects(*sizes[:-2], *left)

    def run(x: torch.Tensor) -> torch.Tensor:
        for axis, (before, after) in zip((-2, -1), amounts):
            x = x.narrow(axis, before, x.shape[axis] - before - after)
        return x

    return node.kernel(run, "x", exact=True, view=True)


_BOXES: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
    # (N, 4) -> start and end of rows, start and end of columns
    "CORNERS_HEIGHT_FIRST": lambda box: (box[:, 0], box[:, 2], box[:, 1], box[:, 3]),
    "CORNERS_WIDTH_FIRST": lambda box: (box[:, 1], box[:, 3], box[:, 0], box[:, 2]),
    "CENTER_SIZE_HEIGHT_FIRST": lambda box: (*_ends(box[:, 0], box[:, 2]), *_ends(box[:, 1], box[:, 3])),
    "CENTER_SIZE_WIDTH_FIRST": lambda box: (*_ends(box[:, 1], box[:, 3]), *_ends(box[:, 0], box[:, 2])),
}


def _ends(centre: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return centre - size / 2, centre + size / 2


def _cropper(node: Node, pad: float) -> Callable[..., torch.Tensor]:
    """A function of x (B, C, H, W), boxes (N, 4) and the image (N) of each that gives (N, C, h, w).

    A box reaches from pixel to pixel, both included, and is sampled as resize_bilinear samples a picture of its size;
    a point outside x is `pad`, not interpolated.
    """
    counts = [node.const("target_height", 1), node.const("target_width", 1)]
    normalized, scale = node.const("normalized_coordinates", False), node.const("spatial_scale", 1.0)
    ends_of = _BOXES.get(kind := node.const("box_coordinate_mode", "CORNERS_HEIGHT_FIRST"))
    mode = _sampling.checked(node.const("sampling_mode", "DEFAULT"))
    if ends_of is None:
        raise Unsupported(f"box_coordinate_mode {kind!r}")

    def axis_of(start: torch.Tensor, end: torch.Tensor, size: int, count: int) -> tuple[torch.Tensor, ...]:
        """Lower and upper pixel, share of the upper one and whether it is inside, of each point: (N, count)."""
        factor = size - 1 if normalized else 1
        start, end = start * factor, end * factor
        points = start.unsqueeze(-1) + _sampling.grid(mode, end - start + 1, count)
        inside = (points >= 0) & (points <= size - 1)
        points = torch.where(inside, points, 0.0)
        low = points.floor()
        return low.to(torch.int64), points.ceil().to(torch.int64), (points - low).to(torch.float32), inside

    def run(x: torch.Tensor, boxes: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        if len(image) and not 0 <= int(image.min()) <= int(image.max()) < len(x):
            raise ValueError(f"an image index of {image.tolist()}, expected 0 to {len(x) - 1}")
        top, bottom, left, right = ends_of(boxes.to(torch.float64) * scale)
        low, high, down, rows = axis_of(top, bottom, x.shape[2], counts[0])
        west, east, across, columns = axis_of(left, right, x.shape[3], counts[1])
        place = image.reshape(-1, 1, 1)

        def row(line: torch.Tensor) -> torch.Tensor:
            a, b = (x[place, :, line.unsqueeze(-1), column.unsqueeze(1)] for column in (west, east))
            return _sampling.between(a, b, across[:, None, :, None])

        result = _sampling.between(row(low), row(high), down[:, :, None, None]).permute(0, 3, 1, 2)
        inside = (rows.unsqueeze(-1) & columns.unsqueeze(1)).unsqueeze(1)
        return torch.where(inside, result, pad).to(x.dtype)

    return run


def _crop_resize(node: Node, pad: float) -> Kernel:
    """roi (N, 1, 4, 1, 1): each box of each image; (N, 1, 5, 1, 1): the first number is the image."""
    cropped = _cropper(node, pad)
    (images, channels, *_), (boxes, _, numbers, *_) = node.type_of("x").shape, node.type_of("roi").shape
    if numbers not in (4, 5):
        raise Unsupported(f"a roi {node.type_of('roi')}, expected 4 or 5 numbers each")
    counts = node.const("target_height", 1), node.const("target_width", 1)
    node.expects(boxes, 1 if numbers == 5 else images, channels, *counts)

    def run(x: torch.Tensor, roi: torch.Tensor) -> torch.Tensor:
        roi = roi.reshape(len(roi), numbers)
        if numbers == 5:
            return cropped(x, roi[:, 1:], roi[:, 0].to(torch.int64)).unsqueeze(1)
        result = cropped(x, roi.repeat_interleave(len(x), 0), torch.arange(len(x)).repeat(len(roi)))
        return result.reshape(len(roi), len(x), *result.shape[1:])

    return node.kernel(run, "x", "roi")


@mil_op("crop_resize")
def crop_resize(node: Node) -> Kernel:
    """Boxes must lie in the picture; beyond it are zeros, iOS 16's default (coremltools' test of one such box at iOS 15
    expects the whole picture instead, of which its definition says nothing)."""
    return _crop_resize(node, 0.0)


@mil_op("crop_resize", since="CoreML6")
def crop_resize_ios16(node: Node) -> Kernel:
    return _crop_resize(node, node.const("pad_value", 0.0))


@mil_op("crop_resize", since="CoreML7")
def crop_resize_ios17(node: Node) -> Kernel:
    """boxes (N, 4), box_indices (N): by default box i is of image i."""
    cropped = _cropper(node, node.const("pad_value", 0.0))
    count = node.type_of("boxes").shape[0]
    node.expects(count, node.type_of("x").shape[1], node.const("target_height", 1), node.const("target_width", 1))

    def run(x: torch.Tensor, boxes: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        return cropped(x, boxes, torch.arange(len(boxes)) if image is None else image.to(torch.int64))

    return node.kernel(run, "x", "boxes", "box_indices")
