"""The models of the paper's comparison in their real shapes with random weights, as runners of `benchmarks ttft`.

A shape is data (`peers.json`). The modules are Transformers' and timm's; only Cambrian's connector, which neither has,
is written here, after the published code. On the device "meta" nothing is computed: that is how MACs are counted.
"""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastvlm.common.dtypes import torch_dtype

State = dict[str, Any]
_STD = 0.02  # of the random weights
_POOL = 1 << 20  # random numbers that the weights repeat: a copy costs less than drawing billions


class Peer:
    """A model with random weights as a runner: `stages()` are encode, project, prefill; one square picture, batch 1.

    `shape` is one of peers.json's models, `text_tokens` the prompt's length without visual tokens. A round's values
    travel in a dict: "encoded", "projected" (N, H), "logits" (V,) float32 of the last position.
    """

    def __init__(self, shape: Mapping[str, Any], text_tokens: int, dtype: str, device: str) -> None:
        self.name, self.shape = shape["title"], shape
        self.dtype, self.device = torch_dtype(dtype), device
        self.held = ExitStack()  # what ends with the runner
        with torch.device("meta"):
            self.model = self.build().to(self.dtype).eval().requires_grad_(False)
        if shape["text"]["shared_layers"]:
            share_layers(self.language.model.layers)
        if device != "meta":
            materialise(self.model, device)
        for part in self.model.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
        self.ids = torch.arange(text_tokens, device=device)
        self.pixels = self.inputs()
        self.settings: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "attention": "sdpa",
            "memory_format": "channels_last where it convolves",
            "weights": "random, real shapes"
            + (", the decoder's layers share one layer's memory" if shape["text"]["shared_layers"] else ""),
        }

    def build(self) -> Any:
        """The modules, on the current device."""
        raise NotImplementedError

    def inputs(self) -> list[torch.Tensor]:
        """What preprocessing gives: a tensor (B, 3, S, S) for each encoder."""
        return [self.picture(size_of(encoder)) for encoder in self.shape["encoders"]]

    @property
    def language(self) -> Any:
        """Transformers' causal language model."""
        return self.model["language"]

    def encode(self, state: State) -> None:
        """Pictures -> features."""
        raise NotImplementedError

    def project(self, state: State) -> None:
        """Features -> (N, H)."""
        raise NotImplementedError

    def prefill(self, state: State) -> None:
        """Embed the ids, put the picture behind the first, run the decoder: logits of the last position only.

        As a matrix, not with `logits_to_keep=1`: a batch of one bfloat16 row over weights without gradients makes
        PyTorch 2.12 copy the whole vocabulary's weights (1.9 s of CPU time instead of 0.03).
        """
        text = self.language.get_input_embeddings()(self.ids)
        embeds = torch.cat([text[:1], state["projected"], text[1:]])[None]
        hidden = self.language.model(inputs_embeds=embeds, use_cache=True).last_hidden_state
        state["logits"] = self.language.lm_head(hidden[0, -1:])[0].float()

    def stages(self) -> list[tuple[str, Callable[[State], None]]]:
        """(stage, function of the round's state), in order."""
        return [(name, torch.inference_mode()(getattr(self, name))) for name in ("encode", "project", "prefill")]

    def picture(self, size: int, count: int = 1) -> torch.Tensor:
        """Random pixels (count, 3, size, size), around 0 as normalised ones are."""
        pixels = torch.empty(count, 3, size, size, dtype=self.dtype, device=self.device)
        return pixels.normal_().contiguous(memory_format=torch.channels_last)


class FastVLMPeer(Peer):
    """FastVLM itself."""

    def build(self) -> Any:
        vision = tower(self.shape["encoders"][0])
        text = language_model(self.shape["text"])
        width, hidden = vision.num_features, text.config.hidden_size
        return nn.ModuleDict({"vision": vision, "projector": mlp(width, hidden, hidden), "language": text})

    def encode(self, state: State) -> None:
        grid = self.model["vision"].forward_features(self.pixels[0])
        state["encoded"] = grid.flatten(2).transpose(1, 2).contiguous()

    def project(self, state: State) -> None:
        state["projected"] = self.model["projector"](state["encoded"])[0]


