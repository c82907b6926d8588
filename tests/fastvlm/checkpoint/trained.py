"""Adapters as PEFT saves them, with random values as if trained, and what PEFT itself makes of base and adapter."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastvlm.checkpoint.checkpoint import Checkpoint

WEIGHTS = "adapter_model.safetensors"
# LLaVA's names of what tests adapt, written by hand: naming.py is what is tested.
LLAVA = (
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    ("model.multi_modal_projector.linear_2", "model.mm_projector.2"),
    (
        "model.vision_tower.timm_model.stages.1.blocks.0.mlp.",
        "model.vision_tower.vision_tower.model.network.2.0.convffn.",
    ),
    ("model.vision_tower.timm_model.stem.0.", "model.vision_tower.vision_tower.model.patch_embed.0."),
)


def load(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model of a checkpoint in Transformers' layout."""
    from transformers import FastVlmForConditionalGeneration

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FastVlmForConditionalGeneration.from_pretrained(base, dtype=dtype)


def train(model: Any, config: Any, folder: Path, **saving: Any) -> Any:
    """PEFT's model with every trained value moved at random, saved to `folder`."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if value.requires_grad or "lora_" in name:
                    value += 0.05 * torch.randn(value.shape, generator=generator).to(value.dtype)
        wrapped.save_pretrained(folder, **saving)
    return wrapped


def merged(wrapped: Any) -> dict[str, torch.Tensor]:
    """The state dict that PEFT merges, under Transformers' names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: dict[str, torch.Tensor] = wrapped.merge_and_unload().state_dict()
    return state


def as_llava(folder: Path) -> None:
    """Rename an adapter's tensors as if LLaVA's class had been trained."""
    rename(folder, llava_name)


def llava_name(name: str) -> str:
    """A name of Transformers' in LLaVA's class."""
    for theirs, ours in LLAVA:
        name = name.replace(theirs, ours)
    return name


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Rename an adapter's tensors."""
    save_file({change(name): value for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def distance(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any value of any tensor; infinity where shapes differ."""
    worst = 0.0
    for name in checkpoint.tensors:
        value = checkpoint.read(name).float()
        if value.shape != expected[name].shape:
            return float("inf")
        worst = max(worst, float((value - expected[name].float()).abs().max()))
    return worst
