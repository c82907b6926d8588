"""Several questions to one model: only the part of each that is new is computed."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.common.files import read_small
from fastvlm.data.images import MAX_BYTES, as_rgb
from fastvlm.model.language import Sampler
from fastvlm.model.surface import FastVLM

KEPT_PICTURES = 16  # image embeddings of 0.9 MB each in the 0.5B model


class Session:
    """A `FastVLM` with caches: pictures' embeddings by the hash of their content, and the KV cache of the prefix that
    a prompt shares with the one before. A second question on the same picture prefills its own tokens only.

    The answers are `FastVLM.generate`'s but for rounding: a matrix product of few rows rounds otherwise than one of
    many. One answer at a time: beginning another ends the one before.

    Args:
        model: the checkpoint or artefact, as loaded.
    """

    def __init__(self, model: FastVLM) -> None:
        self.model = model
        self._pictures: OrderedDict[str, np.ndarray] = OrderedDict()
        self._keys: list[int | str] = []  # what the KV cache holds: token ids, and a picture's hash for each of its own
        self._past: Any = None
        self._prompts = 0  # read so far

    def picture(self, image: Any) -> tuple[str, np.ndarray]:
        """A picture's hash and its embeddings (1, N, H), from the cache if it was seen before."""
        key = content_hash(image)
        if key not in self._pictures:
            model = self.model
            self._pictures[key] = model.project(model.encode_image(model.preprocess(image)))
        self._pictures.move_to_end(key)
        while len(self._pictures) > KEPT_PICTURES:
            self._pictures.popitem(last=False)
        return key, self._pictures[key]

    def prefill(self, prompt: str, image: Any = None) -> tuple[np.ndarray, int]:
        """Read a prompt; `prompt` and `image` as in `FastVLM.stream`.

        Returns:
            The last position's logits (V,) float32, and the number of tokens that the cache did not hold.
        """
        model, images = self.model, [] if image is None else image if isinstance(image, (list, tuple)) else [image]
        ids = model.tokenize(prompt, len(images))[0].tolist()
        hashes, embeddings = zip(*map(self.picture, images), strict=True) if images else ((), ())
        shown = iter([key for key in hashes for _ in range(model.tokens_per_image)])
        keys = [next(shown) if token == model.image_token_id else token for token in ids]
        known = min(_common_prefix(keys, self._keys), len(keys) - 1)  # the last position's logits are asked for
        past = model.language.rewind(self._past, known) if known else None
        self._keys, self._past = [], None  # half of a prefill would be no cache
        rest = ids[known:]
        text = model.image_token_id not in rest  # then the pictures' embeddings aren't needed again
        embeds = model.language.embed(np.array([rest])) if text else model.merge(prompt, embeddings)[:, known:]
        self._prompts += 1
        logits, self._past = model.language.prefill(embeds, past)
        self._keys = keys
        return logits, len(keys) - known

    def stream(self, prompt: str, image: Any = None, max_new_tokens: int = 256, **sampling: Any) -> Iterator[str]:
        """As `FastVLM.stream`; `sampling` as for `fastvlm.model.language.Sampler`."""
        draw = Sampler(**sampling)
        logits, _ = self.prefill(prompt, image)
        yield from self.model.decode(self._tokens(self.model.language.decode(logits, self._past, max_new_tokens, draw)))

    def _tokens(self, tokens: Iterator[int]) -> Iterator[int]:
        """The tokens as long as no other prompt has taken the KV cache."""
        prompts = self._prompts
        while self._prompts == prompts and (token := next(tokens, None)) is not None:
            yield token

    def generate(self, prompt: str, image: Any = None, max_new_tokens: int = 256, **sampling: Any) -> str:
        """As `FastVLM.generate`."""
        return "".join(self.stream(prompt, image, max_new_tokens, **sampling))


def content_hash(image: Any) -> str:
    """SHA-256 of a file's bytes, or of a picture's size and pixels."""
    if isinstance(image, (str, os.PathLike)) and Path(image).is_file():
        return hashlib.sha256(read_small(image, MAX_BYTES)).hexdigest()
    rgb = as_rgb(image)
    return hashlib.sha256(f"{rgb.size} ".encode() + rgb.tobytes()).hexdigest()


def _common_prefix(first: list[Any], second: list[Any]) -> int:
    """The length of the longest prefix of both."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
