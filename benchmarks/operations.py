"""Where a saved program leaves its reference: the package run operation by operation, in lockstep with another run.

Two comparisons. *Rounding*: each operation as typed against the same operation of the same program in float32.
*Layers*: each convolution and linear layer of the program, in order, against the PyTorch layer that it came from (a
linear layer may have become a 1 x 1 convolution; a BatchNorm that follows its convolution is part of the layer).
Nothing is kept: a pair of values is compared as soon as both are there.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from timm.models.fastvit import Attention, AttentionBlock, LayerScale2d
from torch import nn

from benchmarks.metrics import snr_db
from fastvlm.errors import CheckFailed
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


class _Stopped(BaseException):
    """Ends a run that nobody reads any more."""


def lockstep(run: Callable[[Emit], Any]) -> Iterator[Value]:
    """Turn a run that calls back for each value into an iterator: the run waits, in a thread, until a value is used."""
    values: SimpleQueue[Value | BaseException | None] = SimpleQueue()
    turn, stopped = threading.Semaphore(0), threading.Event()

    def emit(value: Value) -> None:
        values.put(value)
        turn.acquire()
        if stopped.is_set():
            raise _Stopped

    def work() -> None:
        try:
            run(emit)
            values.put(None)
        except BaseException as error:
            values.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (value := values.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
            turn.release()
    finally:
        stopped.set()
        turn.release()
        thread.join()


def program_values(
    package: Path, pixels: np.ndarray, compute: str, function: str | None = None
) -> Callable[[Emit], Any]:
    """A run of the package in the MIL executor; pixels (1, 3, S, S) float32, `compute` "as-typed" or "float32"."""
    executor = mil.load(package, compute=compute, function_name=function)

    def run(emit: Emit) -> None:
        def watch(operation: mil.Operation, outputs: Mapping[str, torch.Tensor]) -> None:
            for value in _floats(operation, outputs):
                emit(value)

        executor.run({contract.INPUT: pixels}, watch=watch)

    return run


def _floats(operation: mil.Operation, outputs: Mapping[str, torch.Tensor]) -> Iterator[Value]:
    half = {output.name for output in operation.outputs if output.type is not None and output.type.dtype == "fp16"}
    for name, value in outputs.items():
        if value.is_floating_point():
            yield Value(name, operation.type, value.numpy(), name in half)


def layer_scales(encoder: nn.Module, fp16: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """By what the export multiplied each layer's output, (channels,): powers of two for float16's sake, and the
    attention's 1 / sqrt(head size) in its queries. `encoder` is the folded one, `fp16` what the manifest says of it.
    """
    layers = {name: layer for name, layer in encoder.named_modules() if type(layer) in _LAYERS}
    exponents = fp16["layer_exponents"] if fp16 else {}
    scales = {}
    for name, layer in layers.items():  # an attention's qkv has three exponents, of as many channels each
        powers = np.exp2(np.atleast_1d(np.float32(exponents.get(name, 0))))
        scales[name] = np.repeat(powers, len(layer.weight) // len(powers))  # type: ignore[arg-type]
    for name, module in encoder.named_modules():
        if isinstance(module, Attention):
            scales[f"{name}.qkv"][: module.proj.in_features] *= module.scale
    return scales


def traced_scales(encoder: nn.Module) -> dict[str, np.ndarray]:
    """`layer_scales` of a program that was traced from the model as it is: coremltools takes the layer scale behind a
    convolution into its weights, one behind a linear layer stays an operation of its own, and so is not in the layer's
    output. `encoder` is the unfolded one."""
    scales = {
        name: np.ones(len(layer.weight), np.float32)  # type: ignore[arg-type]
        for name, layer in encoder.named_modules()
        if type(layer) in _LAYERS
    }
    for name, block in encoder.named_modules():
        if isinstance(block, AttentionBlock) and isinstance(block.layer_scale_1, LayerScale2d):
            gamma = block.layer_scale_1.gamma.detach().float().flatten().numpy()
            scales[f"{name}.token_mixer.proj"] = np.divide(1, gamma, out=np.zeros_like(gamma), where=gamma != 0)
    return scales


def layer_values(
    encoder: nn.Module, pixels: np.ndarray, scales: Mapping[str, np.ndarray] | None = None
) -> Callable[[Emit], Any]:
    """A run of a folded PyTorch encoder that emits the output of each convolution and linear layer, channels first,
    times its `scales`.
    """

    def emitter(emit: Emit, name: str, kind: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            values = output.numpy().swapaxes(1, -1) if kind == "linear" and output.ndim == 3 else output.numpy()
            if scales:
                values = values * scales[name].reshape(-1, *[1] * (values.ndim - 2))
            emit(Value(name, kind, values))

        return hook

    def run(emit: Emit) -> None:
        handles = [
            layer.register_forward_hook(emitter(emit, name, kind))
            for name, layer in encoder.named_modules()
            if (kind := _LAYERS.get(type(layer)))
        ]
        try:
            with torch.inference_mode():
                encoder.forward_features(torch.from_numpy(pixels))  # type: ignore[operator]
        finally:
            for handle in handles:
                handle.remove()

    return run


def rounding_errors(package: Path, pixels: np.ndarray, function: str | None = None) -> tuple[list[Error], str]:
    """SNR of every operation as typed against float32; and the precision that the program computes in."""
    typed, exact = (lockstep(program_values(package, pixels, compute, function)) for compute in ("as-typed", "float32"))
    errors, half = [], False
    for index, (value, reference) in enumerate(zip(typed, exact, strict=True)):
        half |= value.half
        errors.append(Error(index, value.name, value.type, _snr(reference.array, value.array)))
    return errors, "float16" if half else "float32"


def layer_errors(
    package: Path,
    encoder: nn.Module,
    pixels: np.ndarray,
    function: str | None = None,
    scales: Mapping[str, np.ndarray] | None = None,
) -> list[Error]:
    """SNR of each convolution and linear layer of the program as typed against the folded PyTorch encoder's, which are
    multiplied by `scales` (see `layer_scales`) first.

    Raises CheckFailed when the program's layers are not the encoder's, one to one and in order.
    """
    errors: list[Error] = []
    layers = lockstep(layer_values(encoder, pixels, scales))
    for value, layer in zip_longest(_numbered_layers(package, pixels, function), layers):
        if value is None or layer is None or value[1].array.size != layer.array.size:
            got = "nothing more" if value is None else f"{value[1].type} {value[1].name} {list(value[1].array.shape)}"
            expected = "nothing more" if layer is None else f"{layer.type} {layer.name} {list(layer.array.shape)}"
            raise CheckFailed(
                f"the program's layers are not the reference's: layer {len(errors)}: got {got}, expected {expected}"
            )
        index, output = value
        errors.append(
            Error(index, output.name, output.type, _snr(layer.array.ravel(), output.array.ravel()), layer.name)
        )
    return errors


def _numbered_layers(package: Path, pixels: np.ndarray, function: str | None) -> Iterator[tuple[int, Value]]:
    """Each layer's output with the index of its operation, channels first."""
    pending: tuple[int, Value] | None = None
    for index, value in enumerate(lockstep(program_values(package, pixels, "as-typed", function))):
        if value.type == "batch_norm" and pending is not None:
            yield index, value
            pending = None
            continue
        if pending is not None:
            yield pending
        pending = None
        if value.type == "linear" and value.array.ndim == 3:
            value = replace(value, array=value.array.swapaxes(1, -1))
        if value.type in _LAYERS.values():
            pending = index, value
    if pending is not None:
        yield pending


def _snr(reference: np.ndarray, candidate: np.ndarray) -> float:
    if reference.shape != candidate.shape:
        return -np.inf
    return snr_db(reference, candidate)
