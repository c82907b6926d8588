"""Activations that take and give x / 2^k, so that float16 holds what comes before and after them.

A GELU, a sigmoid and a softmax are not homogeneous, but each does something only near 0 (a softmax: near its maximum).
So the part of the input that matters is cut out, brought back to its own scale, and what lies outside is carried on as
it is. Exact but for the tails: gelu(x) is x above 8 and 0 below -8 to 1e-15, sigmoid and exp are 0 below -64 to 1e-27.
"""

import torch
from torch import Tensor, nn

# A factor 2^k or 2^-k, and a bound on x / 2^k, has to be a float16 that is not subnormal.
_LARGEST_FACTOR, _SMALLEST_BOUND = 14, -14
# Beyond it the part that matters is under float16's resolution of the values that ask for so large a k.
_LARGEST_EXPONENT = _LARGEST_FACTOR - _SMALLEST_BOUND
_GELU_BOUND, _EXP_BOUND = 3, 6  # 2^3 and 2^6: see the module's docstring


def _bound(k: int, least: int) -> float:
    """c / 2^k for the smallest power of two c >= 2^least that leaves it a normal float16."""
    return 2.0 ** max(least - k, _SMALLEST_BOUND)


def _times(x: Tensor, k: int) -> Tensor:
    """x * 2^k, by factors that float16 holds."""
    while k:
        step = max(-_LARGEST_FACTOR, min(k, _LARGEST_FACTOR))
        x, k = x * 2.0**step, k - step
    return x


class ScaledGELU(nn.Module):
    """gelu(2^k y) / 2^k = relu(y - t) + gelu(2^k t) / 2^k with t = clip(y, -c / 2^k, c / 2^k), c = 8 or more.

    k from 1 on; from 29 on it is relu(y), which differs by less than 1e-12 of values that large.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, y: Tensor) -> Tensor:
        if self.k > _LARGEST_EXPONENT:
            return torch.relu(y)
        bound = _bound(self.k, _GELU_BOUND)
        t = y.clamp(-bound, bound)
        return torch.relu(y - t) + _times(nn.functional.gelu(_times(t, self.k)), -self.k)


class ScaledSigmoid(nn.Module):
    """sigmoid(2^k y) = sigmoid(2^k clip(y, -c / 2^k, c / 2^k)), c = 64 or more; k from 1 on."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = min(k, _LARGEST_EXPONENT)

    def forward(self, y: Tensor) -> Tensor:
        bound = _bound(self.k, _EXP_BOUND)
        return torch.sigmoid(_times(y.clamp(-bound, bound), self.k))


class ScaledSoftmax(nn.Module):
    """softmax(2^k y) = softmax(2^k clip(y - max y, -c / 2^k, 0)) over the last axis, c = 64 or more; k from 1 on."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = min(k, _LARGEST_EXPONENT)

    def forward(self, y: Tensor) -> Tensor:
        below = y - y.amax(-1, keepdim=True)
        return _times(below.clamp(-_bound(self.k, _EXP_BOUND), 0.0), self.k).softmax(-1)


# By the name of the plain activation's class: timm has a Sigmoid of its own.
SCALED: dict[str, type[nn.Module]] = {"GELU": ScaledGELU, "Sigmoid": ScaledSigmoid, "Softmax": ScaledSoftmax}
