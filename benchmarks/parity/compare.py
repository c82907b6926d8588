"""Parity of an artefact with its checkpoint: both sides from disk, each stage against its tolerance.

Nothing here depends on the clock or on where the artefact lies: the same two folders give the same document on the same
machine, so that it can go into the manifest.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import metrics
from benchmarks.parity import language as language_parity
from benchmarks.parity import pictures, tolerances
from benchmarks.parity.encoders import Encoded, encode, encode_first, without_operations
from benchmarks.parity.language import Reading
from benchmarks.parity.pictures import COREAI_LIMIT, LIMIT, Picture
from benchmarks.parity.verdict import Row, document
from fastvlm.checkpoint.adapter_flag import titled
from fastvlm.common.cli import log, progress
from fastvlm.common.documents import load_object
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.model import streamed
from fastvlm.model.language import Language, TorchLanguage
from fastvlm.model.surface import FastVLM
from fastvlm.model.torch_parts import load_checkpoint
from model_export import contract
from model_export.artefact import fine_tuned, is_bundle, read_whole
from model_export.coreai.process import has_system_runtime
from model_export.coreai.runtime import projected
from model_export.mil.allocator import give_back, returned_buffers

MAX_NEW_TOKENS = 48  # of each answer
Seen = tuple[Row, np.ndarray, np.ndarray]  # of a picture: its row so far, both sides' merged embeddings (1, T, H)
Speaker = tuple[Language, Any]  # what one side answers with, and its tokenizer
_POSITIONS = 8  # of a prompt that a slow runtime reads, at 15 s each for the 0.5B model
BRIEF = (
    "Apple's interpreter takes hours for a whole prompt of this model, so one picture was compared, the first"
    f" {_POSITIONS} positions of its prompt, and no answer. With --parity-limit N (of parity: --limit N), or on"
    " macOS 27, N questions are."
)
_LARGE = 8 << 20  # bytes of a buffer: an MLP's activations of all prompts; faulting in smaller ones takes too long


def compare(
    reference: str | Path,
    candidate: str | Path,
    images: str | Path | None = None,
    limit: int | None = None,
    report: str | Path | None = None,
    vision: str = "auto",
    llm: str = "auto",
    command: str | None = None,
    name: str | None = None,
    resolution: int | None = None,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Compare an artefact with the checkpoint that it should be. Returns a JSON-able document (keys: `document`).

    `reference` is a checkpoint folder, run by PyTorch in float32 at the artefact's resolution, `adapter` the folder
    of one that is merged into it, as it was for the export; `candidate` an artefact folder, its halves run by
    `vision` and `llm` as in `model_export.runtime.load`. `images` is a folder of the user's pictures, `limit` how
    many of them and of the demo questions (None: LIMIT, or COREAI_LIMIT of a Core AI bundle). `report` is where the
    HTML page goes, `command` its origin, `name` what it calls the candidate (default: the folder's name).
    `resolution` is one of the artefact's (default: its native one).

    Raises UserError for folders or pictures that cannot be used, CheckFailed where both sides' arrays differ in shape.
    A broken tolerance is no exception: "passed" is False.
    """
    from model_export import runtime

    checkpoint, artefact = Path(reference), Path(candidate)
    with progress("parity: load"):
        manifest = read_whole(artefact)
        _warn_of_adapter(manifest, artefact, adapter)
        coreai = is_bundle(manifest)
        brief = limit is None and is_slow(manifest)
        limit = limit or (1 if brief else COREAI_LIMIT if coreai else LIMIT)
        chosen = pictures.choose(checkpoint, Path(images) if images else None, limit)
        pictures.check(chosen)
        actual = runtime.load(artefact, vision=vision, llm=llm, resolution=resolution)
        expected = at_size(load_checkpoint(checkpoint, streamed=True, adapter=adapter), actual.image_size)
    _check_comparable(expected, actual)
    operations: dict[str, Any] = {}
    if coreai:
        operations, expected = without_operations(manifest), projected(expected)
        if brief:
            operations |= {"brief": True, "absent": f"{BRIEF} {operations['absent']}"}
            log(f"parity: {BRIEF}")
    seen, thumbnails = [], []
    with progress("parity: encoders, pictures", len(chosen)) as advance:
        for picture in pictures.opened(chosen):
            if operations:
                encoded = encode(expected, actual, picture)
            else:
                operations, encoded = encode_first(artefact, expected, actual, picture, resolution)
            seen.append(see(expected, actual, picture, encoded))
            if report is not None:
                thumbnails.append(thumbnail(picture.image))
            advance()
    sides = {
        "reference": {"name": titled(checkpoint, adapter), "runners": expected.runners},
        "candidate": {"name": name or artefact.resolve().name, "runners": actual.runners},
    }
    speakers = (expected.language, expected.tokenizer), (actual.language, actual.tokenizer)
    del expected, actual  # and with them the encoders, before the language models need the memory
    gc.collect()
    rows = answer_briefly(*speakers, seen) if brief else answer(*speakers, seen)
    result = document(rows, operations, weight_family(artefact), sides)
    if report is not None:
        from benchmarks.parity.report import write

        write(Path(report), result, thumbnails, command)
    return result


