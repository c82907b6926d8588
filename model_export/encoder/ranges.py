"""The largest values of the encoder and their headroom in float16: of a folded encoder, module by module.

Measured in float32, in which an overflow of float16 is seen and not hidden. A package's operations: `package_ranges`.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.layers import LayerNorm2d
from timm.models.fastvit import Attention, AttentionBlock
from torch import nn

from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common.errors import UserError
from model_export.encoder import fp16
from model_export.encoder.channel_first import channel_first
from model_export.encoder.fp16 import LARGEST, SMALLEST_NORMAL
from model_export.encoder.graph import folded_encoder
from model_export.mil.allocator import give_back

_TILE = 1 << 18  # elements looked at a time for subnormals: they and their magnitudes stay in the cache
CONTAINER = "container"  # the type of a module that only puts out what its last part did
Advance = Callable[[], Any]


@dataclass(frozen=True)
class Range:
    """The largest values of one operation, or module, over the pictures.

    `type` is the operation's or the module's class; `layer` timm's name of the module that it belongs to, None if
    unknown; `dtype` what a package keeps the value in ("fp16" in a checkpoint, which is what an export would make of
    it).

    largest: the largest magnitude. square: the largest (x - mean)^2 inside a LayerNorm, which a processor that takes it
    apart has to hold; 0 without one. subnormal: of the values that are not zero, the share under 2^-14, which float16
    holds with fewer bits or not at all. weight_subnormal: the same of the operation's own weights, 0 without any.
    exponent: k where an export would carry x / 2^k instead (see `model_export.encoder.fp16`); of a checkpoint only.
    """

    name: str
    type: str
    layer: str | None
    largest: float
    square: float = 0.0
    subnormal: float = 0.0
    weight_subnormal: float = 0.0
    dtype: str = "fp16"
    exponent: int = 0

    @property
    def headroom(self) -> float:
        """65504 / largest: under 1 is an overflow; infinite where all values are zero."""
        return LARGEST / self.largest if self.largest else math.inf

    @property
    def square_headroom(self) -> float:
        """65504 / square; infinite without a LayerNorm."""
        return LARGEST / self.square if self.square else math.inf

    @property
    def exported_headroom(self) -> float:
        """65504 / what an export holds of the largest value."""
        return self.headroom * 2.0**self.exponent


@dataclass
class Tally:
    """One operation's figures, gathered picture by picture."""

    name: str
    type: str
    layer: str | None
    largest: float = 0.0
    square: float = 0.0
    small: int = 0
    nonzero: int = 0
    weight_subnormal: float = 0.0
    dtype: str = "fp16"

    def see(self, values: torch.Tensor) -> None:
        self.largest = max(self.largest, largest(values, self.name))
        self.count(values)

    def count(self, values: torch.Tensor) -> None:
        small, nonzero = _count_small(values)
        self.small, self.nonzero = self.small + small, self.nonzero + nonzero

    def see_norm(self, values: torch.Tensor, axes: tuple[int, ...]) -> None:
        self.square = max(self.square, largest_square(values, axes))

    def range(self) -> Range:
        share = self.small / max(self.nonzero, 1)
        return Range(
            self.name, self.type, self.layer, self.largest, self.square, share, self.weight_subnormal, self.dtype
        )


def largest(values: torch.Tensor, name: str) -> float:
    """max |values| of floats, 0.0 of none. Raises UserError, with `name`, for what is not finite."""
    if not values.numel():
        return 0.0
    low, high = (float(bound) for bound in _in_memory_order(values).aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name}: not finite even in float32 (from {low} to {high}): the weights are damaged")
    return max(-low, high)


def largest_square(values: torch.Tensor, axes: tuple[int, ...]) -> float:
    """max (x - mean)^2 with the mean over `axes`, in float64: what a LayerNorm over them has to square."""
    mean = values.mean(axes, dtype=torch.float64)
    deviation = torch.maximum(values.amax(axes).double() - mean, mean - values.amin(axes).double())
    return float(deviation.max()) ** 2


def subnormal_share(tensors: Iterable[torch.Tensor]) -> float:
    """The share of all values not zero that is under 2^-14 in magnitude; 0.0 where all are zero."""
    counts = [_count_small(tensor) for tensor in tensors]
    return sum(small for small, _ in counts) / max(sum(nonzero for _, nonzero in counts), 1)


def _count_small(values: torch.Tensor) -> tuple[int, int]:
    """(number of values under 2^-14 and not zero, number not zero)."""
    under = nonzero = 0
    for tile in _in_memory_order(values).reshape(-1).split(_TILE):
        under += int(torch.count_nonzero(tile.abs() < SMALLEST_NORMAL))
        nonzero += int(torch.count_nonzero(tile))
    return under - (values.numel() - nonzero), nonzero


def _in_memory_order(values: torch.Tensor) -> torch.Tensor:
    """The same values with axes ordered as they lie in memory, so that looking at all of them copies none."""
    return values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))