class LlavaOneVisionPeer(Peer):
    """LLaVA-OneVision: the picture as a whole and its tiles, each through SigLIP; all tokens kept and packed."""

    def build(self) -> Any:
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        encoder, text = self.shape["encoders"][0], self.shape["text"]
        config = LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", **encoder["config"]},
            text_config={"model_type": text["kind"], **text["config"]},
            image_grid_pinpoints=self.shape["connector"]["grid"],
            vision_aspect_ratio=self.shape["connector"]["packing"],
        )
        return LlavaOnevisionForConditionalGeneration(config)

    @property
    def language(self) -> Any:
        return self.model

    def inputs(self) -> list[torch.Tensor]:
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        side, size = size_of(self.shape["encoders"][0]), self.shape["image_size"]
        tiles = image_size_to_num_patches([size, size], self.model.config.image_grid_pinpoints, side)
        return [self.picture(side, tiles)]

    def encode(self, state: State) -> None:
        """All in one batch: on a CPU as fast as tile by tile (measured)."""
        state["encoded"] = self.model.model.vision_tower(self.pixels[0], output_hidden_states=True).hidden_states[-1]

    def project(self, state: State) -> None:
        model, size = self.model.model, self.shape["image_size"]
        features = model.multi_modal_projector(state["encoded"])
        packing = self.shape["connector"]["packing"]
        packed, _ = model.pack_image_features([features], [(size, size)], model.image_newline, packing)
        state["projected"] = packed[0]


class CambrianPeer(Peer):
    """Cambrian-1: four encoders, a cross-attention connector before the decoder and again after some of its layers."""

    def build(self) -> Any:
        encoders, sva = self.shape["encoders"], self.shape["connector"]
        text = language_model(self.shape["text"])
        width, hidden = sva["width"], text.config.hidden_size
        reduce = [encoder["side"] // sva["side"] for encoder in encoders]
        towers = [tower(encoder) for encoder in encoders]
        adapters = [nn.Sequential(mlp(width_of(one), width, width), nn.LayerNorm(width)) for one in towers]
        first = [SamplerLayer(width, width, sva["heads"], reduce) for _ in range(sva["depth"])]
        inner = [SamplerLayer(hidden, width, sva["heads"], reduce) for _ in range(sva["layers"])]
        model = nn.ModuleDict(
            {
                "towers": nn.ModuleList(towers),
                "adapters": nn.ModuleList(adapters),
                "sampler": nn.ModuleList(first),
                "inner": nn.ModuleList(inner),
                "projector": mlp(width, hidden, hidden),
                "language": text,
            }
        )
        model.register_parameter("query", nn.Parameter(torch.empty(width)))
        model.register_parameter("newline", nn.Parameter(torch.empty(hidden)))
        for number, sampler in enumerate(inner):
            layer = text.model.layers[sva["start"] + number * sva["stride"]]
            layer.register_forward_hook(self._resampling(sampler))
        return model

    def encode(self, state: State) -> None:
        state["encoded"] = [
            tokens(encoder["kind"], vision, pixels, encoder["side"])
            for encoder, vision, pixels in zip(self.shape["encoders"], self.model["towers"], self.pixels)
        ]

    def project(self, state: State) -> None:
        side = self.shape["connector"]["side"]
        features = [adapter(one) for adapter, one in zip(self.model["adapters"], state["encoded"])]
        self.seen = features[0].mean(1, keepdim=True), [windows(one, side) for one in features]
        query = self.model.query.expand(side * side, 1, -1)
        for layer in self.model["sampler"]:
            query = layer(query, *self.seen)
        grid = self.model["projector"](query).view(side, side, -1)
        newline = self.model.newline.expand(side, 1, -1)
        state["projected"] = torch.cat([grid, newline], 1).flatten(0, 1)

    def _resampling(self, sampler: nn.Module) -> Callable[..., torch.Tensor]:
        """A hook behind a decoder layer: the picture's positions, but for the newlines, look at the features again."""
        side = self.shape["connector"]["side"]

        def hook(_: Any, __: Any, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.clone()
            grid = hidden[0, 1 : 1 + side * (side + 1)].view(side, side + 1, -1)[:, :side]
            grid.copy_(sampler(grid.reshape(side * side, 1, -1), *self.seen).view_as(grid))
            return hidden

        return hook


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
        asked = self._heads(self.query(hidden))
        attended = F.scaled_dot_product_attention(asked, self._heads(keys), self._heads(values))
        return query + self.proj_out(self.norm(hidden + self.out(attended.transpose(1, 2).flatten(2))))

    def _heads(self, value: torch.Tensor) -> torch.Tensor:
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def open_peer(shape: Mapping[str, Any], text_tokens: int, dtype: str, device: str) -> Peer:
    """The runner of a shape's kind."""
    kinds = {"fastvlm": FastVLMPeer, "llava-onevision": LlavaOneVisionPeer, "cambrian": CambrianPeer}
    return kinds[shape["kind"]](shape, text_tokens, dtype, device)


def mlp(width: int, hidden: int, out: int, bias: bool = True) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, out, bias=bias))


