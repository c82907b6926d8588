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
# Those of integers that are integers.
_INTEGERS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_l1_norm", "reduce_sum_square")
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
    return _reduction(node, function, exact)


@mil_op(*_COMPOSITE)
def composite(node: Node) -> Kernel:
    function, step = _COMPOSITE[node.operation.type], node.step
    if node.operation.type == "reduce_log_sum_exp" and not node.decomposes:
        return _reduction(node, torch.logsumexp)
    return _reduction(node, lambda x, axes, keep: function(x, axes, keep, step))


def _reduction(node: Node, function: Callable[[Tensor, list[int], bool], Tensor], exact: bool = False) -> Kernel:
    """The function of x over its axes: of integers in float64, towards zero, but where it has an integer result."""
    axes, keep = node.const("axes", list(range(node.rank("x")))), node.const("keep_dims", False)
    integers = node.type.dtype == "int32"
    fractions = integers and node.operation.type not in _INTEGERS

    def run(x: Tensor) -> Tensor:
        wide = x.to(torch.float64 if fractions else torch.int64) if integers else x
        # Without an axis nothing is added up; PyTorch would take all of them.
        result = function(wide, axes, keep) if axes else function(wide.unsqueeze(-1), [-1], False)
        return result.to(torch.int64).to(torch.int32) if integers else result.to(x.dtype)

    return node.kernel(run, "x", exact=exact)


@mil_op("reduce_argmax", "reduce_argmin")
def reduce_arg(node: Node) -> Kernel:
    function = torch.argmax if node.operation.type == "reduce_argmax" else torch.argmin
    axis, keep = node.const("axis", -1), node.const("keep_dims", False)
    node.const("output_dtype", None)  # equals the declared type
    return node.kernel(lambda x: function(x, axis, keepdim=keep).to(torch.int32), "x")
