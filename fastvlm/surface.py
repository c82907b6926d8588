"""The Python surface, the same over a PyTorch checkpoint and over an exported artefact. NumPy in and out.

A `FastVLM` is put together from three parts: what encodes the picture, what projects it, what speaks. Here are the
PyTorch parts; `model_export.runtime` has those of an artefact.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fastvlm.errors import UserError
from fastvlm.preprocessing import Preprocessor
from fastvlm.prompt import encode_prompt


class Vision(Protocol):
    """Encodes pictures."""

    name: str

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """(1, 3, S, S) float32 -> (1, N, C) float32, N = (S / 64)²."""
        ...


class Projector(Protocol):
    """Maps the encoder's features into the language model's width."""

    name: str

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(1, N, C) float32 -> (1, N, H) float32."""
        ...


class Language(ABC):
    """A causal language model over embeddings: NumPy in and out, nothing left to be computed on return."""

    name: str
    eos_ids: frozenset[int]

    @abstractmethod
    def embed(self, ids: np.ndarray) -> np.ndarray:
        """(1, T) int64 -> (1, T, H) float32."""

    @abstractmethod
    def logits(self, embeds: np.ndarray) -> np.ndarray:
        """(1, T, H) float32 -> (1, T, V) float32."""

    @abstractmethod
    def prefill(self, embeds: np.ndarray, past: Any = None) -> tuple[np.ndarray, Any]:
        """(1, T, H) float32 behind what the KV cache `past` holds -> the last position's logits (V,) float32, and the
        cache, which now holds these positions too (`past` itself, extended)."""

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
            if count < max_new_tokens:
                logits, past = self.prefill(self.embed(np.array([[token]])), past)


