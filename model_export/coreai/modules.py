"""The three programs of a bundle as PyTorch modules: vision encoder with projector, embeddings, decoder with KV cache.

They have the names, shapes and dtypes that Apple's `CoreAIVisionLanguageModel` expects (docs/COREAI.md). S is the side
of the picture in pixels, N = (S / 64)² image tokens, H the language model's width, q new positions, T all positions so
far, L layers, K key-value heads, X the context's length, D the width of a head, V the vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model_export.coreai import rounding
from model_export.encoder.channel_first import Encoder, pointwise
from model_export.encoder.scaled import ScaledGELU

ATTENTION = "coreai"  # the name of `_attention` in Transformers
SLICE_UPDATE = "fastvlm::slice_update"


class VisionEncoder(nn.Module):
    """Pictures -> image embeddings: a channel-first encoder, and the projector as two 1 x 1 convolutions.

    The encoder's own power of two goes into the first one's weights, so that features beyond float16 are never stored.

    Args:
        encoder: made range-safe by `model_export.encoder.vision.range_safe`.
        projector: Linear (C, H), GELU, Linear (H, H).
        exponent: the first convolution gives x / 2^exponent, and the GELU carries it (0: as it is).
    """

    def __init__(self, encoder: Encoder, projector: tuple[nn.Linear, nn.Linear], exponent: int = 0) -> None:
        super().__init__()
        first, second = projector
        self.fastvit = encoder.fastvit
        down = 2.0**-exponent
        self.linear_0 = pointwise(first.weight.detach() * (2.0**encoder.exponent * down), first.bias.detach() * down)
        self.gelu: nn.Module = ScaledGELU(exponent) if exponent else nn.GELU()
        self.linear_2 = pointwise(second.weight.detach() / down, second.bias.detach())
        self.output_dtype = torch.float16
        rounding.arrange(self.fastvit)
        for name, layer in [*self.named_modules()]:
            if isinstance(layer, nn.Conv2d):
                self.set_submodule(name, Convolution(layer))

    def forward(self, images: Tensor) -> Tensor:
        """(1, 3, S, S) float32 -> (1, N, H) float16."""
        centred = (images - rounding.CENTRE).to(self.linear_0.weight.dtype)
        features = self.fastvit.forward_features(centred)  # type: ignore[operator]
        embeddings = self.linear_2(self.gelu(self.linear_0(features)))
        return embeddings.flatten(2).transpose(1, 2).to(self.output_dtype)


class Convolution(nn.Conv2d):
    """A `Conv2d` whose bias has the shape that it is added in, (1, C, 1, 1).

    coreai-torch reshapes a bias (C,), which coreai-core computes when it converts and stores under a random name.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(layer).items() if not name.startswith("_")})
        self.weight = layer.weight
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach()[None, :, None, None], False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        y = functional.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """Token ids -> embeddings. `nn.Embedding` would ask for int64 ids, which the engine does not have."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(1, q) int32 -> (1, q, H)."""
        return self.weight[input_ids]


class Decoder(nn.Module):
    """Transformers' Qwen2 over embeddings, with a KV cache that is given and updated in place.

    Args:
        language: built with `attn_implementation=ATTENTION`.
    """

    def __init__(self, language: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.model, self.lm_head = language.model, language.lm_head

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Embeddings (1, q, H) behind T - q cached positions -> logits (1, q, V).

        Args:
            inputs_embeds: (1, q, H).
            position_ids: (1, T) int32: 0 to T - 1.
            k_cache, v_cache: (L, 1, K, X, D), X >= T; positions T - q to T - 1 are written.
        """
        total = position_ids.shape[1]
        past = total - inputs_embeds.shape[1]
        rows = position_ids[:, past:]
        seen = position_ids[:, None, None, :] <= rows[:, None, :, None]
        mask = torch.where(seen, 0.0, torch.finfo(inputs_embeds.dtype).min).to(inputs_embeds.dtype)
        states = _States([k_cache, v_cache], past, total)
        hidden = self.model(
            inputs_embeds=inputs_embeds,
            position_ids=rows,
            attention_mask={"full_attention": mask},
            past_key_values=states,
            use_cache=True,
        ).last_hidden_state
        for given, updated in zip((k_cache, v_cache), states.tensors):
            given.copy_(updated)
        return self.lm_head(hidden)


class _States:
    """As much of Transformers' `Cache` as Qwen2 asks for, over the two states of the program."""

    def __init__(self, tensors: list[Tensor], past: int, total: int) -> None:
        self.tensors, self.past, self.total = tensors, past, total

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> list[Tensor]:
        for place, new in enumerate((keys, values)):
            begin, end = [layer, 0, 0, self.past, 0], [layer + 1, 1, new.shape[1], self.total, new.shape[3]]
            self.tensors[place] = slice_update(self.tensors[place], new[None], begin, end)
        return [tensor[layer, :, :, : self.total] for tensor in self.tensors]

    def get_seq_length(self, *_: Any) -> int:
        return self.past


@torch.library.custom_op(SLICE_UPDATE, mutates_args=[])
def slice_update(x: Tensor, new: Tensor, begin: Sequence[int], end: Sequence[int]) -> Tensor:
    """`x` with `new` in [begin, end): Core AI's operation of that name, which updates in place where it can.

    PyTorch's own assignment becomes a copy of the whole state for every layer.
    """
    updated = x.clone()
    updated[tuple(slice(*bounds) for bounds in zip(begin, end))] = new
    return updated


@slice_update.register_fake
def _(x: Tensor, new: Tensor, begin: Sequence[int], end: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


def lower_slice_update(values: Mapping[str, Any], node: torch.fx.Node, _: Any) -> Any:
    """coreai-torch's lowering of `slice_update`; `values` are Core AI's by the nodes' names."""
    from coreai._compiler.dialects import coreai

    args: Any = node.args
    x, new, *bounds = args
    begin, end = (
        coreai.concat(0, [values[at.name] if isinstance(at, torch.fx.Node) else coreai.constant([at]) for at in bound])
        for bound in bounds
    )
    return coreai.slice_update(values[x.name], begin, end, [1] * len(bounds[0]), values[new.name])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """One operation of Core AI, grouped heads included; Transformers' own repeats keys and values."""
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
