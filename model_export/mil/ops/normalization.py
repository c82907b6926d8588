"""Normalizations. Semantics: coremltools defs `normalization.py`.

Each is one operation, computed in float32 and rounded once after; under strict-fp16 the chain of `_strict`.
"""

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op, positive
from ..rounding import round_fp16
from . import _strict
from ._mixed import unmixed

_MOST_CHANNELS = 4096  # neighbours in a window

Weight = torch.Tensor | None


@mil_op("batch_norm")
def batch_norm(node: Node) -> Kernel:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta, one value per channel (the second dimension)."""
    epsilon = node.const("epsilon", 1e-5)

    shape = (-1, *[1] * (node.rank("x") - 2))

    def run(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, gamma: Weight, beta: Weight) -> torch.Tensor:
        return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)

    def chain(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, gamma: Weight, beta: Weight) -> torch.Tensor:
        centred = round_fp16(x - mean.reshape(shape))
        return _strict.affine(_strict.standardized(centred, variance.reshape(shape), epsilon), gamma, beta, shape)

    keys = ("x", "mean", "variance", "gamma", "beta")
    return node.kernel(chain, *keys, exact=True) if node.decomposes else node.kernel(unmixed(node, run, *keys), *keys)


@mil_op("instance_norm")
def instance_norm(node: Node) -> Kernel:
    """Like batch_norm with each sample's and channel's own statistics."""
    epsilon = node.const("epsilon", 1e-5)
    rank = node.rank("x")

    def chain(x: torch.Tensor, gamma: Weight, beta: Weight) -> torch.Tensor:
        return _strict.affine(
            _strict.normalized(x, list(range(2, rank)), epsilon), gamma, beta, (-1, *[1] * (rank - 2))
        )

    if node.decomposes:
        return node.kernel(chain, "x", "gamma", "beta", exact=True)

    def run(x: torch.Tensor, gamma: Weight, beta: Weight) -> torch.Tensor:
        if x.shape[2:].numel() == 1:  # instance_norm refuses it, and group_norm's product and sum don't cancel
            x = x - x
        return torch.group_norm(x, x.shape[1], gamma, beta, epsilon)

    return node.kernel(unmixed(node, run, "x", "gamma", "beta"), "x", "gamma", "beta")


@mil_op("layer_norm")
def layer_norm(node: Node) -> Kernel:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta over the given axes (default: all)."""
    rank = node.rank("x")
    axes = sorted(axis % rank for axis in node.const("axes", list(range(rank))))
    epsilon = node.const("epsilon", 1e-5)
    if len(set(axes)) != len(axes):
        raise Unsupported(f"axes {axes}")

    def chain(x: torch.Tensor, gamma: Weight, beta: Weight) -> torch.Tensor:
        shape = [x.shape[axis] if axis in axes else 1 for axis in range(rank)]
        return _strict.affine(_strict.normalized(x, axes, epsilon), gamma, beta, shape)

    def trailing(x: torch.Tensor, gamma: Weight, beta: Weight) -> torch.Tensor:
        return F.layer_norm(x, x.shape[rank - len(axes) :], gamma, beta, epsilon)

    def general(x: torch.Tensor, gamma: Weight, beta: Weight) -> torch.Tensor:
        others = [axis for axis in range(rank) if axis not in axes]
        order = others + axes
        result = trailing(x.permute(order), gamma, beta)
        return result.permute([order.index(axis) for axis in range(rank)])

    if node.decomposes:
        return node.kernel(chain, "x", "gamma", "beta", exact=True)
    run = trailing if axes == list(range(rank - len(axes), rank)) else general
    return node.kernel(unmixed(node, run, "x", "gamma", "beta"), "x", "gamma", "beta")


@mil_op("l2_norm")
def l2_norm(node: Node) -> Kernel:
    """x / sqrt(sum of squares over the last three dimensions + epsilon): square, sum, sum, rsqrt, product."""
    step, epsilon = node.step, node.typed("epsilon", 1e-6)

    def run(x: torch.Tensor) -> torch.Tensor:
        total = step(step(x.square()).sum((-3, -2, -1), keepdim=True))
        return x * step(step(total + epsilon).rsqrt())

    return node.kernel(run, "x")


@mil_op("local_response_norm")
def local_response_norm(node: Node) -> Kernel:
    """x / (k + alpha * mean of squares over `size` neighbouring channels) ** beta: square, mean, product, sum, power,
    quotient."""
    step, size = node.step, node.const("size")
    positive(node, size=size)
    if size > _MOST_CHANNELS:
        raise Unsupported(f"size {size}, expected at most {_MOST_CHANNELS}")
    alpha, beta, k = node.typed("alpha", 1e-4), node.typed("beta", 0.75), node.typed("k", 1.0)

    def run(x: torch.Tensor) -> torch.Tensor:
        squares = F.pad(step(x.square()).flatten(2).unsqueeze(1), (0, 0, size // 2, (size - 1) // 2))
        mean = step(F.avg_pool2d(squares, (size, 1), stride=1).squeeze(1).reshape(x.shape))
        return x / step(step(step(mean * alpha) + k).pow(beta))

    return node.kernel(run, "x")
