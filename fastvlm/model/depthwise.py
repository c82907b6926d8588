"""Depthwise convolutions in float64 on the CPU, for which PyTorch has no kernel."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class DepthwiseByTaps(TorchFunctionMode):
    """Compute depthwise convolutions as a sum over kernel taps, which is their definition.

    PyTorch has no depthwise kernel for float64 on the CPU: it runs one convolution a channel, 35,040 for the real
    encoder and 94 % of the proof's time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and args[1].shape[1] == 1 and args[6] > 1:
            return depthwise(*args)
        return func(*args, **(kwargs or {}))


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """conv2d for a (O, 1, kh, kw) kernel, O a multiple of groups: (B, groups, H, W) -> (B, O, H', W')."""
    x = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    x = x.repeat_interleave(weight.shape[0] // groups, dim=1)
    reach = [(size - 1) * step for size, step in zip(weight.shape[2:], dilation)]
    rows, columns = ((x.shape[2 + i] - reach[i] - 1) // stride[i] + 1 for i in (0, 1))
    out = x.new_zeros(x.shape[0], weight.shape[0], rows, columns)
    for i, j in itertools.product(*map(range, weight.shape[2:])):
        top, left = i * dilation[0], j * dilation[1]
        window = x[:, :, top : top + rows * stride[0] : stride[0], left : left + columns * stride[1] : stride[1]]
        out.addcmul_(window, weight[:, 0, i, j].view(-1, 1, 1))
    return out if bias is None else out + bias.view(-1, 1, 1)
