"""A recipe's calibration: choices within a budget, then the method AWQ, GPTQ or DWQ."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from quantization.calibration import awq, budget, decoder, dwq, gptq
from quantization.calibration.data import Calibration
from quantization.calibration.sensitivity import sensitivities
from quantization.recipe import LAYERS, Recipe
from quantization.schemes import Affine, Scheme

PREFIX = "language_model."  # of the artefact's names before the model's own
_ROW = 512  # tokens in a row of AWQ's and GPTQ's input, as in mlx-lm
_ROWS = 4  # in a batch

Progress = Callable[[str, float], AbstractContextManager[Callable[..., Any]]]


def calibrated(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, ...]],
    model: Any,
    calibration: Calibration,
    progress: Progress,
    elsewhere: tuple[str, ...] = (),
) -> tuple[Recipe, dict[str, dict[str, Tensor]]]:
    """Make the recipe's choices and run its method over Transformers' `model` (which may change in its course).

    shapes: the artefact's weights. `progress(what, total)` gives `advance(n=1)`. Returns the recipe without choices,
    and the parts of the weights (by the artefact's names) that the method has quantized; all others are rounded as they
    are.
    """
    if recipe.budget is not None:
        options = {name: schemes for name, schemes in recipe.options(shapes, elsewhere).items() if len(schemes) > 1}
        own = {name.removeprefix(PREFIX): schemes for name, schemes in options.items()}
        with progress("what each matrix costs (sequences)", len(calibration.sequences)) as advance:
            nats = sensitivities(model, calibration, own, advance)
        recipe = budget.decide(recipe, shapes, {PREFIX + name: costs for name, costs in nats.items()}, elsewhere)
    plan = recipe.plan(shapes, elsewhere)
    schemes = {name.removeprefix(PREFIX): scheme for name, scheme in plan.items() if name.startswith(PREFIX)}
    quantized = _run(recipe.method, model, schemes, calibration, progress)
    return recipe, {PREFIX + name: parts for name, parts in quantized.items()}


def _run(
    method: str, model: Any, schemes: Mapping[str, Scheme], calibration: Calibration, progress: Progress
) -> dict[str, dict[str, Tensor]]:
    if method == "rtn":
        return {}
    if method == "dwq":
        with progress("DWQ (steps)", dwq.STEPS) as advance:
            return dwq.quantize(model, calibration, schemes, advance)
    rows = calibration.packed(_ROW)
    batches = [decoder.embed(model, calibration, rows[start : start + _ROWS]) for start in range(0, len(rows), _ROWS)]
    first = f"{LAYERS.removeprefix(PREFIX)}0.{decoder.MATRICES[0]}.weight"
    scheme = schemes[first]  # the plan has made sure that all matrices have this one
    assert isinstance(scheme, Affine)
    quantize = {"awq": awq.quantize, "gptq": gptq.quantize}[method]
    with progress(f"{method.upper()} (layers)", len(model.model.layers)) as advance:
        return quantize(model, batches, scheme, advance)
