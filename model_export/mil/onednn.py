"""oneDNN through PyTorch's own operators, with weights packed once: what decides the executor's speed on x86.

`torch.nn.functional` lets oneDNN choose a kernel for the weight's plain layout at every call; with the weight in the
layout that the kernel asks for, 1x1 convolutions run 2.4 times as fast, and linear layers as much faster than through
MKL on AMD. The operators are the ones that TorchInductor emits under `freezing`; they exist where PyTorch was built
with oneDNN (x86), and the operations in ops/ use torch.nn.functional elsewhere, which gives the same numbers to
rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Multiplications of a linear layer and of a convolution from which they gain; below, a call costs 12 to 20 µs more.
LARGE_LINEAR, LARGE_CONV = 1 << 21, 1 << 20
AVAILABLE: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")


def packs(dtype: torch.dtype) -> bool:
    """Whether the operators take this dtype here: bfloat16 wants at least AVX-512, be it emulated."""
    return AVAILABLE and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def conv2d(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    strides: Sequence[int],
    padding: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    shape: Sequence[int],
) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """A 2-D convolution of (N, C, H, W) inputs of this shape, in float32 or bfloat16, and an activation ("none",
    "relu", "gelu") on the sums before they are rounded; the result is in channels-last memory."""
    if groups > len(weight) // groups > 1 == weight.shape[1]:
        return _interleaved(weight, bias, (strides, padding, dilations, groups, shape))
    weight = weight.contiguous(memory_format=torch.channels_last)
    settings = (list(padding), list(strides), list(dilations), groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(shape))

    def run(x: torch.Tensor, activation: str) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise.default(x, packed, bias, *settings, activation, [], "none")

    return run


def _interleaved(
    weight: torch.Tensor, bias: torch.Tensor | None, settings: tuple[Any, ...]
) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """Several outputs of each channel, as FastViTHD's patch embeddings have two: one depthwise convolution for the
    first of them, one for the second, since oneDNN has a fast kernel only for those (twice to seven times as fast)."""
    several = len(weight) // settings[3]
    every = [(weight[i::several].clone(), None if bias is None else bias[i::several].clone()) for i in range(several)]
    parts = [conv2d(*operands, *settings) for operands in every]  # clones: oneDNN takes no strides from a bias

    def run(x: torch.Tensor, activation: str) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        results = [part(x, activation).permute(0, 2, 3, 1) for part in parts]
        return torch.stack(results, -1).flatten(-2).permute(0, 3, 1, 2)

    return run


def linear(weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """x (..., I) @ weight (O, I) transposed + bias, in float32 or bfloat16, for inputs of `rows` rows in all."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), packed, bias, "none", [], "none")
