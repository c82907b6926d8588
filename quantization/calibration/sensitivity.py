"""The cost of rounding each matrix of a language model: nats of KL divergence per token, to second order.

KL(p || p + d) ~ 1/2 E[(dlog p(y) / dW . dW)^2], y drawn from p: Fisher's information along the very error dW that a
scheme makes (Amari, Natural gradient works efficiently in learning, 1998, section 2). One backward pass serves all
matrices and all schemes, and nothing as large as a gradient is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from quantization.calibration import decoder
from quantization.calibration.data import Calibration
from quantization.calibration.decoder import EMBEDDINGS
from quantization.calibration.tensors import as_stored
from quantization.schemes import Scheme

HEAD = "lm_head.weight"
_TOKENS = 4096  # of a batch: each batch rounds every matrix by every scheme once
_LOGITS = 1 << 26  # values of logits at once: 256 MiB in float32
_VALUES = 1 << 22  # of a matrix that are rounded at once


def sensitivities(
    model: Any,
    calibration: Calibration,
    options: Mapping[str, Sequence[Scheme]],
    advance: Callable[[int], Any] | None = None,
) -> dict[str, list[float]]:
    """Weight (by the model's name) -> nats a token for each of its schemes; `advance(n)` after every n sequences.

    Weights are matrices of the decoder's layers, the embeddings and lm_head; tied, the last two are one weight. The
    model's parameters lose their gradients. Raises KeyError for any other weight.
    """
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    head = EMBEDDINGS if tied else HEAD
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.lm_head
    }
    if unknown := sorted(options.keys() - linears.keys() - {EMBEDDINGS, head}):
        raise KeyError(f"no matrix of this model: {', '.join(unknown)}")
    nats = {name: torch.zeros(len(schemes), dtype=torch.float64) for name, schemes in options.items()}
    draw = torch.Generator().manual_seed(0)
    model.requires_grad_(False)
    for ids, real in calibration.batches(_TOKENS):
        places = torch.from_numpy(real)
        # changes[name]: (schemes, B), d(log p)/dW . dW of each sequence
        changes = {name: torch.zeros(len(schemes), len(ids)) for name, schemes in options.items()}
        embeds = decoder.embed(model, calibration, ids).requires_grad_()
        with ExitStack() as hooks:
            for name in options.keys() & linears.keys():
                follow = _follow(options[name], changes[name])
                hooks.enter_context(linears[name].register_forward_hook(follow))
            hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            gradient = _from_the_head(model, hidden.detach(), places, draw, options.get(head, ()), changes.get(head))
            hidden.backward(gradient)
        if EMBEDDINGS in options and embeds.grad is not None:
            _looked_up(model, calibration, ids, embeds.grad, options[EMBEDDINGS], changes[EMBEDDINGS])
        for name, change in changes.items():
            nats[name] += 0.5 * change.double().square().sum(1)
        if advance is not None:
            advance(len(ids))
    tokens = sum(map(len, calibration.sequences))
    return {name: (values / tokens).tolist() for name, values in nats.items()}


def _follow(schemes: Sequence[Scheme], changes: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook of a matrix: the backward pass will add to `changes` what its schemes do."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight = args[0].detach(), module.get_parameter("weight")
        output.register_hook(lambda gradient: _add(weight, x, gradient, schemes, changes))

    return hook


@torch.no_grad()
def _add(weight: Tensor, x: Tensor, gradient: Tensor, schemes: Sequence[Scheme], changes: Tensor) -> None:
    """changes[s, b] += sum over tokens of gradient (B, T, O) . (dW_s x), x (B, T, I)."""
    step = max(1, _VALUES // weight.shape[1])
    for start in range(0, len(weight), step):
        rows, part = weight[start : start + step], gradient[..., start : start + step]
        for number, scheme in enumerate(schemes):
            error = as_stored(scheme, rows) - rows
            changes[number] += torch.einsum("bto,bto->b", part.float(), (x @ error.T).float())


def _from_the_head(
    model: Any, hidden: Tensor, real: Tensor, draw: torch.Generator, schemes: Sequence[Scheme], changes: Tensor | None
) -> Tensor:
    """The gradient of log p(y), y drawn at every real place, by the last hidden states (B, T, H)."""
    gradient = torch.zeros_like(hidden)
    step = max(1, _LOGITS // (len(hidden) * model.config.vocab_size))
    for start in range(0, hidden.shape[1], step):
        x = hidden[:, start : start + step]
        probabilities = torch.softmax(model.lm_head(x).float(), -1)
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=draw).view(*x.shape[:2], 1)
        slope = -probabilities
        slope.scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=slope.dtype))
        slope *= real[:, start : start + step, None]
        gradient[:, start : start + step] = slope.to(x.dtype) @ model.lm_head.weight
        if changes is not None and schemes:
            _add(model.lm_head.weight, x, slope, schemes, changes)
    return gradient


@torch.no_grad()
def _looked_up(
    model: Any, calibration: Calibration, ids: Any, gradient: Tensor, schemes: Sequence[Scheme], changes: Tensor
) -> None:
    """The same for the embeddings as the table that words are looked up in."""
    rows = model.get_input_embeddings().weight
    numbers = torch.from_numpy(ids.astype("int64"))
    used = numbers[numbers < calibration.vocabulary].unique()
    place = torch.full((calibration.vocabulary,), len(used)).scatter_(0, used, torch.arange(len(used)))
    indices = torch.where(
        numbers < calibration.vocabulary, place[numbers.clamp(max=calibration.vocabulary - 1)], len(used)
    )
    for number, scheme in enumerate(schemes):
        error = as_stored(scheme, rows[used]) - rows[used]
        padded = torch.cat([error, torch.zeros_like(error[:1])])  # pictures' rows are in no table
        changes[number] += torch.einsum("bth,bth->b", gradient.float(), padded[indices].float())
