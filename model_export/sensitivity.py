"""The smallest encoder that keeps a signal-to-noise ratio: each layer's sensitivity measured, then bytes against noise.

A layer's sensitivity to a form is the noise in the encoder's features when its weight alone is in that form, relative to
the features' power, mean over the pictures. Noise of different layers adds (their errors are independent), so a choice
for all layers is an allocation; what it really keeps is measured on the written package, and the budget corrected.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastvlm.cli import log, progress
from fastvlm.errors import UserError
from model_export import compress, contract, mil
from model_export.compress import Assignment
from model_export.config import DEPLOYMENT_TARGETS, ExportConfig
from quantization.compression import COMPRESSIONS, Compression, allocate, nbytes
from quantization.compression import compress as compress_weight

# What is tried on each layer: from nearly free to smallest. 8-bit palettes of groups are larger than int8 and no better.
CANDIDATES = ("palette8", "int8", "palette6", "palette6-g16", "palette4", "palette4-g16", "int4-b32")
# Sensitivities are relative, and hardly depend on the resolution; measuring at 1024 would take 16 times as long.
MEASURED_AT = 256
_ROUNDS = 5  # packages written until one keeps the ratio
_CLOSE_ENOUGH_DB = 0.25  # above it; more bytes are not worth another package

Noise = dict[str, dict[str, float]]  # layer -> form -> noise power relative to the features'
Write = Callable[[Mapping[str, Compression], Path], Any]


def search(
    fastvit: nn.Module, config: ExportConfig, pictures: Callable[[int], Any], write: Write, folder: Path
) -> tuple[Assignment, dict[str, Any]]:
    """Forms for a prepared encoder that keep `config.min_snr` dB as typed on the pictures, and facts for the manifest.

    `write(forms, package)` writes a package; temporary ones go into `folder`. Sensitivities are kept in the file
    `OUTPUT_DIR.sensitivity.json`, so that an interrupted search goes on, and the next one (another ratio) is quick.

    Raises UserError when float16 alone does not keep the ratio.
    """
    assert config.min_snr is not None
    shapes = {name: weight.shape for name, weight in compress.weights(fastvit).items()}
    legal = [COMPRESSIONS[name] for name in CANDIDATES if _legal(COMPRESSIONS[name], config.deployment_target)]
    candidates = {
        name: [form for form in legal if compress.fault_of(shape, form, shapes) is None]
        for name, shape in shapes.items()
    }
    small = list(pictures(min(MEASURED_AT, config.image_size or MEASURED_AT)))
    cache = config.output_dir.with_name(config.output_dir.name + ".sensitivity.json")
    noise = measure(fastvit, candidates, small, cache)
    layers = {
        name: {compress.NONE: (2 * int(np.prod(shape)), 0.0)}
        | {form.name: (nbytes(shape, form), noise[name][form.name]) for form in candidates[name]}
        for name, shape in shapes.items()
    }
    allowed = 10 ** (-config.min_snr / 10)
    check = _Check(fastvit, pictures, write, folder)
    base = check({})
    if base > allowed:
        raise UserError(
            f"--min-snr {config.min_snr:g}: float16 alone keeps {_decibels(base):.1f} dB on these pictures: ask for less"
        )
    budget, best, rounds = allowed - base, dict[str, str](), []
    got = base
    for _ in range(_ROUNDS):
        chosen = {name: form for name, form in allocate(layers, budget).items() if form != compress.NONE}
        got = check({name: COMPRESSIONS[form] for name, form in chosen.items()})
        rounds.append({"predicted": _decibels(base + budget), "measured": _decibels(got)})
        log(f"--min-snr: {len(chosen)} of {len(shapes)} layers compressed: {_decibels(got):.2f} dB")
        if got <= allowed:
            best = chosen
            if _decibels(got) - config.min_snr <= _CLOSE_ENOUGH_DB:
                break
        # What the layers really add, against what was predicted, corrects the budget.
        budget *= (allowed - base) / max(got - base, 1e-30) * (0.98 if got > allowed else 1.0)
    forms = {name: COMPRESSIONS[form] for name, form in best.items()}
    wide = {name: _why(name, candidates, layers) for name in shapes if name not in forms}
    facts = {
        "asked_db": config.min_snr,
        "float16_db": round(_decibels(base), 2),
        "measured_at": MEASURED_AT,
        "rounds": [{key: round(value, 2) for key, value in one.items()} for one in rounds],
    }
    return Assignment(forms, wide), facts


def measure(
    fastvit: nn.Module,
    candidates: Mapping[str, Sequence[Compression]],
    pixels: Sequence[np.ndarray],
    cache: Path | None = None,
) -> Noise:
    """The noise of each layer in each of its candidate forms, the other layers in float32.

    pixels: arrays (1, 3, S, S). What `cache` has of this very encoder on these very pictures is taken from there; it is
    written after every layer.
    """
    key = _key(fastvit, pixels)
    known = _read(cache, key)
    todo = [
        (name, form) for name, forms in candidates.items() for form in forms if form.name not in known.get(name, {})
    ]
    layers = dict(fastvit.named_modules())
    with torch.inference_mode(), progress("sensitivity (layers x forms)", len(todo)) as advance:
        runs = _Tails(fastvit, pixels) if todo else None
        for position, (name, form) in enumerate(todo):
            assert runs is not None
            weight = layers[name].weight
            original = weight.detach().clone()
            small = compress_weight(original.half().numpy(), form)
            weight.data.copy_(torch.from_numpy(small.decode().astype(np.float32)))
            known.setdefault(name, {})[form.name] = runs.noise(name)
            weight.data.copy_(original)
            advance()
            if cache is not None and (position + 1 == len(todo) or todo[position + 1][0] != name):
                _save(cache, key, known)
    return {name: {form.name: known[name][form.name] for form in forms} for name, forms in candidates.items()}


class _Tails:
    """Runs the encoder from the stage that changed: what enters each stage is kept for every picture."""

    def __init__(self, fastvit: nn.Module, pixels: Sequence[np.ndarray]) -> None:
        self.steps = [fastvit.stem, *fastvit.stages, fastvit.final_conv]  # type: ignore[misc]
        self.entering = [[torch.from_numpy(array).contiguous(memory_format=torch.channels_last)] for array in pixels]
        for values in self.entering:
            for step in self.steps:
                values.append(step(values[-1]))  # type: ignore[operator]

    def noise(self, layer: str) -> float:
        """Relative noise power of the features now, against those of the unchanged encoder; mean over the pictures."""
        part = layer.split(".")
        first = {"stem": 0, "stages": 1 + int(part[1]) if part[0] == "stages" else 0}.get(part[0], len(self.steps) - 1)
        powers = []
        for values in self.entering:
            x = values[first]
            for step in self.steps[first:]:
                x = step(x)  # type: ignore[operator]
            powers.append(float((x - values[-1]).square().sum() / values[-1].square().sum()))
        return sum(powers) / len(powers)


class _Check:
    """Relative noise power, as typed, of a package written with some forms, at the native size; worst picture."""

    def __init__(self, fastvit: nn.Module, pictures: Callable[[int], Any], write: Write, folder: Path) -> None:
        self.write, self.package = write, folder / "check.mlpackage"
        self.fastvit, self.pictures = fastvit, pictures

    def __call__(self, forms: Mapping[str, Compression]) -> float:
        import shutil

        self.write(forms, self.package)
        executor = mil.load(self.package)
        size = executor.inputs[contract.INPUT].shape[-1]
        assert size is not None
        powers = []
        for pixels in self.pictures(size):
            with torch.inference_mode():
                features = self.fastvit.forward_features(torch.from_numpy(pixels))  # type: ignore[operator]
            expected = features.flatten(2).transpose(1, 2).numpy().astype(np.float64)
            actual = executor.predict({contract.INPUT: pixels})[contract.OUTPUT]
            powers.append(float(((actual - expected) ** 2).sum() / (expected**2).sum()))
        del executor
        shutil.rmtree(self.package)
        return max(powers)


def _legal(form: Compression, target: str) -> bool:
    return DEPLOYMENT_TARGETS.index(form.target) <= DEPLOYMENT_TARGETS.index(target)


def _why(name: str, candidates: Mapping[str, Sequence[Compression]], layers: Mapping[str, Any]) -> str:
    if not candidates[name]:
        return "too few weights to be worth a form, or none that its shape allows"
    least = min(candidates[name], key=lambda form: layers[name][form.name][1])
    noise = layers[name][least.name][1]
    return f"even {least.name} costs more noise ({_decibels(noise):.1f} dB alone) than its bytes are worth"


def _decibels(noise: float) -> float:
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


def _read(cache: Path | None, key: str) -> Noise:
    """What was measured before of the same encoder; nothing where the file is of another, or damaged."""
    if cache is None or not cache.is_file():
        return {}
    try:
        document = json.loads(cache.read_text(encoding="utf-8"))
        if document["key"] == key:
            return dict(document["noise"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log(f"{cache}: of another encoder or other pictures: measured anew")
    return {}


def _save(cache: Path, key: str, noise: Noise) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    staging = cache.with_name(f".{cache.name}.{os.getpid()}")
    staging.write_text(json.dumps({"key": key, "noise": noise}, indent=1), encoding="utf-8")
    os.replace(staging, cache)
