"""What a model computes and moves, from its architecture alone: multiply-accumulates and bytes, at any resolution.

No torch: `estimate` must answer at once. tests/benchmarks/test_estimate_work.py holds the counts against PyTorch's own
and against `audit`'s of an exported package. Convolutions are square, weights and activations 2 bytes (float16).
"""

import math
from dataclasses import dataclass
from typing import Any

HALF = 2  # bytes of a float16
# A tensor of 57 MB stays on the fast path of the M1 Max's Neural Engine and one of 101 MB does not (ConvNeXt-L at 768
# and at 1024, FastVLM paper, table 10: 1.8 times the pixels take 4.2 times as long).
SPILL = 1 << 26


@dataclass(frozen=True)
class Operation:
    """A convolution, matrix product or elementwise step: multiply-accumulates, and values read, written, stored."""

    kind: str  # "dense", "depthwise", "attention" (a product of two activations) or "pointwise" (no products)
    macs: int
    inputs: int
    outputs: int
    weights: int

    @property
    def moved(self) -> int:
        """Bytes of activations read and written."""
        return HALF * (self.inputs + self.outputs)


@dataclass(frozen=True)
class EncoderWork:
    """One pass of an encoder. Bytes; `spilled` are those moved by operations with a tensor larger than SPILL."""

    macs: int
    weights: int
    attention_macs: int = 0
    activations: int = 0
    spilled: int = 0
    operations: int = 0
    longest_attention: int = 0  # tokens


@dataclass(frozen=True)
class LanguageModel:
    """The sizes of a Llama-like decoder (Qwen2, Qwen3, Mistral, Vicuna): config.json's fields."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    inner: int
    vocab: int

    @property
    def matrices(self) -> int:
        """Values in the decoder layers' matrices: multiply-accumulates for each token."""
        attention = 2 * self.heads * self.head + 2 * self.kv_heads * self.head
        return self.layers * self.hidden * (attention + 3 * self.inner)

    @property
    def output(self) -> int:
        """Values in the matrix that turns the last position into logits."""
        return self.vocab * self.hidden

    def scores(self, tokens: int) -> int:
        """Values of attention's score matrices in all layers."""
        return self.layers * self.heads * tokens * tokens


def encoder_work(architecture: dict[str, Any], resolution: int | None) -> EncoderWork:
    """The work of an encoder (published.json, `encoders`) on a square picture.

    `kind` "counted" gives the numbers themselves, for models whose architecture isn't modelled here.
    """
    settings = {name: value for name, value in architecture.items() if name not in ("kind", "source")}
    if architecture["kind"] == "counted":
        return EncoderWork(weights=HALF * settings.pop("parameters"), **settings)
    if resolution is None:
        raise ValueError("fastvit: no resolution")
    operations = fastvit(resolution, **settings)
    spilling = [one for one in operations if HALF * max(one.inputs, one.outputs) > SPILL]
    return EncoderWork(
        macs=sum(one.macs for one in operations),
        weights=HALF * sum(one.weights for one in operations),
        attention_macs=sum(one.macs for one in operations if one.kind == "attention"),
        activations=sum(one.moved for one in operations),
        spilled=sum(one.moved for one in spilling),
        operations=sum(one.macs > 0 for one in operations),
        longest_attention=(resolution // (4 << min(settings["attention"]))) ** 2 if settings["attention"] else 0,
    )


def fastvit(
    resolution: int, depths: list[int], widths: list[int], ratio: int, attention: list[int], se: bool = False
) -> list[Operation]:
    """FastViT in its folded form: FastViTHD (timm's fastvit_mci3), MobileCLIP's MCi and their smaller siblings.

    `attention`: the stages that mix tokens by attention (heads of 32) instead of a 3x3 depthwise convolution; `se`: a
    squeeze-and-excite block after the last convolution. Each stage after the first halves the side.
    """
    side, width = resolution // 2, widths[0]
    found = [_conv(3, width, 3, resolution, side), _point(width * side * side)]
    found += [_conv(width, width, 3, side, side // 2, width), _point(width * (side // 2) ** 2)]
    side //= 2
    found += [_conv(width, width, 1, side, side), _point(width * side * side)]
    for stage, (depth, next_width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            found += [_conv(width, next_width, 7, side, side // 2, width)]
            side, width = side // 2, next_width
            found += [_point(width * side * side), _conv(width, width, 1, side, side), _point(width * side * side)]
        tokens, mixes = side * side, stage in attention
        if mixes:  # a convolution as position encoding
            found.append(_conv(width, width, 7, side, side, width))
        for _ in range(depth):
            found += _attention(tokens, width, 32) if mixes else [_conv(width, width, 3, side, side, width)]
            found += [_conv(width, width, 7, side, side, width), _conv(width, ratio * width, 1, side, side)]
            found += [_point(ratio * width * tokens), _conv(ratio * width, width, 1, side, side)]
            found.append(_point(width * tokens, 2))
    found.append(_conv(width, 2 * width, 3, side, side, width))
    if se:
        found += [_linear(1, 2 * width, width // 8), _linear(1, width // 8, 2 * width)]
    return [*found, _point(2 * width * side * side)]


def _conv(width: int, out: int, kernel: int, side: int, out_side: int, groups: int = 1) -> Operation:
    weights = out * width // groups * kernel * kernel
    kind = "depthwise" if groups == width else "dense"
    return Operation(kind, weights * out_side**2, width * side**2, out * out_side**2, weights + out)


def _linear(tokens: int, width: int, out: int) -> Operation:
    return Operation("dense", tokens * width * out, tokens * width, tokens * out, width * out + out)


def _point(values: int, inputs: int = 1) -> Operation:
    return Operation("pointwise", 0, inputs * values, values, 0)


def _attention(tokens: int, width: int, head: int) -> list[Operation]:
    """Norm, queries, keys and values, scores, softmax, their product with the values, projection, sum."""
    scores = width // head * tokens * tokens
    product = Operation("attention", math.prod((tokens, tokens, width)), 2 * tokens * width, scores, 0)
    back = Operation("attention", product.macs, scores + tokens * width, tokens * width, 0)
    return [
        _point(width * tokens), _linear(tokens, width, 3 * width), product, _point(scores), back,
        _linear(tokens, width, width), _point(width * tokens, 2),
    ]  # fmt: skip
