"""Composite operations as chains of elementary ones, each result rounded to fp16: the policy "strict-fp16".

What is taken apart: an operation in which a value other than a sum of products lies between operands and result and so
would be stored in fp16: statistics, squares, exponentials, scores. What stays one operation:

- convolutions, matrix products, sums, means and pooling: products added up in float32 and rounded once;
- element-wise functions (gelu, sigmoid, tanh, exp, ...) except softplus: taken to be read from a table, with nothing
  stored between. Apple's patent US 12189599 B2 ("Lookup table activation functions for neural networks") describes
  that, and the engine's programs load the nonlinearity beside the weights and the bias (tinygrad,
  `extra/accel/ane/README.md`).

Tensors are float32 holding fp16 numbers, and so are the results. Arguments are not written over.
"""

from collections.abc import Sequence

import torch

from ..rounding import round_fp16


def constant(value: float) -> float:
    """A constant as fp16 has it (1e-12 is 0)."""
    return float(torch.tensor(value, dtype=torch.float16))


def normalized(x: torch.Tensor, axes: list[int], epsilon: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + epsilon) over the axes: mean, difference, square, mean, sum, rsqrt, product."""
    centred = round_fp16(x - round_fp16(x.mean(axes, keepdim=True)))
    variance = round_fp16(round_fp16(centred.square()).mean(axes, keepdim=True))
    return standardized(centred, variance, epsilon)


def standardized(centred: torch.Tensor, variance: torch.Tensor, epsilon: float) -> torch.Tensor:
    """centred / sqrt(variance + epsilon), written over `centred`: sum, rsqrt, product."""
    inverse = round_fp16(round_fp16(variance + constant(epsilon)).rsqrt_())
    return round_fp16(centred.mul_(inverse))


def affine(
    x: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None, shape: Sequence[int]
) -> torch.Tensor:
    """gamma x + beta, both in this shape, written over x: product, sum."""
    x = x if gamma is None else round_fp16(x.mul_(gamma.reshape(*shape)))
    return x if beta is None else round_fp16(x.add_(beta.reshape(*shape)))


def softmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    """exp(x - max) / sum of the same: maximum (exact), difference, exponential, sum, quotient.

    The engine does shift by the maximum (coremltools #2728).
    """
    powers = round_fp16(round_fp16(x - x.amax(axis, keepdim=True)).exp_())
    return round_fp16(powers.div_(round_fp16(powers.sum(axis, keepdim=True))))


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)): exponential, sum, logarithm. Overflows from 11.1, on an M3 Max from 10.4 (coremltools #2687)."""
    return round_fp16(round_fp16(round_fp16(x.exp()).add_(1)).log_())


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(query key^T / sqrt(E) + mask) value, the query scaled first as coremltools takes it apart before iOS 18.

    Product, matrix product, sum (a false element of a boolean mask is minus infinity), softmax, matrix product.
    """
    scale = constant(query.shape[-1] ** -0.5)
    scores = round_fp16(round_fp16(query * scale) @ key.mT)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = round_fp16(scores + mask)
    return round_fp16(softmax(scores, -1) @ value)
