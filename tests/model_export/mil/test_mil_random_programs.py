"""Random programs, built with coremltools' builder, saved and loaded; NumPy says what each of their operations gives.

The suite draws the same few each time. More, and others: raise EXAMPLES, and `--hypothesis-profile default`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mil_random import DTYPES, MOST, Drawn, check, dtype_of, evaluate
from mil_random_draft import Draft
from mil_random_elements import ELEMENTS
from mil_random_layers import LAYERS
from mil_random_shapes import SHAPES

EXAMPLES = 30
FAMILIES = (*ELEMENTS, *SHAPES, *LAYERS)
# Operations that may stand in for each other.
ALIKE = (
    {"add", "sub", "maximum", "minimum"},
    {"relu", "abs", "square", "sign", "round", "ceil", "floor", "atan", "cos", "sin", "erf", "sigmoid", "tanh"},
    {"reduce_sum", "reduce_max", "reduce_min"},
    {"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"},
    {"reduce_argmax", "reduce_argmin"},
    {"logical_and", "logical_or", "logical_xor"},
)
drawn_in_full = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@st.composite
def programs(draw: Callable[..., Any], least: int = 5, most: int = 40) -> Drawn:
    """Programs of so many operations, and a few that make what they return arrays of a type that Core ML returns."""
    d = Draft(draw, draw(st.sampled_from(["iOS15", "iOS16", "iOS17", "iOS18"])))
    kinds = ["fp32", "int32"] if d.target == "iOS15" else ["fp32", "fp16", "int32"]
    for place in range(d.whole(1, 3)):
        sizes: list[int] = []
        for _ in range(d.whole(1, 5)):
            sizes.append(d.one([n for n in (1, 2, 3, 4, 6, 17) if n * math.prod(sizes) <= MOST]))
        d.inputs[f"x{place}"] = d.values[f"x{place}"] = d.array(sizes, DTYPES[d.one(kinds)])
    count = d.whole(least, most)
    for _ in range(4 * count):
        if len(d.lines) >= count:
            break
        d.one(FAMILIES)(d)
    for name in d.drawn().outputs:
        value = d.values.get(name)
        if value is not None and value.dtype == bool:
            d.add("cast", {"x": name}, dtype="int32")
        elif value is not None and value.dtype == np.float16 and d.target == "iOS15":
            d.add("cast", {"x": name}, dtype="fp32")
    return d.drawn()


@drawn_in_full
@given(programs(), st.sampled_from(["as-typed", "float32"]))
def test_every_operation_gives_its_formula(drawn: Drawn, compute: str) -> None:
    with TemporaryDirectory() as folder:
        drawn.save(Path(folder, "p.mlpackage"))
        check(drawn, Path(folder, "p.mlpackage"), compute)


def mutants(drawn: Drawn) -> list[Drawn]:
    """The program with another operation in one place, where that makes a difference."""
    values, found = dict(drawn.inputs), []
    for place, line in enumerate(drawn.lines):
        results = [value.astype(dtype_of(line, i, values)) for i, (value, _) in enumerate(evaluate(line, values))]
        for op in sorted({op for group in ALIKE if line.op in group for op in group} - {line.op}):
            other = replace(line, op=op)
            ((value, _),) = evaluate(other, values)
            if (np.abs(np.float64(value) - results[0]) > 0.1 + 0.1 * np.abs(np.float64(value))).any():
                found.append(replace(drawn, lines=(*drawn.lines[:place], other, *drawn.lines[place + 1 :])))
        values |= zip(line.results, results)
    return found


@settings(drawn_in_full, max_examples=EXAMPLES // 2)
@given(st.data())
def test_another_operation_is_found(data: st.DataObject) -> None:
    drawn = data.draw(programs(most=15))
    others = mutants(drawn)
    assume(others)
    with TemporaryDirectory() as folder:
        data.draw(st.sampled_from(others)).save(Path(folder, "p.mlpackage"))
        with pytest.raises(AssertionError, match=r"(?s)^v.* = .*expected"):
            check(drawn, Path(folder, "p.mlpackage"))
