"""Reductions. Semantics: coremltools defs `reduction.py`.

Under strict-fp16 each intermediate is rounded. A logarithm of a sum of exponentials is then taken without a shift by
the maximum, as on an M3 Max (coremltools #2690).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import Kernel, Node, mil_op


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


# type: (function of the tensor, the axes and whether to keep them, whether fp16 operands give fp16 results exactly)
_PLAIN: dict[str, tuple[Callable[[Tensor, list[int], bool], Tensor], bool]] = {
    "reduce_sum": (torch.sum, False),
    "reduce_mean": (torch.mean, False),
    "reduce_max": (torch.amax, True),
    "reduce_min": (torch.amin, True),
    "reduce_prod": (_prod, False),
    "reduce_l1_norm": (lambda x, axes, keep: x.abs().sum(axes, keep), False),
}
# type: function of the same, and of what each intermediate goes through
_COMPOSITE: dict[str, Callable[[Tensor, list[int], bool, Callable[[Tensor], Tensor]], Tensor]] = {
    "reduce_l2_norm": lambda x, axes, keep, step: step(step(x.square()).sum(axes, keep)).sqrt(),
    "reduce_log_sum": lambda x, axes, keep, step: step(x.sum(axes, keep)).log(),
    "reduce_log_sum_exp": lambda x, axes, keep, step: step(step(x.exp()).sum(axes, keep)).log(),
    "reduce_sum_square": lambda x, axes, keep, step: step(x.square()).sum(axes, keep),
}


@mil_op(*_PLAIN)
def plain(node: Node) -> Kernel:
    function, exact = _PLAIN[node.operation.type]
    axes, keep = _axes(node)
    return node.kernel(lambda x: function(x, axes, keep).to(x.dtype), "x", exact=exact)


@mil_op(*_COMPOSITE)
def composite(node: Node) -> Kernel:
    function, (axes, keep), step = _COMPOSITE[node.operation.type], _axes(node), node.step
    if node.operation.type == "reduce_log_sum_exp" and not node.decomposes:
        return node.kernel(lambda x: torch.logsumexp(x, axes, keep), "x")
    return node.kernel(lambda x: function(x, axes, keep, step).to(x.dtype), "x")


def _axes(node: Node) -> tuple[list[int], bool]:
    return node.const("axes", list(range(node.rank("x")))), node.const("keep_dims", False)


@mil_op("reduce_argmax", "reduce_argmin")
def reduce_arg(node: Node) -> Kernel:
    function = torch.argmax if node.operation.type == "reduce_argmax" else torch.argmin
    axis, keep = node.const("axis", -1), node.const("keep_dims", False)
    node.const("output_dtype", None)  # equals the declared type
    return node.kernel(lambda x: function(x, axis, keepdim=keep).to(torch.int32), "x")