def _normed_linear(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))


def language_model(text: Mapping[str, Any]) -> Any:
    """A causal language model of Transformers on the current device; `text` is a shape's "text"."""
    import transformers

    names = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "llama": ("LlamaConfig", "LlamaForCausalLM")}
    config, model = (getattr(transformers, name) for name in names[text["kind"]])
    return model(config(**text["config"]))


def tower(encoder: Mapping[str, Any], whole: bool = False) -> Any:
    """An encoder on the current device, as it runs, or `whole` as it was published."""
    config = {**encoder["config"], **(encoder["whole"] if whole else {})}
    if encoder["kind"] in ("convnext", "fastvit"):
        import timm

        return timm.create_model(**{"num_classes": 0, **config}, pretrained=False)
    import transformers

    names = {"siglip": "SiglipVision", "clip": "CLIPVision", "dinov2": "Dinov2"}
    stem = names[encoder["kind"]]
    return getattr(transformers, f"{stem}Model")(getattr(transformers, f"{stem}Config")(**config))


def size_of(encoder: Mapping[str, Any]) -> int:
    """The side in pixels of what an encoder is given."""
    return encoder.get("resolution") or encoder["config"]["image_size"]


def width_of(vision: Any) -> int:
    """Channels of an encoder's features."""
    stages = getattr(vision, "feature_info", None)
    return sum(stage["num_chs"] for stage in stages) if stages else vision.config.hidden_size


def tokens(kind: str, vision: Any, pixels: torch.Tensor, side: int) -> torch.Tensor:
    """An encoder's features on a grid of `side` x `side` (bilinear in float32, as published): (1, side², C)."""
    if kind == "convnext":
        grids, value = [], vision.stem(pixels)
        for stage in vision.stages:
            value = stage(value)
            grids.append(value)
    else:
        found = vision(pixels).last_hidden_state
        found = found if kind == "siglip" else found[:, 1:]
        grids = [found.transpose(1, 2).unflatten(2, (math.isqrt(found.shape[1]), -1))]
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

    Parameters that share their identity go on sharing it.
    """
    made: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    scale = name == "weight" and parameter.ndim == 1
                    made[id(parameter)] = _random(parameter, device, float(scale))
                part._parameters[name] = made[id(parameter)]
        if any(buffer is not None and buffer.is_meta for buffer in part._buffers.values()):
            part._buffers.update(_buffers(part, device))


def _random(like: torch.Tensor, device: str, mean: float) -> nn.Parameter:
    value, pool = torch.empty(like.shape, dtype=like.dtype, device=device), _pool(like.dtype, mean)
    flat = value.view(-1)
    for start in range(0, len(flat), len(pool)):
        piece = flat[start : start + len(pool)]
        piece.copy_(pool[: len(piece)])
    return nn.Parameter(value, requires_grad=False)


@cache
def _pool(dtype: torch.dtype, mean: float) -> torch.Tensor:
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
