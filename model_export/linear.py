"""The layers of a language model in oneDNN's own layout: what decides its speed in PyTorch on x86."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_export.mil import int8, onednn

ROWS = 256  # for about so many tokens at once the layout is chosen: an image's


class PackedLinear(nn.Module):
    """x (..., I) @ weight (O, I) transposed + bias in bfloat16, packed once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.run = onednn.linear(linear.weight, linear.bias, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class DynamicInt8Linear(nn.Module):
    """The same with 8-bit operands: the weight by output, x by token (each row by its own largest magnitude)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.layer, self.bias = int8.Int8Linear(linear.weight, None, 1), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = (rows.abs().amax(1, keepdim=True).float() / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        data = (rows / scale).round_().add_(128).to(torch.uint8)
        result = self.layer(int8.Quantized(data, 1.0, 128)).mul_(scale)
        return (result if self.bias is None else result.add_(self.bias)).unflatten(0, x.shape[:-1])


def packed(linear: nn.Linear, dtype: str = "bfloat16") -> nn.Module:
    """The layer packed to compute in bfloat16 or int8, if it is in bfloat16 and PyTorch has oneDNN; else itself."""
    if dtype == "int8":
        return DynamicInt8Linear(linear)
    return PackedLinear(linear) if onednn.AVAILABLE and linear.weight.dtype == torch.bfloat16 else linear
