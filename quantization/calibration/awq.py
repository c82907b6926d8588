"""AWQ: scale up the inputs that matter before rounding, scale them back in what feeds them, and clip.

Source: https://arxiv.org/abs/2306.00978; the search is that of mlx-lm 0.32.2's `quant/awq.py` (same grids, same
fallback). docs/QUANTIZATION.md has the reasons not to call it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantization.calibration import decoder
from quantization.calibration.tensors import as_stored, encode
from quantization.schemes import Affine, Cast

_GRID = 20
_LEAST_CLIP = 0.5
_CLIP_TOKENS = 512  # inputs that a clip is judged on
_NOT_CLIPPED = ("q_proj", "k_proj")  # their product decides the attention: clipping would flatten it
_BLOCKS = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}  # whose output a scale is judged by
_SCALED = ("input_layernorm", "mlp.up_proj", "post_attention_layernorm")  # in this order; v_proj feeds groups of heads
_ROWS = 64


@torch.no_grad()
def quantize(
    model: Any, batches: Sequence[Tensor], scheme: Affine, advance: Callable[[], Any] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Scale, clip and round all decoder matrices.

    Returns, by the model's names, parts of the matrices (weight, scales, biases) and of the vectors that take the
    scales (weight). The model is left as it was.
    """
    stored = {}
    for number, layer, calls in decoder.layers(model, batches):
        searched = _searched(layer, calls, scheme)
        for name, value in searched.state_dict().items():
            matrix = name.removesuffix(".weight") in decoder.MATRICES
            stored[f"model.layers.{number}.{name}"] = encode(scheme if matrix else Cast(scheme.dtype), value)
        if advance is not None:
            advance()
    return stored


def _searched(layer: Any, calls: Sequence[decoder.Call], scheme: Affine) -> Any:
    """A layer that computes the same and whose matrices lose less by rounding; this one if there is none."""
    searched = copy.deepcopy(layer)
    inputs: dict[str, list[Tensor]] = {}
    decoder.inputs_of(searched, calls, lambda name, x: inputs.setdefault(name, []).append(x))
    features = {name: torch.cat(parts) for name, parts in inputs.items()}
    for source in _SCALED:
        _scale(searched, source, calls, features, scheme)
    for name in decoder.MATRICES:
        if not name.endswith(_NOT_CLIPPED):
            matrix = searched.get_submodule(name)
            matrix.weight.copy_(best_clip(matrix.weight, features[name], scheme))
    expected = [call.run(layer) for call in calls]
    return searched if _loss(searched, expected, calls, scheme) < _loss(layer, expected, calls, scheme) else layer


def _loss(layer: Any, expected: Sequence[Tensor], calls: Sequence[decoder.Call], scheme: Affine) -> float:
    rounded = copy.deepcopy(layer)
    for name in decoder.MATRICES:
        matrix = rounded.get_submodule(name)
        matrix.weight.copy_(as_stored(scheme, matrix.weight))
    return sum(float((call.run(rounded) - wanted).square().sum()) for call, wanted in zip(calls, expected))


def _scale(layer: Any, source: str, calls: Sequence[decoder.Call], features: dict[str, Tensor], scheme: Affine) -> None:
    """Find the scales of one input and move them from `source` into the matrices behind it, in place."""
    names = decoder.INPUTS[source]
    x = features[names[0]]
    scales = _best_scales(layer, names, source, calls, x, scheme)
    feeds = layer.get_submodule(source)
    feeds.weight.copy_(feeds.weight / (scales[:, None] if feeds.weight.ndim == 2 else scales))
    if getattr(feeds, "bias", None) is not None:
        feeds.bias.copy_(feeds.bias / scales)
    for name in names:
        matrix = layer.get_submodule(name)
        matrix.weight.copy_(matrix.weight * scales)
        features[name] = features[name] / scales


def _best_scales(
    layer: Any, names: Sequence[str], source: str, calls: Sequence[decoder.Call], x: Tensor, scheme: Affine
) -> Tensor:
    """scales = mean |x| ^ ratio, of the ratios 0, 1/20, ... the one with the least squared error behind the block."""
    matrices = [layer.get_submodule(name) for name in names]
    original = [matrix.weight.clone() for matrix in matrices]
    run = _behind(layer, names, source, calls, x)
    expected, magnitude = run(), x.abs().float().mean(0)
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(_GRID):
        scales = (magnitude ** (step / _GRID)).clamp(min=1e-4)
        scales = (scales / (scales.max() * scales.min()).sqrt()).to(x.dtype)
        for matrix, weight in zip(matrices, original):
            matrix.weight.copy_(as_stored(scheme, weight * scales) / scales)
        loss = sum(float((a - b).float().square().sum()) for a, b in zip(run(), expected))
        if loss < least:
            best, least = scales, loss
    for matrix, weight in zip(matrices, original):
        matrix.weight.copy_(weight)
    return best


def _behind(layer: Any, names: Sequence[str], source: str, calls: Sequence[decoder.Call], x: Tensor) -> Any:
    """A function that computes what is behind the matrices: the block's output, or the one matrix's."""
    if source not in _BLOCKS:
        return lambda: [layer.get_submodule(names[0])(x)]
    block, inputs = layer.get_submodule(_BLOCKS[source]), x.split([call.hidden[..., 0].numel() for call in calls])

    def run() -> list[Tensor]:
        outputs = []
        for call, part in zip(calls, inputs):
            hidden = part.view(call.hidden.shape)
            outputs.append(
                block(hidden_states=hidden, **call.rest)[0] if source == "input_layernorm" else block(hidden)
            )
        return outputs

    return run


def best_clip(weight: Tensor, x: Tensor, scheme: Affine) -> Tensor:
    """The matrix (O, I) with each group clipped where that lowers the squared error over inputs x (tokens, I)."""
    group = scheme.group_size
    x = x[:: -(-len(x) // _CLIP_TOKENS)].float().view(-1, weight.shape[1] // group, group)
    x = x.transpose(0, 1)  # (groups, tokens, group)
    clipped = []
    for rows in weight.float().split(_ROWS):
        grouped = rows.view(len(rows), -1, group)
        reach = grouped.abs().amax(-1, keepdim=True)
        best, least = reach.clone(), torch.full_like(reach[..., 0], float("inf"))
        for step in range(int(_LEAST_CLIP * _GRID)):
            bound = reach * (1 - step / _GRID)
            rounded = as_stored(scheme, grouped.clamp(-bound, bound).view_as(rows)).view_as(grouped)
            # (groups, tokens, rows): what each group's rounding changes in the output
            loss = torch.einsum("gtk,rgk->gtr", x, rounded - grouped).square().mean(1).T
            better = loss < least
            best[better], least = bound[better], torch.where(better, loss, least)
        clipped.append(grouped.clamp(-best, best).view_as(rows))
    return torch.cat(clipped).to(weight.dtype)
