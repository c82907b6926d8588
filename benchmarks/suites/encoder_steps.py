"""Steps of `benchmarks encoder` that need the models; each is called in a process of its own (`suite.call`)."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.suites.steps import plain_encoder, share
from fastvlm.common import threads
from fastvlm.common.cli import log, progress

FORCED_HEADROOM = 2.0**13  # asked of a checkpoint that needs no power of two
STREAMS = (3, 4)  # timm's numbers of the stages whose streams are scaled
RIVAL_FORM, SCALED_FORM = "palette4-g16", "palette4-g16-scaled"
# What the attentions add to the streams, times this: 1 leaves 21 dB where every LayerNorm of a stage is lost.
ATTENTION_SCALE = 8.0
PICTURES = 6  # that an SNR is the mean over


# Range-safe float16


def ordinary_checkpoint(target: str, shape: str) -> None:
    """Write the random encoder in float32."""
    from fastvlm.synthetic.checkpoint import write_checkpoint

    write_checkpoint(Path(target), shape=shape, dtype="float32")


def hot_checkpoints(target: str, shape: str, image_size: int, peaks: list[str]) -> dict[str, float]:
    """Write `target`-PEAK, whose streams peak near PEAK on the built-in pictures, for each peak; `target` is as it was.

    The attentions of all add ATTENTION_SCALE times as much. Returns the peak of the lesser stage of each.
    """
    before = _stream_peaks(_hot(target, shape), image_size)
    reached = {}
    for peak in peaks:
        # the nearest power of two, which leaves the weights' digits as they are
        scale = {stage: 2.0 ** round(math.log2(float(peak) / before[stage])) for stage in STREAMS}
        path = _hot(f"{target}-{peak}", shape, stream_scale=scale)
        reached[peak] = min(_stream_peaks(path, image_size).values())
    return reached


def hot_gelus(target: str, shape: str, image_size: int, peaks: list[str]) -> dict[str, float]:
    """Write `target`-PEAK, whose last patch embedding reaches PEAK after its GELU on N(0, 1) noise, for each peak.

    Returns what each reaches.
    """
    from fastvlm.data import pictures
    from model_export.encoder import ranges

    noise = [pictures.noise(image_size)]

    def reached(checkpoint: str) -> float:
        return ranges.measure_modules(plain_encoder(checkpoint), noise)["stages.4.downsample.proj.1"].largest

    before = reached(_hot(target, shape))
    return {
        peak: reached(_hot(f"{target}-{peak}", shape, patch_scale=float(peak) / before)) for peak in peaks
    }  # fmt: skip


def _hot(target: str, shape: str, **scales: Any) -> str:
    from fastvlm.synthetic.checkpoint import write_checkpoint

    common: dict[str, Any] = {"dtype": "float32", "attention_scale": ATTENTION_SCALE, "low_pass": True}
    return str(write_checkpoint(Path(target), shape=shape, **common, **scales))


def _stream_peaks(checkpoint: str, image_size: int) -> dict[int, float]:
    """Largest magnitude on the residual stream of each of STREAMS, in float32 on the built-in pictures."""
    from fastvlm.data import pictures
    from fastvlm.data.preprocessing import read_preprocessor
    from model_export.encoder import ranges

    plain = plain_encoder(checkpoint)
    found = ranges.measure_modules(plain, pictures.pixels(read_preprocessor(checkpoint), image_size))
    peaks = {}
    for stage in STREAMS:
        names = [f"stages.{stage}.pos_emb.reparam_conv"]
        for i in range(len(plain.stages[stage].blocks)):
            names += [f"stages.{stage}.blocks.{i}.mlp:input", f"stages.{stage}.blocks.{i}"]
        peaks[stage] = max(found[name].largest for name in names)
    return peaks


def forced_export(checkpoint: str, target: str, image_size: int) -> None:
    """Export with FORCED_HEADROOM, so that most values carry a power of two and most GELUs are in their scaled form."""
    from functools import partial
    from unittest.mock import patch

    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from fastvlm.data import pictures
    from fastvlm.data.preprocessing import read_preprocessor
    from model_export.config import ExportConfig
    from model_export.encoder import fp16, vision

    folder, preprocessor = Path(target), read_preprocessor(checkpoint)
    config = ExportConfig(Path(checkpoint), folder.parent / "out", image_size=image_size)
    with patch.object(fp16, "choose", partial(fp16.choose, headroom=FORCED_HEADROOM)):
        vision.export_vision(
            open_checkpoint(checkpoint), config, folder, lambda size: pictures.pixels(preprocessor, size)
        )


def snr(checkpoint: str, image_size: int, packages: dict[str, tuple[str, str]]) -> dict[str, dict[str, float]]:
    """SNR in dB of packages {key: (policy, path)} against the plain PyTorch module in float32.

    "" is the mean over pictures that no export was calibrated on (one alone is 1 dB off it), "noise_" the same on
    N(0, 1) noise.

    A result that is not finite has -inf.
    """
    import numpy as np

    from benchmarks.metrics import snr_db
    from fastvlm.data import pictures

    inputs = {
        "": _pictures(checkpoint, image_size),
        "noise_": [pictures.noise(image_size, seed) for seed in range(1, PICTURES + 1)],
    }
    expected = {kind: [_features(checkpoint, pixels) for pixels in drawn] for kind, drawn in inputs.items()}
    found: dict[str, dict[str, float]] = {kind: {} for kind in inputs}
    with progress("comparing packages", len(packages)) as advance:
        for key, (policy, package) in packages.items():
            compute = _executor(package, policy)
            for kind, drawn in inputs.items():
                values = [snr_db(wanted, compute(pixels)) for wanted, pixels in zip(expected[kind], drawn)]
                found[kind][key] = float(np.mean(values))
            advance()
    return found


def _executor(package: str, policy: str) -> Callable[[Any], Any]:
    """Pixels to features (1, N, C) float32, of any package of this encoder, whatever its types and layout."""
    import numpy as np

    from model_export import mil
    from model_export.mil.types import NUMPY

    executor = mil.load(package, compute=policy)
    ((name, kind),) = executor.inputs.items()

    def features(pixels: Any) -> Any:
        (found,) = executor.predict({name: pixels.astype(NUMPY[kind.dtype])}).values()
        if found.ndim == 4:  # the plain script's: a map (1, C, H, W)
            found = found.reshape(*found.shape[:2], -1).transpose(0, 2, 1)
        return found.astype(np.float32)

    return features


def _pictures(checkpoint: str, image_size: int) -> list[Any]:
    """Pixels (1, 3, S, S) of the first questions of the demo set's test half."""
    from dataclasses import replace

    from fastvlm.data import scenes
    from fastvlm.data.preprocessing import read_preprocessor

    prepare = replace(read_preprocessor(checkpoint), image_size=image_size)
    return [prepare(question.image) for question in scenes.questions(PICTURES)]


