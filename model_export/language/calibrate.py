"""Calibration inside an export: pictures and questions through the encoder, and what the recipe makes of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common import threads
from fastvlm.common.cli import log, progress
from fastvlm.common.dtypes import Array, as_array
from fastvlm.data import conversations, default_questions
from fastvlm.data.conversations import Sample
from fastvlm.data.preprocessing import Preprocessor
from fastvlm.model.surface import Vision
from model_export.language.llm import ELSEWHERE_OF, weight_shapes
from quantization.calibration.data import collect
from quantization.calibration.methods import calibrated
from quantization.recipe import Recipe

_DEMO, _DRAWN = 256, 64  # built-in questions; each of the latter costs an answer of the model's own


# How many threads add up a product decides its last bits, and these, over thousands of steps, the weights: a recipe
# gives the same bytes on every number of cores only where that number is fixed.
@threads.alone()
def calibrate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    preprocessor: Preprocessor,
    samples: list[Sample] | None,
    exported: Vision | None,
    layout: str = "app",
) -> tuple[Recipe, dict[str, dict[str, Array]], dict[str, Any]]:
    """Run the samples through the `exported` encoder (None: the checkpoint's), then the recipe's method.

    Without samples there are built-in ones. Answers that they don't have are the checkpoint's own. The model computes
    in bfloat16 where the checkpoint is stored so, else in float32. Returns the recipe without choices, the parts of
    weights by the artefact's names, and facts for the manifest.
    """
    from fastvlm.model.build import build
    from fastvlm.model.torch_parts import from_model

    samples = built_in(checkpoint.path) if samples is None else samples
    stored = {info.dtype for name, info in checkpoint.tensors.items() if name.startswith(naming.LANGUAGE)}
    dtype = "bfloat16" if stored == {"bfloat16"} else "float32"
    model = from_model(build(checkpoint, dtype, "cpu"), checkpoint, preprocessor)
    if exported is not None:
        model = replace(model, vision=exported)
    with progress("calibration (pictures and questions)", len(samples)) as advance:
        calibration = collect(model, checkpoint.model_config.text.vocab_size, samples, advance)
    language = model.language.model  # type: ignore[attr-defined]
    del model
    shapes = weight_shapes(checkpoint, layout)
    decided, parts = calibrated(recipe, shapes, language, calibration, progress, ELSEWHERE_OF[layout])
    facts = {
        "method": recipe.method,
        "samples": len(samples),
        "tokens": sum(map(len, calibration.sequences)),
        "sha256": calibration.sha256,
        "encoder": "the exported package" if exported is not None else "the checkpoint's",
        "computed_in": dtype,
    }
    arrays = {name: {part: as_array(tensor) for part, tensor in of_weight.items()} for name, of_weight in parts.items()}
    return decided, arrays, facts


def built_in(checkpoint: Path) -> list[Sample]:
    """Questions for whoever has none: of the demo set, without the answers where the checkpoint speaks otherwise."""
    if default_questions.built_in(checkpoint) == default_questions.DEMO:
        return conversations.demo_samples(_DEMO, "train")
    log("calibrating on drawn pictures: give --calibration-data for what the model will be asked")
    return [replace(sample, answer=None) for sample in conversations.demo_samples(_DRAWN, "train")]
