"""Architectures that go to Core ML and back: name -> (build, shapes or arrays of its inputs), random weights, small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 16  # of the decoder's cache


@dataclass(frozen=True)
class Trip:
    """One architecture.

    build: the module in float32, its last output alone where it has several kinds of them. inputs: a shape (values of
    N(0, 1)), or (shape, below) for token numbers. route: how it is converted, "trace", "export" or "script". states:
    the buffers that are states, with their shapes. full: the architecture at the size that it is timed at, None: at
    this one. typed_outputs: how many outputs are compared as typed; later ones hang on the order of near ties.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    route: str = "trace"
    states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    full: Trip | None = None
    typed_outputs: int | None = None

    def arrays(self, seed: int = 0) -> list[np.ndarray]:
        """Inputs in the module's order, float32 or int32."""
        rng = np.random.default_rng(seed)
        return [
            rng.integers(0, shape[1], shape[0]).astype(np.int32)
            if isinstance(shape[0], tuple)
            else rng.standard_normal(shape).astype(np.float32)
            for shape in self.inputs
        ]


def _timm(name: str, size: int, route: str = "trace", **options: Any) -> Trip:
    """One of timm; full: at 224 x 224, without the options that make it shallow."""

    def build(size: int, options: dict[str, Any]) -> nn.Module:
        import timm

        sized: dict[str, Any] = {"img_size": size} if name.startswith(("vit", "deit", "swin")) else {}
        return timm.create_model(name, pretrained=False, num_classes=10, **sized, **options)

    full = Trip(partial(build, 224, {}), ((1, 3, 224, 224),), route)
    return Trip(partial(build, size, options), ((1, 3, size, size),), route, full=full)


def _torchvision(name: str, size: int, **options: Any) -> Trip:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=10, **options)

    return Trip(build, ((1, 3, size, size),), full=Trip(build, ((1, 3, 224, 224),)))


class _Output(nn.Module):
    """A module of transformers or torchvision with plain tensors in and out."""

    def __init__(self, module: nn.Module, take: Callable[[Any], Any], **options: Any) -> None:
        super().__init__()
        self.module, self.take, self.options = module, take, options

    def forward(self, *inputs: Tensor) -> Any:
        return self.take(self.module(*inputs, **self.options))


def _text(kind: str, causal: bool = False, full: tuple[int, ...] = (128, 512, 6), **names: Any) -> Trip:
    """A text encoder or decoder of transformers without a cache; full: length, width and layers at full size; names:
    its words for the sizes of `sizes`."""

    def build(length: int, width: int, layers: int) -> nn.Module:
        import transformers

        heads = width // 16 if width < 100 else width // 64
        sizes = {"width": width, "layers": layers, "heads": heads, "hidden": 2 * width, "kv": heads // 2,
                 "positions": length + 8, "embedding": 32}  # fmt: skip
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=300, attn_implementation="eager", **{word: sizes[name] for word, name in names.items()}
        )
        # coremltools 9.0 doesn't convert `diff`, with which transformers makes a causal mask that it isn't given
        mask = {"attention_mask": torch.full((1, 1, length, length), -1e4).triu(1)} if causal else {}
        module = getattr(transformers, f"{kind}Model" + "WithProjection" * ("projection_dim" in names))(config)
        return _Output(module, lambda out: out[0], return_dict=False, **mask)

    small = (24, 64, 2)
    return Trip(
        partial(build, *small), (((1, small[0]), 300),), full=Trip(partial(build, *full), (((1, full[0]), 300),))
    )


_SIZES: dict[str, Any] = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
}
_KV: dict[str, Any] = _SIZES | {"num_key_value_heads": "kv"}


