"""Range-safe float16: every value of the encoder may carry x / 2^k, exactly, where x would come near 65504.

A convolution takes any power of two at its input and gives any at its output: the factor goes into its weights and its
bias. Additions tie their values to one k. A LayerNorm loses it, with 2^-2k in its eps; a GELU, a sigmoid and a softmax
keep it by their scaled forms (`model_export.encoder.scaled`). Powers of two are exact in binary floating point.

k is the smallest one that leaves HEADROOM, so an encoder that needs none stays as it is. See docs/NEURAL_ENGINE.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.models.fastvit import AttentionBlock, PatchEmbed, RepMixerBlock
from torch import nn

from model_export.encoder.scaled import SCALED

LARGEST = 65504.0  # of float16
SMALLEST_NORMAL = 2.0**-14
# Asked of every value and of every square in a decomposed LayerNorm: pictures differ from those that were measured.
HEADROOM = 16.0
# Signal to noise of a weight rounded to float16 is about 74 dB; much less means that many of its values are subnormal.
_WEIGHT_SNR_DB = 66.0


class Measured(Protocol):
    """Largest magnitude of a module's output, and of the squares inside a LayerNorm."""

    @property
    def largest(self) -> float: ...

    @property
    def square(self) -> float | None: ...


@dataclass(frozen=True)
class Headroom:
    """The value nearest to float16's end: its module and its largest magnitude; the largest square in a LayerNorm."""

    name: str
    largest: float
    square: float

    @property
    def least(self) -> float:
        return LARGEST / self.largest

    @property
    def squares(self) -> float | None:
        return LARGEST / self.square if self.square else None


@dataclass(eq=False)
class Value:
    """A value that carries x / 2^exponent. `places` are the names in the ranges under which it was measured, `norms`
    the LayerNorms that take it, `activations` the modules that keep its scale or lose it."""

    places: list[str]
    norms: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    exponent: int = 0


@dataclass(eq=False)
class Link:
    """A convolution, or some of its output channels, from one value to another.

    `scale` names the branch's layer scale, which is free in a folded encoder, where the layer ends a branch of a
    stream: a `Gain` there lets it have an exponent of its own. `inner` marks a layer between two others, whose output
    is free to be larger than it was.
    """

    layer: str
    source: Value
    target: Value
    rows: slice = field(default_factory=lambda: slice(None))
    scale: str | None = None
    inner: bool = False
    exponent: int = 0  # of what the layer puts out, before a Gain


