"""The operation at which a saved program leaves its reference: a run as typed, step by step beside two others.

Two comparisons at once. *Rounding*: each operation as typed against the same operation of the same program in float32.
*Layers*: each convolution and linear layer of the program, in order, against the PyTorch layer that it came from (a
linear layer may have become a 1 x 1 convolution; a BatchNorm that follows its convolution is part of the layer).
No value is stored: PyTorch's layers drive the program, and values are compared as soon as all are there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.layers import ConvNormAct
from timm.models.fastvit import (
    Attention,
    AttentionBlock,
    LayerScale2d,
    MobileOneBlock,
    ReparamLargeKernelConv,
    RepConditionalPosEnc,
    RepMixer,
    RepMixerBlock,
)
from torch import nn

from benchmarks.metrics import snr_db
from model_export import contract, mil

_LAYERS: dict[type[nn.Module], str] = {nn.Conv2d: "conv", nn.Linear: "linear"}


@dataclass(frozen=True)
class Value:
    """One output of one operation (its name and type in the program; is it fp16 there?) or of one PyTorch layer."""

    name: str
    type: str
    array: np.ndarray
    half: bool = False


@dataclass(frozen=True)
class Error:
    """SNR in dB of one output: `index` of its operation among those compared, `layer` its PyTorch name where known."""

    index: int
    name: str
    type: str
    snr_db: float
    layer: str | None = None


Emit = Callable[[Value], None]


@dataclass
class Comparison:
    """The result of `compare`. `half`: whether some value is fp16 in the program. `fault`: why the layers are not the
    reference's, one to one and in order. `features`: the program's output as typed, None where no operation gives it.
    """

    rounding: list[Error] = field(default_factory=list)
    layers: list[Error] = field(default_factory=list)
    half: bool = False
    fault: str | None = None
    features: np.ndarray | None = None


def compare(
    typed: Iterable[Value],
    exact: Iterable[Value],
    reference: Callable[[Emit], Any],
    scales: Mapping[str, np.ndarray] | None = None,
) -> Comparison:
    """Compare a program's values as typed with those in float32, and its layers with the reference's.

    `reference` runs the PyTorch encoder and calls back with the output of each of its layers (see `layers_of`), which
    `scales` multiply (see `layer_scales`).
    """
    comparison = Comparison()
    program = _layer_values(_rounded(typed, exact, comparison))

    def meet(layer: Value | None) -> None:
        value = None if comparison.fault else next(program, None)
        if comparison.fault or value is layer is None:
            return
        if value is None or layer is None or value[1].array.size != layer.array.size:
            got = "nothing more" if value is None else f"{value[1].type} {value[1].name} {list(value[1].array.shape)}"
            expected = "nothing more" if layer is None else f"{layer.type} {layer.name} {list(layer.array.shape)}"
            comparison.fault = (
                f"the program's layers are not the reference's: layer {len(comparison.layers)}:"
                f" got {got}, expected {expected}"
            )
            return
        index, output = value
        array = _by_channel(layer.array)
        if scales and (scale := scales.get(layer.name)) is not None:
            array = array * scale[:, None]
        snr = _snr(array, _by_channel(output.array))
        comparison.layers.append(Error(index, output.name, output.type, snr, layer.name))

    reference(meet)
    meet(None)
    for _ in program:
        pass
    return comparison


def _rounded(typed: Iterable[Value], exact: Iterable[Value], comparison: Comparison) -> Iterator[tuple[int, Value]]:
    """Each value as typed with the index of its operation, compared with the one in float32."""
    for index, (value, expected) in enumerate(zip(typed, exact, strict=True)):
        comparison.half |= value.half
        comparison.rounding.append(Error(index, value.name, value.type, _snr(expected.array, value.array)))
        if value.name == contract.OUTPUT:
            comparison.features = value.array.copy()
        yield index, value


def _layer_values(values: Iterable[tuple[int, Value]]) -> Iterator[tuple[int, Value]]:
    """Only the values of layers, a convolution's behind its BatchNorm."""
    pending: tuple[int, Value] | None = None
    for index, value in values:
        if pending is not None:
            yield (index, value) if value.type == "batch_norm" else pending
        pending = (index, value) if value.type in _LAYERS.values() else None
    if pending is not None:
        yield pending


def program_values(executor: mil.MILExecutor, pixels: np.ndarray) -> Iterator[Value]:
    """Each operation's outputs for pixels (1, 3, S, S) float32, channels first."""
    for operation, outputs in executor.watched({contract.INPUT: pixels}):
        half = {output.name for output in operation.outputs if output.type is not None and output.type.dtype == "fp16"}
        for name, tensor in outputs.items():
            if tensor.is_floating_point():
                array = tensor.numpy()
                yield Value(name, operation.type, _channels_first(array, operation.type), name in half)