class _Detector(nn.Module):
    """Feature pyramid, RetinaNet's heads and the choice of the best boxes."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18
        from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
        from torchvision.ops import FeaturePyramidNetwork

        trunk = resnet18(weights=None)
        self.stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool, trunk.layer1)
        self.layer2, self.layer3 = trunk.layer2, trunk.layer3
        self.pyramid = FeaturePyramidNetwork([64, 128, 256], 32)
        self.classes, self.boxes = RetinaNetClassificationHead(32, 3, 4), RetinaNetRegressionHead(32, 3)
        for layer in [*self.classes.modules(), *self.boxes.modules()]:
            if isinstance(layer, nn.Conv2d):  # theirs are 0.01: all scores would be the same
                nn.init.kaiming_normal_(layer.weight)
        nn.init.normal_(self.classes.cls_logits.weight, std=0.005)  # nor are they all 1

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first = self.stem(images)
        second = self.layer2(first)
        maps = list(self.pyramid({"0": first, "1": second, "2": self.layer3(second)}).values())
        scores, boxes = self.classes(maps).sigmoid().amax(-1), self.boxes(maps)
        best, places = scores.topk(20, dim=1)
        return best, boxes.gather(1, places.unsqueeze(-1).expand(-1, -1, 4))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(time, channels)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        found = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(found)))


class _DiffusionBlock(nn.Module):
    """A UNet's block: time embedding, residual blocks, self and cross attention, down and up with a skip."""

    def __init__(self, channels: int = 64, text: int = 48) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(32, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.first = nn.Conv2d(4, channels, 3, padding=1)
        self.block1, self.block2 = _ResidualBlock(channels, channels), _ResidualBlock(channels, channels)
        self.down, self.up = nn.Conv2d(channels, channels, 3, 2, 1), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.own = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(channels, 4, kdim=text, vdim=text, batch_first=True)
        self.last = nn.Conv2d(2 * channels, 4, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(-torch.arange(16) / 2.0)
        time = self.embed(torch.cat([angles.sin(), angles.cos()], -1))
        skip = self.block1(self.first(x), time)
        down = self.block2(self.down(skip), time)
        rows = down.flatten(2).transpose(1, 2)
        rows = rows + self.own(self.norm(rows), self.norm(rows), self.norm(rows), need_weights=False)[0]
        rows = rows + self.cross(rows, text, text, need_weights=False)[0]
        down = rows.transpose(1, 2).reshape(down.shape)
        return self.last(torch.cat([skip, self.up(F.interpolate(down, scale_factor=2.0, mode="nearest"))], 1))


class _Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], width: int, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = kind(width, width + 16, batch_first=True, **options)
        self.head = nn.LazyLinear(7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens))[0])