@dataclass(frozen=True)
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

    @property
    def image_size(self) -> int:
        """The resolution S in pixels."""
        return self.preprocessor.image_size

    @property
    def runners(self) -> dict[str, str]:
        """What runs each part."""
        return {"vision": self.vision.name, "projector": self.projector.name, "language": self.language.name}

    def preprocess(self, image: Any) -> np.ndarray:
        """A picture (PIL image, path, or uint8 (height, width, 3)) -> pixel values (1, 3, S, S) float32, 0…1 before
        the checkpoint's mean and standard deviation. Raises UserError for what is no usable picture."""
        return self.preprocessor(image)

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """Pixel values (1, 3, S, S) float32 -> encoder features (1, N, C) float32."""
        return self.vision.encode(_checked(pixel_values, (1, 3, self.image_size, self.image_size), "pixel_values"))

    def project(self, features: np.ndarray) -> np.ndarray:
        """Encoder features (1, N, C) -> image embeddings (1, N, H) float32."""
        return self.projector(_checked(features, (1, (self.image_size // 64) ** 2, None), "features"))

    def embed(self, prompt: str, image: Any = None, conv_mode: str = "qwen_2") -> np.ndarray:
        """The merged embeddings (1, T, H) float32 that the language model reads.

        `image` is one picture, a list of pictures (for one prompt), or None for a text-only prompt.
        """
        images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        features = [self.project(self.encode_image(self.preprocess(one))) for one in images]
        return self.merge(prompt, features, conv_mode)

    def merge(self, prompt: str, image_embeddings: Sequence[np.ndarray], conv_mode: str = "qwen_2") -> np.ndarray:
        """Put image embeddings, each (1, N, H), in the places of the prompt's image tokens -> (1, T, H) float32."""
        tokens = (self.image_size // 64) ** 2
        ids = encode_prompt(self.tokenizer, prompt, self.image_token_id, tokens, len(image_embeddings), conv_mode)
        embeds = self.language.embed(ids)
        if image_embeddings:
            embeds = embeds.copy()
            embeds[ids == self.image_token_id] = np.concatenate([one[0] for one in image_embeddings])
        return embeds

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
    return np.ascontiguousarray(array, dtype=np.float32)


class TorchVision:
    """The encoder in PyTorch: a timm FastViT whose `forward_features` gives (1, C, H, W)."""

    def __init__(self, encoder: Any, name: str) -> None:
        self.encoder, self.name = encoder, name
        self.like = next(encoder.parameters())

    @torch.inference_mode()
    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(pixel_values).to(self.like.device, self.like.dtype)
        features = self.encoder.forward_features(pixels)
        return features.flatten(2).transpose(1, 2).float().cpu().numpy()


class TorchProjector:
    """A projector module in PyTorch."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.like = next(module.parameters())

    @torch.inference_mode()
    def __call__(self, features: np.ndarray) -> np.ndarray:
        return self.module(torch.from_numpy(features).to(self.like.device, self.like.dtype)).float().cpu().numpy()


class TorchLanguage(Language):
    """Any Transformers causal language model as a `Language`."""

    def __init__(self, model: Any, eos_ids: Iterable[int], name: str) -> None:
        self.model, self.eos_ids, self.name = model, frozenset(eos_ids), name
        self.like = next(model.parameters())

    def _tensor(self, embeds: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(embeds)).to(self.like.device, self.like.dtype)

    @torch.inference_mode()
    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.model.get_input_embeddings()(torch.from_numpy(ids).to(self.like.device)).float().cpu().numpy()

    @torch.inference_mode()
    def logits(self, embeds: np.ndarray) -> np.ndarray:
        return self.model(inputs_embeds=self._tensor(embeds), use_cache=False).logits.float().cpu().numpy()

    @torch.inference_mode()
    def prefill(self, embeds: np.ndarray, past: Any = None) -> tuple[np.ndarray, Any]:
        # By index and not as `1`, a view, for which PyTorch's matmul copies a frozen bfloat16 matrix (272 MB at 0.5B).
        last = torch.tensor([embeds.shape[1] - 1], device=self.like.device)
        output = self.model(
            inputs_embeds=self._tensor(embeds), past_key_values=past, use_cache=True, logits_to_keep=last
        )
        return output.logits[0, -1].float().cpu().numpy(), output.past_key_values

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
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    image_strategy: str | None = None,
) -> FastVLM:
    """Load a checkpoint in any supported layout as a FastVLM run by PyTorch."""
    from fastvlm.checkpoint import open_checkpoint
    from fastvlm.model import build
    from fastvlm.preprocessing import read_preprocessor

    checkpoint = open_checkpoint(path)
    model = build(checkpoint, dtype, device, attn_implementation)
    return from_model(
        model,
        checkpoint,
        read_preprocessor(checkpoint.path, image_strategy),
        f"PyTorch {torch.__version__} {device} {dtype}",
    )


def from_model(model: Any, checkpoint: Any, preprocessor: Preprocessor, name: str) -> FastVLM:
    """The surface over a built `FastVlmForConditionalGeneration`."""
    from transformers import Qwen2ForCausalLM

    with torch.device("meta"):
        language = Qwen2ForCausalLM(model.config.text_config)
    language.model, language.lm_head = model.model.language_model, model.lm_head  # the same modules, no copy
    language.eval()
    tokenizer = checkpoint.tokenizer()
    eos = eos_ids(tokenizer, model.config.text_config.eos_token_id)
    return FastVLM(
        preprocessor=preprocessor,
        tokenizer=tokenizer,
        image_token_id=checkpoint.image_token_id,
        vision=TorchVision(model.model.vision_tower.timm_model, name),
        projector=TorchProjector(model.model.multi_modal_projector, name),
        language=TorchLanguage(language, eos, name),
    )


def eos_ids(tokenizer: Any, configured: int | Sequence[int] | None) -> set[int]:
    """The ids that end an answer: the configuration's, the tokenizer's, and the template's `<|im_end|>`."""
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    ids |= {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    return {token for token in ids if token is not None}
