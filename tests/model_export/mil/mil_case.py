"""A case of an operation, and the arrays that most of them take."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    op: str
    inputs: Arrays
    parameters: dict[str, Any] = field(default_factory=dict)
    oracle: Callable[..., Any] | None = None  # None: coremltools' value inference
    target: str = "iOS17"
    half: bool = True

    def __str__(self) -> str:
        short = {k: v for k, v in self.parameters.items() if not isinstance(v, np.ndarray) or v.size < 5}
        return f"{self.op}-{'-'.join(f'{k}={v}' for k, v in short.items())}".replace(" ", "")


def uniform(*shape: int, low: float = -3, high: float = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


X = uniform(2, 4, 5, 6)
Y = uniform(2, 4, 5, 6, seed=1)
POSITIVE = uniform(2, 3, 4, low=0.1)
UNIT = uniform(2, 3, 4, low=-0.9, high=0.9)
INTS = np.arange(-6, 6, dtype=np.int32).reshape(3, 4)
BOOLS = np.arange(12).reshape(3, 4) % 3 == 0
C4 = uniform(4, low=0.5, high=1.5, seed=2)
