"""The Python surface, the same over a PyTorch checkpoint and over an exported artefact. NumPy in and out.

A `FastVLM` is put together from three parts: what encodes the picture, what projects it, what speaks. Here are the
PyTorch parts; `model_export.runtime` has those of an artefact. Whatever a part computes is finite, or an error.
"""

import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fastvlm.common.cli import log
from fastvlm.common.dtypes import choose_device, computed_in, dtype_name
from fastvlm.common.errors import UserError
from fastvlm.common.image_tokens import tokens_per_image
from fastvlm.common.limits import Part, finite, positions, stopped, warn_once
from fastvlm.data.preprocessing import Preprocessor
from fastvlm.data.prompt import encode_prompt, eos_ids

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


class Language(ABC):
    """A causal language model over embeddings: NumPy in and out, nothing left to be computed on return.

    `positions` is how many it was made for (None: unknown): a prompt past them is refused, an answer ends there.
    """

    name: str
    remedy: str
    eos_ids: frozenset[int]
    positions: int | None

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """(1, T) int64 -> (1, T, H) float32."""
        return finite(self._embed(ids), "language model: embeddings of tokens", self)

    def hidden(self, embeds: np.ndarray, past: Any = None, kept: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        """(B, T, H) float32 behind what the KV cache `past` holds -> the final hidden states (B, T, H) float32, and the
        cache, which now holds these positions too (`past` itself, extended). NaN and infinity show in `head`.

        `kept` (B, length of `past`) bool says which cached positions belong to each sequence (default: all).
        """
        before = kept.sum(1).max() if kept is not None else 0 if past is None else self.length(past)
        self.check_length(int(before) + embeds.shape[1])
        return self._hidden(embeds, past, kept)

    def head(self, hidden: np.ndarray, first: int = 0) -> np.ndarray:
        """Final hidden states (..., T, H) float32, of positions from `first` on -> logits (..., T, V) float32."""
        return finite(self._head(hidden), "language model: logits at position {}", self, first)

    def logits(self, embeds: np.ndarray) -> np.ndarray:
        """(B, T, H) float32 -> (B, T, V) float32."""
        return self.head(self.hidden(embeds)[0])

    def prefill(self, embeds: np.ndarray, past: Any = None) -> tuple[np.ndarray, Any]:
        """As `hidden`, for one sequence (1, T, H) -> the last position's logits (V,) float32, and the cache."""
        hidden, past = self.hidden(embeds, past)
        return self.head(hidden[:, -1:], self.length(past) - 1)[0, -1], past

    def check_length(self, tokens: int, of_pictures: int = 0) -> None:
        """UserError for a prompt of more tokens than there are positions."""
        if self.positions is not None and tokens > self.positions:
            counted = f", {of_pictures} of them for pictures" if of_pictures else ""
            raise UserError(
                f"prompt: {tokens} tokens{counted}, but the language model has {self.positions} positions"
                " (max_position_embeddings): shorten the text, or show fewer pictures at once"
            )

    @abstractmethod
    def _embed(self, ids: np.ndarray) -> np.ndarray:
        """`embed`, whatever comes out; so the next two."""

    @abstractmethod
    def _hidden(self, embeds: np.ndarray, past: Any, kept: np.ndarray | None) -> tuple[np.ndarray, Any]: ...

    @abstractmethod
    def _head(self, hidden: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def length(self, past: Any) -> int:
        """How many positions a KV cache holds."""

    @abstractmethod
    def rewind(self, past: Any, length: int) -> Any:
        """The KV cache with its first `length` positions only (`past` itself, cut)."""

    def stream(
        self,
        embeds: np.ndarray,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Yield new token ids until an end token (not yielded) or `max_new_tokens`; greedy at temperature 0."""
        draw = Sampler(temperature, top_p, seed)
        yield from self.decode(*self.prefill(embeds), max_new_tokens, draw)

    def decode(self, logits: np.ndarray, past: Any, max_new_tokens: int, draw: "Sampler") -> Iterator[int]:
        """The same after a prefill: what it gave, and what picks the tokens."""
        for count in range(1, max_new_tokens + 1):
            token = draw(logits)
            if token in self.eos_ids:
                return
            yield token
            if count == max_new_tokens:
                return
            if self.positions is not None and self.length(past) >= self.positions:
                log(stopped(self.positions))
                return
            logits, past = self.prefill(self.embed(np.array([[token]])), past)


@dataclass(frozen=True, repr=False)
class FastVLM:
    """A loaded FastVLM: `preprocess`, `encode_image`, `project`, `logits`, `generate` and `stream`.

    S is the resolution in pixels, N = (S / 64)² the image tokens, C the encoder's width (3072 for FastViTHD), H the
    language model's, V its vocabulary, T the prompt's length in tokens, image tokens included.
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
        """What runs each part."""
        return {"vision": self.vision.name, "projector": self.projector.name, "language": self.language.name}

    @property
    def tokens_per_image(self) -> int:
        """How many tokens of the prompt a picture takes."""
        return tokens_per_image(self.image_size)

    def preprocess(self, image: Any) -> np.ndarray:
        """A picture (PIL image, path, or uint8 (height, width, 3)) -> pixel values (1, 3, S, S) float32, 0…1 before
        the checkpoint's mean and standard deviation. Raises UserError for what is no usable picture."""
        return self.preprocessor(image)

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """Pixel values (1, 3, S, S) float32 -> encoder features (1, N, C) float32."""
        pixels = _checked(pixel_values, (1, 3, self.image_size, self.image_size), "pixel_values")
        return finite(self.vision.encode(pixels), "vision encoder: features", self.vision)

    def project(self, features: np.ndarray) -> np.ndarray:
        """Encoder features (1, N, C) -> image embeddings (1, N, H) float32."""
        checked = _checked(features, (1, self.tokens_per_image, None), "features")
        return finite(self.projector(checked), "projector: embeddings of a picture", self.projector)

    def embed(self, prompt: str, image: Any = None, conv_mode: str = "qwen_2") -> np.ndarray:
        """The merged embeddings (1, T, H) float32 that the language model reads.

        `image` is one picture, a list of pictures (for one prompt), or None for a text-only prompt.
        """
        images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        features = [self.project(self.encode_image(self.preprocess(one))) for one in images]
        return self.merge(prompt, features, conv_mode)

    def merge(self, prompt: str, image_embeddings: Sequence[np.ndarray], conv_mode: str = "qwen_2") -> np.ndarray:
        """Put image embeddings, each (1, N, H), in the places of the prompt's image tokens -> (1, T, H) float32."""
        ids = self.tokenize(prompt, len(image_embeddings), conv_mode)
        embeds = self.language.embed(ids)
        if image_embeddings:
            embeds = embeds.copy()
            embeds[ids == self.image_token_id] = np.concatenate([one[0] for one in image_embeddings])
        return embeds

    def tokenize(self, prompt: str, images: int = 1, conv_mode: str = "qwen_2") -> np.ndarray:
        """The prompt's token ids (1, T) int64, N for each picture. UserError for none, and for more than the language
        model has positions; more than the tokenizer's `model_max_length` is warned of."""
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
        """UserError with all of these (name, prompt, pictures) that `tokenize` refuses, before any is answered."""
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
        """Prefill logits (1, T, V) float32 for every position of the prompt."""
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
        """Yield the answer piece by piece as it is made; greedy at temperature 0."""
        embeds = self.embed(prompt, image, conv_mode)
        yield from self.decode(self.language.stream(embeds, max_new_tokens, temperature, top_p, seed))

    def decode(self, ids: Iterator[int]) -> Iterator[str]:
        """Token ids -> text pieces; a piece is held back while it ends inside a UTF-8 character."""
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
        """The whole answer; `sampling` as for `stream`."""
        return "".join(self.stream(prompt, image, max_new_tokens, **sampling))


def _checked(array: np.ndarray, shape: tuple[int | None, ...], name: str) -> np.ndarray:
    got = np.shape(array)
    if len(got) != len(shape) or any(want is not None and have != want for have, want in zip(got, shape)):
        expected = ", ".join("C" if want is None else str(want) for want in shape)
        raise UserError(f"{name}: wrong shape: got {tuple(got)}, expected ({expected})")
    if (dtype := np.asarray(array).dtype).kind != "f":
        raise UserError(f"{name}: got {dtype}, expected float32: `preprocess` makes pixel values of a picture")
    return np.ascontiguousarray(array, dtype=np.float32)


class TorchVision:
    """The encoder in PyTorch: a timm FastViT whose `forward_features` gives (1, C, H, W)."""

    def __init__(self, encoder: Any, name: str, remedy: str) -> None:
        self.encoder, self.name, self.remedy = encoder, name, remedy
        self.like = next(encoder.parameters())

    @torch.inference_mode()
    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(pixel_values).to(self.like.device, self.like.dtype)
        features = self.encoder.forward_features(pixels)
        return features.flatten(2).transpose(1, 2).float().cpu().numpy()


class TorchProjector:
    """A projector module in PyTorch."""

    def __init__(self, module: torch.nn.Module, name: str, remedy: str) -> None:
        self.module, self.name, self.remedy = module, name, remedy
        self.like = next(module.parameters())

    @torch.inference_mode()
    def __call__(self, features: np.ndarray) -> np.ndarray:
        return self.module(torch.from_numpy(features).to(self.like.device, self.like.dtype)).float().cpu().numpy()


class TorchLanguage(Language):
    """Any Transformers causal language model as a `Language`."""

    def __init__(self, model: Any, eos_ids: Iterable[int], name: str, remedy: str) -> None:
        self.model, self.eos_ids, self.name, self.remedy = model, frozenset(eos_ids), name, remedy
        self.like, self.positions = next(model.parameters()), positions(model.config.to_dict())

    def _tensor(self, embeds: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(embeds)).to(self.like.device, self.like.dtype)

    @torch.inference_mode()
    def _embed(self, ids: np.ndarray) -> np.ndarray:
        return self.model.get_input_embeddings()(torch.from_numpy(ids).to(self.like.device)).float().cpu().numpy()

    @torch.inference_mode()
    def _hidden(self, embeds: np.ndarray, past: Any, kept: np.ndarray | None) -> tuple[np.ndarray, Any]:
        where: dict[str, Any] = {}
        if kept is not None:
            new = np.ones(embeds.shape[:2], np.int64)
            positions = kept.sum(1, keepdims=True) + new.cumsum(1) - 1
            mask = np.concatenate([kept.astype(np.int64), new], axis=1)
            where = {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions)}
        states, past = self._states(inputs_embeds=self._tensor(embeds), past_key_values=past, use_cache=True, **where)
        return states.float().cpu().numpy(), past

    def _states(self, **inputs: Any) -> tuple[torch.Tensor, Any]:
        output = self.model.model(**inputs)
        return output.last_hidden_state, output.past_key_values

    @torch.inference_mode()
    def _head(self, hidden: np.ndarray) -> np.ndarray:
        return self.model.lm_head(self._tensor(hidden)).float().cpu().numpy()

    def length(self, past: Any) -> int:
        return past.get_seq_length()

    def rewind(self, past: Any, length: int) -> Any:
        past.crop(length - past.get_seq_length())
        return past


class Sampler:
    """Picks a token from logits (V,): the largest at temperature 0, else by temperature and nucleus (top_p)."""

    def __init__(self, temperature: float = 0.0, top_p: float | None = None, seed: int | None = None) -> None:
        if temperature < 0:
            raise UserError(f"--temperature: got {temperature}, expected 0 (greedy) or more")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"--top_p: got {top_p}, expected a number in (0, 1]")
        self.temperature, self.top_p, self.rng = temperature, top_p, np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        if self.temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) / self.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        if self.top_p is not None:
            order = np.argsort(-probabilities)
            before = np.cumsum(probabilities[order]) - probabilities[order]
            probabilities[order[before >= self.top_p]] = 0  # the token that crosses top_p stays
            probabilities /= probabilities.sum()
        return int(self.rng.choice(len(probabilities), p=probabilities))


