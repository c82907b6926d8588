"""The model that is trained: which of its parameters, what it sees of a picture, and how their values are kept."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastvlm.checkpoint import naming
from fastvlm.common.cli import log
from fastvlm.common.dtypes import has_bfloat16
from fastvlm.common.errors import UserError
from fastvlm.common.memory import available_memory
from fastvlm.finetune.plan import Plan, trained_prefixes
from fastvlm.finetune.settings import LINEAR
from fastvlm.model.build import build

TRAINED = "trained.safetensors"  # in a state that a killed run goes on from
_SHARE = 0.5  # of the free memory: what pictures' features may take


def computed_dtype(wanted: str, device: str) -> str:
    """The meaning of `--dtype` on a device; UserError for bfloat16 where it has none."""
    if wanted == "bfloat16" and not has_bfloat16(device):
        raise UserError(f"--dtype: got bfloat16, expected float32: this {device} device has no bfloat16")
    if wanted == "auto":
        return "bfloat16" if device == "cuda" and has_bfloat16(device) else "float32"
    return wanted


class Trainee:
    """A checkpoint's model in the form in which it is trained.

    `base` is Transformers' model, `model` the same with LoRA around it, or `base` itself. What is trained is float32;
    the rest has the `dtype` that it is computed in. The vision tower stays in eval mode whatever is trained: the
    statistics of its BatchNorms belong to the pictures that the encoder was trained with, and a few of another kind
    would spoil them.
    """

    def __init__(self, plan: Plan, device: str, dtype: str) -> None:
        settings, checkpoint = plan.settings, plan.checkpoint
        self.plan, self.device = plan, device
        torch.manual_seed(settings.seed)  # LoRA's first matrices are random
        self.base = build(checkpoint, dtype, device)
        self.model: Any = self.base
        prefixes = trained_prefixes(settings)
        if settings.kind == "adapter":
            whole = ["multi_modal_projector", *(["vision_tower"] if settings.train == "all" else [])]
            lora = LoraConfig(
                r=settings.lora_rank, lora_alpha=settings.alpha, target_modules=[*LINEAR], modules_to_save=whole,
                task_type="CAUSAL_LM",
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT asks Transformers by names that it is giving up
                self.model = get_peft_model(self.base, lora)
        else:
            for name, parameter in self.base.named_parameters():
                parameter.requires_grad_(name.startswith(prefixes))
        for parameter in self.parameters().values():  # a copy: others may still be in the checkpoint's file
            parameter.data = parameter.detach().to(torch.float32, copy=True)
        self.tower = self.base.model.vision_tower

    @property
    def sees_pixels(self) -> bool:
        """Whether the vision tower is trained, so that nothing of it can be computed before."""
        return self.plan.settings.train == "all"

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: the projector with its own learning rate, and all others."""
        rate, projector = self.plan.settings.rates
        named = self.parameters().items()
        groups = [([p for n, p in named if ".multi_modal_projector." in f".{n}"], projector)]
        groups += [([p for n, p in named if ".multi_modal_projector." not in f".{n}"], rate)]
        return [{"params": params, "lr": lr} for params, lr in groups if params]

    def save(self, folder: Path) -> None:
        """Write what is trained, as it is now."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: p.detach().cpu().contiguous() for name, p in self.parameters().items()}
        save_file(values, folder / TRAINED)

    def restore(self, folder: Path) -> None:
        """Take up what `save` wrote."""
        values, parameters = load_file(folder / TRAINED), self.parameters()
        if values.keys() != parameters.keys():
            raise UserError(
                f"{folder / TRAINED}: holds other weights than are trained: delete the folder {folder.parent}"
            )
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    @contextmanager
    def on_features(self) -> Iterator[None]:
        """Where the tower is frozen, the model takes its features in the place of pixels inside the block."""
        if not self.sees_pixels:
            self.base.model.vision_tower = _Through()
        try:
            yield
        finally:
            self.base.model.vision_tower = self.tower


class _Through(nn.Module):
    """Stands for the tower: its features come in, and go out."""

    def forward(self, pixel_values: torch.Tensor, **ignored: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)


class Pictures:
    """What the model gets of a picture file: its pixels, or the frozen tower's features.

    Features are kept in memory while half of what was free lasts; the others' are computed each time. One picture is
    computed at a time, so that its features don't depend on its neighbours, and with them on what was kept.
    """

    def __init__(self, trainee: Trainee) -> None:
        self._trainee, self._preprocess = trainee, trainee.plan.checkpoint.preprocessor
        self._kept: dict[Path, np.ndarray] = {}
        self._left = _SHARE * available_memory()

    def __call__(self, path: Path) -> np.ndarray:
        """(1, 3, S, S) float32 pixels, or (1, C, S / 64, S / 64) float32 features."""
        if self._trainee.sees_pixels:
            return self._preprocess(path)
        if (found := self._kept.get(path)) is None:
            found = self.features(path)
            if self._left >= found.nbytes:
                self._left -= found.nbytes
                self._kept[path] = found
        return found

    def keep(self, paths: Iterable[Path], advance: Callable[[], Any]) -> None:
        """Compute and keep the features of these pictures, up to the first that doesn't fit; `advance()` after each."""
        for path in () if self._trainee.sees_pixels else paths:
            self(path)
            if path not in self._kept:
                log("the pictures' features don't all fit into memory: the others' are computed in each epoch")
                return
            advance()

    def features(self, path: Path) -> np.ndarray:
        """The tower's features (1, C, S / 64, S / 64) float32, as its weights are now."""
        like = next(self._trainee.tower.parameters())
        with torch.inference_mode():
            pixels = torch.from_numpy(self._preprocess(path)).to(like.device, like.dtype)
            return self._trainee.tower(pixels).last_hidden_state.float().cpu().numpy()


def projector_tensors(trainee: Trainee) -> dict[str, torch.Tensor]:
    """The trained projector by the names that LLaVA gives it."""
    return {naming.to_llava(name): p.detach().cpu().contiguous() for name, p in trainee.parameters().items()}
