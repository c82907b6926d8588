"""Rounding to fp16 of float32 tensors, in their own memory, as an fp16 unit leaves its results."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

InPlace = Callable[[torch.Tensor], Any]

# Elements rounded at a time: 24 MiB with the fp16 copy, for the outer cache. Smaller tiles are a little faster on idle
# cores, but each one starts and joins torch's threads, which costs far more on busy ones.
TILE = 1 << 22


def round_fp16(tensor: torch.Tensor) -> torch.Tensor:
    """Each element (float32) as the nearest fp16 number, ties to even: 65520 and more is infinite, subnormals stay.

    Written over the tensor, which is returned; one with gaps or overlaps in memory is copied instead.
    """
    return tiled(tensor, [rounder(tensor.numel())], TILE)


def rounder(size: int) -> InPlace:
    """A function that rounds tiles of a tensor with `size` elements to fp16 in place."""
    if size <= TILE:
        return lambda tile: tile.copy_(tile.half())
    half = torch.empty(TILE, dtype=torch.float16)

    def to_fp16(tile: torch.Tensor) -> None:
        copy = half[: tile.numel()]
        copy.copy_(tile)
        tile.copy_(copy)

    return to_fp16


def tiled(tensor: torch.Tensor, functions: Sequence[InPlace], size: int) -> torch.Tensor:
    """Apply functions of single elements in place: all of them to `size` elements, then to the next in memory."""
    if tensor.numel() <= size and (
        tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    ):
        for function in functions:
            function(tensor)
        return tensor
    flat = _flat(tensor)
    if flat is None:
        tensor = tensor.contiguous()
        flat = tensor.view(-1)
    for tile in flat.split(max(size, 1)):
        for function in functions:
            function(tile)
    return tensor


def _flat(tensor: torch.Tensor) -> torch.Tensor | None:
    """All elements in the order of memory as one vector over the same memory; None when there are gaps or overlaps."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride()), key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return None
            expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))
