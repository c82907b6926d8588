"""The layers of a language model in oneDNN's own layout: what decides its speed in PyTorch on x86."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_export.mil import onednn

ROWS = 256  # for about so many tokens at once the layout is chosen: an image's


class PackedLinear(nn.Module):
    """x (..., I) @ weight (O, I) transposed + bias in bfloat16, packed once.

    Transformers asks for the last position's logits with a view of all positions, for which PyTorch's matmul copies
    the vocabulary's matrix at every prefill (272 MB in the 0.5B model): rows in two dimensions don't.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.run = onednn.linear(linear.weight, linear.bias, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def packed(linear: nn.Linear) -> nn.Module:
    """The layer packed, if it is in bfloat16 and PyTorch has oneDNN; else itself."""
    return PackedLinear(linear) if onednn.AVAILABLE and linear.weight.dtype == torch.bfloat16 else linear