def _features(checkpoint: str, pixels: Any) -> Any:
    """The plain PyTorch encoder's features (1, N, C) of a picture."""
    import torch

    with torch.inference_mode():
        features = plain_encoder(checkpoint).forward_features(torch.from_numpy(pixels))
    return features.flatten(2).transpose(1, 2).numpy()


def scaling(artefact: str) -> dict[str, float]:
    """Of an exported encoder: the operations that powers of two added and their share of the bytes moved, float32
    operations and the audit's findings."""
    from model_export import contract
    from model_export.artefact import read_manifest

    facts = read_manifest(Path(artefact))["vision"]
    added = facts.get("scaling", {"operations": 0, "byte_share": 0.0})
    return {
        "added": added["operations"],
        "byte_share": added["byte_share"],
        "float32": len(facts.get("float32_operations", ())),
        "findings": audited(str(Path(artefact) / contract.PACKAGE))["findings"],
    }


# The graph, and several resolutions in one package


def audited(package: str) -> dict[str, Any]:
    """Findings of a package's audit, and how many of its operations only move data, by kind."""
    from model_export.audit.audit import audit

    document = audit(Path(package))
    (function,) = document["functions"].values()
    moves = {kind: function["data_movement"][kind] for kind in ("transpose", "reshape", "squeeze")}
    return {"findings": len(function["findings"]), "moves": moves}


def function(checkpoint: str, package: str, size: int, single: str) -> dict[str, float]:
    """One function of a package against PyTorch ("snr" in dB, as typed) and against the package of its size alone (the
    largest "difference")."""
    import numpy as np

    from benchmarks.metrics import snr_db
    from model_export import contract, mil

    inputs = {contract.INPUT: _pictures(checkpoint, size)[0]}
    got = mil.load(Path(package), function_name=contract.function_name(size)).predict(inputs)[contract.OUTPUT]
    alone = mil.load(Path(single)).predict(inputs)[contract.OUTPUT]
    expected = _features(checkpoint, inputs[contract.INPUT])
    return {"snr": snr_db(expected, got), "difference": float(np.abs(got - alone).max())}


def package_sizes(packages: list[str]) -> list[int]:
    """Bytes of all files of each package."""
    return [sum(path.stat().st_size for path in Path(one).rglob("*") if path.is_file()) for one in packages]


# Compressed weights


