"""A candidate's fidelity to a reference (logits, perplexity, answers), and its costs.

`reference_results` runs the reference once and writes its logits and answers to a file; `quality` compares any
candidate with that file. `evaluate.py` loads both from folders.
"""

import json
import math
import statistics
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import metrics
from benchmarks.parity import language
from benchmarks.quality.text_model import TextModel
from fastvlm.common.errors import UserError
from fastvlm.common.files import read_small
from fastvlm.data.conversations import Sample
from fastvlm.data.prompt import encode_prompt
from fastvlm.model.surface import FastVLM

MAX_NEW_TOKENS = 48  # of each answer
CONTEXT = 512  # tokens a window of the text, as mlx-lm's own perplexity
TEXT_TOKENS, LEAST_TEXT_TOKENS = 4096, 64  # of a text: what is read, and what a perplexity needs to say anything
_END = "<|im_end|>"  # of an answer in the chat template
_CONTINUED, _START_TOKENS = 8, 64  # the text's beginnings that a text model, which gets no questions, continues
_TIMED = 5  # answers whose steps are timed
_AT_ONCE = 64  # prompts whose embeddings wait to be answered in batches: 0.3 GB at most, in the 7B model
_VALUES_KEPT = 1 << 27  # logits kept of the prompts, and as many of the text: 0.5 GB each in float32
Model = FastVLM | TextModel


@dataclass(frozen=True)
class Text:
    """A text to score, and its name."""

    name: str
    content: str


@dataclass(frozen=True)
class _ReferenceAnswer:
    """The reference's answer to one prompt.

    `tokens`: the prompt's behind its picture (all without one). The compared rows of logits are at these, the last of
    which decides the answer, and at the answer's own: n = len(tokens) + len(answer). `best`: (n,) the reference's
    likeliest token in each row; `kept_rows`: the rows whose logits are in the file. `scored`: the right answer's tokens
    and the end token; where no right one is known, the reference's own answer and its next token.
    """

    name: str
    question: str
    expected: str | None
    tokens: list[int]
    answer: list[int]
    answer_text: str
    best: list[int]
    kept_rows: list[int]
    scored: list[int]


def read_text(path: Path) -> Text:
    """A text file. Raises UserError where it can't be read as UTF-8."""
    try:
        return Text(path.name, read_small(path).decode())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--text {path}: not readable as UTF-8 text ({reason})") from None


def continuations(tokenizer: Any, text: Text) -> list[Sample]:
    """Beginnings of the text's windows as prompts, for a text model."""
    return [
        Sample(f"text {number}", None, tokenizer.decode(window[:_START_TOKENS]), None)
        for number, window in enumerate(windows(tokenizer, text)[:_CONTINUED])
    ]


def windows(tokenizer: Any, text: Text) -> list[list[int]]:
    """The text's first TEXT_TOKENS token ids, CONTEXT a window. Raises UserError for a text that is too short."""
    content = text.content[: TEXT_TOKENS * 32]  # a token is a few letters: enough of it, however long the text
    ids = tokenizer(content, add_special_tokens=False)["input_ids"][:TEXT_TOKENS]
    if len(ids) < LEAST_TEXT_TOKENS:
        raise UserError(f"text {text.name}: {len(ids)} tokens, expected at least {LEAST_TEXT_TOKENS} to score")
    parts = [ids[start : start + CONTEXT] for start in range(0, len(ids), CONTEXT)]
    return [part for part in parts if len(part) > 1]


