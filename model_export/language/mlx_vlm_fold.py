"""A vision tower in training form, folded block by block for the mlx-vlm layout: in PyTorch, by
`fastvlm.model.fold`.
"""

import copy
import re
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common.dtypes import Array, as_array
from fastvlm.common.errors import CheckFailed
from fastvlm.model.build import tower
from fastvlm.model.fold import fold
from model_export.language.tensor_file import RowReader

# What is folded in one go, by its name in timm: no fold reaches across these.
_BLOCK = re.compile(r"stem\.\d+|stages\.\d+\.(blocks\.\d+|downsample|pos_emb)|final_conv")
_UNFOLDED = ("mlp.fc1", "token_mixer.qkv")  # the widest layers of a block, which no fold changes


class Blocks:
    """The tower's blocks, each read and folded when one of its tensors is asked for; only the last ones stay."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._lock = checkpoint, Lock()
        self._tower: Any = tower(checkpoint)
        self._folded = lru_cache(maxsize=2)(self._fold)  # two: workers may be on either side of a border

    def rows(self, name: str) -> tuple[str, RowReader]:
        """dtype and rows of a folded tensor by its name in timm."""
        if _is_unfolded(name):
            stored = naming.VISION + name
            return self._checkpoint.tensors[stored].dtype, partial(self._checkpoint.rows, stored)
        match = _BLOCK.match(name)
        assert match, name
        return "float32", partial(self._rows, match.group(), name)

    def _rows(self, block: str, name: str, start: int, stop: int) -> Array:
        with self._lock:
            return as_array(self._folded(block)[name][start:stop])

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
