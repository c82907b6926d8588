"""DWQ: the codes stay; scales and biases are trained until the logits are the unquantized model's again.

Source: mlx-lm 0.32.2's `quant/dwq.py` (loss, temperature, Adam; `mlx_lm/LEARNED_QUANTS.md`).
docs/QUANTIZATION.md has the reasons not to call it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from fastvlm.common.dtypes import torch_dtype
from quantization.calibration import decoder
from quantization.calibration.data import Calibration, filled
from quantization.calibration.tensors import decode, encode
from quantization.schemes import Affine, Scheme

_TEMPERATURE = 2.0
_BATCH = 8
STEPS = 300  # of a batch each
_RATE = 2e-3  # of Adam, in units of each weight's mean scale; falls to nothing in a straight line


@dataclass
class _Weight:
    """codes (O, G, group) in float32, and as they are stored; scales and biases (O, G) float32, divided by `unit`."""

    codes: Tensor
    packed: Tensor
    scales: Tensor
    biases: Tensor
    unit: float
    scheme: Affine

    def decode(self) -> Tensor:
        return ((self.codes * self.scales[..., None] + self.biases[..., None]) * self.unit).flatten(1)

    def parts(self) -> dict[str, Tensor]:
        dtype = torch_dtype(self.scheme.dtype)
        return {
            "weight": self.packed,
            "scales": (self.scales.detach() * self.unit).to(dtype),
            "biases": (self.biases.detach() * self.unit).to(dtype),
        }


def quantize(
    model: Any,
    calibration: Calibration,
    schemes: Mapping[str, Scheme],
    advance: Callable[[], Any] | None = None,
    steps: int = STEPS,
) -> dict[str, dict[str, Tensor]]:
    """Train what `schemes` (by the model's names) quantize below 8 bits; the rest stays rounded, or as it is.

    Returns name -> parts (weight, scales, biases) of the trained ones. The model is left as it was.
    """
    weights, fixed = {}, {}
    for name, scheme in schemes.items():
        if not isinstance(scheme, Affine):
            continue
        parts = encode(scheme, model.get_parameter(name))
        if scheme.bits < 8:
            weights[name] = _open(parts, scheme)
        else:
            fixed[name] = decode(scheme, parts).float()
    trained = [tensor for weight in weights.values() for tensor in (weight.scales, weight.biases)]
    optimizer = torch.optim.Adam(trained, lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = np.random.default_rng(0)
    for _ in range(steps):
        ids, real = _batch(calibration, order)
        with torch.no_grad():
            target = model(inputs_embeds=decoder.embed(model, calibration, ids), use_cache=False).logits[real]
        values = fixed | {name: weight.decode() for name, weight in weights.items()}
        table = values.get(decoder.EMBEDDINGS, model.get_input_embeddings().weight)
        call = {"inputs_embeds": decoder.embed(model, calibration, ids, table), "use_cache": False}
        logits = functional_call(model, values, kwargs=call).logits[real]
        optimizer.zero_grad()
        _divergence(target, logits).backward()
        optimizer.step()
        schedule.step()
        if advance is not None:
            advance()
    return {name: weight.parts() for name, weight in weights.items()}


def _open(parts: Mapping[str, Tensor], scheme: Affine) -> _Weight:
    scales, biases = parts["scales"].float(), parts["biases"].float()
    unit = float(scales.abs().mean())
    packed, ones = parts["weight"], torch.ones_like(scales)
    codes = decode(scheme, {"weight": packed, "scales": ones, "biases": torch.zeros_like(ones)})
    codes = codes.unflatten(1, (-1, scheme.group_size))
    return _Weight(codes, packed, (scales / unit).requires_grad_(), (biases / unit).requires_grad_(), unit, scheme)


def _batch(calibration: Calibration, order: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """A random batch of sequences (B, T), and the mask (B, T) of their real tokens."""
    count = len(calibration.sequences)
    chosen = order.choice(count, min(_BATCH, count), replace=False)
    ids, real = filled([calibration.sequences[i] for i in chosen])
    return ids, torch.from_numpy(real)


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean KL divergence of logits (N, V) from the target's, both divided by the temperature."""
    expected, got = (torch.log_softmax(x.float() / _TEMPERATURE, -1) for x in (target, logits))
    return (expected.exp() * (expected - got)).sum(-1).mean()
