"""A causal language model over embeddings, NumPy in and out; in PyTorch, any of Transformers'."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from fastvlm.common.cli import log
from fastvlm.common.errors import UserError
from fastvlm.common.limits import finite, positions, stopped


class Language(ABC):
    """A causal language model over embeddings: NumPy in and out, nothing left to be computed on return.

    `positions` is how many it was made for (None: unknown): a prompt past them is refused, an answer ends there.
    """

    name: str
    remedy: str
    eos_ids: frozenset[int]
    positions: int | None
    one_sequence = False  # reads one at a time, and takes no `cached`

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """(1, T) int64 -> (1, T, H) float32."""
        return finite(self._embed(ids), "language model: embeddings of tokens", self)

    def hidden(self, embeds: np.ndarray, past: Any = None, cached: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        """(B, T, H) float32 behind what the KV cache `past` holds -> the final hidden states (B, T, H) float32, and the
        cache, which now holds these positions too (`past` itself, extended). NaN and infinity show in `head`.

        `cached` (B, length of `past`) bool is false at the cached positions that are a sequence's padding (None: none).
        """
        before = cached.sum(1).max() if cached is not None else 0 if past is None else self.length(past)
        self.check_length(int(before) + embeds.shape[1])
        return self._hidden(embeds, past, cached)

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
        """As `embed`, without the check that all is finite; so are `_hidden` and `_head`."""

    @abstractmethod
    def _hidden(self, embeds: np.ndarray, past: Any, cached: np.ndarray | None) -> tuple[np.ndarray, Any]: ...

    @abstractmethod
    def _head(self, hidden: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def length(self, past: Any) -> int:
        """How many positions a KV cache holds."""

    @abstractmethod
    def rewind(self, past: Any, length: int) -> Any:
        """The KV cache cut to its first `length` positions (`past` itself)."""

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
        """As `stream`, after a prefill that gave `logits` and `past`; `draw` picks the tokens."""
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
    def _hidden(self, embeds: np.ndarray, past: Any, cached: np.ndarray | None) -> tuple[np.ndarray, Any]:
        masks: dict[str, Any] = {}
        if cached is not None:
            new = np.ones(embeds.shape[:2], np.int64)
            positions = cached.sum(1, keepdims=True) + new.cumsum(1) - 1
            mask = np.concatenate([cached.astype(np.int64), new], axis=1)
            masks = {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions)}
        states, past = self._states(inputs_embeds=self._tensor(embeds), past_key_values=past, use_cache=True, **masks)
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
