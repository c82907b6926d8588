"""The mlx-vlm layout: FastViTHD's weights and the projector under the names and in the shapes of that package.

Source: mlx-vlm 0.7.10, `mlx_vlm/models/fastvlm` (vision.py, config.py, fastvlm.py). Its vision model is the folded
network with a BatchNorm in each ConvFFN, layer scales, and convolution kernels in channels-last order (O, H, W, I).
"""

import copy
import re
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm import naming
from fastvlm.checkpoint import Checkpoint
from fastvlm.errors import CheckFailed, UserError
from fastvlm.model import folded_skeleton, tower
from fastvlm.reparam import fold
from model_export.llm import Rows, rows_of
from quantization.schemes import DTYPES

_PREFIX = "vision_tower.vision_model."
_LLAVA_PREFIX = "model.vision_tower.vision_tower.model."
# What mlx-vlm's VisionConfig fixes in code: it has no way to be told another tower.
_BLOCKS, _WIDTHS, _FEATURES = (2, 12, 24, 4, 2), (96, 192, 384, 768, 1536), 3072
_HEAD = (_FEATURES, 768)  # the pre-training classifier's projection: required by the loader, never computed
_BATCHNORM_EPS = 1e-5  # mlx.nn.BatchNorm's default
# What is folded in one go, by its name in timm: no fold reaches across these.
_BLOCK = re.compile(r"stem\.\d+|stages\.\d+\.(blocks\.\d+|downsample|pos_emb)|final_conv")
_UNFOLDED = ("mlp.fc1", "token_mixer.qkv")  # the widest layers of a block, which no fold changes


def vision_tower(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], torch.dtype, Rows]]:
    """mlx-vlm's name -> shape and dtype of the folded tower's tensor, and its rows, which are folded when asked for.

    UserError for a tower that mlx-vlm cannot run.
    """
    folded: Any = folded_skeleton(checkpoint)
    _refuse_other_towers(folded)
    blocks = _Blocks(checkpoint)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype, Rows]] = {}

    def constant(name: str, value: float, *shape: int) -> None:
        tensors[name] = shape, torch.float32, lambda start, stop: torch.full((stop - start, *shape[1:]), value)

    for name, tensor in folded.state_dict().items():
        shape, (stem, _, norm) = tuple(tensor.shape), name.partition("mlp.conv.bn.")
        if norm:  # the fold has absorbed it; mlx-vlm's convolution has no bias: the BatchNorm behind it adds it
            value = {"weight": (1 + _BATCHNORM_EPS) ** 0.5, "running_mean": 0.0, "running_var": 1.0}.get(norm)
            if norm == "bias":
                tensors[_name(name)] = shape, *blocks.rows(f"{stem}mlp.conv.conv.bias")
            elif value is not None:
                constant(_name(name), value, *shape)
        elif len(shape) == 4:
            tensors[_name(name)] = (shape[0], *shape[2:], shape[1]), *blocks.rows(name)
        elif not name.endswith("gamma"):
            tensors[_name(name)] = shape, *blocks.rows(name)
    for index, stage in enumerate(folded.stages):
        for number, block in enumerate(stage.blocks):  # the fold has absorbed the layer scales
            attention = hasattr(block, "layer_scale_1")
            for scale in ("layer_scale_1", "layer_scale_2") if attention else ("layer_scale",):
                constant(_name(f"stages.{index}.blocks.{number}.{scale}.gamma"), 1.0, 1, 1, _WIDTHS[index])
    constant(_PREFIX + "head.proj", 0.0, *_HEAD)
    return dict(sorted(tensors.items()))


class _Blocks:
    """The tower's blocks, each read and folded when one of its tensors is asked for; only the last ones stay."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._lock = checkpoint, Lock()
        self._tower: Any = tower(checkpoint)
        self._folded = lru_cache(maxsize=2)(self._fold)  # two: workers may be on either side of a border

    def rows(self, name: str) -> tuple[torch.dtype, Rows]:
        """dtype and rows of a folded tensor by its name in timm; kernels in channels-last order."""
        match = _BLOCK.match(name)
        assert match, name
        block = match.group()
        stored = rows_of(self._checkpoint, naming.VISION + name) if _is_unfolded(name) else None

        def rows(start: int, stop: int) -> Tensor:
            if stored:
                part = stored(start, stop)
            else:
                with self._lock:
                    part = self._folded(block)[name][start:stop]
            return part.permute(0, 2, 3, 1).contiguous() if part.ndim == 4 else part

        return DTYPES[self._checkpoint.tensors[naming.VISION + name].dtype] if stored else torch.float32, rows

    def _fold(self, block: str) -> dict[str, Tensor]:
        module = copy.deepcopy(self._tower.get_submodule(block))
        for name, _ in list(module.named_modules()):
            if name in _UNFOLDED:
                module.set_submodule(name, nn.Identity())
        stored = naming.VISION + block + "."
        state = {name: torch.zeros((), dtype=torch.int64) for name in module.state_dict() if naming.is_ignored(name)}
        for name in self._checkpoint.tensors:
            if name.startswith(stored) and not _is_unfolded(name):
                state[name.removeprefix(stored)] = self._checkpoint.read(name)
        module.load_state_dict(state, strict=True, assign=True)
        try:
            folded = fold(module, torch.float32)
        except CheckFailed as error:
            raise CheckFailed(f"vision tower, {block}: {error}") from None
        return {f"{block}.{name}": tensor for name, tensor in folded.state_dict().items()}


def _is_unfolded(name: str) -> bool:
    return name.rpartition(".")[0].endswith(_UNFOLDED)


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
