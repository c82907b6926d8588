"""The models of the paper's comparison in their real shapes with random weights, as runners of `benchmarks ttft`.

A shape is data (`peers.json`). The modules are Transformers' and timm's; only Cambrian's connector, which neither has,
is written here, after the published code. On the device "meta" nothing is computed: that is how MACs are counted.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.peers.modules import (
    SamplerLayer,
    grid_features,
    language_model,
    materialise,
    mlp,
    share_layers,
    side_of,
    tower,
    width_of,
    windows,
)
from benchmarks.peers.shapes import TEXT_TOKENS, data
from fastvlm.common.dtypes import torch_dtype

State = dict[str, Any]


class Peer:
    """A model with random weights as a runner with the stages encode, project and prefill; a square picture, batch 1.

    `shape` is one of peers.json's models, `text_tokens` the prompt's length without visual tokens. A round's values
    travel in a dict: "encoded", "projected" (N, H), "logits" (V,) float32 of the last position.
    """

    def __init__(self, shape: Mapping[str, Any], text_tokens: int, dtype: str, device: str) -> None:
        self.name, self.shape = shape["title"], shape
        self.dtype, self.device = torch_dtype(dtype), device
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
        """The result of preprocessing: a tensor (B, 3, S, S) for each encoder."""
        return [self.picture(side_of(encoder)) for encoder in self.shape["encoders"]]

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
    """LLaVA-OneVision: the picture as a whole and its tiles, each through SigLIP; all tokens packed."""

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

        side, size = side_of(self.shape["encoders"][0]), self.shape["image_size"]
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
            grid_features(encoder["kind"], vision, pixels, encoder["side"])
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


def open_peer(shape: Mapping[str, Any], text_tokens: int, dtype: str, device: str) -> Peer:
    """The runner of a shape's kind."""
    kinds = {"fastvlm": FastVLMPeer, "llava-onevision": LlavaOneVisionPeer, "cambrian": CambrianPeer}
    return kinds[shape["kind"]](shape, text_tokens, dtype, device)


def open_runner(specification: Mapping[str, Any]) -> Peer:
    """The runner of a specification: "model" of peers.json's models, and if they are there "dtype" and
    "text_tokens" of the prompt without its picture."""
    shape, length = data()["models"][specification["model"]], specification.get("text_tokens") or TEXT_TOKENS
    peer = open_peer(shape, length, specification.get("dtype", "bfloat16"), "cpu")
    peer.settings |= {"threads": torch.get_num_threads(), "kept_buffers": bool(specification.get("keep_buffers"))}
    return peer
