"""Pictures at given coordinates. Semantics: coremltools defs `image_resizing.py`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op
from . import _sampling


def _reflected(place: torch.Tensor, first: float, last: float) -> torch.Tensor:
    """Coordinates folded at the ends."""
    span = last - first
    if span <= 0:
        return torch.full_like(place, first)
    distance = (place - first).abs().remainder(2 * span)
    return first + torch.where(distance > span, 2 * span - distance, distance)


_PADDING: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "constant": lambda place, size: place,
    "border": lambda place, size: place.clamp(0, size - 1),
    "reflection": lambda place, size: _reflected(place, 0, size - 1).clamp(0, size - 1),
    "symmetric": lambda place, size: _reflected(place, -0.5, size - 0.5).clamp(0, size - 1),
}
_COORDINATES: dict[tuple[str, bool], Callable[[torch.Tensor, int], torch.Tensor]] = {
    ("unnormalized", True): lambda place, size: place,
    ("unnormalized", False): lambda place, size: place,
    ("normalized_minus_one_to_one", True): lambda place, size: (place + 1) / 2 * (size - 1),
    ("normalized_minus_one_to_one", False): lambda place, size: ((place + 1) * size - 1) / 2,
    ("normalized_zero_to_one", True): lambda place, size: place * (size - 1),
    ("normalized_zero_to_one", False): lambda place, size: place * size - 0.5,
}


@mil_op("resample")
def resample(node: Node) -> Kernel:
    """x (B, C, H, W) at coordinates (B, h, w, 2), each (column, row): (B, C, h, w).

    Of two nearest pixels the even one is taken, as PyTorch does it.
    """
    sampling, padding = node.const("sampling_mode"), node.const("padding_mode")
    value, key = node.const("padding_value"), (node.const("coordinates_mode"), node.const("align_corners"))
    if sampling not in ("bilinear", "nearest") or padding not in _PADDING or key not in _COORDINATES:
        raise Unsupported(f"sampling_mode {sampling!r}, padding_mode {padding!r}, coordinates_mode {key[0]!r}")
    (images, channels, *_), (batch, rows, columns, *_) = node.type_of("x").shape, node.type_of("coordinates").shape
    if None not in (images, batch) and images != batch:
        raise Unsupported(f"coordinates of {batch} pictures for {images}")
    node.expects(images, channels, rows, columns)
    exact = sampling == "nearest"
    folded = "reflection" if key[1] else "symmetric"
    native = {"border": "border", folded: "reflection", **({"constant": "zeros"} if value == 0 else {})}
    if key[0] == "normalized_minus_one_to_one" and padding in native:

        def torchs(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
            result = F.grid_sample(x.to(torch.float32), grid.to(torch.float32), sampling, native[padding], key[1])
            return result.to(x.dtype)

        return node.kernel(torchs, "x", "coordinates", exact=exact)
    to_pixels, fold = _COORDINATES[key], _PADDING[padding]

    def run(x: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        grid = coordinates.to(torch.float64)
        column, row = (fold(to_pixels(grid[..., i], size), size) for i, size in ((0, x.shape[3]), (1, x.shape[2])))
        if exact:
            return _pixels(x, row.round(), column.round(), value)
        left, top = column.floor(), row.floor()
        across, down = ((a - b).to(torch.float32).unsqueeze(1) for a, b in ((column, left), (row, top)))
        above, below = (
            _sampling.between(_pixels(x, line, left, value), _pixels(x, line, left + 1, value), across)
            for line in (top, top + 1)
        )
        return _sampling.between(above, below, down).to(x.dtype)

    return node.kernel(run, "x", "coordinates", exact=exact)


def _pixels(x: torch.Tensor, row: torch.Tensor, column: torch.Tensor, outside: float) -> torch.Tensor:
    """x (B, C, H, W) at whole numbers (B, h, w): (B, C, h, w)."""
    height, width = x.shape[2:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = torch.where(inside, row * width + column, 0.0).to(torch.int64).flatten(1).unsqueeze(1)
    taken = x.flatten(2).gather(2, place.expand(-1, x.shape[1], -1)).unflatten(2, row.shape[1:])
    return torch.where(inside.unsqueeze(1), taken, outside)


@mil_op("affine")
def affine(node: Node) -> Kernel:
    """x (B, C, H, W) at (a0 u + a1 v + a2, b0 u + b1 v + b2) for the output's columns u and rows v, all of them from
    -1 to 1; transform_matrix (B or 1, 6)."""
    given = [node.const(key).lower() for key in ("sampling_mode", "padding_mode", "coordinates_mode")]
    if given != ["bilinear", "constant", "normalized_minus_one_to_one"] or node.const("padding_value") != 0:
        raise Unsupported(f"{', '.join(given)}, expected bilinear, constant (0) and normalized_minus_one_to_one")
    sizes, corners = [node.const("output_height"), node.const("output_width")], node.const("align_corners")
    node.expects(*node.type_of("x").shape[:2], *sizes)

    def run(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        theta = matrix.to(torch.float32).reshape(-1, 2, 3).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, [*x.shape[:2], *sizes], align_corners=corners)
        return F.grid_sample(x.to(torch.float32), grid, "bilinear", "zeros", align_corners=corners).to(x.dtype)

    return node.kernel(run, "x", "transform_matrix")
