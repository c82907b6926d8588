"""The mlx-vlm layout: FastViTHD's weights and the projector under the names and in the shapes of that package.

Source: mlx-vlm 0.7.10, `mlx_vlm/models/fastvlm` (vision.py, config.py, fastvlm.py). Its vision model is the folded
network with a BatchNorm in each ConvFFN, layer scales, and convolution kernels in channels-last order (O, H, W, I).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.checkpoint.shapes import shapes
from fastvlm.common.dtypes import Array
from fastvlm.common.errors import UserError
from model_export.language.tensor_file import RowReader
from quantization.mlx.casting import cast

_PREFIX = "vision_tower.vision_model."
_LLAVA_PREFIX = "model.vision_tower.vision_tower.model."
# What mlx-vlm's VisionConfig fixes in code: it has no way to be told another tower.
_BLOCKS, _WIDTHS, _FEATURES = (2, 12, 24, 4, 2), (96, 192, 384, 768, 1536), 3072
_HEAD = (_FEATURES, 768)  # the pre-training classifier's projection: required by the loader, never computed
BATCHNORM_EPS = 1e-5  # the default of mlx.nn.BatchNorm, and timm's
_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.")
# The layer whose output a layer scale multiplies, by its name in the block.
_SCALED = {"mlp.fc2": ("layer_scale", "layer_scale_2"), "token_mixer.proj": ("layer_scale_1",)}

Tower = dict[str, tuple[tuple[int, ...], str, RowReader]]


def vision_tower(checkpoint: Checkpoint) -> Tower:
    """mlx-vlm's name -> shape and dtype of the folded tower's tensor, and its rows, which are folded when asked for.

    UserError for a tower that mlx-vlm cannot run.
    """
    model = checkpoint.model_config
    folded = shapes(replace(model, vision_args={**model.vision_args, "inference_mode": True}))
    folded = {
        name.removeprefix(naming.VISION): shape for name, shape in folded.items() if name.startswith(naming.VISION)
    }
    _refuse_other_towers(folded)
    source: Any = _Folded(checkpoint)
    if checkpoint.form == "training":
        from model_export.language.mlx_vlm_fold import Blocks  # and with it torch and timm

        source = Blocks(checkpoint)
    tensors: Tower = {}

    def constant(name: str, value: float, *shape: int) -> None:
        def rows(start: int, stop: int) -> Array:
            return np.full((stop - start, *shape[1:]), value, np.float32)

        tensors[_name(name)] = shape, "float32", rows

    for name, shape in folded.items():
        stem, _, norm = name.partition("mlp.conv.bn.")
        if norm:  # the fold has absorbed it; mlx-vlm's convolution has no bias: the BatchNorm behind it adds it
            value = {"weight": (1 + BATCHNORM_EPS) ** 0.5, "running_mean": 0.0, "running_var": 1.0}.get(norm)
            if value is None:
                tensors[_name(name)] = shape, *source.rows(f"{stem}mlp.conv.conv.bias")
            else:
                constant(name, value, *shape)
        elif name.endswith("gamma"):  # the fold has absorbed the layer scales
            constant(name, 1.0, 1, 1, shape[0])
        elif len(shape) == 4:
            dtype, rows = source.rows(name)
            tensors[_name(name)] = (shape[0], *shape[2:], shape[1]), dtype, partial(_channels_last, rows)
        else:
            tensors[_name(name)] = shape, *source.rows(name)
    head = _PREFIX + "head.proj"
    tensors[head] = _HEAD, "float32", lambda start, stop: np.zeros((stop - start, *_HEAD[1:]), np.float32)
    return dict(sorted(tensors.items()))


def _channels_last(rows: RowReader, start: int, stop: int) -> Array:
    return np.ascontiguousarray(rows(start, stop).transpose(0, 2, 3, 1))


class _Folded:
    """A tower whose branches are folded already: the ConvFFNs' BatchNorms and the layer scales are left to do.

    As `fastvlm.model.fold`: in float64, and the result is rounded once, to float32. The product of two float32 is, too.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def rows(self, name: str) -> tuple[str, RowReader]:
        """dtype and rows of a folded tensor by its name in timm."""
        if "mlp.conv.conv." in name:
            return "float32", partial(self._convolution, name.partition("mlp.conv.")[0] + "mlp.conv.", name)
        block = _BLOCK.match(name)
        layer = name[block.end() :].rpartition(".")[0] if block else ""
        for scale in _SCALED.get(layer, ()):
            if block and naming.VISION + (gamma := f"{block.group()}{scale}.gamma") in self._checkpoint.tensors:
                return "float32", partial(self._scaled, name, gamma)
        stored = naming.VISION + name
        return self._checkpoint.tensors[stored].dtype, partial(self._checkpoint.rows, stored)

    def _read(self, name: str, start: int, stop: int) -> Array:
        return cast(self._checkpoint.rows(naming.VISION + name, start, stop), "float32")[0]

    def _scaled(self, name: str, gamma: str, start: int, stop: int) -> Array:
        values = self._read(name, start, stop)
        return values * self._read(gamma, start, stop).reshape(-1, *[1] * (values.ndim - 1))

    def _convolution(self, stem: str, name: str, start: int, stop: int) -> Array:
        weight, bias, mean, variance = (
            self._read(f"{stem}bn.{part}", start, stop).astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + BATCHNORM_EPS)
        if name.endswith("bias"):
            return (bias - mean * scale).astype(np.float32)
        return (self._read(name, start, stop).astype(np.float64) * scale.reshape(-1, 1, 1, 1)).astype(np.float32)


def projector_name(name: str) -> str:
    """`multi_modal_projector.linear_0.weight` -> `mm_projector.0.weight`."""
    return name.replace("multi_modal_projector.linear_", "mm_projector.")


def _name(timm_name: str) -> str:
    """timm's name in the folded tower -> mlx-vlm's, by way of Apple's own."""
    apple = naming.to_llava(naming.VISION + timm_name).removeprefix(_LLAVA_PREFIX)
    return _PREFIX + apple.replace("patch_embed.", "patch_embed.blocks.")


def _refuse_other_towers(folded: Mapping[str, tuple[int, ...]]) -> None:
    depths: dict[int, int] = {}
    for name in folded:
        if block := _BLOCK.match(name):
            depths[int(block[1])] = max(depths.get(int(block[1]), 0), int(block[2]) + 1)
    blocks = tuple(depths[stage] for stage in sorted(depths))
    widths = tuple(folded[f"stages.{stage}.blocks.0.mlp.fc1.weight"][1] for stage in sorted(depths))
    if (blocks, widths) != (_BLOCKS, _WIDTHS):
        raise UserError(
            f"layout mlx-vlm: mlx-vlm runs only FastViTHD with {_BLOCKS} blocks of {_WIDTHS} channels, "
            f"this vision tower has {blocks} of {widths}; use the app layout"
        )