def palettization(checkpoint: str) -> dict[str, Any]:
    """Our palettes and coremltools' (`palettize_weights`, k-means) of the convolution weights that groups of 16 divide.

    Returns "seconds" of each on one core, tensor by tensor in turn, with those of a per-channel scale; "errors", pairs
    of squared errors by tensor; and "scaled_size", bytes stored with the scale over fp16's.
    """
    import os

    os.environ.update(threads.environment(1))  # before numpy is imported
    import numpy as np

    from model_export.encoder import compress
    from quantization.coreml.compression import COMPRESSIONS, applies, nbytes
    from quantization.coreml.compression import compress as store

    _coremltools_palette(np.ones((16, 1), np.float16), 4, 16)  # its imports are not its time
    weights, form = compress.weights(_prepared(checkpoint)), COMPRESSIONS[RIVAL_FORM]
    chosen = {name: weight for name, weight in weights.items() if applies(weight.shape, form) is None}
    seconds, errors = {"ours": 0.0, "coremltools": 0.0}, []
    with progress("palettes, ours and coremltools'", len(chosen)) as advance:
        for name, weight in chosen.items():
            start = time.perf_counter()
            ours = store(weight, form)
            middle = time.perf_counter()
            theirs = _coremltools_palette(weight, form.bits, form.group)
            seconds["coremltools"] += time.perf_counter() - middle
            seconds["ours"] += middle - start
            pair = [np.square(weight.astype(np.float64) - decoded).sum() for decoded in (ours.decode(), theirs())]
            errors.append(pair)
            if pair[0] > pair[1]:
                log(f"{name} {list(weight.shape)}: squared error {pair[0]:.8g}, coremltools' {pair[1]:.8g}")
            advance()
    start, stored, plain = time.perf_counter(), 0, 0
    for weight in weights.values():
        scaled = COMPRESSIONS[SCALED_FORM]
        plain += weight.nbytes
        if applies(weight.shape, scaled) is None:
            store(weight, scaled)
            stored += nbytes(weight.shape, scaled)
        else:
            stored += weight.nbytes
    seconds["scaled"] = time.perf_counter() - start
    return {"seconds": seconds, "errors": errors, "scaled_size": stored / plain}


def _coremltools_palette(weight: Any, bits: int, group: int | None) -> Callable[[], Any]:
    """What `palettize_weights` makes of a weight; call what is returned to decode it."""
    from model_export.encoder.coreml import coremltools

    coremltools()  # which imports it quietly
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    blocks = [group or 0] + [0] * (weight.ndim - 1)
    made = palettize_weights.blockwise_compress(weight, "KMEANS", bits, blocks, channel_axis=0)
    return lambda: constexpr_lut_to_dense.decompress(made.indices, made.lut, None)


def _prepared(checkpoint: str) -> Any:
    """The encoder whose weights an export would store, before float16's powers of two."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from model_export.encoder import vision
    from model_export.encoder.channel_first import channel_first

    return channel_first(vision.folded_encoder(open_checkpoint(checkpoint))[0])


def sizes(checkpoint: str, package: str) -> dict[str, Any]:
    """Bytes of the encoder's convolution weights in every form ("fp16": as they are), by the forms' own arithmetic; and
    the bytes of `package`'s weight file over what is predicted for RIVAL_FORM."""
    from model_export import encoder_forms
    from model_export.encoder import compress
    from model_export.encoder.package import WEIGHTS
    from quantization.coreml.compression import COMPRESSIONS

    encoder = _prepared(checkpoint)
    shapes = compress.layer_shapes(encoder)
    found = {
        name: compress.size_of(shapes, compress.assign(encoder_forms.load(name), shapes).forms) for name in COMPRESSIONS
    }
    biases = 2 * sum(layer.bias.numel() for layer in encoder.modules() if getattr(layer, "bias", None) is not None)
    written = (Path(package) / WEIGHTS).stat().st_size
    return {
        "weight_bytes": {encoder_forms.NONE: compress.size_of(shapes, {}), **found},
        "predicted": found[RIVAL_FORM] + biases,
        "written": written,
    }


def curve(checkpoint: str, count: int, artefacts: dict[str, str]) -> dict[str, Any]:
    """Of encoders (artefact folders) in front of PyTorch's language model: package bytes, SNR in dB as typed over all
    pictures, and the share of greedy answers that are the same as with PyTorch's encoder; by the artefact's name."""
    from dataclasses import replace

    import numpy as np

    import fastvlm
    from benchmarks.metrics import snr_db
    from fastvlm.data import scenes
    from model_export import contract, runtime

    questions = list(scenes.questions(count))
    model = fastvlm.load(checkpoint)
    encoders = {name: runtime.ExecutorVision(Path(artefact)) for name, artefact in artefacts.items()}
    pixels = [model.preprocess(question.image) for question in questions]
    figures: dict[str, Any] = {}
    with progress("asking", count * (1 + len(encoders))) as advance:

        def ask(vision: Any) -> tuple[list[str], Any]:
            speaker, given = replace(model, vision=vision), []
            for question in questions:
                given.append(speaker.generate(question.question, question.image, max_new_tokens=64).strip())
                advance()
            return given, np.concatenate([vision.encode(array) for array in pixels])

        wanted, features = ask(model.vision)
        for name, encoder in encoders.items():
            given, actual = ask(encoder)
            figures[name] = {
                "bytes": package_sizes([str(Path(artefacts[name]) / contract.PACKAGE)])[0],
                "snr": snr_db(features, actual),
                "agreement": share(given, wanted),
            }
    return figures
