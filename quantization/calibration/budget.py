"""A recipe's choices within its budget: the least cost in quality."""

import math
from collections.abc import Mapping, Sequence

from fastvlm.common.errors import UserError
from fastvlm.common.units import format_bytes
from quantization.calibration.allocation import allocate
from quantization.recipe import Recipe
from quantization.schemes import Scheme, nbytes

Shapes = Mapping[str, tuple[int, ...]]


def within_reach(recipe: Recipe, shapes: Shapes, elsewhere: tuple[str, ...] = ()) -> Recipe | None:
    """The recipe with the largest choice for each weight, where the budget holds all of them: nothing to measure.

    None where it does not. Raises UserError when not even the smallest choices fit.
    """
    options = recipe.options(shapes, elsewhere)
    largest = {
        name: max(schemes, key=lambda scheme: nbytes(scheme, shapes[name]))
        for name, schemes in options.items()
        if len(schemes) > 1
    }
    room = _rest(recipe, shapes, options)
    fits = sum(nbytes(scheme, shapes[name]) for name, scheme in largest.items()) <= room
    return recipe.decided(largest) if fits else None


def decide(
    recipe: Recipe, shapes: Shapes, nats: Mapping[str, Sequence[float]], elsewhere: tuple[str, ...] = ()
) -> Recipe:
    """The recipe with a scheme for each weight that has several. `nats`: weight -> cost of each of its options.

    Raises UserError when the budget can't be met.
    """
    options = recipe.options(shapes, elsewhere)
    room = _rest(recipe, shapes, options)
    layers = {
        name: {str(i): (cost, nbytes(options[name][i], shapes[name])) for i, cost in enumerate(costs)}
        for name, costs in nats.items()
    }
    chosen = allocate(layers, room)
    return recipe.decided({name: options[name][int(number)] for name, number in chosen.items()})


def _rest(recipe: Recipe, shapes: Shapes, options: Mapping[str, Sequence[Scheme]]) -> int:
    """Bytes of the budget that are left for the weights with a choice."""
    if recipe.budget is None:
        raise UserError(f"recipe {recipe.name} leaves the schemes open: say how large, as in fit:400MB or fit:4.5bpw")
    sizes = {name: [nbytes(scheme, shapes[name]) for scheme in schemes] for name, schemes in options.items()}
    parameters = sum(map(math.prod, shapes.values()))
    limit, least = recipe.budget.limit(parameters), sum(map(min, sizes.values()))
    if least > limit:
        raise UserError(
            f"recipe {recipe.name}: {format_bytes(limit)} is less than the {format_bytes(least)}"
            f" ({8 * least / parameters:.2f} bits per weight) that the smallest choices take: allow more"
        )
    return limit - sum(size[0] for size in sizes.values() if len(size) == 1)
