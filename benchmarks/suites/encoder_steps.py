"""Steps of encoder.json that need the models; each is called in a process of its own (`benchmarks.suites.step`)."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.suites.steps import plain_encoder
from fastvlm.common import threads
from fastvlm.common.cli import log, progress

FORCED_HEADROOM = 2.0**13  # asked of a checkpoint that needs no power of two
STREAMS = (3, 4)  # timm's numbers of the stages whose streams are scaled
RIVAL_FORM, SCALED_FORM = "palette4-g16", "palette4-g16-scaled"
# What the attentions add to the streams, times this: 1 leaves 21 dB where every LayerNorm of a stage is lost.
ATTENTION_SCALE = 8.0
PICTURES = 6  # that an SNR is the mean over


# Range-safe float16


def hot_streams(target: str, shape: str, image_size: str, *peaks: str) -> dict[str, float]:
    """Write `target`-PEAK, whose streams peak near PEAK on the built-in pictures, for each peak; `target` is as it was.

    The attentions of all add ATTENTION_SCALE times as much. Returns the peak of the lesser stage of each.
    """
    before = _stream_peaks(_hot(target, shape), int(image_size))
    reached = {}
    for peak in peaks:
        # the nearest power of two, which leaves the weights' digits as they are
        scale = {stage: 2.0 ** round(math.log2(float(peak) / before[stage])) for stage in STREAMS}
        path = _hot(f"{target}-{peak}", shape, stream=scale)
        reached[peak] = min(_stream_peaks(path, int(image_size)).values())
    return reached


def hot_gelus(target: str, shape: str, image_size: str, *peaks: str) -> dict[str, float]:
    """Write `target`-PEAK, whose last patch embedding reaches PEAK after its GELU on N(0, 1) noise, for each peak.

    Returns what each reaches.
    """
    from fastvlm.data import pictures
    from model_export.encoder import ranges

    noise = [pictures.noise(int(image_size))]

    def reached(checkpoint: str) -> float:
        return ranges.measure_modules(plain_encoder(checkpoint), noise)["stages.4.downsample.proj.1"].largest

    before = reached(_hot(target, shape))
    return {
        peak: reached(_hot(f"{target}-{peak}", shape, patch=float(peak) / before)) for peak in peaks
    }  # fmt: skip


def _hot(target: str, shape: str, **scales: Any) -> str:
    from fastvlm.synthetic.checkpoint import write_checkpoint
    from fastvlm.synthetic.heat import heat

    return str(heat(write_checkpoint(Path(target), shape=shape), attention=ATTENTION_SCALE, low_pass=True, **scales))


def _stream_peaks(checkpoint: str, image_size: int) -> dict[int, float]:
    """Largest magnitude on the residual stream of each of STREAMS, in float32 on the built-in pictures."""
    from fastvlm.data import pictures
    from fastvlm.data.preprocessing import read_preprocessor
    from model_export.encoder import ranges

    plain = plain_encoder(checkpoint)
    modules = ranges.measure_modules(plain, pictures.pixels(read_preprocessor(checkpoint), image_size))
    peaks = {}
    for stage in STREAMS:
        names = [f"stages.{stage}.pos_emb.reparam_conv"]
        for i in range(len(plain.stages[stage].blocks)):
            names += [f"stages.{stage}.blocks.{i}.mlp:input", f"stages.{stage}.blocks.{i}"]
        peaks[stage] = max(modules[name].largest for name in names)
    return peaks


def forced_export(checkpoint: str, target: str, image_size: str) -> None:
    """Export with FORCED_HEADROOM, so that most values carry a power of two and most GELUs are in their scaled form."""
    from functools import partial
    from unittest.mock import patch

    from model_export.config import ExportConfig
    from model_export.encoder import fp16
    from model_export.export import export, plan

    config = ExportConfig(Path(checkpoint), Path(target), image_size=int(image_size))
    with patch.object(fp16, "choose", partial(fp16.choose, headroom=FORCED_HEADROOM)):
        export(plan(config, ("vision",)))


def snr(checkpoint: str, image_size: str, **packages: str) -> dict[str, dict[str, float]]:
    """SNR in dB of packages (POLICY:PATH) against the plain PyTorch module in float32, by their names.

    "picture" is the mean over pictures that no export was calibrated on (one alone is 1 dB off it), "noise" the same on
    N(0, 1) noise. A result that is not finite has -inf.
    """
    import numpy as np

    from benchmarks.metrics import snr_db
    from fastvlm.data import pictures

    size = int(image_size)
    inputs = {
        "picture": _pictures(checkpoint, size),
        "noise": [pictures.noise(size, seed) for seed in range(1, PICTURES + 1)],
    }
    plain = plain_encoder(checkpoint)
    expected = {kind: [_features(plain, pixels) for pixels in drawn] for kind, drawn in inputs.items()}
    means: dict[str, dict[str, float]] = {kind: {} for kind in inputs}
    with progress("comparing packages", len(packages)) as advance:
        for name, policy_and_path in packages.items():
            policy, _, path = policy_and_path.partition(":")
            compute = _executor(path, policy)
            for kind, drawn in inputs.items():
                values = [snr_db(wanted, compute(pixels)) for wanted, pixels in zip(expected[kind], drawn)]
                means[kind][name] = float(np.mean(values))
            advance()
    return means


def _executor(package: str, policy: str) -> Callable[[Any], Any]:
    """Pixels to features (1, N, C) float32, of any package of this encoder, whatever its types and layout."""
    import numpy as np

    from model_export import mil
    from model_export.mil.types import NUMPY

    executor = mil.load(package, compute=policy)
    ((name, kind),) = executor.inputs.items()

    def features(pixels: Any) -> Any:
        (output,) = executor.predict({name: pixels.astype(NUMPY[kind.dtype])}).values()
        if output.ndim == 4:  # the plain script's: a map (1, C, H, W)
            output = output.reshape(*output.shape[:2], -1).transpose(0, 2, 1)
        return output.astype(np.float32)

    return features


def _pictures(checkpoint: str, image_size: int) -> list[Any]:
    """Pixels (1, 3, S, S) of the first questions of the demo set's test half."""
    from dataclasses import replace

    from fastvlm.data import scenes
    from fastvlm.data.preprocessing import read_preprocessor

    prepare = replace(read_preprocessor(checkpoint), image_size=image_size)
    return [prepare(question.image) for question in scenes.questions(PICTURES)]


