"""Multiple-choice knapsack: one option per layer, minimum cost under a budget.

For the encoder the cost is bytes and the budget noise; for the language model the cost is nats and the budget bytes.
"""

import itertools
import math
from collections.abc import Mapping

from fastvlm.common.errors import UserError

Options = Mapping[str, tuple[float, float]]  # option -> (cost, what it takes of the budget)


def allocate(layers: Mapping[str, Options], budget: float) -> dict[str, str]:
    """Layer -> option, so that the cost is low and what the options take together stays within the budget.

    Costs of layers add, and so does what they take. Steps along each layer's convex hull are made by what they save
    for what they take; what then remains of the budget goes to the single changes that save most. The result is less
    than one layer's step above the least cost. Raises UserError when even the least of all options is too much.
    """
    wrong = [f"{layer} {options}" for layer, options in layers.items() if not _usable(options)]
    if wrong:
        raise ValueError(f"cannot allocate: expected option -> (cost, finite amount >= 0), got {'; '.join(wrong)}")
    chosen, steps = {}, []
    for layer, options in layers.items():
        hull = _hull(options)
        chosen[layer] = hull[0]
        for number, (a, b) in enumerate(itertools.pairwise(hull)):
            steps.append((_slope(options[a], options[b]), layer, number, b))
    if _taken(layers, chosen) > budget:
        raise UserError(
            f"the least that {len(layers)} layers take is {_taken(layers, chosen):.4g}, "
            f"more than the budget {budget:.4g}: allow more"
        )
    stopped = set()
    for _, layer, _, option in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        if layer not in stopped and _taken(layers, chosen | {layer: option}) <= budget:
            chosen[layer] = option
        else:
            stopped.add(layer)
    while change := _best_change(layers, chosen, budget):
        chosen.update([change])
    return chosen


def _usable(options: Options) -> bool:
    return bool(options) and all(math.isfinite(taken) and taken >= 0 for _, taken in options.values())


def _taken(layers: Mapping[str, Options], chosen: Mapping[str, str]) -> float:
    return math.fsum(layers[layer][option][1] for layer, option in chosen.items())


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Cost saved for what is taken more from a to b."""
    return (a[0] - b[0]) / (b[1] - a[1])


def _hull(options: Options) -> list[str]:
    """The options on the lower convex hull of cost over what they take, from the least taken to the least cost."""
    hull: list[str] = []
    for name in sorted(options, key=lambda name: (options[name][1], options[name][0], name)):
        if hull and options[name][0] >= options[hull[-1]][0]:
            continue
        while len(hull) > 1 and _slope(options[hull[-1]], options[name]) >= _slope(
            options[hull[-2]], options[hull[-1]]
        ):
            hull.pop()
        hull.append(name)
    return hull


def _best_change(layers: Mapping[str, Options], chosen: Mapping[str, str], budget: float) -> tuple[str, str] | None:
    """The one layer's change that saves most within the budget, or None."""
    spare, best, change = budget - _taken(layers, chosen), 0.0, None
    for layer, options in layers.items():
        cost, taken = options[chosen[layer]]
        for name, (less, more) in options.items():
            if cost - less > best and more - taken <= spare:
                best, change = cost - less, (layer, name)
    return change
