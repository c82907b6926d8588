"""The measurement of a sweep's point: an encoder and a language model, each exported once for all points that share it,
put together as `fastvlm export` would, and compared with the checkpoint (`quality`)."""

import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality import job
from benchmarks.shared_exports import Remembered, digest, export_apart
from benchmarks.ttft.runner import STAGES, one_round, stages_of, totals
from fastvlm.common.staging import once, replaced
from fastvlm.data.conversations import Sample
from quantization.recipe import recipe_from_json
from quantization.sweep import engine
from quantization.sweep.point import apart

# Repetitions of the first token's timing: at least so many, for so many seconds, at most so many.
TIMED, TIMED_SECONDS, TIMED_MOST = 5, 2.0, 25
# What a point and its exports import; none of it starts threads.
LIBRARIES = (
    "transformers.models.fast_vlm.modeling_fast_vlm", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.auto.tokenization_auto", "benchmarks.quality.quality", "benchmarks.ttft.models",
    "model_export.export", "model_export.runtime", "model_export.encoder.vision", "model_export.language.calibrate",
)  # fmt: skip


def measure(point: engine.Point, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Export a point (as far as it isn't yet), load it, and ask it. Figures and timings as `quality.quality`'s (but
    `encode_s`), and sizes, `bits_per_weight`, `load_s` and the stages of the time to first token, in seconds."""
    from benchmarks.quality import quality
    from model_export import runtime
    from model_export.coreai import process

    work = Path(settings["work"])
    with tempfile.TemporaryDirectory(dir=work, prefix="artefact.") as folder:
        manifest = put_together(point, settings, Path(folder))
        reference = work / "shared" / f"reference-{digest(settings['common'])}.zip"
        results = once(reference, partial(_ask_reference, settings))
        start = time.perf_counter()
        model = runtime.load(folder)
        loaded = time.perf_counter() - start
        samples = job.choose(settings["samples"], settings["count"])
        seeing = replace(model, vision=Remembered(model.vision, work, manifest))
        result = quality.quality(model=seeing, samples=samples, results=results)
        result["figures"] |= job.sizes(Path(folder)) | {"bits_per_weight": manifest["llm"]["bits_per_weight"]}
    result["timings"].pop("encode_s", None)  # of what was remembered
    result["timings"] |= {"load_s": quality.figure(loaded), "runners": model.runners, **first_token(model, samples)}
    result["timings"]["peak_beside"] = process.peak_bytes()
    return {name: result[name] for name in ("figures", "timings", "answers")}


def first_token(model: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """Medians in seconds of encoding, projection and prefill, and of their sum, for the first picture's question."""
    from benchmarks.ttft.models import ModelRunner

    sample = next((sample for sample in samples if sample.image is not None), None)
    if sample is None or sample.image is None:
        return {}
    question = {"prompt": sample.question, "question": sample.question, "tokens": 0}
    stages = stages_of(ModelRunner(model, sample.image(), question, {}))[: STAGES.index("prefill") + 1]
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) <= TIMED or (len(rounds) <= TIMED_MOST and time.perf_counter() - start < TIMED_SECONDS):
        spent, _ = one_round(stages, {}, {})
        rounds.append({**spent, **totals(spent)})
    keys = {"encode": "ttft_encode_s", "project": "ttft_project_s", "prefill": "ttft_prefill_s", "ttft_paper": "ttft_s"}
    return {
        key: statistics.median(times[stage] for times in rounds[1:]) for stage, key in keys.items()
    }  # after a warm-up


def _ask_reference(settings: Mapping[str, Any], target: Path) -> None:
    with replaced(target) as partial_file:
        reference = job.Job(
            model=settings["checkpoint"], results=str(partial_file), is_reference=True, samples=settings["samples"],
            count=settings["count"], text=settings["text"], adapter=settings["adapter"],
        )  # fmt: skip
        apart(job.evaluate, reference)


def put_together(point: engine.Point, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Put the point's artefact together in `folder`, out of links to the shared exports; returns its manifest."""
    from model_export import artefact

    exports = _exports(point, settings)
    manifests = [artefact.read_manifest(folder) for folder in exports]
    for export in exports:
        for name in artefact.files_in(export):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            os.link(export / name, target)
    first, last = manifests[0], manifests[-1]
    both = {"parts": ["vision", "llm"], "files": first["files"] | last["files"]}
    return artefact.write_manifest(folder, first | last | both)


def _exports(point: engine.Point, settings: Mapping[str, Any]) -> tuple[Path, ...]:
    """The folders that a point is put together from: two halves, or one Core AI bundle."""
    recipe = recipe_from_json(point["recipe"])
    of_language: dict[str, Any] = {"quant": point["recipe"]}
    if point.get("format") == "coreai":
        whole = of_language | {"format": "coreai", "image_size": point["resolution"]}
        return (_shared(settings, ("vision", "llm"), whole),)
    of_encoder = {"vision_quant": point["vision_quant"], "image_size": point["resolution"]}
    if recipe.vision:  # the recipe names the encoder's forms
        of_encoder |= of_language
    encoder = _shared(settings, ("vision",), of_encoder)
    if recipe.calibrates:  # on what the encoder gives
        of_language |= of_encoder
    language = _shared(settings, ("llm",), of_language, encoder if recipe.calibrates else None)
    return language, encoder  # the encoder's preprocessor is last, and stays: it has the resolution


def _shared(
    settings: Mapping[str, Any], parts: Sequence[str], options: dict[str, Any], encoder: Path | None = None
) -> Path:
    name = f"{'-'.join(parts)}-{digest(settings['common'], options)}"
    target = Path(settings["work"]) / "shared" / name
    return once(target, lambda folder: export_apart(settings, parts, options, folder, encoder))
