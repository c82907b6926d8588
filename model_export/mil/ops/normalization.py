"""Normalizations, each one operation: computed in float32, rounded once after. coremltools defs `normalization.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op


@mil_op("batch_norm")
def batch_norm(node: Node) -> Kernel:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta, one value per channel (the second dimension)."""
    epsilon = node.const("epsilon", 1e-5)

    def run(
        x: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
    ) -> torch.Tensor:
        return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)

    return node.kernel(run, "x", "mean", "variance", "gamma", "beta")


@mil_op("instance_norm")
def instance_norm(node: Node) -> Kernel:
    """Like batch_norm with each sample's and channel's own statistics."""
    epsilon = node.const("epsilon", 1e-5)
    return node.kernel(
        lambda x, gamma, beta: F.instance_norm(x, None, None, gamma, beta, eps=epsilon), "x", "gamma", "beta"
    )


@mil_op("layer_norm")
def layer_norm(node: Node) -> Kernel:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta over the given axes (default: all)."""
    rank = node.rank("x")
    axes = sorted(axis % rank for axis in node.const("axes", list(range(rank))))
    sizes = node.type_of("x").shape
    epsilon = node.const("epsilon", 1e-5)
    normalized = [size for axis, size in enumerate(sizes) if axis in axes and size is not None]
    if len(normalized) != len(axes):
        raise Unsupported("normalized sizes known only at run time")

    def trailing(x: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None) -> torch.Tensor:
        return F.layer_norm(x, normalized, gamma, beta, epsilon)

    def general(x: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None) -> torch.Tensor:
        kept = [axis for axis in range(rank) if axis not in axes]
        order = kept + axes
        result = trailing(x.permute(order), gamma, beta)
        return result.permute([order.index(axis) for axis in range(rank)])

    run = trailing if axes == list(range(rank - len(axes), rank)) else general
    return node.kernel(run, "x", "gamma", "beta")


@mil_op("l2_norm")
def l2_norm(node: Node) -> Kernel:
    """x / sqrt(sum of squares over the last three dimensions + epsilon)."""
    epsilon = node.const("epsilon", 1e-6)
    return node.kernel(lambda x: x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon), "x")


@mil_op("local_response_norm")
def local_response_norm(node: Node) -> Kernel:
    """x / (k + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""
    size, alpha = node.const("size"), node.const("alpha", 1e-4)
    beta, k = node.const("beta", 0.75), node.const("k", 1.0)
    return node.kernel(lambda x: F.local_response_norm(x, size, alpha, beta, k), "x")
