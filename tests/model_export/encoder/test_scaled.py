"""Activations on x / 2^k: the unscaled functions, exactly; within float16's range at every step; only where asked."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model_export.encoder.scaled import SCALED, ScaledGELU, ScaledSigmoid, ScaledSoftmax

LARGEST = 65504.0


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), by SciPy's normal distribution."""
    return x * torch.from_numpy(scipy.special.ndtr(x.numpy()))


def sigmoid(x: Tensor) -> Tensor:
    return torch.from_numpy(scipy.special.expit(x.numpy()))


def softmax(x: Tensor) -> Tensor:
    return torch.from_numpy(scipy.special.softmax(x.numpy(), axis=-1))


CASES: list[tuple[type[Any], Callable[[Tensor], Tensor], bool]] = [
    (ScaledGELU, gelu, True),
    (ScaledSigmoid, sigmoid, False),
    (ScaledSoftmax, softmax, False),
]


def drawn(k: int, seed: int) -> Tensor:
    """x of every magnitude up to 4096 * 2^k, of both signs, with the values where the functions bend among them."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.linspace(-70, 70, 1401, dtype=torch.float64)
    sizes = torch.rand(2048, generator=generator, dtype=torch.float64) * (12 + k)
    signs = torch.rand(2048, generator=generator, dtype=torch.float64) - 0.5
    return torch.cat(
        [near, torch.exp2(sizes) * signs.sign(), torch.tensor([0.0, 2.0 ** (12 + k)], dtype=torch.float64)]
    )


@pytest.mark.parametrize(("scaled", "function", "keeps_scale"), CASES)
@given(k=st.integers(1, 40), seed=st.integers(0, 99))
def test_equals_the_unscaled_function(
    scaled: type[Any], function: Callable[[Tensor], Tensor], keeps_scale: bool, k: int, seed: int
) -> None:
    if scaled is not ScaledGELU:
        k = min(k, 28)  # their k is bounded: beyond it float16 holds no two different scores

    def error(x: Tensor, used: int) -> float:
        actual = scaled(used)(x * 2.0**-k) * (2.0**k if keeps_scale else 1.0)
        return float((actual - function(x)).abs().max() / function(x).abs().max())

    assert error(drawn(k, seed), k) <= 1e-12
    if k < 28:  # the control
        assert error(torch.linspace(-70, 70, 1401, dtype=torch.float64), k + 1) > 1e-3


class Seen(TorchDispatchMode):
    """Every value that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.values.append(result)
        return result


@pytest.mark.parametrize(("scaled", "function", "keeps_scale"), CASES)
@pytest.mark.parametrize("k", [1, 4, 9, 14, 15, 17, 20, 28, 29, 100])
def test_float16_holds_every_step(scaled: type[Any], function: Any, keeps_scale: bool, k: int) -> None:
    """No step leaves float16, no constant is one of its infinities, and the result a GELU's is near the right one."""
    y = torch.linspace(-4094, 4094, 2001, dtype=torch.float64)
    with Seen() as seen:
        scaled(k)(y)
    assert max(float(value.abs().max()) for value in seen.values) <= LARGEST
    small = scaled(k)(y.half()).double()
    assert torch.isfinite(small).all()
    if scaled is ScaledGELU:
        assert torch.allclose(small, gelu(y.half().double() * 2.0**k) * 2.0**-k, rtol=1e-3, atol=1e-3)


def test_constants_are_float16s() -> None:
    """The factors and bounds of the graph: none is an infinity or subnormal in float16, nor rounds to 0."""
    for k in range(1, 60):
        for scaled in SCALED.values():
            graph = torch.fx.symbolic_trace(scaled(k)).graph
            numbers = [
                float(value)
                for node in graph.nodes
                for value in (*node.args, *node.kwargs.values())
                if isinstance(value, float) and math.isfinite(value)
            ]
            assert all(number == 0 or 2.0**-14 <= abs(number) <= 2.0**14 for number in numbers), (scaled, k, numbers)