def reference_results(model: Model, samples: Sequence[Sample], text: Text | None, target: Path) -> dict[str, Any]:
    """Ask the reference everything and write it to `target`, with at most 2 `_VALUES_KEPT` logits (evenly spaced rows).

    Returns {"figures", "timings", "about"} of the reference itself. Without a text, the perplexity is of the answers
    to the samples. Raises UserError for a text that is too short or no samples, CheckFailed where logits are not
    finite.
    """
    if not samples:
        raise UserError("no questions: nothing asked is no evaluation")
    parts = windows(model.tokenizer, text) if text else []
    clock, references, answer_nats, text_nats = Clock(), [], [], []
    with zipfile.ZipFile(target, "w") as file:
        for number, (sample, tokens, embeds, answer) in enumerate(_answered(model, samples, clock)):
            logits = _forced(model, embeds, answer, len(tokens))
            kept_rows = _evenly(len(logits), _VALUES_KEPT // (logits.shape[1] * len(samples)), len(tokens) - 1)
            _write(file, f"prompt/{number}", logits[kept_rows])
            answer_text, best = (
                model.tokenizer.decode(answer, skip_special_tokens=True),
                logits.argmax(axis=-1).tolist(),
            )
            scored = [*answer, best[-1]] if sample.answer is None else _ids(model, f"{sample.answer}{_END}")
            reference = _ReferenceAnswer(
                sample.name, sample.question, sample.answer, tokens, answer, answer_text, best, kept_rows, scored
            )
            references.append(reference)
            answer_nats.append(_answer_nats(model, embeds, logits, reference))
        text_kept, text_best = [], []
        for number, ids in enumerate(parts):
            logits = model.language.logits(model.language.embed(np.array([ids])))[0, :-1]
            text_nats.append(metrics.negative_log_likelihood(logits, ids[1:]))
            text_best.append(logits.argmax(axis=-1).tolist())
            text_kept.append(_evenly(len(logits), _VALUES_KEPT // (logits.shape[1] * len(parts)), 0))
            _write(file, f"text/{number}", logits[text_kept[-1]])
        nats = np.concatenate(text_nats or answer_nats)
        perplexity = _perplexity(nats)
        of = f"{text.name} in windows of {CONTEXT}" if text else "the answers, given their pictures"
        result = {
            "figures": {"perplexity": figure(perplexity)}
            | _exact(references, [reference.answer_text for reference in references]),
            "timings": clock.timings(),
            "about": {
                "runners": model.runners,
                "text": f"{of}: {len(nats)} tokens",
                "rows_kept": sum(len(reference.kept_rows) for reference in references) + sum(map(len, text_kept)),
                "rows": sum(len(reference.best) for reference in references) + sum(map(len, text_best)),
            },
        }
        meta = {"vocabulary": logits.shape[1], "asked": [asdict(reference) for reference in references]}
        meta |= {"windows": parts, "text_kept": text_kept, "text_best": text_best}
        meta |= {"perplexity": perplexity, "result": result}
        file.writestr("meta.json", json.dumps(meta))
    return result


def quality(model: Model, samples: Sequence[Sample], results: Path) -> dict[str, Any]:
    """Compare a candidate with the reference's answers to the same samples (`reference_results`).

    {"figures", "timings", "answers", "about"}. Figures, to four digits: `first_*` of the row that decides the answer,
    `prompt_*` of the question's, `answer_*` of the reference's own answer fed to both, `text_*` of the text: each
    `*_kl_mean` and `*_kl_p99` in nats, and `*_top1`, the share of rows with the same likeliest token; `perplexity`
    beside the reference's and their ratio; `same_answers` and, where right answers are known, `exact`, as shares.
    Answers are in the samples' order, greedy. Timings: `Clock.timings`.

    Rows are counted from the prompt's end and start behind the picture, so a candidate may see its pictures at another
    resolution. Raises UserError where file and candidate don't fit, CheckFailed where logits are not finite.
    """
    with zipfile.ZipFile(results) as file:
        meta = json.loads(file.read("meta.json"))
        references = [_ReferenceAnswer(**reference) for reference in meta["asked"]]
        if [reference.question for reference in references] != [sample.question for sample in samples]:
            raise UserError(f"{results}: the reference answered other questions: run it again")
        rows, clock, answers, answer_nats = _Rows(), Clock(), [], []
        for number, (reference, (_, tokens, embeds)) in enumerate(zip(references, _prompts(model, samples, clock))):
            if tokens != reference.tokens:
                raise UserError(f"{reference.name}: the candidate's tokenizer gives other tokens than the reference's")
            logits = _forced(model, embeds, reference.answer, len(tokens))
            _check_vocabulary(logits, meta["vocabulary"])
            kl = metrics.kl_positions(_read(file, f"prompt/{number}"), logits[reference.kept_rows])
            best, last = logits.argmax(axis=-1), len(tokens) - 1
            rows.add("first", kl, best, reference, range(last, last + 1))
            rows.add("prompt", kl, best, reference, range(last + 1))
            rows.add("answer", kl, best, reference, range(last, len(best)))
            answer_nats.append(_answer_nats(model, embeds, logits, reference))
            # the same likeliest token at every step makes the same answer: no need to decode it
            same_tokens = best[last:].tolist() == reference.best[last:] and reference.best[last:-1] == reference.answer
            ids = reference.answer if same_tokens and clock.full else clock.answer(model, embeds)
            answers.append(_answer(reference, model.tokenizer.decode(ids, skip_special_tokens=True), kl))
        perplexity = _perplexity(np.concatenate(_text_nats(model, file, meta, rows) or answer_nats))
    result = meta["result"]
    figures = rows.figures() | {
        "perplexity": figure(perplexity),
        "perplexity_ratio": figure(perplexity / meta["perplexity"]),
        "same_answers": figure(float(np.mean([answer["same"] for answer in answers]))),
        **_exact(references, [answer["candidate"] for answer in answers]),
        "questions": len(answers),
        **{f"reference_{name}": value for name, value in result["figures"].items()},
    }
    about = result["about"] | {"runners": model.runners, "reference_runners": result["about"]["runners"]}
    return {"figures": figures, "timings": clock.timings(), "answers": answers, "about": about}


def figure(value: float) -> float:
    """Four digits, none beyond 1e-8: there the number of threads shows."""
    return round(float(f"{value:.4g}"), 8)


class Clock:
    """Times of a model's steps. `full` when enough answers were timed."""

    def __init__(self) -> None:
        self.encode: list[float] = []
        self.prefill: list[float] = []
        self.decode: list[float] = []

    @property
    def full(self) -> bool:
        return len(self.prefill) >= _TIMED

    def answer(self, model: Model, embeds: np.ndarray) -> list[int]:
        """The greedy answer's token ids; its steps are timed."""
        start = time.perf_counter()
        stream = model.language.stream(embeds, MAX_NEW_TOKENS)
        ids = list(islice(stream, 1))
        first = time.perf_counter()
        self.prefill.append(embeds.shape[1] / (first - start))
        ids += stream
        steps = min(len(ids), MAX_NEW_TOKENS - 1)  # the one that finds the end token is a step, too
        if steps:
            self.decode.append(steps / (time.perf_counter() - first))
        return ids

    def timings(self) -> dict[str, float]:
        """Medians: `encode_s`, seconds a picture with projection; tokens/s of prefill and of decoding."""
        samples = {
            "encode_s": self.encode,
            "prefill_tokens_per_s": self.prefill,
            "decode_tokens_per_s": self.decode,
        }
        return {name: figure(statistics.median(values)) for name, values in samples.items() if values}


def _answered(
    model: Model, samples: Sequence[Sample], clock: Clock
) -> Iterator[tuple[Sample, list[int], np.ndarray, list[int]]]:
    """Each of `_prompts` with the model's own answer's token ids: the first ones timed, the others in batches."""
    prompts = _prompts(model, samples, clock)
    for prompt in islice(prompts, _TIMED):
        yield *prompt, clock.answer(model, prompt[-1])
    while group := list(islice(prompts, _AT_ONCE)):
        waiting = [embeds for *_, embeds in group]
        readings = language.answers(model.language, waiting, MAX_NEW_TOKENS, lambda count: None)
        yield from ((*prompt, reading.tokens) for prompt, reading in zip(group, readings))


def _prompts(model: Model, samples: Sequence[Sample], clock: Clock) -> Iterator[tuple[Sample, list[int], np.ndarray]]:
    """Each sample with its tokens behind the picture, and its embeddings (1, T, H)."""
    if not isinstance(model, TextModel):
        model.check_prompts((sample.name, sample.question, int(sample.image is not None)) for sample in samples)
    for sample in samples:
        if isinstance(model, TextModel):
            tokens = _ids(model, sample.question)
            yield sample, tokens, model.language.embed(np.array([tokens]))
            continue
        images = []
        if sample.image is not None:
            pixels = model.preprocess(sample.image())
            start = time.perf_counter()
            images.append(model.project(model.encode_image(pixels)))
            clock.encode.append(time.perf_counter() - start)
        ids = encode_prompt(model.tokenizer, sample.question, model.image_token_id, 1, len(images))[0].tolist()
        behind = ids[ids.index(model.image_token_id) + 1 :] if images else ids
        yield sample, behind, model.merge(sample.question, images)


def _ids(model: Model, text: str) -> list[int]:
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _forced(model: Model, embeds: np.ndarray, answer: list[int], prompt_rows: int) -> np.ndarray:
    """Logits (n, V) of the prompt's last rows and of the answer fed after it, in one pass."""
    if answer:
        embeds = np.concatenate([embeds, model.language.embed(np.array([answer]))], axis=1)
    return model.language.logits(embeds)[0][-prompt_rows - len(answer) :]


def _answer_nats(model: Model, embeds: np.ndarray, logits: np.ndarray, reference: _ReferenceAnswer) -> np.ndarray:
    """Negative log-likelihood of each of `reference.scored`; `logits` are `_forced` by the reference's own answer."""
    if reference.scored[:-1] != reference.answer:
        logits = _forced(model, embeds, reference.scored[:-1], len(reference.tokens))
    return metrics.negative_log_likelihood(logits[len(reference.tokens) - 1 :], reference.scored)


def _check_vocabulary(logits: np.ndarray, expected: int) -> None:
    if logits.shape[1] != expected:
        raise UserError(f"vocabulary: candidate {logits.shape[1]} tokens, reference {expected}: they must be the same")


def _text_nats(model: Model, file: zipfile.ZipFile, meta: dict[str, Any], rows: "_Rows") -> list[np.ndarray]:
    """Negative log-likelihood of each of the text's tokens, window by window; its divergences go into `rows`."""
    nats = []
    for number, ids in enumerate(meta["windows"]):
        logits = model.language.logits(model.language.embed(np.array([ids])))[0, :-1]
        _check_vocabulary(logits, meta["vocabulary"])
        nats.append(metrics.negative_log_likelihood(logits, ids[1:]))
        kl = metrics.kl_positions(_read(file, f"text/{number}"), logits[meta["text_kept"][number]])
        rows.kl.setdefault("text", []).extend(kl)
        rows.same.setdefault("text", []).extend(logits.argmax(axis=-1) == meta["text_best"][number])
    return nats


class _Rows:
    """Divergences and agreement of rows of logits, by what they are of."""

    def __init__(self) -> None:
        self.kl: dict[str, list[float]] = {}
        self.same: dict[str, list[bool]] = {}

    def add(self, name: str, kl: np.ndarray, best: np.ndarray, reference: _ReferenceAnswer, wanted: range) -> None:
        """`kl` is of the rows `reference.kept_rows`, `best` of all; `wanted` are the rows that count for `name`."""
        self.kl.setdefault(name, []).extend(value for row, value in zip(reference.kept_rows, kl) if row in wanted)
        self.same.setdefault(name, []).extend(best[row] == reference.best[row] for row in wanted)

    def figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, values in self.kl.items():
            figures[f"{name}_kl_mean"] = figure(float(np.mean(values)))
            figures[f"{name}_kl_p99"] = figure(float(np.percentile(values, 99)))
            figures[f"{name}_top1"] = figure(float(np.mean(self.same[name])))
        return figures


def _answer(reference: _ReferenceAnswer, answer_text: str, kl: np.ndarray) -> dict[str, Any]:
    divergence = [value for row, value in zip(reference.kept_rows, kl) if row >= len(reference.tokens) - 1]
    return {
        "name": reference.name,
        "question": reference.question,
        "expected": reference.expected,
        "reference": reference.answer_text,
        "candidate": answer_text,
        "same": answer_text == reference.answer_text,
        "kl": figure(float(np.mean(divergence))),
    }


def _exact(references: Sequence[_ReferenceAnswer], answer_texts: Sequence[str]) -> dict[str, float]:
    known = [
        reference.expected == text.strip()
        for reference, text in zip(references, answer_texts)
        if reference.expected is not None
    ]
    return {"exact": figure(sum(known) / len(known))} if known else {}


def _perplexity(nats: np.ndarray) -> float:
    return math.exp(float(nats.mean()))


def _evenly(count: int, most: int, always: int) -> list[int]:
    """At most `most` (but one) row numbers of `count`, evenly spaced, `always` among them."""
    if count <= most:
        return list(range(count))
    spaced = np.linspace(0, count - 1, max(most - 1, 0)).round().astype(int).tolist()
    return sorted({*spaced, always})


def _write(file: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, array, allow_pickle=False)


def _read(file: zipfile.ZipFile, name: str) -> np.ndarray:
    with file.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
