"""The smallest encoder that keeps a signal-to-noise ratio: each layer's sensitivity, then bytes against noise.

A layer's sensitivity to a form is the noise in the encoder's features when its weight alone is in that form, relative
to the features' power, mean over the pictures. Noise of different layers adds (their errors are independent), so a
choice for all layers is an allocation; what it really keeps is measured on the written package, and the budget
corrected.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastvlm.common.cli import log, progress
from fastvlm.common.documents import Unreadable, load
from fastvlm.common.errors import UserError
from fastvlm.common.staging import write_file
from fastvlm.common.units import format_bytes
from model_export import contract, encoder_forms, mil
from model_export.config import DEPLOYMENT_TARGETS, ExportConfig
from model_export.encoder import compress
from model_export.encoder.channel_first import Encoder
from model_export.encoder.compress import Assignment
from quantization.calibration.allocation import allocate
from quantization.coreml.compression import COMPRESSIONS, Compression, nbytes
from quantization.coreml.compression import compress as compress_weight

# What is tried on each layer, from nearly free to smallest. 8-bit palettes of groups would take minutes to cluster.
FORMS_TRIED = ("palette8", "int8", "palette6", "palette6-g16", "palette4", "palette4-g16", "int4-b32")
# Sensitivities are relative, and hardly depend on the resolution; measuring at 1024 would take 16 times as long.
MEASURED_AT = 256
_ROUNDS = 5  # packages written to come close to the ratio; more only where none of them keeps it
_CLOSE_ENOUGH_DB = 0.25  # above it; more bytes are not worth another package
_BELOW = 0.98  # of what was too much
_LEAST_ADDED = 1e-3  # of the budget: bounds what a round that added next to nothing makes of the next one's

Noise = dict[str, dict[str, float]]  # layer -> form -> noise power relative to the features'
Write = Callable[[Mapping[str, Compression], Path], Any]
# layer -> form, `encoder_forms.NONE` among them -> (bytes, noise)
Options = Mapping[str, Mapping[str, tuple[int, float]]]


def search(
    encoder: Encoder, config: ExportConfig, pictures: Callable[[int], Any], write: Write, folder: Path
) -> tuple[Assignment, dict[str, Any]]:
    """Forms for a prepared encoder that keep `config.min_snr` dB as typed on the pictures, and facts for the manifest.

    `write(forms, package)` writes a package; temporary ones go into `folder`. Sensitivities are kept in the file
    `OUTPUT_DIR.sensitivity.json`, so that an interrupted search goes on, and the next one (another ratio) is quick.

    Raises UserError when float16 alone does not keep the ratio, CheckFailed when weights do not fit float16.
    """
    assert config.min_snr is not None
    targets = DEPLOYMENT_TARGETS[: DEPLOYMENT_TARGETS.index(config.deployment_target) + 1]
    legal = [form for form in map(COMPRESSIONS.__getitem__, FORMS_TRIED) if form.target in targets]
    compress.check_finite(compress.weights(encoder.fastvit))
    shapes = compress.layer_shapes(encoder.fastvit)
    options = {
        name: [form for form in legal if compress.fault_of(shape, form, shapes) is None]
        for name, shape in shapes.items()
    }
    check = _checker(encoder, pictures, write, folder)
    base = check({})
    if base > 10 ** (-config.min_snr / 10):
        raise UserError(
            f"--min-snr {config.min_snr:g}: float16 alone keeps {decibels(base):.1f} dB on these pictures: ask for less"
        )
    small = list(pictures(min(MEASURED_AT, config.image_size or MEASURED_AT)))
    cache = config.output_dir.with_name(config.output_dir.name + ".sensitivity.json")
    noise = measure(encoder.fastvit, options, small, cache)
    layers = {
        name: {encoder_forms.NONE: (2 * int(np.prod(shape)), 0.0)}
        | {form.name: (nbytes(shape, form), noise[name][form.name]) for form in options[name]}
        for name, shape in shapes.items()
    }
    chosen, facts = fit(layers, config.min_snr, base, check)
    uncompressed = {
        name: _why(layers[name], [compress.fault_of(shape, form, shapes) for form in legal])
        for name, shape in shapes.items()
        if name not in chosen
    }
    return Assignment(chosen, uncompressed), {"measured_at": small[0].shape[-1], **facts}


def fit(
    layers: Options, least_db: float, base: float, check: Callable[[Mapping[str, Compression]], float]
) -> tuple[dict[str, Compression], dict[str, Any]]:
    """The smallest choice of forms that `check` finds to keep `least_db` dB, and facts for the manifest.

    `check(forms)` is the relative noise power of the whole; `base` that of float16 alone, which keeps `least_db`. Every
    round's budget is corrected by what the last choice really added, against what was predicted. Where `_ROUNDS` rounds
    all failed, each further one halves the budget, down to float16 itself.
    """
    allowed = 10 ** (-least_db / 10)
    budget, too_much, best_noise = allowed - base, float("inf"), base
    best: dict[str, str] | None = None
    tried: list[dict[str, str]] = []
    rounds: list[dict[str, float]] = []
    while best is None or len(rounds) < _ROUNDS:
        chosen = allocate(layers, min(budget, _BELOW * too_much))
        if (best is not None and _bytes(layers, chosen) >= _bytes(layers, best)) or chosen in tried:
            break  # nothing to gain
        tried.append(chosen)
        forms = _forms(chosen)
        predicted = sum(layers[name][form][1] for name, form in chosen.items())
        noise = check(forms) if forms else base
        size, measured = _bytes(layers, chosen), decibels(noise)
        rounds.append(
            {"weight_bytes": size, "predicted_db": round(decibels(base + predicted), 2)}
            | {"measured_db": round(measured, 2)}
        )
        log(
            f"--min-snr {least_db:g}: {len(forms)} of {len(layers)} layers compressed, {format_bytes(size)}:"
            f" {measured:.2f} dB{'' if noise <= allowed else ', too little'}"
        )
        if noise > allowed:
            too_much = predicted
            budget = predicted * ((allowed - base) / (noise - base) if len(rounds) < _ROUNDS else 0.5)
            continue
        best, best_noise = chosen, noise
        if measured - least_db <= _CLOSE_ENOUGH_DB:
            break
        budget *= (allowed - base) / max(noise - base, _LEAST_ADDED * (allowed - base))
    if not _forms(best or {}):
        log(f"warning: --min-snr {least_db:g}: only float16 keeps it: no layer is compressed")
    return _forms(best or {}), {
        "asked_db": least_db,
        "float16_db": round(decibels(base), 2),
        "kept_db": round(decibels(best_noise), 2),
        "rounds": rounds,
    }


def _bytes(layers: Options, chosen: Mapping[str, str]) -> int:
    return sum(layers[name][form][0] for name, form in chosen.items())


def _forms(chosen: Mapping[str, str]) -> dict[str, Compression]:
    return {name: COMPRESSIONS[form] for name, form in chosen.items() if form != encoder_forms.NONE}


def measure(
    fastvit: nn.Module,
    options: Mapping[str, Sequence[Compression]],
    pixels: Sequence[np.ndarray],
    cache: Path | None = None,
) -> Noise:
    """The noise of each layer in each of its forms, the other layers in float32.

    pixels: arrays (1, 3, S, S). What `cache` has of this very encoder on these very pictures is taken from there; it is
    written after every layer.
    """
    key = _key(fastvit, pixels)
    known = _known(cache, key) if cache is not None else {}
    todo = [(name, form) for name, forms in options.items() for form in forms if form.name not in known.get(name, {})]
    total = sum(map(len, options.values()))
    if cache is not None:
        log(f"{cache}: {total - len(todo)} of {total} sensitivities are known; an interrupted run goes on from there")
    if todo:
        with torch.inference_mode(), progress("sensitivity (layers x forms)", len(todo)) as advance:
            runs = _Tails(fastvit, pixels)
            for position, (name, form) in enumerate(todo):
                known.setdefault(name, {})[form.name] = runs.noise_of(name, form)
                advance()
                if cache is not None and (position + 1 == len(todo) or todo[position + 1][0] != name):
                    write_file(cache, json.dumps({"key": key, "noise": known}, indent=1).encode())
    return {name: {form.name: known[name][form.name] for form in forms} for name, forms in options.items()}


class _Tails:
    """Runs the encoder from the stage that changed: what enters each stage is kept for every picture."""

    def __init__(self, fastvit: nn.Module, pixels: Sequence[np.ndarray]) -> None:
        self.layers: dict[str, Any] = dict(fastvit.named_modules())
        self.steps = [fastvit.stem, *fastvit.stages, fastvit.final_conv]  # type: ignore[misc]
        self.entering = [[torch.from_numpy(array).contiguous(memory_format=torch.channels_last)] for array in pixels]
        for values in self.entering:
            for step in self.steps:
                values.append(step(values[-1]))  # type: ignore[operator]

    def noise_of(self, layer: str, form: Compression) -> float:
        """Relative noise power of the features when one layer's weight is in this form, mean over the pictures; the
        weight is put back."""
        weight = self.layers[layer].weight
        original = weight.detach().clone()
        small = compress_weight(original.half().numpy(), form)
        weight.data.copy_(torch.from_numpy(small.decode().astype(np.float32)))
        kind, number, *_ = layer.split(".")
        first = 1 + int(number) if kind == "stages" else 0 if kind == "stem" else len(self.steps) - 1
        powers = []
        for values in self.entering:
            x = values[first]
            for step in self.steps[first:]:
                x = step(x)  # type: ignore[operator]
            powers.append(float((x - values[-1]).square().sum() / values[-1].square().sum()))
        weight.data.copy_(original)
        return sum(powers) / len(powers)


def _checker(
    encoder: Encoder, pictures: Callable[[int], Any], write: Write, folder: Path
) -> Callable[[Mapping[str, Compression]], float]:
    """The noise of a package written with some forms, as typed, at the native size; of the worst picture."""
    references: list[np.ndarray] = []  # the float32 encoder's features of each picture: the same in every round

    def check(forms: Mapping[str, Compression]) -> float:
        package = folder / "check.mlpackage"
        write(forms, package)
        executor = mil.load(package)
        pixels = list(pictures(executor.inputs[contract.INPUT].shape[-1] or 0))
        if not references:
            with torch.inference_mode():
                references.extend(encoder(torch.from_numpy(array)).numpy() for array in pixels)
        features = (executor.predict({contract.INPUT: array})[contract.OUTPUT] for array in pixels)
        noise = max(map(relative_noise, references, features))
        shutil.rmtree(package)
        return noise

    return check


def _why(options: Mapping[str, tuple[int, float]], faults: Sequence[str | None]) -> str:
    """The reason why a layer stayed float16; `faults` are those of each form for its shape."""
    noises = {form: noise for form, (_, noise) in options.items() if form != encoder_forms.NONE}
    if not noises:
        return "; ".join(dict.fromkeys(fault for fault in faults if fault))
    least = min(noises, key=lambda form: noises[form])
    return f"even {least} costs more noise ({decibels(noises[least]):.1f} dB alone) than its bytes are worth"


def relative_noise(expected: np.ndarray, actual: np.ndarray) -> float:
    """Power of the difference over that of `expected`, in float64."""
    expected = expected.astype(np.float64)
    return float(((actual - expected) ** 2).sum() / (expected**2).sum())


def decibels(noise: float) -> float:
    """A relative noise power as a signal-to-noise ratio."""
    return float("inf") if noise == 0 else float(-10 * np.log10(noise))


def _key(fastvit: nn.Module, pixels: Sequence[np.ndarray]) -> str:
    """sha256 of everything that decides a sensitivity."""
    digest = hashlib.sha256()
    for name, tensor in fastvit.named_parameters():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().data)
    for array in pixels:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _known(cache: Path, key: str) -> Noise:
    """Earlier measurements of the same encoder; {} where the file is of another, or damaged."""
    if not cache.is_file():
        return {}
    try:
        document = load(cache)
        if document["key"] == key:
            return {str(layer): {**forms} for layer, forms in document["noise"].items()}
    except (Unreadable, KeyError, TypeError, AttributeError):
        pass
    log(f"{cache}: damaged, or of another encoder or other pictures: measured anew")
    return {}
