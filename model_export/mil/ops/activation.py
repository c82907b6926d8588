"""Activations. Semantics: coremltools defs `activation.py`."""

from collections.abc import Callable
from functools import partial

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


_ALPHA: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "elu": lambda x, alpha: F.elu(x, alpha),
    "leaky_relu": lambda x, alpha: torch.where(x >= 0, x, alpha * x),
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, torch.zeros_like(x)),
}
_ALPHA_BETA: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "clamped_relu": lambda x, alpha, beta: torch.where(x >= 0, x, alpha * x).clamp(max=beta),
    "linear_activation": lambda x, alpha, beta: alpha * x + beta,
    "scaled_tanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
}


@mil_op(*_ALPHA)
def with_alpha(node: Node) -> Kernel:
    function, alpha = _ALPHA[node.operation.type], node.const("alpha")
    return node.kernel(lambda x: function(x, alpha), "x")


@mil_op(*_ALPHA_BETA)
def with_alpha_and_beta(node: Node) -> Kernel:
    function, alpha, beta = _ALPHA_BETA[node.operation.type], node.const("alpha"), node.const("beta")
    return node.kernel(lambda x: function(x, alpha, beta), "x")


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