class Gain(nn.Module):
    """x * 2^exponent: takes the place of a layer scale behind a branch."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0**self.exponent


@dataclass
class Flow:
    """The values of a folded, channel-first FastViT and the layers between them, in order of execution.

    `scores` are the products of each attention: (scores, queries, keys); `features` is what the encoder puts out.
    """

    values: list[Value] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    scores: list[tuple[Value, Value, Value]] = field(default_factory=list)
    features: Value = field(default_factory=lambda: Value([]))

    def layer_exponents(self) -> dict[str, int | list[int]]:
        """e by layer, where it is not 0: the exported layer computes 2^e times its output. An attention's `qkv` has one
        for the queries, the keys and the values each."""
        exponents: dict[str, list[int]] = {}
        for link in self.links:
            exponents.setdefault(link.layer, []).append(-link.exponent)
        return {name: e[0] if len(e) == 1 else e for name, e in exponents.items() if any(e)}

    def exponents(self) -> dict[str, int]:
        """k by place: the exported encoder holds x / 2^k there."""
        places = {name: value.exponent for value in self.values for name in (*value.places, *value.activations)}
        places |= {name: 0 for name in places if name.endswith((".gate", ".softmax"))}  # these lose the scale
        return places | {link.layer: link.exponent for link in self.links if not link.layer.endswith(".qkv")}

    def activation_exponents(self) -> dict[str, int]:
        """k by module, of the activations that are in their scaled form."""
        return {name: value.exponent for value in self.values for name in value.activations if value.exponent}

    def headroom(self, ranges: Mapping[str, Measured]) -> Headroom:
        """The minimum headroom to 65504, by ranges of the unscaled encoder."""
        largest = {name: ranges[name].largest * 2.0**-value.exponent for value in self.values for name in value.places}
        squares = [_square(ranges[name]) * 4.0**-value.exponent for value in self.values for name in value.norms]
        name = max(largest, key=largest.__getitem__)
        return Headroom(name, largest[name], max(squares, default=0.0))


def flow(fastvit: nn.Module) -> Flow:
    """Read a folded FastViT, before or after `channel_first`. Raises TypeError for a block of another architecture."""
    result, fresh = Flow(), Value([])

    def value(*places: str) -> Value:
        result.values.append(Value(list(places)))
        return result.values[-1]

    def link(layer: str, source: Value, target: Value, **more: Any) -> Value:
        result.links.append(Link(layer, source, target, **more))
        return target

    def activated(name: str, module: Any, source: Value) -> Value:
        """A convolution, perhaps squeeze-and-excite, a GELU."""
        out = value(f"{name}.reparam_conv", name)
        link(f"{name}.reparam_conv", source, out)
        if not isinstance(module.se, nn.Identity):
            hidden = link(f"{name}.se.fc1", out, value(f"{name}.se.fc1"))
            gate = link(f"{name}.se.fc2", hidden, value(f"{name}.se.fc2"))
            gate.activations.append(f"{name}.se.gate")
        out.activations.append(f"{name}.act")
        return out

    def attention(name: str, block: AttentionBlock, stream: Value) -> None:
        mixer, channels = f"{name}.token_mixer", block.token_mixer.proj.weight.shape[0]
        stream.norms.append(f"{name}.norm")
        parts = [value(f"{mixer}:{part}") for part in ("queries", "keys", "values")]
        for number, part in enumerate(parts):
            link(f"{mixer}.qkv", fresh, part, rows=slice(number * channels, (number + 1) * channels))
        scores = value(f"{mixer}:scores")
        scores.activations.append(f"{mixer}.softmax")
        result.scores.append((scores, parts[0], parts[1]))
        link(f"{mixer}.proj", parts[2], stream, scale=f"{name}.layer_scale_1")
        stream.places += [f"{mixer}.proj", f"{name}.mlp:input"]

    x = fresh
    for number, block in enumerate(fastvit.stem):  # type: ignore[arg-type]
        x = activated(f"stem.{number}", block, x)
    for number, stage in enumerate(fastvit.stages):  # type: ignore[arg-type]
        at = f"stages.{number}"
        if isinstance(stage.downsample, PatchEmbed):
            for part, block in enumerate(stage.downsample.proj):
                x = activated(f"{at}.downsample.proj.{part}", block, x)
        if not isinstance(stage.pos_emb, nn.Identity):
            x = link(f"{at}.pos_emb.reparam_conv", x, value(f"{at}.pos_emb.reparam_conv"))
        for i, block in enumerate(stage.blocks):
            name = f"{at}.blocks.{i}"
            if isinstance(block, AttentionBlock):
                attention(name, block, x)
            elif isinstance(block, RepMixerBlock):  # its convolution has absorbed the skip: a new stream
                mixer = f"{name}.token_mixer.reparam_conv"
                x = link(mixer, x, value(mixer))
            else:
                raise TypeError(f"a block of type {type(block).__name__}: cannot be rescaled")
            spread = link(f"{name}.mlp.conv.conv", x, value(f"{name}.mlp.conv.conv"), inner=True)
            hidden = link(f"{name}.mlp.fc1", spread, value(f"{name}.mlp.fc1"))
            hidden.activations.append(f"{name}.mlp.act")
            scale = "layer_scale_2" if isinstance(block, AttentionBlock) else "layer_scale"
            link(f"{name}.mlp.fc2", hidden, x, scale=f"{name}.{scale}")
            x.places += [f"{name}.mlp.fc2", name]
    result.features = activated("final_conv", fastvit.final_conv, x)
    return result


def choose(fastvit: nn.Module, ranges: Mapping[str, Measured], headroom: float = HEADROOM) -> Flow:
    """The smallest exponents, from 0 up, that leave every value and every square in a LayerNorm `headroom` below 65504
    and every weight in range; and exponents that keep weights out of float16's subnormals, as far as values allow it.

    `fastvit` is folded and channel-first, `ranges` are those of the unscaled encoder in float32, by module name.
    KeyError when a module was not measured, TypeError for another architecture.
    """
    chosen, bound = flow(fastvit), LARGEST / headroom
    for value in chosen.values:
        needs = [_exponent(ranges[name].largest / bound) for name in value.places]
        needs += [math.ceil(_exponent(_square(ranges[name]) / bound) / 2) for name in value.norms]
        value.exponent = max(0, *needs)
    for link in chosen.links:  # in order: the exponent of a link's source is final
        layer: Any = fastvit.get_submodule(link.layer)
        least = _exponent(_largest(layer.weight, link.rows) * 2.0**link.source.exponent / LARGEST)
        if layer.bias is not None:
            least = max(least, _exponent(_largest(layer.bias, link.rows) / LARGEST))
        if link.scale is None:
            link.target.exponent = max(link.target.exponent, least)
        link.exponent = max(link.target.exponent, least)
        if link.scale is not None or link.inner:
            weight = layer.weight[link.rows].detach() * 2.0 ** (link.source.exponent - link.exponent)
            link.exponent -= _lift(weight, ranges[link.layer].largest * 2.0**-link.exponent, bound)
        if link.inner:
            link.target.exponent = link.exponent
    for scores, queries, keys in chosen.scores:
        missing = max(0, scores.exponent - queries.exponent - keys.exponent)
        queries.exponent += missing // 2
        keys.exponent += missing - missing // 2
        scores.exponent = queries.exponent + keys.exponent
        for link in chosen.links:
            if link.target in (queries, keys):
                link.exponent = link.target.exponent
    return chosen


@torch.no_grad()
def rescale(fastvit: nn.Module, exponents: Flow) -> nn.Module:
    """Let a folded, channel-first FastViT carry these exponents, in place, and return it.

    Its feature map is 2^-exponents.features.exponent times what it was, in float32 bit for bit but for subnormals and
    where an activation takes its scaled form (float64: 1e-12).
    """
    for link in exponents.links:
        layer: Any = fastvit.get_submodule(link.layer)
        layer.weight[link.rows].mul_(2.0 ** (link.source.exponent - link.exponent))
        if layer.bias is not None:
            layer.bias[link.rows].mul_(2.0**-link.exponent)
        if link.scale is not None and link.exponent != link.target.exponent:
            fastvit.set_submodule(link.scale, Gain(link.exponent - link.target.exponent))
    for value in exponents.values:
        for name in value.norms:
            norm: Any = fastvit.get_submodule(name)
            norm.eps *= 4.0**-value.exponent
    for name, exponent in exponents.activation_exponents().items():
        fastvit.set_submodule(name, SCALED[type(fastvit.get_submodule(name)).__name__](exponent))
    return fastvit


def _square(measured: Measured) -> float:
    return measured.square or 0.0


def _largest(tensor: torch.Tensor, rows: slice) -> float:
    return float(tensor[rows].detach().abs().max())


def _exponent(ratio: float) -> int:
    """The smallest integer k with ratio / 2^k <= 1."""
    return math.ceil(math.log2(ratio)) if ratio > 0 else -(1 << 30)


def _lift(weight: torch.Tensor, largest: float, bound: float) -> int:
    """m for a branch's weight whose output reaches `largest` now: 2^m times it would not be subnormal."""
    values = weight.float()
    error = (values.half().float() - values).square().sum().item()
    power = values.square().sum().item()
    if power == 0 or largest == 0 or error <= power * 10 ** (-_WEIGHT_SNR_DB / 10):
        return 0
    rms = math.sqrt(power / values.numel())
    # A typical weight becomes a thousand times the smallest normal.
    wanted = math.ceil(math.log2(2**10 * SMALLEST_NORMAL / rms))
    room = math.floor(math.log2(bound / largest))
    return max(0, min(wanted, room))
