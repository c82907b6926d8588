"""Range-safe float16: the residual stream of each stage carries x / 2^k, exactly, where x would come near 65504.

Between blocks a stage's stream passes only through linear maps and LayerNorms. So 2^-k goes into the convolution that
starts the stream and into every branch that adds to it (weights and biases; only the biases of convolutions from stream
to stream), 2^k into every consumer, and 2^-2k into LayerNorm's eps. Powers of two are exact in binary floating point.
What comes before and inside a GELU keeps its scale: that is what `--compute-precision mixed` is for.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.models.fastvit import AttentionBlock, RepMixerBlock
from torch import nn

LARGEST = 65504.0  # of float16
SMALLEST_NORMAL = 2.0**-14
# Asked of every value and of every square in a decomposed LayerNorm: pictures differ from those that were measured.
HEADROOM = 16.0
# Where no power of two reaches. Under it the export warns, and mixed precision keeps the operation in float32.
UNREACHED_HEADROOM = 4.0
# Signal to noise of a weight rounded to float16 is about 74 dB; much less means that many of its values are subnormal.
_WEIGHT_SNR_DB = 66.0


class Measured(Protocol):
    """Largest magnitude of a module's output, and of the squares inside a LayerNorm."""

    @property
    def largest(self) -> float: ...

    @property
    def square(self) -> float | None: ...


@dataclass(frozen=True)
class Hottest:
    """The module nearest to float16's end, its largest magnitude, and the largest square inside any LayerNorm."""

    name: str
    largest: float
    square: float

    @property
    def headroom(self) -> float:
        return LARGEST / self.largest

    @property
    def square_headroom(self) -> float | None:
        return LARGEST / self.square if self.square else None


class Gain(nn.Module):
    """x * 2^exponent: takes the place of a layer scale behind a branch whose weights would be float16 subnormals."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0**self.exponent


def stream_exponents(fastvit: nn.Module, ranges: Mapping[str, Measured], headroom: float = HEADROOM) -> list[int]:
    """k of each stage: the smallest power of two that leaves every linear value of the stage `headroom` below 65504,
    and every square inside a LayerNorm as well; 0 where that is so already.

    `ranges` by module name, of the unscaled encoder in float32. KeyError when a module of the stream was not measured.
    """
    found = []
    for number, stage in enumerate(fastvit.stages):  # type: ignore[arg-type]
        prefix = f"stages.{number}."
        names = [prefix + name for name in _linear_outputs(stage)]
        squares = [
            ranges[f"{prefix}blocks.{i}.norm"].square or 0.0 for i, block in enumerate(stage.blocks) if _attends(block)
        ]
        value = max(ranges[name].largest for name in names)
        bound = LARGEST / headroom
        found.append(max(0, _exponent(value / bound), math.ceil(_exponent(max(squares, default=0.0) / bound) / 2)))
    return found


def rescale(fastvit: nn.Module, exponents: Sequence[int]) -> nn.Module:
    """Let stage s of a folded FastViT carry x / 2^exponents[s], in place, and return it.

    The feature map stays the same function, to rounding in float64 and bit for bit in float32 but for subnormals.
    Works before and after `channel_first`. ValueError unless there is one exponent a stage.
    """
    stages = list(fastvit.stages)  # type: ignore[arg-type]
    if len(exponents) != len(stages):
        raise ValueError(f"{len(exponents)} exponents for {len(stages)} stages")
    for number, (stage, k) in enumerate(zip(stages, exponents)):
        if k == 0:
            continue
        down, up = 2.0**-k, 2.0**k
        start = _start(stage)
        _scale(start, down, down)
        for block in stage.blocks:
            if _attends(block):
                block.norm.eps *= down * down
                _scale(block.token_mixer.proj, down, down)
            elif block.token_mixer.reparam_conv is not start:
                _scale(block.token_mixer.reparam_conv, 1.0, down)
            _scale(block.mlp.conv.conv, 1.0, down)
            _scale(block.mlp.fc1, up, 1.0)
            _scale(block.mlp.fc2, down, down)
        last = number + 1 == len(stages)
        consumer: Any = fastvit.final_conv if last else stages[number + 1].downsample.proj[0]
        _scale(consumer.reparam_conv, up, 1.0)
    return fastvit


def lift_small_weights(fastvit: nn.Module, ranges: Mapping[str, Measured], exponents: Sequence[int]) -> dict[str, int]:
    """Keep a branch's weights out of float16's subnormals, in place: multiply them by 2^m and what follows by 2^-m.

    A folded layer scale, a stage's 2^-k and a stream that is large by itself make them small. Only where rounding the
    weight to float16 would cost more than it should (`_WEIGHT_SNR_DB`), and only as far as the values keep their
    headroom. Returns m by the layer's name. A branch's first convolution hands its 2^-m to the one after it; its last
    layer gets one more operation, a `Gain` where the layer scale was.
    """
    lifted = {}
    for number, stage in enumerate(fastvit.stages):  # type: ignore[arg-type]
        for i, block in enumerate(stage.blocks):
            name = f"stages.{number}.blocks.{i}"
            branches = [("mlp.fc2", block.mlp.fc2, "layer_scale_2" if _attends(block) else "layer_scale")]
            if _attends(block):
                branches.append(("token_mixer.proj", block.token_mixer.proj, "layer_scale_1"))
            first = block.mlp.conv.conv
            m = _lift(first.weight, ranges[f"{name}.mlp.conv.conv"].largest * 2.0 ** -exponents[number])
            if m > 0:
                _scale(first, 2.0**m, 2.0**m)
                _scale(block.mlp.fc1, 2.0**-m, 1.0)
                lifted[f"{name}.mlp.conv.conv"] = m
            for layer, producer, scale in branches:
                largest = ranges[f"{name}.{layer}"].largest * 2.0 ** -exponents[number]
                m = _lift(producer.weight, largest)
                if m > 0:
                    _scale(producer, 2.0**m, 2.0**m)
                    setattr(block, scale, Gain(-m))
                    lifted[f"{name}.{layer}"] = m
    return lifted


def hottest(fastvit: nn.Module, ranges: Mapping[str, Measured], exponents: Sequence[int]) -> Hottest:
    """Where the encoder that carries x / 2^exponents[s] comes nearest to 65504, by ranges of the unscaled one."""
    scale: dict[str, float] = {}
    square = 0.0
    for number, (stage, k) in enumerate(zip(fastvit.stages, exponents)):  # type: ignore[arg-type]
        scale.update({f"stages.{number}.{name}": 2.0**-k for name in _linear_outputs(stage)})
        for i, block in enumerate(stage.blocks):
            if _attends(block):
                square = max(square, (ranges[f"stages.{number}.blocks.{i}.norm"].square or 0.0) * 4.0**-k)
    # A LayerNorm's output is left out: the exported one has no gamma, and stays under the root of its channels.
    leaves = {
        name
        for name, module in fastvit.named_modules()
        if not any(module.children()) and not isinstance(module, nn.LayerNorm)
    }
    values = {
        name: found.largest * scale.get(name, 1.0)
        for name, found in ranges.items()
        if name in leaves or name in scale or name.endswith(":scores")
    }
    name = max(values, key=values.__getitem__)
    return Hottest(name, values[name], square)


def out_of_range(graph: torch.fx.Graph, largest: Mapping[str, float], headroom: float = UNREACHED_HEADROOM) -> set[str]:
    """Names of the operations that give, or take, a value with less than `headroom`: what has to stay in float32.

    `largest` by name of the node, where it was measured.
    """
    hot = {name for name, value in largest.items() if value * headroom > LARGEST}
    return {
        node.name
        for node in graph.nodes
        if node.op == "call_function" and (node.name in hot or any(other.name in hot for other in node.all_input_nodes))
    }


def layer_exponents(names: Iterable[str], exponents: Sequence[int], lifted: Mapping[str, int]) -> dict[str, int]:
    """By name of a convolution of the folded encoder: e such that the exported one computes 2^e times its output."""
    found = {}
    for name in names:
        parts = name.split(".")
        in_stream = parts[0] == "stages" and (
            parts[2] == "pos_emb"
            or (
                parts[2] == "blocks" and name.endswith(("reparam_conv", "mlp.conv.conv", "mlp.fc2", "token_mixer.proj"))
            )
        )
        found[name] = (-exponents[int(parts[1])] if in_stream else 0) + lifted.get(name, 0)
    return found


def _attends(block: nn.Module) -> bool:
    if not isinstance(block, (AttentionBlock, RepMixerBlock)):
        raise TypeError(f"a block of type {type(block).__name__}: cannot be rescaled")
    return isinstance(block, AttentionBlock)


def _start(stage: nn.Module) -> nn.Module:
    """The convolution that starts a stage's stream: the position encoding's, which has absorbed its skip, or else the
    first RepMixer's."""
    if not isinstance(stage.pos_emb, nn.Identity):
        return stage.pos_emb.reparam_conv  # type: ignore[union-attr, return-value]
    return stage.blocks[0].token_mixer.reparam_conv  # type: ignore[index, union-attr, return-value]


