"""Both sides' encoders, picture by picture; with the first one every operation and layer of the saved program, too."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import metrics
from benchmarks.parity import operations, tolerances
from benchmarks.parity.pictures import Picture
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.limits import finite
from fastvlm.model.surface import FastVLM
from fastvlm.model.torch_parts import TorchVision
from model_export import contract, mil
from model_export.artefact import is_ours, read_whole
from model_export.mil.allocator import kept_buffers, returned_buffers
from model_export.runtime import ExecutorVision, function_for
from quantization.coreai.forms import PLAIN

# Bytes of an activation that three runs side by side give back: kept, they cost 0.7 GB at 1024 x 1024; faulting them in
# again costs 2 s.
_LARGE = 24 << 20


# One picture's features (1, N, C) of reference and candidate, and the figures up to them (of `verdict.LABELS`).
Encoded = tuple[Sequence[np.ndarray], dict[str, float]]


def encode(expected: FastVLM, actual: FastVLM, picture: Picture) -> Encoded:
    """One picture through both encoders, each on its own pixels."""
    pixels = [model.preprocess(picture.image) for model in (expected, actual)]
    with kept_buffers():
        features = [model.encode_image(values) for model, values in zip((expected, actual), pixels)]
    return _encoded(picture, pixels, features)


def encode_first(
    artefact: Path,
    expected: FastVLM,
    actual: FastVLM,
    picture: Picture,
    resolution: int | None = None,
) -> tuple[dict[str, Any], Encoded]:
    """The same, and the result of `compare_operations` for this picture, in the MIL executor whatever else runs the
    candidate: where that is the executor as well, both come from one run.

    `expected` is run by PyTorch; its encoder is in channels-last memory from here on, in which oneDNN is twice as fast.
    """
    reference, candidate = expected.vision, actual.vision
    assert isinstance(reference, TorchVision)
    reference.encoder.to(memory_format=torch.channels_last)
    pixels = [model.preprocess(picture.image) for model in (expected, actual)]
    if isinstance(candidate, ExecutorVision) and candidate.compute == "as-typed":
        executor, shared = candidate, np.array_equal(pixels[0], pixels[1])
    else:
        executor = ExecutorVision(artefact, function=function_for(read_whole(artefact), artefact, resolution))
        shared = False
    document, first, second = compare_operations(artefact, reference, executor, pixels[0])
    first = finite(first, "vision encoder: features", reference)
    if shared and second is not None:
        second = finite(second, "vision encoder: features", executor)
    else:
        second = actual.encode_image(pixels[1])
    return document, _encoded(picture, pixels, [first, second])


def without_operations(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The place of `compare_operations`' result for a Core AI bundle, whose runtime gives no operation's value: no
    operations, and "absent" says so; "width" is the decoder's."""
    return {
        "precision": "float16" if manifest["llm"]["decisions"]["vision"] == [PLAIN] else "compressed",
        "rounding": [],
        "layers": [],
        "fault": None,
        "width": manifest["vision"]["channels"],
        "absent": "Apple's Core AI runtime gives the outputs of whole programs only, so no operation or layer was"
        " compared by itself: what is known of the encoder are the figures of its image embeddings above.",
    }


def compare_operations(
    artefact: Path, reference: TorchVision, candidate: ExecutorVision, pixels: np.ndarray
) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
    """The package operation by operation on one picture (1, 3, S, S), and the features of both sides: `reference` as
    the checkpoint has it, folded or not; `candidate` as typed.

    {"precision", "rounding": [...], "layers": [...], "fault"}: lists of `operations.Error` as dictionaries in execution
    order; `fault` is why the layers could not be matched with the checkpoint's. The candidate's features are None
    where no operation gives them. UserError for a program that cannot be run.
    """
    manifest, encoder = read_whole(artefact), reference.encoder
    if is_ours(manifest):
        scales = operations.layer_scales(encoder, manifest["vision"].get("fp16"))
    else:
        scales = operations.traced_scales(encoder)
    features: list[np.ndarray] = []

    def run(emit: operations.Emit) -> None:
        with operations.layers_of(encoder, emit):
            features.append(reference.encode(pixels))

    try:
        with returned_buffers(_LARGE):
            typed, exact = (
                operations.program_values(executor, pixels)
                for executor in (candidate.executor, candidate.executor.in_float32())
            )
            comparison = operations.compare(typed, exact, run, scales)
    except mil.MILError as error:
        raise UserError(f"{artefact / contract.PACKAGE}: {error}") from error
    precision = "float16" if comparison.half else "float32"
    if manifest["vision"].get("compression", {}).get("forms") or manifest["config"].get("vision_quant") == "compressed":
        precision = "compressed"
    document = {
        "precision": precision,
        "rounding": _listed(comparison.rounding),
        "layers": [] if comparison.fault else _listed(comparison.layers),
        "fault": comparison.fault,
    }
    return document, features[0], comparison.features


def _listed(errors: Sequence[operations.Error]) -> list[dict[str, Any]]:
    return [asdict(error) | {"snr_db": tolerances.number(error.snr_db)} for error in errors]


def _encoded(picture: Picture, pixels: Sequence[np.ndarray], features: Sequence[np.ndarray]) -> Encoded:
    for what, (a, b) in {"pixels": pixels, "features": features}.items():
        if a.shape != b.shape:
            raise CheckFailed(f"{picture.name}: {what}: got shape {b.shape}, expected {a.shape}")
    peak = float(np.abs(features[0]).max())
    figures = {
        "preprocessing": metrics.max_abs(*pixels),
        "encoder_snr": metrics.snr_db(*features),
        "encoder_cosine": metrics.cosine(*features),
        "encoder_max_abs": metrics.max_abs(*features) / peak if peak else math.inf,
    }
    return features, figures