def load_checkpoint(
    path: str | os.PathLike[str],
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    image_strategy: str | None = None,
    streamed: bool = False,
) -> FastVLM:
    """Load a checkpoint in any supported layout as a FastVLM run by PyTorch; `dtype` may be "auto", too (see
    `dtypes.computed_in`). `streamed` is for proofs: the language model's matrices stay as they are stored."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from fastvlm.model.build import build

    device, checkpoint = choose_device(device), open_checkpoint(path, image_strategy)
    vision, language = computed_in(checkpoint.dtype, device) if dtype == "auto" else (dtype, dtype)
    model = build(checkpoint, language, device, attn_implementation, vision, streamed)
    return from_model(model, checkpoint, checkpoint.preprocessor)


def from_model(model: Any, checkpoint: Any, preprocessor: Preprocessor) -> FastVLM:
    """The surface over a built `FastVlmForConditionalGeneration`."""
    from transformers import Qwen2ForCausalLM

    with torch.device("meta"):
        language = Qwen2ForCausalLM(model.config.text_config)
    language.model, language.lm_head = model.model.language_model, model.lm_head  # the same modules, no copy
    language.eval()
    tokenizer = checkpoint.tokenizer()
    eos = eos_ids(tokenizer, model.config.text_config.eos_token_id)
    encoder, projector = model.model.vision_tower.timm_model, model.model.multi_modal_projector
    return FastVLM(
        preprocessor=preprocessor,
        tokenizer=tokenizer,
        image_token_id=checkpoint.image_token_id,
        vision=TorchVision(encoder, *_name_and_remedy(encoder, checkpoint.path)),
        projector=TorchProjector(projector, *_name_and_remedy(projector, checkpoint.path)),
        language=TorchLanguage(language, eos, *_name_and_remedy(language, checkpoint.path)),
    )


def _name_and_remedy(module: torch.nn.Module, path: Path) -> tuple[str, str]:
    """Of what runs a part of the checkpoint at `path`."""
    like = next(module.parameters())
    name = f"PyTorch {torch.__version__} {like.device.type} {dtype_name(like.dtype)}"
    if like.dtype == torch.float16:
        return name, "float16 ends at 65504: run the checkpoint with --dtype bfloat16 or float32"
    doctor = f"python -m fastvlm doctor {shlex.quote(str(path))}"
    return name, f"weights are damaged, or too large: `{doctor}` reads them all"