def _channels_first(array: np.ndarray, kind: str) -> np.ndarray:
    return array.swapaxes(1, -1) if kind == "linear" and array.ndim == 3 else array


@contextmanager
def layers_of(encoder: nn.Module, emit: Emit) -> Iterator[None]:
    """Inside the block, every run of this encoder emits the output of each layer that the folded encoder has, by its
    name there, channels first.
    """
    with torch.inference_mode(), ExitStack() as hooks:
        for name, (kind, module, before) in _places(encoder).items():

            def take(tensor: torch.Tensor, name: str = name, kind: str = kind) -> None:
                emit(Value(name, kind, _channels_first(tensor.numpy(), kind)))

            if before:
                handle = module.register_forward_pre_hook(lambda _, inputs, take=take: take(inputs[0]))
            else:
                handle = module.register_forward_hook(lambda _, __, output, take=take: take(output))
            hooks.callback(handle.remove)
        yield


def _places(encoder: nn.Module) -> dict[str, tuple[str, nn.Module, bool]]:
    """The places in a stored encoder, folded or not, of the outputs of its folded form's layers: for each of those its
    kind, a module, and whether that module's input is meant instead of its output."""
    places: dict[str, tuple[str, nn.Module, bool]] = {}
    inside: set[nn.Module] = set()  # what the fold takes into one of them
    for name, module in encoder.named_modules():
        if module in inside:
            continue
        if isinstance(module, (MobileOneBlock, ReparamLargeKernelConv)):
            places[f"{name}.reparam_conv"] = "conv", module.se, True
            inside.update(set(module.modules()) - set(module.se.modules()))
        elif isinstance(module, (RepMixer, RepConditionalPosEnc)):
            places[f"{name}.reparam_conv"] = "conv", module, False
            inside.update(module.modules())
        elif isinstance(module, ConvNormAct):
            places[f"{name}.conv"] = "conv", module, False
            inside.update(module.modules())
        elif isinstance(module, RepMixerBlock):
            places[f"{name}.mlp.fc2"] = "conv", module.layer_scale, False
            inside.add(module.mlp.fc2)
        elif isinstance(module, AttentionBlock):
            places[f"{name}.token_mixer.proj"] = "linear", module.layer_scale_1, False
            places[f"{name}.mlp.fc2"] = "conv", module.layer_scale_2, False
            inside.update((module.token_mixer.proj, module.mlp.fc2))
        elif kind := _LAYERS.get(type(module)):
            places[name] = kind, module, False
    return places


def layer_scales(encoder: nn.Module, fp16: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """The factors of the export on layers' outputs, (channels,) or (1,) for all: powers of two for float16's sake, and
    the attention's 1 / sqrt(head size) in its queries. `fp16` is the manifest's entry of that name.
    """
    exponents = fp16["layer_exponents"] if fp16 else {}
    scales = {name: np.exp2(np.atleast_1d(np.float32(exponent))) for name, exponent in exponents.items()}
    for name, module in encoder.named_modules():
        if isinstance(module, Attention):  # queries, keys and values may have an exponent each
            powers = scales.get(f"{name}.qkv", np.ones(1, np.float32))
            scale = np.repeat(powers, module.qkv.out_features // len(powers))
            scale[: module.proj.in_features] *= module.scale
            scales[f"{name}.qkv"] = scale
    return scales


def traced_scales(encoder: nn.Module) -> dict[str, np.ndarray]:
    """`layer_scales` of a program that was traced from the model as it is: coremltools takes the layer scale behind a
    convolution into its weights, one behind a linear layer stays an operation of its own, and so is not in the layer's
    output."""
    scales = {}
    for name, block in encoder.named_modules():
        if isinstance(block, AttentionBlock) and isinstance(block.layer_scale_1, LayerScale2d):
            gamma = block.layer_scale_1.gamma.detach().float().flatten().numpy()
            scales[f"{name}.token_mixer.proj"] = np.divide(1, gamma, out=np.zeros_like(gamma), where=gamma != 0)
    return scales


def _by_channel(array: np.ndarray) -> np.ndarray:
    """(1, C, ...) -> (C, the rest), without a copy in either order of memory."""
    return array.reshape(array.shape[1], -1) if array.ndim > 1 else array.reshape(-1, 1)


def _snr(reference: np.ndarray, candidate: np.ndarray) -> float:
    if reference.shape != candidate.shape:
        return -np.inf
    return snr_db(reference, candidate)
