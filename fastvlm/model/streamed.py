"""Layers whose weights stay as they are stored and are converted part by part when they are used.

A model of them takes the memory of what it may keep of its stored weights; the others are mapped at every use.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvlm.common import threads

Rows = Callable[[Any], Tensor]  # a slice, or ids (N,) -> the values of those rows of a weight
_AT_ONCE = 1 << 19  # values that are converted at once: 2 MiB in float32, about what a core's cache holds
_OUTPUTS = 128  # of a product of many rows at a time, at least: fewer are slow to multiply
# Many rows are multiplied by oneDNN, with the operator that TorchInductor emits: on AMD a fifth faster than MKL, which
# is what torch.nn.functional takes, where both are.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_pool: ThreadPoolExecutor | None = None


@contextmanager
def workers() -> Iterator[None]:
    """Compute streamed layers inside the block on as many threads as PyTorch has, one thread an operation."""
    global _pool
    with threads.alone() as count, ThreadPoolExecutor(count) as _pool:
        try:
            yield
        finally:
            _pool = None


@dataclass
class Memory:
    """Memory for stored weights that layers keep: all of the 0.5B model's in 16 bits."""

    free: int = 5 << 28  # bytes

    def take(self, size: int) -> bool:
        """Whether `size` bytes are free; then they are no longer."""
        taken = size <= self.free
        self.free -= size if taken else 0
        return taken


class StreamedLinear(nn.Module):
    """x (..., I) @ weight (O, I) transposed + bias, in x's dtype.

    `read()` gives access to the weight's rows, for as long as the layer lives with `keeps`, else for each use anew.
    """

    def __init__(
        self, read: Callable[[], Rows], shape: tuple[int, ...], keeps: bool, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.read, (self.out_features, self.in_features), self.bias = read, shape, bias
        self.keeps, self.stored = keeps, cast(Rows | None, None)

    def forward(self, x: Tensor) -> Tensor:
        flat, result = x.flatten(0, -2), x.new_empty(*x.shape[:-1], self.out_features)
        out, step = result.view(-1, self.out_features), max(_AT_ONCE // self.in_features, min(len(flat), _OUTPUTS))
        multiply = _many_rows if _ONEDNN and len(flat) >= _OUTPUTS else nn.functional.linear
        rows = self.stored or self.read()
        self.stored = rows if self.keeps else None

        def compute(start: int, stop: int) -> None:
            with torch.inference_mode():  # which each thread has of its own
                for first in range(start, stop, step):
                    part = slice(first, min(first + step, stop))
                    bias = None if self.bias is None else self.bias[part]
                    out[:, part] = multiply(flat, rows(part).to(x.dtype), bias)

        _spread(compute, self.out_features)
        return result


def _many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")


def forget(model: nn.Module) -> None:
    """Drop the stored weights that the layers of a model keep, until they are used again."""
    for layer in model.modules():
        if isinstance(layer, StreamedLinear):
            layer.stored = None


def _spread(compute: Callable[[int, int], None], size: int) -> None:
    """Call `compute(start, stop)` for equal parts of `size`, one a worker. The calling thread only waits: parts of
    weights among what lasts would split its heap."""
    if _pool is None:
        return compute(0, size)
    bounds = [size * number // _pool._max_workers for number in range(_pool._max_workers + 1)]
    for future in [_pool.submit(compute, *both) for both in pairwise(bounds)]:
        future.result()


class StreamedEmbedding(nn.Module):
    """A table whose rows are converted to `dtype` when they are asked for."""

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.dtype = rows, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids.flatten()).to(self.dtype).unflatten(0, ids.shape)


STREAMED = (StreamedLinear, StreamedEmbedding)