def _warn_of_adapter(manifest: Mapping[str, Any], artefact: Path, adapter: Path | None) -> None:
    """Warn where one side is with an adapter and the other without: the figures will say so, but not why."""
    if "sources" not in manifest:  # made elsewhere: nobody knows
        return
    made = fine_tuned(manifest["sources"])
    if made and not adapter:
        log(f"warning: {artefact} was exported with an adapter ({made}): --adapter names it for the reference")
    if adapter and not made:
        log(f"warning: {artefact} was exported without an adapter, the reference is with {adapter}")


def at_size(model: FastVLM, image_size: int) -> FastVLM:
    """The model at another resolution: an artefact may be exported for one of its own (`--image-size`)."""
    if model.image_size == image_size:
        return model
    return replace(model, preprocessor=replace(model.preprocessor, image_size=image_size))


def _check_comparable(expected: FastVLM, actual: FastVLM) -> None:
    """Refuse sides whose settings differ: no figure could agree."""
    faults = [
        f"{what}: checkpoint {a}, artefact {b}"
        for what, a, b in (
            ("image strategy", expected.preprocessor.image_strategy, actual.preprocessor.image_strategy),
            ("vocabulary", len(expected.tokenizer), len(actual.tokenizer)),
        )
        if a != b
    ]
    if faults:
        raise UserError(
            f"reference and candidate cannot be compared: {'; '.join(faults)}: export the artefact from this checkpoint"
        )


def see(expected: FastVLM, actual: FastVLM, picture: Picture, encoded: Encoded) -> Seen:
    """Take one picture that both sides have encoded as far as the merged embeddings, each on its own features."""
    features, figures = encoded
    a, b = (
        model.merge(picture.question, [model.project(values)]) for model, values in zip((expected, actual), features)
    )
    if a.shape != b.shape:
        raise CheckFailed(f"{picture.name}: merged embeddings: got shape {b.shape}, expected {a.shape}")
    figures = figures | {"merged_snr": min(map(metrics.snr_db, a[0], b[0]))}
    return Row(picture.name, picture.source, picture.question, picture.truth, "", "", None, figures), a, b


def answer(expected: Speaker, actual: Speaker, seen: Sequence[Seen]) -> list[Row]:
    """Take pictures that both encoders have seen to the end of their answers, each side on its own embeddings."""
    with streamed.workers(), returned_buffers(_LARGE):
        theirs = _answers("candidate", actual[0], [embeds for *_, embeds in seen])
        drafts = [reading.tokens for reading in theirs]
        ours = _answers("reference", expected[0], [embeds for _, embeds, _ in seen], drafts)
        with progress("parity: prefill logits, pictures", len(seen)) as advance:
            for (row, *_), a, b in zip(seen, ours, theirs):
                logits = language_parity.logits_figures(expected[0], actual[0], (a.hidden, b.hidden))
                row.reference, row.candidate = _text(expected, a.tokens), _text(actual, b.tokens)
                row.divergence = _divergence(expected, actual, a, b)
                row.figures |= {
                    **logits,
                    "greedy_tokens": float(a.tokens == b.tokens),
                    "greedy_answers": float(row.reference == row.candidate),
                }
                advance()
    return [row for row, *_ in seen]


