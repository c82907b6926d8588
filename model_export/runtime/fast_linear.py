"""The layers of a language model in the layout and the arithmetic that are the fastest on this machine."""

import torch
from torch import Tensor, nn

from model_export.mil import int8, onednn

ROWS = 256  # for about so many tokens at once the layout is chosen: an image's
_FEW = 4  # rows up to which reading the weight takes longer than computing
_OUTPUTS = 512  # whose weights are made float32 at a time: these stay in a cache


class PackedLinear(nn.Module):
    """x (..., I) @ weight (O, I) transposed + bias in float32 or bfloat16, packed once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.run = onednn.linear(linear.weight, linear.bias, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class SplitLinear(nn.Module):
    """The same of float32, with a weight that is held once, in bfloat16: a prompt is multiplied in float32, a few
    outputs at a time, and a single token in bfloat16, which reads half as much."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # No parameters: what `like` the model is shall be told by what it is given.
        self.weight, self.bias = linear.weight.data, None if linear.bias is None else linear.bias.data

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= _FEW:
            result = nn.functional.linear(rows.bfloat16(), self.weight).float()
        else:
            result = torch.cat([nn.functional.linear(rows, part.float()) for part in self.weight.split(_OUTPUTS)], 1)
        return (result if self.bias is None else result + self.bias).unflatten(0, x.shape[:-1])


class DynamicInt8Linear(nn.Module):
    """The same with 8-bit operands: the weight by output, x by token (each row by its own largest magnitude)."""

    def __init__(self, linear: nn.Linear, result: torch.dtype) -> None:
        super().__init__()
        self.layer, self.bias = int8.Int8Linear(linear.weight, None, 1, result), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = (rows.abs().amax(1, keepdim=True).float() / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        data = (rows / scale).round_().add_(128).to(torch.uint8)
        result = self.layer(int8.Quantized(data, 1.0, 128)).mul_(scale)
        return (result if self.bias is None else result.add_(self.bias)).unflatten(0, x.shape[:-1])


def fast(linear: nn.Linear, prefill: str, eight_bits: bool = False) -> nn.Module:
    """The layer for speed: its weight has the dtype in which single tokens are computed, `prefill` is what it is given
    and gives ("float32" or "bfloat16"), and what a prompt is computed in."""
    given = getattr(torch, prefill)
    if eight_bits:
        return DynamicInt8Linear(linear, given)
    if linear.weight.dtype != given:
        return SplitLinear(linear)
    return PackedLinear(linear) if onednn.packs(given) else linear
