"""What a case of one operation is, and its usual operands."""

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