def _features(plain: Any, pixels: Any) -> Any:
    """The features (1, N, C) of a picture by timm's encoder."""
    import torch

    with torch.inference_mode():
        features = plain.forward_features(torch.from_numpy(pixels))
    return features.flatten(2).transpose(1, 2).numpy()


def function(checkpoint: str, package: str, image_size: str, single: str) -> dict[str, float]:
    """One function of a package against PyTorch ("snr" in dB, as typed) and against the package of its size alone (the
    largest "difference")."""
    import numpy as np

    from benchmarks.metrics import snr_db
    from model_export import contract, mil

    inputs = {contract.INPUT: _pictures(checkpoint, int(image_size))[0]}
    name = contract.function_name(int(image_size))
    got = mil.load(Path(package), function_name=name).predict(inputs)[contract.OUTPUT]
    alone = mil.load(Path(single)).predict(inputs)[contract.OUTPUT]
    expected = _features(plain_encoder(checkpoint), inputs[contract.INPUT])
    return {"snr": snr_db(expected, got), "difference": float(np.abs(got - alone).max())}


def palettization(checkpoint: str) -> dict[str, float]:
    """Our palettes and coremltools' (`palettize_weights`, k-means) of the convolution weights that groups of 16 divide.

    Returns the seconds on one core of "ours" and "coremltools", tensor by tensor in turn, and of "scaled", with a scale
    for each channel; "tensors"; squared errors, ours over coremltools', of the "worst" and of "all", and how many are
    "worse"; and "scaled_size", bytes stored with the scale over fp16's.
    """
    os.environ.update(threads.environment(1))  # before numpy is imported
    import numpy as np

    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from model_export.encoder import compress, vision
    from model_export.encoder.channel_first import channel_first
    from quantization.coreml.compression import COMPRESSIONS, applies, nbytes
    from quantization.coreml.compression import compress as store

    _coremltools_palette(np.ones((16, 1), np.float16), 4, 16)  # its imports are not its time
    weights = compress.weights(channel_first(vision.folded_encoder(open_checkpoint(checkpoint))[0]))
    form, scaled = COMPRESSIONS[RIVAL_FORM], COMPRESSIONS[SCALED_FORM]
    seconds, errors, stored = {"ours": 0.0, "coremltools": 0.0, "scaled": 0.0}, [], 0
    with progress("palettes, ours and coremltools'", len(weights)) as advance:
        for name, weight in weights.items():
            if applies(weight.shape, form) is None:
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
            start, fits = time.perf_counter(), applies(weight.shape, scaled) is None
            if fits:
                store(weight, scaled)
            stored += nbytes(weight.shape, scaled) if fits else weight.nbytes
            seconds["scaled"] += time.perf_counter() - start
            advance()
    return seconds | {
        "tensors": len(errors),
        "worst": max(ours / theirs if theirs else 1.0 + (ours > 0) for ours, theirs in errors),
        "worse": sum(bool(ours > theirs) for ours, theirs in errors),
        "all": sum(ours for ours, _ in errors) / sum(theirs for _, theirs in errors),
        "scaled_size": stored / sum(weight.nbytes for weight in weights.values()),
    }


def _coremltools_palette(weight: Any, bits: int, group: int | None) -> Callable[[], Any]:
    """Palettize a weight by coremltools' `palettize_weights`; returns the function that decodes it."""
    from model_export.encoder.coreml import coremltools

    coremltools()  # which imports it quietly
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    blocks = [group or 0] + [0] * (weight.ndim - 1)
    made = palettize_weights.blockwise_compress(weight, "KMEANS", bits, blocks, channel_axis=0)
    return lambda: constexpr_lut_to_dense.decompress(made.indices, made.lut, None)