def measure_modules(
    encoder: nn.Module, pixels: Iterable[np.ndarray], advance: Advance = lambda: None, subnormals: bool = False
) -> dict[str, Range]:
    """The output of every module of a folded timm FastViT, by module name in order of execution.

    pixels: arrays (1, 3, S, S) float32; `advance()` after each. Layers have the name that timm gives them
    (`stages.3.blocks.0.mlp.fc2`), a block or a stage is what leaves it. `stages.3.blocks.0.mlp:input` is an attention
    block's stream between its two branches; of `stages.3.blocks.0.token_mixer`, `:queries` (over the root of the head's
    size), `:keys`, `:values` and `:scores`, what its softmax gets: no module puts them out. A LayerNorm has the largest
    square of its input. Shares of subnormals are measured only with `subnormals`: without, this is an encoding and one
    look at each value a picture (5 % of the time at 1024 x 1024).

    Raises UserError for values that are not finite in float32, and for no pixels at all.
    """
    tallies: dict[str, Tally] = {}
    # The tensor seen last, kept no longer than the encoder keeps it; its version (of in-place changes); its figure.
    last: tuple[Callable[[], torch.Tensor | None], int, float] = (lambda: None, 0, 0.0)

    def see(name: str, module: nn.Module, values: torch.Tensor) -> Tally:
        nonlocal last
        if name not in tallies:
            weights = module.parameters(recurse=False) if subnormals and ":" not in name else ()
            tallies[name] = Tally(name, CONTAINER, name.partition(":")[0], weight_subnormal=subnormal_share(weights))
        tally = tallies[name]
        if values is not last[0]() or values._version != last[1]:  # a container puts out what its last child did
            last = weakref.ref(values), values._version, largest(values, name)
            if not isinstance(module, Attention):  # whose last part is its projection, in another order of axes
                tally.type = type(module).__name__
            if subnormals:
                tally.count(values)
        tally.largest = max(tally.largest, last[2])
        return tally

    def after(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        tally = see(name, module, output)
        if isinstance(module, nn.LayerNorm):
            tally.see_norm(inputs[0], _axes(module))

    def before(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        see(f"{name}:input", module, inputs[0])

    def products(name: str, attention: Attention, layer: nn.Module, _: object, output: torch.Tensor) -> None:
        heads = output.unflatten(-1, (3, attention.num_heads, attention.head_dim)).movedim(1, -2)
        for head in range(attention.num_heads):  # one at a time: all together take 100 MB at 1024 x 1024
            q, k, v = heads[:, :, head].unbind(1)
            q = q * attention.scale
            for part, values in (("queries", q), ("keys", k), ("values", v), ("scores", q @ k.mT)):
                see(f"{name}:{part}", layer, values)

    handles = []
    for name, module in encoder.named_modules():
        if name and not isinstance(module, (nn.Identity, nn.Dropout)):
            handles.append(module.register_forward_hook(partial(after, name)))
        if isinstance(module, Attention):
            handles.append(module.qkv.register_forward_hook(partial(products, name, module)))
        if isinstance(module, AttentionBlock):
            handles.append(module.mlp.register_forward_pre_hook(partial(before, f"{name}.mlp")))
    try:
        with torch.no_grad():
            for array in pixels:
                # Convolutions are quicker on channels-last values: those of other values are reordered at each.
                values = torch.from_numpy(array).contiguous(memory_format=torch.channels_last)
                encoder.forward_features(values)  # type: ignore[operator]
                give_back()  # or what one picture has split would stay beside what the next one needs
                advance()
    finally:
        for handle in handles:
            handle.remove()
    return {tally.name: tally for tally in finished(tallies)}


def _axes(norm: nn.LayerNorm) -> tuple[int, ...]:
    """The axes that it normalizes: channels of (B, C, H, W) in timm's LayerNorm2d, else the last ones."""
    return (1,) if isinstance(norm, LayerNorm2d) else tuple(range(-len(norm.normalized_shape), 0))


def finished(tallies: Mapping[str, Tally]) -> list[Range]:
    if not tallies:
        raise UserError("no picture to measure the encoder's values on: expected one or more")
    return [tally.range() for tally in tallies.values()]


def measure_checkpoint(
    checkpoint: Checkpoint, pixels: Iterable[np.ndarray], advance: Advance = lambda: None
) -> list[Range]:
    """Every module of a checkpoint's folded encoder (see `measure_modules`), with shares of subnormals, and with the
    exponents that an export would choose by these pictures."""
    fastvit = folded_encoder(checkpoint)[0]
    ranges = measure_modules(fastvit, pixels, advance, subnormals=True)
    exponents = fp16.choose(channel_first(fastvit), ranges).exponents()
    return [replace(range_, exponent=exponents.get(name, 0)) for name, range_ in ranges.items()]
