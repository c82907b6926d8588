"""A random program while it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mil_random import MOST, Drawn, Line, dtype_of, evaluate

LARGEST = 1000  # of an operand: what is larger is only returned
Test = Callable[[np.ndarray], Any]


def floating(x: np.ndarray) -> bool:
    return x.dtype.kind == "f"


def number(x: np.ndarray) -> bool:
    return x.dtype.kind in "fi"


def tensor(x: np.ndarray) -> bool:
    return x.ndim > 0


class Draft:
    """A program while it is drawn. Its values are known, so that operations get operands that they are defined for."""

    def __init__(self, draw: Callable[..., Any], target: str) -> None:
        self.draw, self.target = draw, target
        self.inputs: dict[str, np.ndarray] = {}
        self.values: dict[str, np.ndarray] = {}
        self.lines: list[Line] = []

    def drawn(self) -> Drawn:
        """The program as it is now."""
        return Drawn(self.target, self.inputs, tuple(self.lines))

    def one(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def whole(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def array(self, shape: Sequence[int], dtype: Any, low: float = -3, high: float = 3) -> np.ndarray:
        """Halves, of which many are equal, or any numbers."""
        rng = np.random.default_rng(self.whole(0, 2**16))
        if np.dtype(dtype).kind == "f" and self.flag():
            return rng.uniform(low, high, shape).astype(dtype)
        step = 2 if np.dtype(dtype).kind == "f" else 1
        return (rng.integers(math.ceil(low * step), high * step + 1, shape) / step).astype(dtype)

    def pick(self, *tests: Test) -> str | None:
        """An earlier value that passes the tests, late ones first."""
        names = [name for name in reversed(self.values) if all(test(self.values[name]) for test in tests)]
        return self.one(names) if names else None

    def axis(self, x: str) -> int:
        rank = self.values[x].ndim
        return self.whole(-rank, rank - 1)

    def axes(self, x: str, least: int = 1) -> list[int]:
        rank = self.values[x].ndim
        chosen = self.draw(st.lists(st.sampled_from(range(rank)), unique=True, min_size=least, max_size=rank))
        return [axis - rank if self.flag() else axis for axis in chosen]

    def scalar(self, x: str, value: float) -> Any:
        return self.values[x].dtype.type(value)

    def add(self, op: str, operands: dict[str, Any], results: int = 1, blocks: Any = (), **parameters: Any) -> str:
        """Append an operation unless its results are too large; the first result's name."""
        first = f"v{len(self.lines)}"
        names = (first,) if results == 1 else tuple(f"{first}_{place}" for place in range(results))
        line = Line(op, names, operands, parameters, blocks)
        found = evaluate(line, self.values)
        if all(value.size <= MOST and value.ndim <= 5 for value, _ in found):
            self.lines.append(line)
            for place, (name, (value, _)) in enumerate(zip(names, found)):
                with np.errstate(all="ignore"):
                    made = value.astype(dtype_of(line, place, self.values))
                if value.size and (value.dtype == bool or np.abs(value).max() <= LARGEST):
                    self.values[name] = made
        return names[0]
