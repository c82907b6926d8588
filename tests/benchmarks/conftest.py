"""A small FastVLM out of numpy, whose every part has weights to perturb, so that parity itself is what is tested."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.parity import compare, encoders
from benchmarks.parity.pictures import Picture
from fastvlm.data import scenes
from fastvlm.model.language import Language
from fastvlm.model.surface import FastVLM
from tests.helpers import with_tensors

SIZE, CHANNELS, HIDDEN, VOCAB, EOS, IMAGE_ID = 128, 12, 8, 40, 38, 39


class FakePreprocessor:
    image_size, image_strategy = SIZE, "pad"

    def __init__(self):
        self.mean = 0.0

    def __call__(self, image):
        pixels = np.asarray(image.resize((SIZE, SIZE)), dtype=np.float32) / 255 - self.mean
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


class FakeTokenizer:
    """Letters are tokens."""

    model_max_length = int(1e30)

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) % 36 for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(" " if i == 5 else chr(ord("a") + int(i) % 26) for i in ids if i < 36)

    extra = 0

    def __len__(self):
        return VOCAB + self.extra


@dataclass
class FakeVision:
    weight: np.ndarray
    name: str = "fake vision"
    remedy: str = "mend it"

    def encode(self, pixels):
        patches = pixels.reshape(1, 3, 2, 64, 2, 64).transpose(0, 2, 4, 1, 3, 5).reshape(1, 4, 3, -1)
        return (patches.reshape(1, 4, 3, 16, -1).mean(-1).reshape(1, 4, 48) @ self.weight).astype(np.float32)


@dataclass
class FakeProjector:
    weight: np.ndarray
    name: str = "fake projector"
    remedy: str = "mend it"

    def __call__(self, features):
        return (features @ self.weight).astype(np.float32)


@dataclass
class FakeLanguage(Language):
    """Its cache is the embeddings so far, and which of them belong to each sequence."""

    embedding: np.ndarray
    matrix: np.ndarray
    name: str = "fake language"
    remedy: str = "mend it"
    positions: int | None = None
    eos_ids: frozenset[int] = frozenset({EOS})

    def _embed(self, ids):
        return self.embedding[ids]

    def _hidden(self, embeds, past, kept):
        before = np.empty((len(embeds), 0, embeds.shape[2]), np.float32) if past is None else past
        past, count = np.concatenate([before, embeds], axis=1), embeds.shape[1]
        kept = np.ones(before.shape[:2], bool) if kept is None else kept
        kept = np.concatenate([kept, np.ones((len(embeds), count), bool)], axis=1)
        return np.stack([self._states(one[own])[-count:] for one, own in zip(past, kept)]), past

    def _states(self, embeds):
        steps = np.arange(1, len(embeds) + 1, dtype=np.float32)[:, None]
        before = np.pad(embeds, ((1, 0), (0, 0)))[:-1]
        return np.tanh(embeds + 0.8 * before + np.cumsum(embeds, axis=0) / steps).astype(np.float32)

    def _head(self, hidden):
        return hidden @ self.matrix

    def length(self, past):
        return past.shape[1]

    def rewind(self, past, length):
        return past[:, :length]


@pytest.fixture(scope="session")
def hot_demo(tmp_path_factory) -> Path:
    """The demo checkpoint with a projector whose sums leave even float32's range."""

    def heat(tensors):
        name = next(name for name in tensors if name.endswith("multi_modal_projector.linear_1.weight"))
        tensors[name] = tensors[name].float() * 5e38

    return with_tensors(scenes.CHECKPOINT, tmp_path_factory.mktemp("hot") / "demo", heat)


@pytest.fixture
def reference() -> FastVLM:
    rng = np.random.default_rng(7)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return FastVLM(
        preprocessor=FakePreprocessor(), tokenizer=FakeTokenizer(), image_token_id=IMAGE_ID,
        vision=FakeVision(draw(48, CHANNELS)), projector=FakeProjector(draw(CHANNELS, HIDDEN) / 3),
        language=FakeLanguage(draw(VOCAB, HIDDEN), draw(HIDDEN, VOCAB)),
    )  # fmt: skip


@pytest.fixture
def candidate(reference) -> FastVLM:
    return copy.deepcopy(reference)


def perturb_pixels(model):
    model.preprocessor.mean = 1e-3


def perturb_vision(model):
    model.vision.weight += 1


def perturb_projector(model):
    model.projector.weight[2] *= -4


def perturb_embedding(model):
    model.language.embedding[ord("W") % 36, 0] += 4


def perturb_head(model):
    model.language.matrix[2, 7] += 9


@pytest.fixture
def shown() -> list[Picture]:
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (90, 120, 3)).astype(np.uint8)) for _ in range(4)]
    return [Picture(f"picture {n}", image, f"What is this, {n}?", None, "demo") for n, image in enumerate(images)]


@pytest.fixture
def compared():
    """Take pictures through two models: the rows."""

    def run(expected, actual, pictures):
        seen = [compare.see(expected, actual, one, encoders.encode(expected, actual, one)) for one in pictures]
        return compare.answer((expected.language, expected.tokenizer), (actual.language, actual.tokenizer), seen)

    return run


@pytest.fixture
def operations() -> dict[str, Any]:
    """What `encoders.compare_operations` gives for a sound fp16 package."""
    rounding = [
        {"index": i, "name": f"x_{i}", "type": "conv" if i % 3 == 0 else "gelu", "snr_db": 66.0 - i / 10, "layer": None}
        for i in range(60)
    ]
    layers = [
        error | {"layer": f"stages.{error['index'] // 20}.blocks.{error['index']}.fc1", "snr_db": error["snr_db"] - 1}
        for error in rounding[::3]
    ]
    return {"precision": "float16", "rounding": rounding, "layers": layers, "fault": None}


@pytest.fixture
def sides() -> dict[str, Any]:
    runners = {"vision": "fake vision", "projector": "fake projector", "language": "fake language"}
    return {
        "reference": {"name": "checkpoint", "runners": runners},
        "candidate": {"name": "artefact", "runners": runners},
    }
