"""Calibration data: pictures, questions and answers as the language model reads them.

An image token's embedding is not a row of the vocabulary. Here it becomes one: the rows of the pictures' projected
features are numbered behind the V tokens, so that a sequence is ids alone, and what is made for text models (mlx-lm's
calibrations among it) runs on pictures unchanged.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvlm.data.conversations import Sample
from fastvlm.model.surface import FastVLM

ANSWER_TOKENS = 64  # of an answer that the model gives itself


@dataclass(frozen=True)
class Calibration:
    """Sequences of ids (T,) int32, each prompt and answer; id V + r is row r of `images` (R, H) float32."""

    vocabulary: int
    sequences: tuple[np.ndarray, ...]
    images: np.ndarray

    def packed(self, length: int) -> np.ndarray:
        """The sequences one behind the other, cut into rows (B, length) int32; what doesn't fill a row is left out."""
        joined = np.concatenate(self.sequences)
        length = min(length, len(joined))
        return joined[: len(joined) // length * length].reshape(-1, length)

    def batches(self, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All sequences, by length, in batches of about so many tokens: ids (B, T), and where they are real (B, T).

        The shorter ones are filled up behind their end, which a causal model doesn't see.
        """
        ordered = sorted(self.sequences, key=len)
        while ordered:
            count = max(1, sum(1 for i, ids in enumerate(ordered) if (i + 1) * len(ids) <= tokens))
            yield filled(ordered[:count])
            del ordered[:count]

    @property
    def sha256(self) -> str:
        """sha256 over all ids and rows, for the manifest."""
        digest = hashlib.sha256(self.images.tobytes())
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little") + sequence.tobytes())
        return digest.hexdigest()


def filled(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences as one matrix of ids (B, T) int32, and where it is real (B, T)."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
    real = np.zeros(ids.shape, np.bool_)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], real[row, : len(sequence)] = sequence, True
    return ids, real


def collect(
    model: FastVLM, vocabulary: int, samples: Sequence[Sample], advance: Callable[[], Any] | None = None
) -> Calibration:
    """Run every sample's picture through the model's encoder and projector; it answers what has no answer, greedily.

    `vocabulary` V is the number of rows of its embeddings.
    """
    sequences: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for sample in samples:
        pictures = []
        if sample.image is not None:
            pictures = [model.project(model.encode_image(model.preprocess(sample.image())))]
        ids = model.tokenize(sample.question, len(pictures))[0]
        ids = np.concatenate([ids, _answer(model, sample, pictures)])
        places = np.flatnonzero(ids == model.image_token_id) if pictures else np.empty(0, np.int64)
        ids[places] = vocabulary + sum(map(len, rows)) + np.arange(len(places))
        sequences.append(ids.astype(np.int32))
        rows += [picture[0] for picture in pictures]
        if advance is not None:
            advance()
    width = model.language.embed(np.zeros((1, 1), np.int64)).shape[-1]
    return Calibration(vocabulary, tuple(sequences), np.concatenate([np.empty((0, width), np.float32), *rows]))


def _answer(model: FastVLM, sample: Sample, pictures: list[np.ndarray]) -> np.ndarray:
    """The answer's ids, with the end token that the model would give."""
    if sample.answer is not None:
        ids = model.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    else:
        ids = list(model.language.stream(model.merge(sample.question, pictures), ANSWER_TOKENS))
    return np.array([*ids, model.tokenizer.eos_token_id], np.int64)
