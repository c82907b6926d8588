"""A session answers as the model does and reads only what is new."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm.data import scenes
from fastvlm.model import session
from fastvlm.model.session import Session
from fastvlm.model.surface import FastVLM

QUESTIONS = ["Count the shapes.", "Name the shape at the top right.", "What digit is shown?"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [question.image for question in scenes.questions(3)]


@pytest.fixture
def encoded(demo_model: FastVLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """Every picture that the encoder had to look at."""
    seen: list[np.ndarray] = []
    encode = demo_model.vision.encode
    monkeypatch.setattr(demo_model.vision, "encode", lambda pixels: (seen.append(pixels), encode(pixels))[1])
    yield seen


def last_logits(model: FastVLM, prompt: str, image: Any = None) -> np.ndarray:
    return model.logits(prompt, image)[0, -1]


def test_a_second_question_reads_its_own_tokens_only(
    demo_model: FastVLM, pictures: list[Image.Image], encoded: list[np.ndarray]
) -> None:
    asked = Session(demo_model)
    counts, found = [], []
    for question in QUESTIONS:
        logits, read = asked.prefill(question, pictures[0])
        counts.append(read)
        found.append(logits)
    assert len(encoded) == 1
    tokens = (demo_model.image_size // 64) ** 2
    assert counts[0] > tokens and all(read < 25 for read in counts[1:])
    for question, logits in zip(QUESTIONS, found):
        expected = last_logits(demo_model, question, pictures[0])
        np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())


def test_answers_are_the_models_whatever_was_asked_before(demo_model: FastVLM, pictures: list[Image.Image]) -> None:
    asked = Session(demo_model)
    order = [(q, p) for q in QUESTIONS for p in [*pictures[:2], None]] + [(QUESTIONS[0], pictures[0])]
    for question, picture in order:
        assert asked.generate(question, picture, 40) == demo_model.generate(question, picture, 40)
    several = [pictures[0], pictures[1]]
    assert asked.generate(QUESTIONS[0], several, 10) == demo_model.generate(QUESTIONS[0], several, 10)
    swapped = several[::-1]  # the same two hashes in another order are another prompt
    logits, _ = asked.prefill(QUESTIONS[0], swapped)
    expected = last_logits(demo_model, QUESTIONS[0], swapped)
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
    assert np.abs(expected - last_logits(demo_model, QUESTIONS[0], several)).max() > 1e-2


def test_an_abandoned_answer_and_a_broken_prefill_leave_no_trace(
    demo_model: FastVLM, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Session(demo_model)
    next(asked.stream(QUESTIONS[0], pictures[0]))
    assert asked.generate(QUESTIONS[1], pictures[0], 40) == demo_model.generate(QUESTIONS[1], pictures[0], 40)
    prefill = type(demo_model.language).prefill

    def broken(self: Any, embeds: np.ndarray, past: Any = None) -> Any:
        prefill(self, embeds[:, : embeds.shape[1] // 2], past)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(demo_model.language), "prefill", broken)
        asked.prefill(QUESTIONS[2], pictures[0])
    assert asked.generate(QUESTIONS[2], pictures[0], 40) == demo_model.generate(QUESTIONS[2], pictures[0], 40)


def test_beginning_another_answer_ends_the_one_before(demo_model: FastVLM, pictures: list[Image.Image]) -> None:
    asked = Session(demo_model)
    first = asked.stream(QUESTIONS[1], pictures[0], 40)
    begun = next(first)
    assert asked.generate(QUESTIONS[2], pictures[0], 40) == demo_model.generate(QUESTIONS[2], pictures[0], 40)
    assert demo_model.generate(QUESTIONS[1], pictures[0], 40).startswith(begun) and list(first) == []


def test_pictures_are_known_by_their_content(
    demo_model: FastVLM, pictures: list[Image.Image], encoded: list[np.ndarray], tmp_path: Path
) -> None:
    asked = Session(demo_model)
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    pictures[0].save(one)
    pictures[0].save(other)
    first, _ = asked.picture(one)
    assert asked.picture(str(other))[0] == first and len(encoded) == 1
    assert asked.picture(np.asarray(pictures[0]))[0] == asked.picture(pictures[0])[0]
    pictures[1].save(one)  # the same name, another picture
    assert asked.picture(one)[0] != first
    turned = pictures[0].rotate(90)
    assert asked.picture(turned)[0] != asked.picture(pictures[0])[0]


def test_only_so_many_pictures_are_kept(
    demo_model: FastVLM, encoded: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "KEPT_PICTURES", 2)
    asked = Session(demo_model)
    colours = [Image.new("RGB", (64, 64), (40 * i, 0, 0)) for i in range(3)]
    for index in (0, 1, 0, 2, 0, 1):  # 1 is the one not used for longest when 2 comes
        asked.picture(colours[index])
    assert len(encoded) == 4
