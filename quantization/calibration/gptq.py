"""GPTQ: round column by column, and let the columns that are still open make up for each error.

Source: https://arxiv.org/abs/2210.17323, algorithm 1; scales, damping and order as mlx-lm 0.32.2's `quant/gptq.py`.
docs/QUANTIZATION.md has the reasons not to call it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.common.dtypes import as_array, as_tensor, torch_dtype
from quantization.calibration import decoder
from quantization.calibration.tensors import decode, encode
from quantization.mlx import affine
from quantization.schemes import Affine

_DAMPING = 1e-2  # of the Hessian's mean diagonal


@torch.no_grad()
def quantize(
    model: Any, batches: Sequence[Tensor], scheme: Affine, advance: Callable[[], Any] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Quantize all decoder matrices, each on the inputs that the quantized layers before it give.

    Returns `model.layers.N.<matrix>.weight` -> parts (weight, scales, biases); the model is left with what they decode
    to.
    """
    stored = {}
    for number, layer, calls in decoder.layers(model, batches):
        hessians: dict[str, Tensor] = {}

        def add(name: str, x: Tensor, hessians: dict[str, Tensor] = hessians) -> None:
            rows = x.float()
            product = rows.T @ rows
            hessians[name] = hessians[name].add_(product) if name in hessians else product

        decoder.inputs_of(layer, calls, add)
        for name, hessian in hessians.items():
            matrix = layer.get_submodule(name)
            assert isinstance(matrix, nn.Linear)
            parts = round_matrix(matrix.weight, hessian, scheme)
            stored[f"model.layers.{number}.{name}.weight"] = parts
            matrix.weight.copy_(decode(scheme, parts))
        if advance is not None:
            advance()
    return stored


def round_matrix(weight: Tensor, hessian: Tensor, scheme: Affine) -> dict[str, Tensor]:
    """One matrix (O, I) with the second moments (I, I) float32 of its input, summed over tokens."""
    group, bins, dtype = scheme.group_size, 2**scheme.bits - 1, torch_dtype(scheme.dtype)
    damped = hessian + torch.eye(len(hessian)) * (_DAMPING * hessian.diagonal().mean() + torch.finfo().tiny)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    rest, codes = weight.float().clone(), torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(len(weight), weight.shape[1] // group, dtype=dtype)
    biases = torch.empty_like(scales)
    for number, start in enumerate(range(0, weight.shape[1], group)):
        stop = start + group
        edges = encode(scheme, rest[:, start:stop])
        scales[:, number], biases[:, number] = edges["scales"][:, 0], edges["biases"][:, 0]
        scale, bias = scales[:, number].float(), biases[:, number].float()
        errors = torch.empty(len(weight), group)
        for column in range(start, stop):
            value = rest[:, column]
            code = ((value - bias) / scale).round_().clamp_(0, bins)
            codes[:, column] = code.to(torch.uint8)
            error = (value - (scale * code + bias)) / inverse[column, column]
            rest[:, column:stop] -= error[:, None] * inverse[column, column:stop]
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ inverse[start:stop, stop:]
    return {"weight": as_tensor(affine.pack(as_array(codes), scheme.bits)), "scales": scales, "biases": biases}
