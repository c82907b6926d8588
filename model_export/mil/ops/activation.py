"""Activations. Semantics: coremltools defs `activation.py`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op
from . import _strict
from ._mixed import unmixed

Unary = Callable[[torch.Tensor], torch.Tensor]

# type: (function, the same in place or None, whether fp16 operands give fp16 results exactly)
_PLAIN: dict[str, tuple[Unary, Unary | None, bool]] = {
    "relu": (torch.relu, torch.relu_, True),
    "relu6": (F.relu6, partial(F.hardtanh_, min_val=0.0, max_val=6.0), True),
    "sigmoid": (torch.sigmoid, torch.sigmoid_, False),
    "silu": (F.silu, partial(F.silu, inplace=True), False),
    "softplus": (partial(F.softplus, threshold=88.0), None, False),
    "softsign": (F.softsign, None, False),
}


@mil_op(*_PLAIN)
def plain(node: Node) -> Kernel:
    function, inplace, exact = _PLAIN[node.operation.type]
    if node.decomposes and node.operation.type == "softplus":
        return node.kernel(_strict.softplus, "x", exact=True)
    activation = "relu" if node.operation.type == "relu" else None
    return node.kernel(function, "x", exact=exact, inplace=inplace, activation=activation)


@mil_op("gelu")
def gelu(node: Node) -> Kernel:
    """EXACT: x/2 (1 + erf(x/√2)); TANH_APPROXIMATION: PyTorch's; SIGMOID_APPROXIMATION: x sigmoid(1.702 x)."""
    mode = node.const("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return node.kernel(lambda x: x * torch.sigmoid(1.702 * x), "x")
    approximate = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}.get(mode)
    if approximate is None:
        raise Unsupported(f"mode {mode!r}")
    inplace = partial(torch.ops.aten.gelu_, approximate=approximate)
    activation = "gelu" if approximate == "none" else None
    return node.kernel(partial(F.gelu, approximate=approximate), "x", inplace=inplace, activation=activation)


@mil_op("softmax")
def softmax(node: Node) -> Kernel:
    axis = node.const("axis", -1)
    if node.decomposes:
        return node.kernel(partial(_strict.softmax, axis=axis), "x", exact=True)
    return node.kernel(partial(torch.softmax, dim=axis), "x")


@mil_op("elu")
def elu(node: Node) -> Kernel:
    return _in_place(node, F.elu, F.elu_, alpha=node.const("alpha"))


@mil_op("leaky_relu")
def leaky_relu(node: Node) -> Kernel:
    """x, or alpha x below 0."""
    return _in_place(node, F.leaky_relu, F.leaky_relu_, negative_slope=node.const("alpha"))


@mil_op("thresholded_relu")
def thresholded_relu(node: Node) -> Kernel:
    """x, or 0 below alpha, which stays itself, where PyTorch's threshold does not."""
    below = float(np.nextafter(np.float32(node.const("alpha")), np.float32(-np.inf)))
    return _in_place(node, torch.threshold, torch.threshold_, threshold=below, value=0.0)


def _in_place(node: Node, function: Callable[..., Any], inplace: Callable[..., Any], **settings: float) -> Kernel:
    return node.kernel(partial(function, **settings), "x", inplace=partial(inplace, **settings))


@mil_op("clamped_relu")
def clamped_relu(node: Node) -> Kernel:
    """leaky_relu, at most beta."""
    alpha, beta = node.const("alpha"), node.const("beta")
    inplace = lambda x: F.leaky_relu_(x, alpha).clamp_(max=beta)  # noqa: E731
    return node.kernel(lambda x: F.leaky_relu(x, alpha).clamp_(max=beta), "x", inplace=inplace)


_SCALED: dict[str, Callable[..., torch.Tensor]] = {  # `mul` is in place or not, the rest is
    "linear_activation": lambda mul, x, alpha, beta: mul(x, alpha).add_(beta),
    "scaled_tanh": lambda mul, x, alpha, beta: mul(x, beta).tanh_().mul_(alpha),
    "sigmoid_hard": lambda mul, x, alpha, beta: mul(x, alpha).add_(beta).clamp_(0, 1),
}


@mil_op(*_SCALED)
def scaled(node: Node) -> Kernel:
    """linear_activation: alpha x + beta; scaled_tanh: alpha tanh(beta x); sigmoid_hard: alpha x + beta, in 0 to 1."""
    function, alpha, beta = _SCALED[node.operation.type], node.const("alpha"), node.const("beta")
    run, inplace = (partial(function, mul, alpha=alpha, beta=beta) for mul in (torch.mul, torch.Tensor.mul_))
    return node.kernel(run, "x", inplace=inplace)


@mil_op("prelu")
def prelu(node: Node) -> Kernel:
    """alpha has one value per channel, the second dimension."""
    return node.kernel(unmixed(node, F.prelu, "x", "alpha"), "x", "alpha")


@mil_op("softplus_parametric")
def softplus_parametric(node: Node) -> Kernel:
    """alpha_c log(1 + exp(beta_c x)), c being the second dimension."""
    step = node.step
    function = _strict.softplus if node.decomposes else partial(F.softplus, threshold=88.0)

    def run(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return alpha.reshape(shape) * function(step(x * beta.reshape(shape)))

    return node.kernel(unmixed(node, run, "x", "alpha", "beta"), "x", "alpha", "beta")
