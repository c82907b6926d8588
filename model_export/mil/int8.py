"""Matrix products of 8-bit operands with sums in int32, as VNNI instructions compute them: four times float32's speed.

Weights are int8 with a scale for each output. What goes in is uint8 by its own range, measured at every run, so that
any program runs without a calibration; what an activation gives inside a pair of layers is never written in more than
8 bits where there are many rows: its range is that of a sample of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

AVAILABLE: bool = torch.cpu._is_vnni_supported() and hasattr(torch.ops.onednn, "qlinear_pointwise")
# Of many rows every 17th (a prime: no column of the picture is looked at more than others) decides the range of all;
# what lies a little above it is still held.
_MANY, _SAMPLE, _MARGIN = 2048, 17, 1.1
_ROWS = 4096  # of a weight are rounded at a time
Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Quantized:
    """(data - zero) * scale, with data uint8."""

    data: torch.Tensor
    scale: float
    zero: int

    @classmethod
    def of(cls, x: torch.Tensor) -> Quantized:
        """Quantize with the scale of its own smallest and largest values; zero is always representable."""
        low, high = (float(bound) for bound in x.aminmax())
        scale, zero = span(low, high)
        rounded = torch.quantize_per_tensor(x.float(), scale, zero, torch.quint8)
        # `int_repr` would copy it, on one thread.
        data = torch.empty(0, dtype=torch.uint8).set_(rounded.untyped_storage(), 0, rounded.shape, rounded.stride())
        return cls(data, scale, zero)


def span(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point by which uint8 holds low ... high, and zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, torch.finfo(torch.float32).tiny)
    return scale, round(-low / scale)


class Int8Linear:
    """activation(x @ weight transposed + bias) with 8-bit operands and sums in int32: what VNNI instructions compute,
    four times as fast as float32.

    The weight (O, I) is rounded to int8 with one scale for each output; inputs are uint8, quantized by the caller.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int, result: torch.dtype = torch.bfloat16
    ) -> None:
        """`rows`: of the inputs that it will mostly see. `result`: what it gives without 8 bits."""
        self.result = result
        largest = torch.linalg.vector_norm(weight, float("inf"), dim=1).float()
        self.scales = (largest / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        parts = zip(weight.split(_ROWS), self.scales.split(_ROWS))  # a vocabulary's matrix is not to be held in float32
        rounded = torch.cat([(part / scales[:, None]).round_().to(torch.int8) for part, scales in parts])
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, [rows, weight.shape[1]])
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: Quantized, activation: str = "none", target: tuple[float, int] | None = None) -> torch.Tensor:
        """(rows, O) of type `result`, or uint8 by the scale and zero point `target`."""
        to = (1.0, 0, self.result) if target is None else (*target, torch.uint8)
        weights = (self.packed, self.scales, self.zeros, self.bias)
        return torch.ops.onednn.qlinear_pointwise(x.data, x.scale, x.zero, *weights, *to, activation, [], "none")


def pointwise(layer: Int8Linear) -> Run:
    """A 1 x 1 convolution of (N, C, H, W)."""
    return lambda x: _picture(layer(Quantized.of(_rows(x))), x)


def pair(first: Int8Linear, second: Int8Linear, activation: str) -> Run:
    """Two 1 x 1 convolutions of (N, C, H, W) with an activation between them."""

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = Quantized.of(_rows(x))
        if len(rows.data) < _MANY:
            return _picture(second(Quantized.of(first(rows, activation))), x)
        sample = first(Quantized(rows.data[::_SAMPLE].contiguous(), rows.scale, rows.zero), activation)
        low, high = (float(bound) for bound in sample.aminmax())
        scale, zero = span(low * _MARGIN, high * _MARGIN)
        hidden = first(rows, activation, (scale, zero))
        return _picture(second(Quantized(hidden, scale, zero)), x)

    return run


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) as (N H W, C), the order of memory in channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _picture(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    count, _, height, width = like.shape
    return rows.reshape(count, height, width, -1).permute(0, 3, 1, 2)
