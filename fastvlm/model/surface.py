"""The Python surface, the same over a PyTorch checkpoint and over an exported artefact. NumPy in and out.

A `FastVLM` is put together from three parts: vision encoder, projector and language model. `fastvlm.model.torch_parts`
has those of PyTorch, `model_export.runtime` those of an artefact. Values that are not finite are an error.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastvlm.common.errors import UserError
from fastvlm.common.image_tokens import tokens_per_image
from fastvlm.common.limits import Part, finite, warn_once
from fastvlm.data.preprocessing import Preprocessor
from fastvlm.data.prompt import encode_prompt
from fastvlm.model.language import Language

_SHOWN = 5  # faults a line


class Vision(Part, Protocol):
    """Encodes pictures."""

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """(1, 3, S, S) float32 -> (1, N, C) float32, N = (S / 64)²."""
        ...


class Projector(Part, Protocol):
    """Maps the encoder's features into the language model's width."""

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(1, N, C) float32 -> (1, N, H) float32."""
        ...


@dataclass(frozen=True, repr=False)
class FastVLM:
    """A loaded FastVLM: `generate`, `stream` and their stages, NumPy in and out.

    S is the resolution in pixels, N = (S / 64)² the image tokens, C the encoder's width (3072 for FastViTHD), H the
    language model's, V its vocabulary, T the prompt's length in tokens, image tokens included.

    Every method raises UserError for unusable input, and CheckFailed where a part computes NaN or infinity (both in
    `fastvlm.common.errors`).
    """

    preprocessor: Preprocessor
    tokenizer: Any
    image_token_id: int
    vision: Vision
    projector: Projector
    language: Language

    def __repr__(self) -> str:
        runners = ", ".join(dict.fromkeys(self.runners.values()))
        return f"FastVLM({self.image_size} x {self.image_size} pixels, {self.tokens_per_image} image tokens; {runners})"

    @property
    def image_size(self) -> int:
        """The resolution S in pixels."""
        return self.preprocessor.image_size

    @property
    def runners(self) -> dict[str, str]:
        """The name of the runner of each part."""
        return {"vision": self.vision.name, "projector": self.projector.name, "language": self.language.name}

    @property
    def tokens_per_image(self) -> int:
        """The number of tokens N of one picture."""
        return tokens_per_image(self.image_size)

    def preprocess(self, image: Any) -> np.ndarray:
        """Resize and crop or pad a picture, and normalize it.

        Args:
            image: a path, a PIL image, or an array (height, width, 3) uint8, RGB.

        Returns:
            Pixel values (1, 3, S, S) float32: 0 to 1, less the checkpoint's mean, over its standard deviation.

        Raises:
            UserError: the picture can't be read, or is beyond the limits of `fastvlm.data.images`.
        """
        return self.preprocessor(image)

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """Run the vision encoder.

        Args:
            pixel_values: (1, 3, S, S) float32, as `preprocess` gives them.

        Returns:
            The encoder's features (1, N, C) float32, image tokens in reading order.

        Raises:
            UserError: another shape, or no floating-point type.
        """
        pixels = _checked(pixel_values, (1, 3, self.image_size, self.image_size), "pixel_values")
        return finite(self.vision.encode(pixels), "vision encoder: features", self.vision)

    def project(self, features: np.ndarray) -> np.ndarray:
        """Run the projector.

        Args:
            features: (1, N, C) float32, as `encode_image` gives them.

        Returns:
            Image embeddings (1, N, H) float32.

        Raises:
            UserError: another shape, or no floating-point type.
        """
        checked = _checked(features, (1, self.tokens_per_image, None), "features")
        return finite(self.projector(checked), "projector: embeddings of a picture", self.projector)

    def embed(self, prompt: str, image: Any = None, conv_mode: str = "qwen_2") -> np.ndarray:
        """Embed a prompt and its pictures.

        Args:
            prompt: the question. Where it has `<image>`, these are the pictures' places; else they come before it.
            image: a picture as for `preprocess`, a list of several, or None for text alone.
            conv_mode: "qwen_2" for the chat template, "plain" for the prompt as it is.

        Returns:
            The language model's input embeddings (1, T, H) float32.

        Raises:
            UserError: an unusable picture, or a prompt that is empty or longer than the model's positions.
        """
        images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        features = [self.project(self.encode_image(self.preprocess(picture))) for picture in images]
        return self.merge(prompt, features, conv_mode)

    def merge(self, prompt: str, image_embeddings: Sequence[np.ndarray], conv_mode: str = "qwen_2") -> np.ndarray:
        """As `embed`, with the pictures as image embeddings, each (1, N, H)."""
        ids = self.tokenize(prompt, len(image_embeddings), conv_mode)
        embeds = self.language.embed(ids)
        if image_embeddings:
            embeds = embeds.copy()
            embeds[ids == self.image_token_id] = np.concatenate(image_embeddings, axis=1)[0]
        return embeds

    def tokenize(self, prompt: str, images: int = 1, conv_mode: str = "qwen_2") -> np.ndarray:
        """The prompt's token ids (1, T) int64, N of them for each picture. UserError for an empty prompt, or one longer
        than the language model's positions; a warning for one longer than the tokenizer's `model_max_length`."""
        ids = encode_prompt(self.tokenizer, prompt, self.image_token_id, self.tokens_per_image, images, conv_mode)
        count, of_pictures = ids.shape[1], images * self.tokens_per_image
        if not count:
            raise UserError("prompt: empty: expected text, or a picture")
        self.language.check_length(count, of_pictures)
        most = self.tokenizer.model_max_length  # 1e30 where the files don't say
        if count > most:
            warn_once(
                f"prompt: {count} tokens, {of_pictures} of them for pictures: more than the tokenizer's"
                f" model_max_length {most}: the model may not have been trained with so many"
            )
        return ids

    def check_prompts(self, prompts: Iterable[tuple[str, str, int]], conv_mode: str = "qwen_2") -> None:
        """Raise UserError for all of the (name, prompt, number of pictures) that `tokenize` refuses."""
        faults: dict[str, None] = {}
        for name, prompt, images in prompts:
            try:
                self.tokenize(prompt, images, conv_mode)
            except UserError as error:
                faults[f"{name}: {error}"] = None
        if faults:
            more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
            raise UserError("; ".join([*[*faults][:_SHOWN], *more]))

    def logits(self, prompt: str, image: Any = None, conv_mode: str = "qwen_2") -> np.ndarray:
        """Run the prefill; arguments and errors as for `embed`.

        Returns:
            The logits (1, T, V) float32 of every position of the prompt.
        """
        return self.language.logits(self.embed(prompt, image, conv_mode))

    def stream(
        self,
        prompt: str,
        image: Any = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | None = None,
        conv_mode: str = "qwen_2",
    ) -> Iterator[str]:
        """Answer a prompt, piece by piece.

        Args:
            prompt, image, conv_mode: as for `embed`.
            max_new_tokens: the most tokens of the answer.
            temperature: 0 for greedy decoding; above it, tokens are sampled.
            top_p: nucleus sampling: the share of the probability to sample from, in (0, 1]; None for all of it.
            seed: of the sampling; None for another answer each time.

        Returns:
            An iterator over the text of the answer, in pieces of whole characters.

        Raises:
            UserError: as for `embed`, or for `temperature` or `top_p` out of range.
        """
        embeds = self.embed(prompt, image, conv_mode)
        yield from self.decode(self.language.stream(embeds, max_new_tokens, temperature, top_p, seed))

    def decode(self, ids: Iterator[int]) -> Iterator[str]:
        """Decode token ids to pieces of text; a piece waits until it ends with a whole UTF-8 character."""
        seen: list[int] = []
        shown = ""
        for token in ids:
            seen.append(token)
            text = self.tokenizer.decode(seen, skip_special_tokens=True)
            if len(text) > len(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text
        rest = self.tokenizer.decode(seen, skip_special_tokens=True)[len(shown) :]
        if rest:
            yield rest

    def generate(self, prompt: str, image: Any = None, max_new_tokens: int = 256, **sampling: Any) -> str:
        """Answer a prompt: `stream`, with the same arguments and errors, in one string.

        Args:
            sampling: `temperature`, `top_p`, `seed` and `conv_mode`.

        Returns:
            The text of the answer.
        """
        return "".join(self.stream(prompt, image, max_new_tokens, **sampling))


def _checked(array: np.ndarray, shape: tuple[int | None, ...], name: str) -> np.ndarray:
    got = np.shape(array)
    if len(got) != len(shape) or any(want is not None and have != want for have, want in zip(got, shape)):
        expected = ", ".join("C" if want is None else str(want) for want in shape)
        raise UserError(f"{name}: wrong shape: got {tuple(got)}, expected ({expected})")
    if (dtype := np.asarray(array).dtype).kind != "f":
        raise UserError(f"{name}: got {dtype}, expected float32: `preprocess` makes pixel values of a picture")
    return np.ascontiguousarray(array, dtype=np.float32)