class _Loop(nn.Module):
    """A branch on the input, and a layer again and again until its output is small."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x)) if bool(x.sum() > 0) else torch.sigmoid(self.b(x))
        count = 0
        while bool(y.abs().sum() > 1.0) and count < 4:
            y = torch.tanh(self.a(y)) * 0.7
            count += 1
        return y


class _Decoder(nn.Module):
    """A Llama-like decoder, one token at a time, its keys and values in states."""

    def __init__(self, width: int, layers: int, heads: int = 4, words: int = 100) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.keys: Tensor
        self.values: Tensor
        self.embed, self.head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.gate = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(layers))
        self.norms = nn.ParameterList(nn.Parameter(torch.rand(width) + 0.5) for _ in range(2 * layers + 1))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(layers, heads, CONTEXT, width // heads))

    def _norm(self, x: Tensor, number: int) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.norms[number]

    def _rotated(self, x: Tensor, position: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = position.float() * torch.exp(-torch.arange(half) * (9.0 / half))
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        x = self.embed(token)  # (1, width)
        past = (torch.arange(CONTEXT) > position).float() * -1e4
        here = (torch.arange(CONTEXT) == position).float()[:, None]
        for i in range(len(self.qkv)):
            q, k, v = self.qkv[i](self._norm(x, 2 * i)).reshape(3, self.heads, 1, -1).unbind(0)
            self.keys[i] = self.keys[i] * (1 - here) + self._rotated(k, position) * here
            self.values[i] = self.values[i] * (1 - here) + v * here
            weights = self._rotated(q, position) @ self.keys[i].transpose(1, 2) / (self.width // self.heads) ** 0.5
            x = x + self.out[i](((weights + past).softmax(-1) @ self.values[i]).reshape(1, -1))
            gate, up = self.gate[i](self._norm(x, 2 * i + 1)).chunk(2, -1)
            x = x + self.down[i](F.silu(gate) * up)
        return self.head(self._norm(x, -1))


def _segmentation() -> nn.Module:
    import torchvision

    module = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    )
    return _Output(module, lambda out: out["out"])


def _recurrent(kind: str, **options: Any) -> Trip:
    def build(width: int) -> nn.Module:
        return _Recurrent(getattr(nn, kind), width, **options)

    return Trip(partial(build, 32), (((1, 12), 50),), full=Trip(partial(build, 256), (((1, 64), 50),)))


def _decoder(width: int, layers: int, full: Trip | None = None) -> Trip:
    states = {name: (layers, 4, CONTEXT, width // 4) for name in ("keys", "values")}
    return Trip(partial(_Decoder, width, layers), (((1,), 100), ((1,), 1)), states=states, full=full)


TRIPS: dict[str, Trip] = {
    # convolutions
    "resnet18": _timm("resnet18", 96),
    "resnext26": _timm("resnext26ts", 96),
    "seresnet": _timm("legacy_seresnet18", 96),
    "regnety": _timm("regnety_002", 96),
    "mobilenetv2": _timm("mobilenetv2_050", 96),
    "mobilenetv3": _timm("mobilenetv3_small_050", 96),
    "mobilenetv4": _timm("mobilenetv4_conv_small", 96, "export"),
    "efficientnet": _timm("efficientnet_lite0", 96),
    "mnasnet": _timm("mnasnet_small", 96),
    "ghostnet": _timm("ghostnet_050", 96),
    "convnext": _timm("convnext_atto", 96, "export"),
    "densenet": _timm("densenet121", 64, block_config=(2, 3, 3, 2)),
    "squeezenet": _torchvision("squeezenet1_1", 96),
    "repvgg": _timm("repvgg_a0", 64),
    "dla": _timm("dla34", 96),
    "inceptionnext": _timm("inception_next_atto", 96),
    "shufflenet": _torchvision("shufflenet_v2_x0_5", 96),
    "googlenet": _torchvision("googlenet", 96, aux_logits=False, init_weights=False),
    # transformers of pictures
    "vit": _timm("vit_tiny_patch16_224", 96, "export", depth=4),
    "deit": _timm("deit_tiny_distilled_patch16_224", 96, depth=4),
    "swin": _timm("swin_tiny_patch4_window7_224", 56, depths=(1, 1, 2, 1), embed_dim=32),
    "mixer": _timm("mixer_s32_224", 224),
    "poolformer": _timm("poolformerv2_s12", 96),
    "xcit": _timm("xcit_nano_12_p16_224", 96, depth=3),
    # both
    "fastvit": _timm("fastvit_t8", 96),
    "mobilevit": _timm("mobilevit_xxs", 96),
    "mobilevitv2": _timm("mobilevitv2_050", 96),
    "edgenext": _timm("edgenext_xx_small", 96),
    "efficientformer": _timm("efficientformerv2_s0", 224, depths=(1, 1, 2, 2)),
    "levit": _timm("levit_128s", 224, depth=(1, 1, 2)),
    "repvit": _timm("repvit_m0_9", 96, depth=(1, 1, 2, 1)),
    "tinyvit": _timm("tiny_vit_5m_224", 224, depths=(1, 1, 2, 1)),
    # heads
    "detector": Trip(
        _Detector,
        ((1, 3, 96, 96),),
        typed_outputs=1,
        full=Trip(_Detector, ((1, 3, 224, 224),), typed_outputs=1),
    ),
    "segmentation": Trip(_segmentation, ((1, 3, 96, 96),), full=Trip(_segmentation, ((1, 3, 224, 224),))),
    "diffusion": Trip(
        _DiffusionBlock,
        ((1, 4, 16, 16), (1,), (1, 7, 48)),
        full=Trip(partial(_DiffusionBlock, 128), ((1, 4, 32, 32), (1,), (1, 77, 48))),
    ),
    # text
    "bert": _text("Bert", **_SIZES),
    "roberta": _text("Roberta", max_position_embeddings="positions", **_SIZES),
    "distilbert": _text("DistilBert", dim="width", n_layers="layers", n_heads="heads", hidden_dim="hidden"),
    "albert": _text("Albert", embedding_size="embedding", **_SIZES),
    "gpt2": _text("GPT2", True, n_embd="width", n_layer="layers", n_head="heads", n_positions="positions"),
    "llama": _text("Llama", True, **_KV),
    "qwen2": _text("Qwen2", True, **_KV),
    "clip-text": _text("CLIPText", projection_dim="embedding", max_position_embeddings="positions", **_SIZES),
    # recurrent and control flow
    "lstm": _recurrent("LSTM", bidirectional=True, num_layers=2),
    "gru": _recurrent("GRU"),
    "rnn": _recurrent("RNN", nonlinearity="relu"),
    "loop": Trip(_Loop, ((2, 16),), "script", full=Trip(partial(_Loop, 512), ((64, 512),), "script")),
    "decoder": _decoder(64, 2, full=_decoder(512, 6)),
}

# 67 million parameters in layers, whose memory is measured
LARGE = _text("Bert", full=(256, 1024, 8), **_SIZES).full