def _linear_outputs(stage: nn.Module) -> Iterable[str]:
    """Names, within a stage, of the modules whose outputs are scaled by 2^-k."""
    if not isinstance(stage.pos_emb, nn.Identity):
        yield "pos_emb.reparam_conv"
    for i, block in enumerate(stage.blocks):  # type: ignore[arg-type]
        yield f"blocks.{i}.token_mixer.{'proj' if _attends(block) else 'reparam_conv'}"
        if _attends(block):
            yield f"blocks.{i}.mlp:input"  # the stream between its two branches, which no module puts out
        yield f"blocks.{i}.mlp.conv.conv"
        yield f"blocks.{i}.mlp.fc2"
        yield f"blocks.{i}"


def _exponent(ratio: float) -> int:
    """The smallest integer k with ratio / 2^k <= 1."""
    return math.ceil(math.log2(ratio)) if ratio > 0 else -(1 << 30)


@torch.no_grad()
def _scale(layer: nn.Module, weight: float, bias: float) -> None:
    layer.weight.mul_(weight)  # type: ignore[union-attr, operator]
    if layer.bias is not None:
        layer.bias.mul_(bias)  # type: ignore[union-attr, operator]


def _lift(weight: torch.Tensor, largest: float) -> int:
    """m for a branch's last weight, whose output reaches `largest` now."""
    values = weight.detach().float()
    error = (values.half().float() - values).square().sum().item()
    power = values.square().sum().item()
    if power == 0 or largest == 0 or error <= power * 10 ** (-_WEIGHT_SNR_DB / 10):
        return 0
    rms = math.sqrt(power / values.numel())
    # A typical weight becomes a thousand times the smallest normal.
    wanted = math.ceil(math.log2(2**10 * SMALLEST_NORMAL / rms))
    room = math.floor(math.log2(LARGEST / HEADROOM / largest))
    return max(0, min(wanted, room))
