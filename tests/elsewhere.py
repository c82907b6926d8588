"""Artefacts as others make them: Apple's export script for the encoder, mlx-vlm's converter with Apple's patch for the
rest. Written from what those do, with nothing of this project's export: an oracle."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm.model import build

_GROUP = 64
_LAYERS = {"linear_1": 0, "linear_2": 2}  # LLaVA's projector is a Sequential: its layers are 0 and 2
_DROPPED = ("_name_or_path",)  # what saving a converted config leaves out


def write_elsewhere(
    checkpoint: Path, folder: Path, bits: int | None = None, *, licence: bool = False, fused: bool = True
) -> Path:
    """The folder that Apple's script and patch make of a LLaVA checkpoint: float16, or `bits` in groups of 64.

    `licence` copies the checkpoint's licence, too, which they don't; `fused` False keeps coremltools from folding the
    BatchNorms that the traced model still has.
    """
    opened = open_checkpoint(checkpoint)
    folder.mkdir(parents=True)
    write_package(opened, folder / "fastvithd.mlpackage", fused)
    write_language(opened, folder, bits)
    _write_files(opened, folder, bits)
    if licence:
        shutil.copy(checkpoint / "LICENSE", folder / "LICENSE")
    return folder


class _Tower(nn.Module):
    """The encoder as LLaVA's code calls it: features row by row, channels last."""

    def __init__(self, fastvit: Any) -> None:
        super().__init__()
        self.fastvit = fastvit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.fastvit.forward_features(images)
        batch, channels, height, width = features.shape
        return features.reshape(batch, channels, height * width).transpose(1, 2)


def write_package(checkpoint: Checkpoint, package: Path, fused: bool = True) -> None:
    """jit.trace, iOS16, float32, one multi-array in and out; BatchNorms and layer scales as they are in the model."""
    import coremltools as ct

    tower = build.encoder(checkpoint)
    for module in tower.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # Apple's model multiplies queries and keys itself
    size = checkpoint.image_size
    with torch.no_grad():
        traced = torch.jit.trace(_Tower(tower).eval(), torch.rand(1, 3, size, size), check_trace=False)
    passes = ct.PassPipeline.DEFAULT
    if not fused:
        passes.remove_passes({"common::fuse_conv_batchnorm"})
    converted = ct.convert(
        traced,
        inputs=[ct.TensorType(name="images", shape=(1, 3, size, size))],
        outputs=[ct.TensorType(name="image_features", dtype=np.float32)],
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        compute_units=ct.ComputeUnit.CPU_AND_GPU,
        pass_pipeline=passes,
        skip_model_load=True,
    )
    converted.save(str(package))


def write_language(checkpoint: Checkpoint, folder: Path, bits: int | None) -> None:
    """One model.safetensors with the projector in it, and an index, by MLX: what `nn.quantize` does to a Linear or an
    Embedding whose width divides by 64."""
    import mlx.core as mx

    stored: dict[str, Any] = {}
    for name in checkpoint.tensors:
        if name.startswith(naming.VISION):
            continue
        value = mx.array(checkpoint.read(name).float().numpy()).astype(mx.float16)
        target = _converted_name(name)
        stem, _, leaf = target.rpartition(".")
        if bits and leaf == "weight" and value.ndim == 2 and value.shape[1] % _GROUP == 0:
            parts = mx.quantize(value, group_size=_GROUP, bits=bits)
            mx.eval(parts)  # or else every float32 original stays in memory
            stored |= {f"{stem}.{part}": one for part, one in zip(("weight", "scales", "biases"), parts, strict=True)}
        else:
            mx.eval(value)
            stored[target] = value
    mx.save_safetensors(str(folder / "model.safetensors"), stored, metadata={"format": "mlx"})
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in stored.values())},
        "weight_map": dict.fromkeys(sorted(stored), "model.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def _converted_name(name: str) -> str:
    if name.startswith(naming.PROJECTOR):
        layer, leaf = name.removeprefix(naming.PROJECTOR).split(".")
        return f"multi_modal_projector.linear_{_LAYERS[layer]}.{leaf}"
    if name.startswith(naming.LANGUAGE):
        return "language_model.model." + name.removeprefix(naming.LANGUAGE)
    return "language_model." + name


def _write_files(checkpoint: Checkpoint, folder: Path, bits: int | None) -> None:
    """config.json: the checkpoint's with the image token's id; tokenizer and processors as Transformers saves them."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _DROPPED}
    config |= {"image_token_index": checkpoint.image_token_id, "tie_word_embeddings": checkpoint.tied}
    if bits:
        config |= {"vision_config": {}, "quantization": {"group_size": _GROUP, "bits": bits}}
    (folder / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=4))
    checkpoint.tokenizer().save_pretrained(str(folder), save_jinja_files=False)
    side = checkpoint.image_size
    preprocessor = {
        "crop_size": {"height": side, "width": side}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "CLIPImageProcessor", "image_std": [1.0, 1.0, 1.0],
        "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": side},
    }  # fmt: skip
    processor = {
        "image_token": "<image>", "num_additional_image_tokens": 0, "patch_size": 64,
        "processor_class": "LlavaProcessor",
    }  # fmt: skip
    for name, document in (("preprocessor_config.json", preprocessor), ("processor_config.json", processor)):
        (folder / name).write_text(json.dumps(document, indent=2))
