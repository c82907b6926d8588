"""The modules that the peers' models are built from: encoders, decoders, Cambrian's connector, random weights."""

import copy
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_STD = 0.02  # of the random weights
_POOL = 1 << 20


class SamplerLayer(nn.Module):
    """A layer of the Spatial Vision Aggregator: each query attends to its own window of every encoder's grid.

    After `VisionCrossAttentionLayer` of cambrian-mllm/cambrian (vision_sampler.py). Every key is visible here: the
    published mask hides padding, which a square picture doesn't have. `reduce`: a window's side for each encoder.
    """

    def __init__(self, query_width: int, width: int, heads: int, reduce: list[int]) -> None:
        super().__init__()
        self.heads = heads
        self.proj_context = nn.Linear(width, width, bias=False)
        self.proj_in = nn.Linear(query_width + width, width, bias=False)
        self.proj_out = mlp(width, width, query_width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.query = _normed_linear(width)
        self.keys = nn.ModuleList([_normed_linear(width) for _ in reduce])
        self.values = nn.ModuleList([_normed_linear(width) for _ in reduce])
        self.out = nn.Linear(width, width, bias=False)
        self.positions = nn.ParameterList(
            [nn.Parameter(torch.empty(side * side, width)) for side in reduce if side > 1]
        )

    def forward(self, query: torch.Tensor, context: torch.Tensor, latents: list[torch.Tensor]) -> torch.Tensor:
        """(Q, 1, query_width), (1, 1, width), each (Q, window, width) -> (Q, 1, query_width)."""
        seen = self.proj_context(context).expand(len(query), -1, -1)  # once for all queries, unlike as published
        hidden = self.proj_in(torch.cat([query, seen], -1))
        positions = iter(self.positions)
        placed = [one + next(positions) if one.shape[1] > 1 else one for one in latents]
        keys = torch.cat([layer(one) for layer, one in zip(self.keys, placed)], 1)
        values = torch.cat([layer(one) for layer, one in zip(self.values, placed)], 1)
        queries = self._heads(self.query(hidden))
        attended = F.scaled_dot_product_attention(queries, self._heads(keys), self._heads(values))
        return query + self.proj_out(self.norm(hidden + self.out(attended.transpose(1, 2).flatten(2))))

    def _heads(self, value: torch.Tensor) -> torch.Tensor:
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def mlp(width: int, hidden: int, out: int, bias: bool = True) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, out, bias=bias))


def _normed_linear(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))


def language_model(text: Mapping[str, Any]) -> Any:
    """A causal language model of Transformers on the current device; `text` is a shape's "text"."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(text["kind"], **text["config"]))


def tower(encoder: Mapping[str, Any], whole: bool = False) -> Any:
    """An encoder on the current device, as it runs, or `whole` as it was published."""
    config = {**encoder["config"], **(encoder["whole"] if whole else {})}
    if encoder["kind"] in ("convnext", "fastvit"):
        import timm

        return timm.create_model(**{"num_classes": 0, **config}, pretrained=False)
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(encoder["kind"], **config))


def side_of(encoder: Mapping[str, Any]) -> int:
    """The side in pixels of what an encoder is given."""
    return encoder.get("resolution") or encoder["config"]["image_size"]


def width_of(vision: Any) -> int:
    """Channels of an encoder's features."""
    stages = getattr(vision, "feature_info", None)
    return sum(stage["num_chs"] for stage in stages) if stages else vision.config.hidden_size


def grid_features(kind: str, vision: Any, pixels: torch.Tensor, side: int) -> torch.Tensor:
    """An encoder's features on a grid of `side` x `side` (bilinear in float32, as published): (1, side², C)."""
    if kind == "convnext":
        grids, value = [], vision.stem(pixels)
        for stage in vision.stages:
            value = stage(value)
            grids.append(value)
    else:
        hidden = vision(pixels).last_hidden_state
        hidden = hidden if kind == "siglip_vision_model" else hidden[:, 1:]
        grids = [hidden.transpose(1, 2).unflatten(2, (math.isqrt(hidden.shape[1]), -1))]
    return torch.cat([_resized(grid, side).flatten(2).transpose(1, 2) for grid in grids], -1).contiguous()


def _resized(grid: torch.Tensor, side: int) -> torch.Tensor:
    if grid.shape[-1] == side:
        return grid
    return F.interpolate(grid.float(), size=(side, side), mode="bilinear", align_corners=False).to(grid.dtype)


def windows(grid: torch.Tensor, side: int) -> torch.Tensor:
    """(1, S², C) -> (side², (S / side)², C): what lies in each of side x side windows."""
    reduce = math.isqrt(grid.shape[1]) // side
    return grid.view(side, reduce, side, reduce, -1).transpose(1, 2).reshape(side * side, reduce * reduce, -1)


def share_layers(layers: nn.ModuleList) -> None:
    """Give every layer the first one's parameters: the same work, and the same bytes read as long as a layer is larger
    than the caches, in the memory of one layer. Each keeps its own place in the KV cache."""
    for layer in layers[1:]:
        for part, first in zip(layer.modules(), layers[0].modules()):
            part._parameters.update(first._parameters)


def materialise(model: nn.Module, device: str) -> None:
    """Give a model on the meta device memory and random weights (`_STD`); scales of norms around 1; buffers as built.

    Parameters that are the same object stay the same object.
    """
    made: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    mean = float(name == "weight" and parameter.ndim == 1)
                    made[id(parameter)] = _random(parameter, device, mean)
                part._parameters[name] = made[id(parameter)]
        if any(buffer is not None and buffer.is_meta for buffer in part._buffers.values()):
            part._buffers.update(_buffers(part, device))


def _random(like: torch.Tensor, device: str, mean: float) -> nn.Parameter:
    value, pool = torch.empty(like.shape, dtype=like.dtype, device=device), _pool(like.dtype, mean)
    for piece in value.view(-1).split(len(pool)):
        piece.copy_(pool[: len(piece)])
    return nn.Parameter(value, requires_grad=False)


@cache
def _pool(dtype: torch.dtype, mean: float) -> torch.Tensor:
    """Random numbers that weights repeat: a copy takes less time than drawing billions."""
    return torch.empty(_POOL).normal_(mean, _STD, generator=torch.Generator().manual_seed(0)).to(dtype)


def _buffers(part: Any, device: str) -> dict[str, Any]:
    """A module's buffers with their values: rotary frequencies, position ids, BatchNorm's statistics."""
    if "inv_freq" in part._buffers:
        return dict(type(part)(config=copy.deepcopy(part.config)).to(device)._buffers)
    values = {}
    for name, buffer in part._buffers.items():
        if name == "position_ids":
            values[name] = torch.arange(buffer.shape[-1], device=device)[None]
        else:
            values[name] = torch.full(buffer.shape, float(name == "running_var"), dtype=buffer.dtype, device=device)
    return values
