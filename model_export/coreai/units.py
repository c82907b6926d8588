"""A bundle on a Mac's compute units, beside the interpreter that also runs elsewhere."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fastvlm.common.cli import one_line, progress
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.model.surface import FastVLM
from model_export.config import INTERPRETER
from model_export.coreai.runtime import load_bundle

_PROMPT = "What is in the picture?"
_ROUNDS = 5  # timed, after one that is not


def compare(bundle: Path, units: Sequence[str], least_snr_db: float) -> list[dict[str, Any]]:
    """Image embeddings and prefill logits of each unit against the interpreter's, on the same inputs.

    Returns:
        Of each unit and stage: {function, unit, snr_db or None, seconds (median of a call), fault or None, passed},
        and `events`, what the runtime logged: which delegates ran shows there.
    """
    from model_export.encoder.sensitivity import decibels, relative_noise

    with progress("the interpreter"):
        pixels, embeds, expected = _inputs(load_bundle(bundle, INTERPRETER))
    checks: list[dict[str, Any]] = []
    for unit in units:
        with progress(f"the system's runtime, {unit}"):
            try:
                model = load_bundle(bundle, unit)
                measured = {
                    "vision": _timed(model.vision.encode, pixels),
                    "main": _timed(model.language.logits, embeds),
                }
                events = model.vision.runtime.events()  # type: ignore[attr-defined]
            except (UserError, CheckFailed) as error:
                checks.append(
                    {"function": "load", "unit": unit, "snr_db": None, "fault": one_line(error), "passed": False}
                )
                continue
        for role, (actual, seconds) in measured.items():
            snr = decibels(relative_noise(expected[role], actual)) if np.isfinite(actual).all() else None
            passed = snr is not None and snr >= least_snr_db
            fault = None if snr is not None else "gives NaN or infinity"
            checks.append(
                {
                    "function": role,
                    "unit": unit,
                    "snr_db": snr,
                    "seconds": seconds,
                    "fault": fault,
                    "passed": passed,
                    "events": events,
                }
            )
    return checks


def _inputs(model: FastVLM) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Pixels, a prompt's embeddings, and what the interpreter gives for them."""
    pixels = np.random.default_rng(0).random((1, 3, model.image_size, model.image_size), dtype=np.float32)
    embeddings = model.vision.encode(pixels)
    embeds = model.merge(_PROMPT, [embeddings])
    return pixels, embeds, {"vision": embeddings, "main": model.language.logits(embeds)}


def _timed(function: Any, argument: np.ndarray) -> tuple[np.ndarray, float]:
    """The result, and the median of its seconds."""
    result, seconds = function(argument), []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        function(argument)
        seconds.append(time.perf_counter() - start)
    return result, median(seconds)
