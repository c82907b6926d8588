"""Hot encoders: synthetic checkpoints with values inside that float16 cannot hold, and features as they were."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastvlm.checkpoint import naming
from fastvlm.synthetic.checkpoint import rule


def heat(
    folder: Path,
    stream: Mapping[int, float] | None = None,
    attention: float = 1.0,
    patch: float = 1.0,
    low_pass: bool = False,
) -> Path:
    """Rewrite the weights of a checkpoint in the Transformers layout, folded, float32, in one file; returns `folder`.

    `stream` {stage: F} lets the residual streams of attention stages (3 and 4) be F times as large while every branch,
    and what leaves the stage, stays as it is but for LayerNorm's eps. `attention` multiplies what every attention adds
    to its stream: over random weights it is nearly uniform and adds little, so that an encoder whose LayerNorms are
    lost still comes to 21 dB. `patch` does so with the last patch embedding, before and after its GELU, as the
    published 0.5B's is large. `low_pass` gives depthwise kernels a mean, as trained ones have, and rounds all values to
    float16's digits, as published ones are: white noise, which rounding is, is then averaged on its way, and weights
    are exact.
    """
    tensors = load_file(folder / "model.safetensors")
    factors = _factors(tensors, stream or {}, attention, patch)
    for name, values in tensors.items():
        factor = factors.get(name, 1.0)
        if low_pass:
            exponent = 2.0 ** math.floor(math.log2(factor))  # which rounds nothing
            tensors[name] = (_with_mean(values, name) * (factor / exponent)).half().float() * exponent
        elif name in factors:
            tensors[name] = values * factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _factors(names: Collection[str], stream: Mapping[int, float], attention: float, patch: float) -> dict[str, float]:
    """Tensor -> factor. A stage's stream starts at its position encoding; layer scales end the branches that add to it;
    the branches' LayerNorms don't see its scale, their convolutions and the layer after the stage do."""
    last_patch = r"stages\.4\.downsample\.proj\.1\.reparam_conv\.(weight|bias)"
    rows = [(r"layer_scale_1\.gamma", attention), (last_patch, patch)]
    rows.append((r"stages\.4\.pos_emb\.reparam_conv\.weight", 1 / patch))
    for stage, scale in stream.items():
        at = rf"stages\.{stage}\."
        after = "final_conv" if stage == 4 else rf"stages\.{stage + 1}\.downsample\.proj\.0"
        rows.append((rf"{at}(pos_emb\.reparam_conv\.(weight|bias)|blocks\.\d+\.layer_scale_[12]\.gamma)", scale))
        rows.append((rf"({at}blocks\.\d+\.mlp\.conv\.conv|{after}\.reparam_conv)\.weight", 1 / scale))
    return {name: math.prod(factor for pattern, factor in rows if re.search(pattern, name)) for name in names}


def _with_mean(values: torch.Tensor, name: str) -> torch.Tensor:
    """Depthwise kernels (but those that hold a skip) with a mean of two standard deviations, by the sign of the first
    tap, and their response to an even picture as it was."""
    shape = tuple(values.shape)
    mixes = len(shape) == 4 and shape[1] == 1 and shape[2] > 1 and name.startswith(naming.VISION)
    if not mixes or ".token_mixer." in name or ".pos_emb." in name:
        return values
    area = shape[2] * shape[3]
    kernels = values.view(-1, area)
    deviation = rule(name, shape)[2]
    return ((kernels + 2 * deviation * kernels[:, :1].sign()) / math.sqrt(1 + 4 * area)).view(shape)
