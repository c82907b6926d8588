"""Reductions. Semantics: coremltools defs `reduction.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..registry import Kernel, Node, mil_op
from . import _strict


def _prod(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


Reduction = Callable[[torch.Tensor, list[int], bool], torch.Tensor]

# type: (function of the tensor, the axes and whether to keep them, whether fp16 operands give fp16 results exactly)
_REDUCTIONS: dict[str, tuple[Reduction, bool]] = {
    "reduce_sum": (torch.sum, False),
    "reduce_mean": (torch.mean, False),
    "reduce_max": (torch.amax, True),
    "reduce_min": (torch.amin, True),
    "reduce_prod": (_prod, False),
    "reduce_l1_norm": (lambda x, axes, keep: x.abs().sum(axes, keep), False),
    "reduce_l2_norm": (lambda x, axes, keep: x.square().sum(axes, keep).sqrt(), False),
    "reduce_log_sum": (lambda x, axes, keep: x.sum(axes, keep).log(), False),
    "reduce_log_sum_exp": (torch.logsumexp, False),
    "reduce_sum_square": (lambda x, axes, keep: x.square().sum(axes, keep), False),
}

_CHAINS: dict[str, Reduction] = {
    "reduce_l2_norm": _strict.l2_norm,
    "reduce_log_sum": _strict.log_sum,
    "reduce_log_sum_exp": _strict.log_sum_exp,
    "reduce_sum_square": _strict.sum_square,
}


@mil_op(*_REDUCTIONS)
def reduction(node: Node) -> Kernel:
    function, exact = _REDUCTIONS[node.operation.type]
    if node.decomposes and node.operation.type in _CHAINS:
        function, exact = _CHAINS[node.operation.type], True
    axes = node.const("axes", list(range(node.rank("x"))))
    keep = node.const("keep_dims", False)
    return node.kernel(lambda x: function(x, axes, keep).to(x.dtype), "x", exact=exact)


@mil_op("reduce_argmax", "reduce_argmin")
def reduce_arg(node: Node) -> Kernel:
    function = torch.argmax if node.operation.type == "reduce_argmax" else torch.argmin
    axis, keep = node.const("axis", -1), node.const("keep_dims", False)
    node.const("output_dtype", None)  # equals the declared type
    return node.kernel(lambda x: function(x, axis, keepdim=keep).to(torch.int32), "x")
