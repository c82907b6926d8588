"""Padding of sliding windows, shared by convolution and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..registry import Unsupported


def padding(
    pad_type: str,
    pad: Sequence[int],
    sizes: Sequence[int | None],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Elements to add before and after each spatial dimension (coremltools defs `_utils.aggregated_pad`)."""
    if pad_type == "valid":
        return [0] * len(kernel), [0] * len(kernel)
    if pad_type == "custom":
        return list(pad[0::2]), list(pad[1::2])
    if pad_type not in ("same", "same_lower"):
        raise Unsupported(f"pad_type {pad_type!r}")
    before, after = [], []
    for size, window, stride, dilation in zip(sizes, kernel, strides, dilations):
        if size is None:
            raise Unsupported(f"pad_type {pad_type!r} with a size known only at run time")
        total = max(0, (-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        before.append(small if pad_type == "same" else large)
        after.append(large if pad_type == "same" else small)
    return before, after


def pad_spatial(x: torch.Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> torch.Tensor:
    """x (N, C, *D) with `value` added around its spatial dimensions."""
    amounts = [amount for pair in zip(reversed(before), reversed(after)) for amount in pair]
    return F.pad(x, amounts, value=value)
