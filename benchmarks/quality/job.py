"""One model measured for `evaluate` or a sweep; in a process of its own, so that its peak memory is its own."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import text_model
from fastvlm.common.cli import log
from fastvlm.common.errors import UserError
from fastvlm.data import conversations, default_questions
from fastvlm.data.default_questions import DEMO, DRAWN
from fastvlm.data.records import evenly
from model_export import contract
from model_export.coreai import contract as coreai
from model_export.coreai import process
from quantization.sweep.point import apart, peak_bytes

TEXT_ONLY = "text"  # a source of samples, as DEMO and DRAWN are, beside folders and files
_COUNTS = {DEMO: 200, DRAWN: 16}  # of questions; a folder's or file's: all
_OWN = 200  # of a fine-tune's own, evenly spaced: its records may be sorted


@dataclass(frozen=True)
class Job:
    """One model to ask, a checkpoint with `adapter` merged into it. `results` is the reference's file
    (`quality.reference_results`): written if `is_reference`.

    `samples`: "demo", "drawn", "text" (a text model, which continues the text), or a folder's or file's path; `count`
    of them at most (None: a default). `text`: a file's path; None: the answers are scored. Runners and resolution as in
    `model_export.runtime.load`.
    """

    model: str
    results: str
    is_reference: bool = False
    samples: str = DEMO
    count: int | None = None
    text: str | None = None
    vision: str = "auto"
    llm: str = "auto"
    resolution: int | None = None
    adapter: str | None = None


def evaluate(job: Job) -> dict[str, Any]:
    """Do the job in this process: `quality.reference_results` or `quality.quality` with sizes, `load_s` and `peak_gb`,
    the peak memory of this process and of Apple's runtime beside it."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM  # noqa: F401  imported before the clock runs

    from benchmarks.quality import quality

    folder = Path(job.model)
    start = time.perf_counter()
    adapter = None if job.adapter is None else Path(job.adapter)
    model = text_model.load(folder, job.vision, job.llm, job.resolution, adapter)
    loaded = time.perf_counter() - start
    text = quality.read_text(Path(job.text)) if job.text else None
    if isinstance(model, text_model.TextModel):
        if text is None:
            raise UserError(f"{folder}: a text model: expected a text to score")
        samples = quality.continuations(model.tokenizer, text)
    else:
        samples = choose(job.samples, job.count)
    if job.is_reference:
        result = quality.reference_results(model, samples, text, Path(job.results))
    else:
        result = quality.quality(model, samples, Path(job.results))
    result["figures"] |= sizes(folder)
    peak = peak_bytes() + process.peak_bytes()
    result["timings"] |= {"load_s": quality.figure(loaded), "peak_gb": float(f"{peak / 1e9:.4g}")}
    return result


def measured(job: Job) -> dict[str, Any]:
    """`evaluate` in a process of its own, so that its peak memory is its own. Raises what that raised."""
    return apart(evaluate, job)


def source(given: str | None, reference: Path, adapter: Path | None = None) -> str:
    """The source of the samples (see `Job`): as given, or what a fine-tune held out of its training, or the demo where
    the reference speaks its language, else drawn pictures."""
    if given in (DEMO, DRAWN):
        return given
    if given:
        return str(Path(given).resolve())
    own = default_questions.own(reference, adapter, default_questions.EVALUATION)
    if own is None:
        return default_questions.built_in(reference)
    log(f"questions: {own}, which the fine-tune held out of its training: --samples names others")
    return str(own.resolve())


def told(source: str) -> str:
    """A source's name, for a report."""
    own = Path(source).name == default_questions.EVALUATION
    return f"{Path(source).name}, held out of the fine-tune's training" if own else Path(source).name


def choose(source: str, count: int | None = None) -> list[conversations.Sample]:
    """The samples of a source (see `Job`). Raises UserError."""
    own = Path(source).name == default_questions.EVALUATION
    count = _COUNTS.get(source, _OWN if own else None) if count is None else count
    if source == DEMO:
        return conversations.demo_samples(count or 0)
    if source == DRAWN:
        return conversations.drawn_samples(count or 0)
    samples = conversations.load(source)
    return evenly(samples, count) if own and count is not None else samples[:count]


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of a model's folder, all files (but export.json, whose figures' digits are no weights) and by part."""
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files.pop(folder / contract.MANIFEST, None)
    total = {"bytes": sum(files.values())}
    for part, patterns in (
        ("vision", (f"{contract.PACKAGE}/*", contract.VISION_WEIGHTS, f"{coreai.ASSETS['vision']}/*")),
        ("language", (contract.WEIGHTS_GLOB, *(f"{coreai.ASSETS[role]}/*" for role in ("main", "embedding")))),
        ("projector", (contract.PROJECTOR_WEIGHTS,)),
    ):
        matching = [size for path, size in files.items() if any(_under(path, folder, glob) for glob in patterns)]
        if matching:
            total[f"bytes_{part}"] = sum(matching)
    return total


def _under(path: Path, folder: Path, glob: str) -> bool:
    relative = path.relative_to(folder)
    return relative.match(glob) if "/" not in glob else relative.parts[0] == glob.partition("/")[0]
