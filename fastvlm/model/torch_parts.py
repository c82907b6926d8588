"""The parts of a FastVLM in PyTorch, and a checkpoint as the FastVLM that they run."""

import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvlm.common.dtypes import choose_device, computed_in, dtype_name
from fastvlm.data.preprocessing import Preprocessor
from fastvlm.data.prompt import eos_ids
from fastvlm.model.language import TorchLanguage
from fastvlm.model.surface import FastVLM


class TorchVision:
    """The encoder in PyTorch: a timm FastViT whose `forward_features` gives (1, C, H, W)."""

    def __init__(self, encoder: Any, name: str, remedy: str) -> None:
        self.encoder, self.name, self.remedy = encoder, name, remedy
        self.like = next(encoder.parameters())

    @torch.inference_mode()
    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(pixel_values).to(self.like.device, self.like.dtype)
        features = self.encoder.forward_features(pixels)
        return features.flatten(2).transpose(1, 2).float().cpu().numpy()


class TorchProjector:
    """A projector module in PyTorch."""

    def __init__(self, module: torch.nn.Module, name: str, remedy: str) -> None:
        self.module, self.name, self.remedy = module, name, remedy
        self.like = next(module.parameters())

    @torch.inference_mode()
    def __call__(self, features: np.ndarray) -> np.ndarray:
        return self.module(torch.from_numpy(features).to(self.like.device, self.like.dtype)).float().cpu().numpy()


def load_checkpoint(
    path: str | os.PathLike[str],
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    image_strategy: str | None = None,
    streamed: bool = False,
    adapter: str | os.PathLike[str] | None = None,
) -> FastVLM:
    """As `fastvlm.load`. `streamed` is for proofs: the language model's matrices stay as they are stored."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from fastvlm.model.build import build

    device = choose_device(device)
    checkpoint = open_checkpoint(path, image_strategy, None if adapter is None else Path(adapter))
    vision, language = computed_in(checkpoint.dtype, device) if dtype == "auto" else (dtype, dtype)
    model = build(checkpoint, language, device, attn_implementation, vision, streamed)
    return from_model(model, checkpoint, checkpoint.preprocessor)


def from_model(model: Any, checkpoint: Any, preprocessor: Preprocessor) -> FastVLM:
    """The surface over a built `FastVlmForConditionalGeneration`."""
    from transformers import Qwen2ForCausalLM

    with torch.device("meta"):
        language = Qwen2ForCausalLM(model.config.text_config)
    language.model, language.lm_head = model.model.language_model, model.lm_head  # the same modules, no copy
    language.eval()
    tokenizer = checkpoint.tokenizer()
    eos = eos_ids(tokenizer, model.config.text_config.eos_token_id)
    encoder, projector = model.model.vision_tower.timm_model, model.model.multi_modal_projector
    return FastVLM(
        preprocessor=preprocessor,
        tokenizer=tokenizer,
        image_token_id=checkpoint.image_token_id,
        vision=TorchVision(encoder, *_name_and_remedy(encoder, checkpoint.path)),
        projector=TorchProjector(projector, *_name_and_remedy(projector, checkpoint.path)),
        language=TorchLanguage(language, eos, *_name_and_remedy(language, checkpoint.path)),
    )


def _name_and_remedy(module: torch.nn.Module, path: Path) -> tuple[str, str]:
    """The name of the module that runs a part of the checkpoint at `path`, and its remedy."""
    like = next(module.parameters())
    name = f"PyTorch {torch.__version__} {like.device.type} {dtype_name(like.dtype)}"
    if like.dtype == torch.float16:
        return name, "float16 ends at 65504: run the checkpoint with --dtype bfloat16 or float32"
    doctor = f"fastvlm doctor {shlex.quote(str(path))}"
    return name, f"weights are damaged, or too large: `{doctor}` reads them all"
