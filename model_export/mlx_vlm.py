"""The mlx-vlm layout: FastViTHD's weights and the projector under the names and in the shapes of that package.

Source: mlx-vlm 0.7.10, `mlx_vlm/models/fastvlm` (vision.py, config.py, fastvlm.py). Its vision model is the folded
network with a BatchNorm in each ConvFFN, layer scales, and convolution kernels in channels-last order (O, H, W, I).
"""

from typing import Any

import torch
from torch import Tensor

from fastvlm import naming
from fastvlm.checkpoint import Checkpoint
from fastvlm.errors import UserError
from fastvlm.model import encoder
from fastvlm.reparam import fold

_PREFIX = "vision_tower.vision_model."
_LLAVA_PREFIX = "model.vision_tower.vision_tower.model."
# What mlx-vlm's VisionConfig fixes in code: it has no way to be told another tower.
_BLOCKS, _WIDTHS, _FEATURES = (2, 12, 24, 4, 2), (96, 192, 384, 768, 1536), 3072
_HEAD = (_FEATURES, 768)  # the pre-training classifier's projection: required by the loader, never computed
_BATCHNORM_EPS = 1e-5  # mlx.nn.BatchNorm's default


def vision_tower(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """mlx-vlm's name -> float32 tensor of the folded tower. UserError for a tower that mlx-vlm cannot run."""
    folded: Any = fold(encoder(checkpoint, torch.float32))
    _refuse_other_towers(folded)
    state = folded.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if naming.is_ignored(naming.VISION + name):
            continue
        if name.endswith("mlp.conv.conv.bias"):  # mlx-vlm's convolution has none: the BatchNorm behind it adds it
            stem = _name(name).removesuffix("conv.bias") + "bn."
            ones = torch.ones_like(tensor)
            tensors |= {
                stem + "weight": ones * (1 + _BATCHNORM_EPS) ** 0.5,
                stem + "bias": tensor,
                stem + "running_mean": torch.zeros_like(tensor),
                stem + "running_var": ones,
            }
        else:
            tensors[_name(name)] = tensor.permute(0, 2, 3, 1).contiguous() if tensor.ndim == 4 else tensor
    for index, stage in enumerate(folded.stages):
        for number, block in enumerate(stage.blocks):  # the fold has absorbed the layer scales
            attention = hasattr(block, "layer_scale_1")
            for scale in ("layer_scale_1", "layer_scale_2") if attention else ("layer_scale",):
                tensors[_name(f"stages.{index}.blocks.{number}.{scale}.gamma")] = torch.ones(1, 1, _WIDTHS[index])
    tensors[_PREFIX + "head.proj"] = torch.zeros(_HEAD)
    return dict(sorted(tensors.items()))


def projector_name(name: str) -> str:
    """`multi_modal_projector.linear_0.weight` -> `mm_projector.0.weight`."""
    return name.replace("multi_modal_projector.linear_", "mm_projector.")


def _name(timm_name: str) -> str:
    """timm's name in the folded tower -> mlx-vlm's, by way of Apple's own."""
    apple = naming.to_llava(naming.VISION + timm_name).removeprefix(_LLAVA_PREFIX)
    return _PREFIX + apple.replace("patch_embed.", "patch_embed.blocks.")


def _refuse_other_towers(tower: Any) -> None:
    blocks = tuple(len(stage.blocks) for stage in tower.stages)
    widths = tuple(stage.blocks[0].mlp.fc1.in_channels for stage in tower.stages)
    if (blocks, widths) != (_BLOCKS, _WIDTHS):
        raise UserError(
            f"layout mlx-vlm: mlx-vlm runs only FastViTHD with {_BLOCKS} blocks of {_WIDTHS} channels, "
            f"this vision tower has {blocks} of {widths}; use the app layout"
        )
