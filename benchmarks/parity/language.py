"""The language halves of a parity run: prefill logits and greedy answers, prompts of one length at once.

The candidate decodes greedily with its KV cache. The reference then reads each prompt with the candidate's answer
behind it, in one pass: as long as its most likely tokens are the candidate's, it would have decoded them, too; from the
first one that differs on it decodes by itself.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import metrics
from fastvlm.common.cli import log
from fastvlm.common.errors import CheckFailed
from fastvlm.common.limits import stopped
from fastvlm.model.language import Language

_TOKENS_AT_ONCE = 4096  # of prompts: bounds what a layer's activations take, 0.3 GB in the 7B model's MLP
_POSITIONS_AT_ONCE = 128  # of logits: 78 MB a side with Qwen2's vocabulary


@dataclass(eq=False)
class Reading:
    """A language model's result for a prompt: its final hidden states (T, H) float32 and its greedy answer.

    `margin`, where a reference's answer parts from the candidate's and neither has ended: log p(its token) − log p(the
    candidate's) by the reference, in nats.
    """

    hidden: np.ndarray
    tokens: list[int]
    margin: float | None = None


Advance = Callable[[int], Any]  # called with the number of finished tokens, those that an early end saves included


def answers(language: Language, embeds: Sequence[np.ndarray], most: int, advance: Advance) -> list[Reading]:
    """Read prompts, each (1, T, H) float32, and answer each greedily with at most `most` tokens."""
    by_index: dict[int, Reading] = {}
    for batch in _batches(language, embeds):
        hidden, past = language.hidden(np.concatenate([embeds[index] for index in batch]))
        readings = [Reading(states, []) for states in hidden]
        tokens = language.head(hidden[:, -1:], hidden.shape[1] - 1)[:, -1].argmax(-1)
        room = _room(language, hidden.shape[1], most)
        running = [
            reading for reading, token in zip(readings, tokens) if _goes_on(language, reading.tokens, token, room)
        ]
        _decode(language, past, readings, running, room, advance)
        advance(most * len(batch) - sum(len(reading.tokens) for reading in readings))
        if language.positions is not None and any(room == len(reading.tokens) < most for reading in readings):
            log(stopped(language.positions))
        by_index |= zip(batch, readings)
    return [by_index[index] for index in range(len(embeds))]


def answers_after(
    language: Language, embeds: Sequence[np.ndarray], drafts: Sequence[list[int]], most: int, advance: Advance
) -> list[Reading]:
    """The same, and the same answers, given drafts of them: as much of one as is right costs no decoding."""
    by_index: dict[int, Reading] = {}
    for batch in _batches(language, embeds):
        prompts = np.concatenate([embeds[index] for index in batch])
        length, room = prompts.shape[1], _room(language, prompts.shape[1], most)
        own = [drafts[index][:room] for index in batch]
        ids = np.zeros((len(own), min(room - 1, max(map(len, own)))), np.int64)  # the last token that fits is never fed
        for row, draft in zip(ids, own):
            row[: len(draft)] = draft[: len(row)]
        hidden, past = language.hidden(np.concatenate([prompts, language.embed(ids)], axis=1) if ids.size else prompts)
        mask = np.arange(hidden.shape[1])[None].repeat(len(own), 0) < length  # the prompts
        readings, running = [], []
        for states, draft, cached in zip(hidden, own, mask):
            logits = language.head(states[None, length - 1 : length + min(len(draft), len(ids[0]))], length - 1)[0]
            tokens = logits.argmax(-1).tolist()
            right = metrics.first_divergence(draft, tokens[: len(draft)])
            right = len(draft) if right is None else right
            reading = Reading(states[:length], draft[:right])
            cached[length : length + right] = True
            if right < room and _goes_on(language, reading.tokens, tokens[right], room):
                running.append(reading)
            if right < min(len(draft), len(reading.tokens)):
                scores = metrics.log_softmax(logits[right])
                reading.margin = float(scores[tokens[right]] - scores[draft[right]])
            readings.append(reading)
        advance(sum(len(reading.tokens) for reading in readings))
        _decode(language, past, readings, running, room, advance, mask)
        advance(most * len(batch) - sum(len(reading.tokens) for reading in readings))
        by_index |= zip(batch, readings)
    return [by_index[index] for index in range(len(embeds))]


def _batches(language: Language, embeds: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """The indexes of prompts of one length, at most _TOKENS_AT_ONCE in all."""
    lengths = defaultdict(list)
    for index, prompt in enumerate(embeds):
        lengths[prompt.shape[1]].append(index)
    for length, same in lengths.items():
        step = 1 if language.one_sequence else max(1, _TOKENS_AT_ONCE // length)
        yield from (same[start : start + step] for start in range(0, len(same), step))


def _room(language: Language, length: int, most: int) -> int:
    """The number of tokens that may follow a prompt; the last one needs no position."""
    return most if language.positions is None else min(most, language.positions - length + 1)


def _goes_on(language: Language, tokens: list[int], token: int, room: int) -> bool:
    """Append the next token to an answer, unless it ends it; whether another one follows."""
    if token in language.eos_ids:
        return False
    tokens.append(int(token))
    return len(tokens) < room


def _decode(
    language: Language,
    past: Any,
    readings: list[Reading],
    running: list[Reading],
    room: int,
    advance: Advance,
    mask: np.ndarray | None = None,
) -> None:
    """Decode the `running` answers of a batch to their end; `mask` (B, T) bool: the cached positions that each sequence
    attends to, None for all."""
    while running:
        advance(len(running))
        goes_on = np.array([[reading in running] for reading in readings])
        last = [[reading.tokens[-1] if reading.tokens else 0] for reading in readings]
        hidden, past = language.hidden(language.embed(np.array(last, np.int64)), past, mask)
        mask = None if mask is None else np.concatenate([mask, goes_on], axis=1)
        first = language.length(past) - 1
        tokens = language.head(hidden, first)[:, -1].argmax(-1)
        running = [
            reading
            for reading, token in zip(readings, tokens)
            if reading in running and _goes_on(language, reading.tokens, token, room)
        ]


def logits_figures(reference: Language, candidate: Language, states: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """KL divergence in nats (mean over positions), top-1 agreement and SNR in dB of the logits that both sides make of
    their final hidden states (T, H) of one prompt; a part of the vocabulary's logits exists at a time.

    Raises CheckFailed when the two sides' shapes differ, and for logits that are not finite.
    """
    divergences, same, signal, noise, length = [], 0.0, 0.0, 0.0, len(states[0])
    for start in range(0, length, _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        a, b = (side.head(hidden[None, part], start)[0] for side, hidden in zip((reference, candidate), states))
        if a.shape != b.shape:
            raise CheckFailed(f"logits: got shape {b.shape}, expected {a.shape}")
        divergences.append(metrics.kl_positions(a, b))
        same += metrics.top1_agreement(a, b) * len(a)
        signal, noise = signal + float(np.vdot(a, a)), noise + float(np.vdot(a - b, a - b))
    return {
        "prefill_snr": 10 * math.log10(signal / noise) if signal and noise else math.inf if not noise else -math.inf,
        "prefill_kl": float(np.concatenate(divergences).mean()),
        "prefill_top1": same / length,
    }
