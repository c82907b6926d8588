"""Allocation of options to layers: against brute force, in order of worth, and refusals."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.common.errors import UserError
from quantization.calibration.allocation import allocate

OPTION = st.tuples(st.integers(1, 100), st.floats(0, 10, width=32))


@settings(max_examples=200)
@given(
    options=st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
def test_allocation_against_brute_force(options, share):
    layers = {f"l{i}": {f"s{j}": option for j, option in enumerate(row)} for i, row in enumerate(options)}
    least = math.fsum(min(noise for _, noise in row) for row in options)
    most = math.fsum(max(noise for _, noise in row) for row in options)
    budget = least + share * (most - least)
    every = [dict(zip(layers, choice)) for choice in itertools.product(*layers.values())]

    def size(chosen):
        return sum(layers[layer][scheme][0] for layer, scheme in chosen.items())

    def noise(chosen):
        return math.fsum(layers[layer][scheme][1] for layer, scheme in chosen.items())

    chosen = allocate(layers, budget)
    best = min(size(c) for c in every if noise(c) <= budget)
    assert chosen.keys() == layers.keys()
    assert noise(chosen) <= budget
    step = max(max(bytes_ for bytes_, _ in row) - min(bytes_ for bytes_, _ in row) for row in options)
    assert best <= size(chosen) <= best + step
    if len(layers) == 1:
        assert size(chosen) == best
    assert size(allocate(layers, most)) == sum(min(bytes_ for bytes_, _ in row) for row in options)


def test_allocation_takes_the_cheapest_noise_first():
    layers = {
        "quiet": {"fp16": (100, 0.0), "palette8": (60, 0.1), "palette4": (30, 0.2)},
        "loud": {"fp16": (100, 0.0), "palette8": (50, 5.0), "palette4": (25, 50.0)},
    }
    assert allocate(layers, 0) == {"quiet": "fp16", "loud": "fp16"}
    assert allocate(layers, 1) == {"quiet": "palette4", "loud": "fp16"}
    assert allocate(layers, 5.2) == {"quiet": "palette4", "loud": "palette8"}
    assert allocate(layers, 100) == {"quiet": "palette4", "loud": "palette4"}


def test_allocation_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match=r"the least that 1 layers take is 1, more than the budget 0.5"):
        allocate({"l": {"int8": (10, 1.0), "int4": (5, 2.0)}}, 0.5)
    with pytest.raises(ValueError, match=r"got a .*nan"):
        allocate({"a": {"int8": (10, math.nan)}}, 1)
    with pytest.raises(ValueError, match=r"got a \{\}"):
        allocate({"a": {}}, 1)
