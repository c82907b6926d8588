"""Answers to evaluation records and, of the demo checkpoint, to the questions that it was trained on."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastvlm.data import scenes
from fastvlm.data.labels import encode_record
from fastvlm.data.prompt import ANSWER, IMAGE, encode_text
from fastvlm.data.records import Record
from fastvlm.finetune.model import Pictures, Trainee
from fastvlm.model.predict import generate_batch
from fastvlm.model.surface import FastVLM
from fastvlm.model.torch_parts import from_model

DEMO_QUESTIONS = 100  # of the demo set
_BATCH = 8  # questions a forward pass; bounds the KV cache
_LONGEST = 64  # tokens of an answer to a demo question


@dataclass(frozen=True)
class Asked:
    """A record up to its first answer: the question as the model reads it, and the answer that is right."""

    record: Record
    question: str
    truth: str

    @classmethod
    def of(cls, record: Record) -> "Asked":
        """The first question of a record and its answer, the pictures in it alone."""
        at = next(place for place, turn in enumerate(record.turns) if turn.role == "assistant")
        turns = record.turns[:at]
        shown = sum(turn.text.count(IMAGE) for turn in turns)
        question = turns[-1].text.replace(IMAGE, "").strip()
        return cls(replace(record, images=record.images[:shown], turns=turns), question, record.turns[at].text)

    def right(self, answer: str) -> bool:
        """Whether an answer is the true one, blanks around it aside."""
        return answer.strip() == self.truth.strip()


def answer(
    trainee: Trainee, pictures: Pictures, asked: Sequence[Asked], longest: int, advance: Callable[[int], Any]
) -> list[str]:
    """The answers of the model as it is now, greedily; `advance(n)` after each n."""
    surface = _surface(trainee)
    features = pictures.features if trainee.sees_pixels else pictures

    def embed(one: Asked) -> np.ndarray:
        checkpoint = trainee.plan.checkpoint
        places = checkpoint.image_token_id, surface.tokens_per_image
        ids, _ = encode_record(one.record, surface.tokenizer, *places)
        ids += encode_text(surface.tokenizer, ANSWER, *places)
        embeds = surface.language.embed(np.array([ids])).copy()
        found = [features(path) for path in one.record.images]
        if found:
            projected = [surface.project(f.reshape(*f.shape[:2], -1).transpose(0, 2, 1)) for f in found]
            embeds[np.array([ids]) == checkpoint.image_token_id] = np.concatenate(projected, axis=1)[0]
        return embeds

    return _generate(surface, map(embed, asked), longest, advance)


def demo_score(trainee: Trainee, advance: Callable[[int], Any]) -> dict[str, list[int]]:
    """How many of the demo set's questions are answered exactly, and of how many: {kind: [exact, questions]}."""
    surface = _surface(trainee)
    questions = list(scenes.questions(DEMO_QUESTIONS))
    embeds = (surface.embed(question.question, question.image) for question in questions)
    score = {kind: [0, 0] for kind in scenes.KINDS}
    for question, given in zip(questions, _generate(surface, embeds, _LONGEST, advance)):
        score[question.kind][0] += given.strip() == question.answer
        score[question.kind][1] += 1
    return score


def _surface(trainee: Trainee) -> FastVLM:
    trainee.model.eval()
    return from_model(trainee.base, trainee.plan.checkpoint, trainee.plan.checkpoint.preprocessor)


def _generate(surface: FastVLM, embeds: Iterable[np.ndarray], longest: int, advance: Callable[[int], Any]) -> list[str]:
    how = argparse.Namespace(max_new_tokens=longest, num_beams=1, temperature=0.0, top_p=None)
    answers: list[str] = []
    batch: list[np.ndarray] = []
    for prompt in embeds:
        batch.append(prompt)
        if len(batch) == _BATCH:
            answers += generate_batch(surface, batch, how)
            advance(len(batch))
            batch = []
    if batch:
        answers += generate_batch(surface, batch, how)
        advance(len(batch))
    return answers