def answer_briefly(expected: Speaker, actual: Speaker, seen: Sequence[Seen]) -> list[Row]:
    """As `answer`, of the first positions of each prompt and without an answer."""
    for row, *sides in seen:
        states = [speaker[0].hidden(embeds[:, :_POSITIONS])[0][0] for speaker, embeds in zip((expected, actual), sides)]
        row.figures |= language_parity.logits_figures(expected[0], actual[0], (states[0], states[1]))
    return [row for row, *_ in seen]


def is_slow(manifest: Mapping[str, Any]) -> bool:
    """Whether an artefact is a Core AI bundle of a real size that the interpreter would have to run."""
    return is_bundle(manifest) and not has_system_runtime() and manifest["vision"]["channels"] > tolerances.NARROW


def _answers(
    side: str, language: Language, embeds: list[np.ndarray], drafts: list[list[int]] | None = None
) -> list[Reading]:
    """One side's readings of the prompts, at most MAX_NEW_TOKENS of each answer."""
    with progress(f"parity: answers of the {side}, tokens", MAX_NEW_TOKENS * len(embeds)) as advance:
        if drafts is None:
            readings = language_parity.answers(language, embeds, MAX_NEW_TOKENS, advance)
        else:
            readings = language_parity.answers_after(language, embeds, drafts, MAX_NEW_TOKENS, advance)
    if isinstance(language, TorchLanguage):
        streamed.forget(language.model)  # the memory is for the other side now
        give_back()
    return readings


def _text(speaker: Speaker, ids: Sequence[int]) -> str:
    return str(speaker[1].decode(ids, skip_special_tokens=True))


def _divergence(expected: Speaker, actual: Speaker, a: Reading, b: Reading) -> dict[str, Any] | None:
    """The place where two answers part: the text before it, each side's token (None: it ended) and rest, the margin.

    `margin` in nats is log p(reference's token) − log p(candidate's) by the reference; near 0 it was a tie. None where
    one of the two ended.
    """
    at = metrics.first_divergence(a.tokens, b.tokens)
    if at is None:
        return None
    common = _text(expected, a.tokens[:at])
    sides = {}
    for side, speaker, ids in (("reference", expected, a.tokens), ("candidate", actual, b.tokens)):
        upto, whole = _text(speaker, ids[: at + 1]), _text(speaker, ids)
        sides[side] = {"token": upto[len(common) :] if at < len(ids) else None, "rest": whole[len(upto) :]}
    margin = None if a.margin is None else tolerances.number(a.margin)
    return {"position": at, "common": common, **sides, "margin": margin}


def weight_family(artefact: Path) -> str:
    """The coarsest of `tolerances.FAMILIES` among the artefact's weights, by its config.json and tensors; of a Core AI
    bundle's, by the forms that its manifest names."""
    from safetensors import safe_open

    if (artefact / contract.MANIFEST).exists() and is_bundle(manifest := read_whole(artefact)):
        known = tolerances.COREAI_FAMILIES
        decided = manifest["llm"]["decisions"]
        return _coarsest(artefact, {known.get(form, form) for form in (*decided["decoder"], *decided["embedding"])})
    config = load_object(artefact / contract.CONFIG)
    quantization = config.get("quantization")
    if quantization:
        entries = [quantization, *(value for value in quantization.values() if isinstance(value, dict))]
        names = {contract.stored_as(entry) for entry in entries}
    else:
        kinds = set()
        for file in sorted(artefact.glob(contract.WEIGHTS_GLOB)):
            with safe_open(file, framework="numpy") as tensors:
                kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        names = {"bf16" if "BF16" in kinds else "fp16" if kinds & {"F16", "F32"} else "unknown"}
    return _coarsest(artefact, names)


def _coarsest(artefact: Path, names: set[str]) -> str:
    if unknown := sorted(names - {*tolerances.FAMILIES}):
        raise UserError(
            f"{artefact}: weights of family {' and '.join(unknown)}: no tolerances for it:"
            f" expected {', '.join(tolerances.FAMILIES)}"
        )
    return max(names, key=tolerances.FAMILIES.index)


def thumbnail(image: Image.Image, side: int = 320) -> Image.Image:
    """A copy for the page, at most `side` pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    return small
