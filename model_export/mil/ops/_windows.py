"""Padding of sliding windows, shared by convolution and pooling."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..registry import Unsupported

_MOST_PADDING = 4096  # elements


def padding(
    pad_type: str,
    pad: Sequence[int],
    sizes: Sequence[int | None],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Elements to add before and after each spatial dimension (coremltools defs `_utils.aggregated_pad`)."""
    if not len(sizes) == len(kernel) == len(strides) == len(dilations) or min(*kernel, *strides, *dilations) < 1:
        raise Unsupported(f"kernel {kernel}, strides {strides}, dilations {dilations} over {len(sizes)} dimensions")
    if pad_type == "valid":
        return [0] * len(kernel), [0] * len(kernel)
    if pad_type == "custom":
        if len(pad) != 2 * len(sizes) or min(pad, default=0) < 0:
            raise Unsupported(f"pad {pad} over {len(sizes)} dimensions")
        return list(pad[0::2]), list(pad[1::2])
    if pad_type not in ("same", "same_lower"):
        raise Unsupported(f"pad_type {pad_type!r}")
    before, after = [], []
    for size, window, stride, dilation in zip(sizes, kernel, strides, dilations):
        if size is None:
            raise Unsupported(f"pad_type {pad_type!r} with a size known only at run time")
        total = max(0, (-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size)
        if total > _MOST_PADDING:
            raise Unsupported(f"padding of {total}")
        small, large = total // 2, total - total // 2
        before.append(small if pad_type == "same" else large)
        after.append(large if pad_type == "same" else small)
    return before, after


def windows(size: int | None, before: int, after: int, kernel: int, stride: int, dilation: int = 1) -> int | None:
    """The number of windows along a dimension. Unsupported where padding makes it larger than any picture."""
    if before + after > _MOST_PADDING:
        raise Unsupported(f"padding of {before} and {after}")
    return None if size is None else (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def pad_spatial(x: torch.Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> torch.Tensor:
    """x (N, C, *D) with `value` added around its spatial dimensions."""
    amounts = [amount for pair in zip(reversed(before), reversed(after)) for amount in pair]
    return F.pad(x, amounts, value=value)
