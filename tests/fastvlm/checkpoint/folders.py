"""Small folders of every kind that is given instead of a checkpoint: each maker turns a sound checkpoint into one."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from edits import WEIGHTS, edit_config, edit_tensors
from safetensors.torch import load_file, save_file

BASE = "apple/FastVLM-0.5B"


def rename_tensors(folder: Path, rename: Callable[[str], str | None]) -> None:
    edit_tensors(folder, lambda tensors: {new: value for name, value in tensors.items() if (new := rename(name))})


def _empty(folder: Path, *names: str) -> None:
    """No weights, but these files."""
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"x")


def artefact(folder: Path) -> None:
    (folder / "export.json").write_text("{}")


def core_ml_package(folder: Path) -> None:
    _empty(folder, "Manifest.json", "Data/com.apple.CoreML/model.mlmodel")


def core_ml_folder(folder: Path) -> None:
    _empty(folder, "fastvithd.mlpackage/Manifest.json")


def mlx_quantized(folder: Path) -> None:
    edit_config(folder, quantization={"bits": 4, "group_size": 64})


def _language_only(name: str) -> str | None:
    return None if "vision_tower" in name else f"language_model.{name}"


def app_model(folder: Path) -> None:
    (folder / "fastvithd.mlpackage").mkdir()
    rename_tensors(folder, _language_only)


def mlx_language_model(folder: Path) -> None:
    rename_tensors(folder, _language_only)
    edit_config(folder, model_type="fast_vlm")


def unmerged_adapter(folder: Path) -> None:
    tensors = {f"base_model.model.{name}": value for name, value in load_file(folder / WEIGHTS).items()}
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name.replace(".weight", ".lora_A.default.weight")] = torch.ones(8, 64)
    save_file(tensors, folder / WEIGHTS)


def hub_cache_repository(folder: Path) -> None:
    _empty(folder, "refs/main", "blobs/0", "snapshots/0123abc/config.json")
    (folder / "refs/main").write_text("0123abc")


def hub_cache(folder: Path) -> None:
    _empty(folder)
    inner = folder / "models--apple--FastVLM-0.5B"
    inner.mkdir()
    (inner / WEIGHTS).write_bytes(b"x")
    hub_cache_repository(inner)


def peft_adapter(folder: Path) -> None:
    _empty(folder, "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": BASE}))


def adapter_beside_weights(folder: Path) -> None:
    weights = (folder / WEIGHTS).read_bytes()
    peft_adapter(folder)
    (folder / WEIGHTS).write_bytes(weights)


def llava_lora(folder: Path) -> None:
    peft_adapter(folder)
    (folder / "non_lora_trainables.bin").write_bytes(b"x")


def mlx_adapter(folder: Path) -> None:
    _empty(folder, "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "model": BASE}))


def non_lora_trainables(folder: Path) -> None:
    _empty(folder, "non_lora_trainables.bin")


def projector_only(folder: Path) -> None:
    _empty(folder, "mm_projector.bin")


def zero_shards(folder: Path) -> None:
    _empty(folder, "global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py")


def zero_shards_step(folder: Path) -> None:
    _empty(folder, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt")


def fsdp_shards(folder: Path) -> None:
    _empty(folder, "pytorch_model_fsdp_0/__0_0.distcp")


def onnx(folder: Path) -> None:
    _empty(folder, "onnx/decoder_model_merged.onnx")


def gguf(folder: Path) -> None:
    _empty(folder, "FastVLM-0.5B-Q4_K_M.gguf", "mmproj.gguf")


# maker, the kind's name, and what its line says that helps
KINDS: list[tuple[Callable[[Path], None], str, tuple[str, ...]]] = [
    (artefact, "artefact", ("an exported artefact", "export.json", "model_export inspect")),
    (core_ml_package, "core-ml-package", ("a Core ML package", "the checkpoint that it was made from")),
    (core_ml_folder, "artefact-elsewhere", ("an artefact exported elsewhere", "a Core ML encoder")),
    (mlx_quantized, "mlx-quantized", ("in MLX's format", "quantization in config.json", "original weights")),
    (app_model, "artefact-elsewhere", ("exported elsewhere", "a Core ML encoder and an MLX language model")),
    (mlx_language_model, "mlx-language-model", ("without the vision tower", "language_model.")),
    (unmerged_adapter, "unmerged-adapter", ("unmerged", ".lora_A.default.weight", "merge_and_unload()")),
    (hub_cache_repository, "hub-cache-repository", ("give its snapshot", "snapshots/0123abc")),
    (hub_cache, "hub-cache", ("a hub cache", "models--apple--FastVLM-0.5B/snapshots/0123abc")),
    (peft_adapter, "peft-adapter", (f"a PEFT adapter of {BASE}", "merge_and_unload().save_pretrained(OUT)")),
    (adapter_beside_weights, "peft-adapter", (f"a PEFT adapter of {BASE}",)),
    (llava_lora, "llava-lora", (f"a PEFT adapter of {BASE}", "non_lora_trainables.bin", "merge_and_unload()")),
    (mlx_adapter, "mlx-adapter", (f"an MLX adapter of {BASE}", "adapters.safetensors")),
    (non_lora_trainables, "non-lora-trainables", ("one half of a LLaVA LoRA fine-tune", "adapter_model.safetensors")),
    (projector_only, "projector-only", ("LLaVA's projector alone", "load_pretrained_model(")),
    (zero_shards, "zero-shards", ("ZeRO shards", "python zero_to_fp32.py . OUT")),
    (zero_shards_step, "zero-shards-step", ("one step's folder", "python zero_to_fp32.py . OUT")),
    (fsdp_shards, "fsdp-shards", ("an FSDP training state", "accelerate merge-weights")),
    (onnx, "onnx", ("an ONNX export", "the checkpoint that it was made from")),
    (gguf, "gguf", ("a GGUF model", "original weights")),
]
