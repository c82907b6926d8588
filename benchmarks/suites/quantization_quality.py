"""The quality that quantizing costs on a trained text model, scheme by scheme: a step of `benchmarks quantization`.

The text is the documentation that comes with Python (`pydoc_data.topics`): every other topic to calibrate on, the rest
to judge by.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import metrics
from fastvlm.common.cli import log
from quantization.calibration import awq, decoder, dwq, gptq
from quantization.calibration.allocation import allocate
from quantization.calibration.data import Calibration
from quantization.calibration.sensitivity import sensitivities
from quantization.calibration.tensors import decode, encode
from quantization.schemes import Affine, Scheme, nbytes

_TOKENS, _USED, _JUDGED = 256, 32, 16  # of a row of text; rows to calibrate on and to judge by
_DWQ_STEPS = 60
BITS = (3, 4, 5, 6, 8)


def text_model(folder: str) -> dict[str, dict[str, float]]:
    """ "kl" (nats a token) and "top1" agreement of int3 to int8, of int4 calibrated, and of a mix of as many bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    used, judged = _rows(AutoTokenizer.from_pretrained(folder))
    calibration = Calibration(model.config.vocab_size, tuple(used), np.empty((0, model.config.hidden_size), np.float32))
    names = [name for name, _ in model.named_parameters() if name.endswith("_proj.weight")] + [decoder.EMBEDDINGS]
    plans: dict[str, Mapping[str, Scheme]] = {f"int{bits}": dict.fromkeys(names, _scheme(bits)) for bits in BITS}
    int4, batches = plans["int4"], [decoder.embed(model, calibration, used[i : i + 4]) for i in range(0, len(used), 4)]
    found: dict[str, tuple[Mapping[str, Scheme], Mapping[str, Mapping[str, Tensor]]]] = {
        name: (plan, {}) for name, plan in plans.items()
    }
    found["fit"] = (_fitted(model, calibration, names), {})
    found["gptq"] = (int4, gptq.quantize(copy.deepcopy(model), batches, _scheme(4)))
    found["awq"] = (int4, awq.quantize(copy.deepcopy(model), batches, _scheme(4)))
    found["dwq"] = (int4, dwq.quantize(model, calibration, int4, steps=_DWQ_STEPS))
    expected = _logits(model, judged)
    figures: dict[str, dict[str, float]] = {}
    for name, (plan, stored) in found.items():
        got = _logits(_stored(model, plan, stored), judged)
        kl, agreement = metrics.kl_divergence(expected, got), metrics.top1_agreement(expected, got)
        log(f"{name}: KL {kl:.4g}, top-1 {agreement:.4f}")
        figures[name] = {"kl": kl, "top1": agreement}
    return figures


def _scheme(bits: int) -> Affine:
    return Affine(bits, 64, "float16")


def _rows(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids (N, _TOKENS) to calibrate on and to judge by, spread over their topics."""
    from pydoc_data.topics import topics

    rows = []
    for start, count in ((0, _USED), (1, _JUDGED)):
        text = "\n\n".join(topics[name] for name in sorted(topics)[start::2])
        ids = np.array(tokenizer(text)["input_ids"], np.int32)
        whole = ids[: len(ids) // _TOKENS * _TOKENS].reshape(-1, _TOKENS)
        rows.append(whole[:: len(whole) // count][:count])
    return rows[0], rows[1]


def _fitted(model: Any, calibration: Calibration, names: Sequence[str]) -> dict[str, Scheme]:
    """The least cost within the bytes of 4 bit."""
    choices = [_scheme(bits) for bits in (2, *BITS)]
    nats = sensitivities(copy.deepcopy(model), calibration, dict.fromkeys(names, choices))
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    options = {
        name: {str(i): (cost, nbytes(choices[i], shapes[name])) for i, cost in enumerate(costs)}
        for name, costs in nats.items()
    }
    chosen = allocate(options, sum(nbytes(_scheme(4), shape) for shape in shapes.values()))
    return {name: choices[int(number)] for name, number in chosen.items()}


@torch.no_grad()
def _stored(model: Any, plan: Mapping[str, Scheme], found: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """The model with the values that its stored weights decode to."""
    changed = copy.deepcopy(model)
    for name in plan.keys() | found.keys():
        weight = changed.get_parameter(name)
        parts = found.get(name)
        if name not in plan:
            weight.copy_(found[name]["weight"])
            continue
        scheme = plan[name]
        weight.copy_(decode(scheme, parts or encode(scheme, weight)))
    return changed


@torch.no_grad()
def _logits(model: Any, rows: np.ndarray) -> np.ndarray:
    """(N * T, V) of rows of ids (N, T)."""
    return np.concatenate([model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy() for ids in rows])
