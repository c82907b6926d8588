"""Random numbers. Semantics: coremltools defs `random.py`.

With a seed, every prediction draws the same numbers; without (-1), PyTorch's generator draws them, which
`torch.manual_seed` seeds. Core ML's own numbers are others: only their distribution is specified.
"""

from collections.abc import Callable

import numpy as np
import torch

from ..registry import Kernel, Node, Unsupported, mil_op

Draw = Callable[[tuple[int, ...], torch.Generator | None], torch.Tensor]


def _generators(node: Node) -> Callable[[], torch.Generator | None]:
    """A function that gives the generator of one prediction; None is PyTorch's own."""
    seed = node.const("seed", -1)
    return lambda: None if seed == -1 else torch.Generator().manual_seed(seed)


def _random(node: Node, draw: Draw, exact: bool = False) -> Kernel:
    shape, dtype, generator = node.known("shape"), node.policy.holds(node.type.dtype), _generators(node)
    if shape is not None:
        node.expects(*shape)

    def run(shape: torch.Tensor) -> torch.Tensor:
        return draw(node.allowed(*shape.tolist()), generator()).to(dtype)

    return node.kernel(run, "shape", exact=exact)


@mil_op("random_bernoulli")
def random_bernoulli(node: Node) -> Kernel:
    """1 with the probability `prob`, else 0."""
    probability = node.const("prob", 0.5)
    return _random(node, lambda shape, generator: torch.rand(shape, generator=generator) < probability, exact=True)


@mil_op("random_normal")
def random_normal(node: Node) -> Kernel:
    mean, deviation = node.const("mean", 0.0), node.const("stddev", 1.0)
    return _random(node, lambda shape, generator: torch.randn(shape, generator=generator) * deviation + mean)


@mil_op("random_uniform")
def random_uniform(node: Node) -> Kernel:
    """From low to the largest number of the program's type below high, which rounding could reach otherwise."""
    low, high = node.const("low", 0.0), node.const("high", 1.0)
    number = np.float16 if node.type.dtype == "fp16" else np.float32
    last = float(np.nextafter(number(high), number(-np.inf))) if high > low else high

    def draw(shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * (high - low) + low).clamp_(max=last)

    return _random(node, draw)


@mil_op("random_categorical")
def random_categorical(node: Node) -> Kernel:
    """`size` indices along the last axis, drawn with replacement by their log-probabilities or probabilities."""
    mode, size, generator = node.const("mode", "logits"), node.const("size", 1), _generators(node)
    dtype = node.policy.holds(node.type.dtype)
    if mode not in ("logits", "probs"):
        raise Unsupported(f"mode {mode!r}")
    node.expects(*node.type_of("x").shape[:-1], size)

    def run(x: torch.Tensor) -> torch.Tensor:
        weights = x.float() if mode == "probs" else x.float().softmax(-1)
        rows = weights.reshape(-1, x.shape[-1])
        drawn = torch.multinomial(rows, size, replacement=True, generator=generator())
        return drawn.reshape(*x.shape[:-1], size).to(dtype)

    return node.kernel(run, "x")
