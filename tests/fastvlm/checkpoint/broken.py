"""Everything that can be wrong with a checkpoint's folder, and what may be given instead of one: one table of each.

A change turns a copy of a sound checkpoint (`sound`: LLaVA's layout, two shards) into that.
"""

import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fastvlm.checkpoint.edits import edit_config, edit_header, edit_json, edit_tensors

Change = Callable[[Path], Any]
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, NORM, WHOLE = "model.safetensors.index.json", "model.norm.weight", "model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
BASE = "apple/FastVLM-0.5B"


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def content(name: str, text: str | bytes) -> Change:
    raw = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(raw)


def removed(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def config(**changes: Any) -> Change:
    return lambda folder: edit_config(folder, **changes)


def index_with(**names: str) -> Change:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= names
        (folder / INDEX).write_text(json.dumps(index))

    return change


def header_with(**changes: Any) -> Change:
    return lambda folder: edit_header(folder / TWO, lambda header: header[NORM].update(changes))


def value(file: str, name: str, number: float) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3] = number

    return lambda folder: edit_tensors(folder, change, file)


def no_whole_set(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / TWO).rename(folder / "weights.safetensors")
    (folder / ONE).rename(folder / "more.safetensors")


def only_language(folder: Path) -> None:
    for file in (ONE, TWO):
        edit_tensors(folder, lambda held: {n: t for n, t in held.items() if "vision_tower" not in n}, file)
    (folder / INDEX).unlink()


class Evil:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def evil_pickle(folder: Path) -> None:
    removed(ONE, TWO, INDEX)(folder)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({NORM: Evil(folder.parent / "written")}, file)


def pipe(folder: Path) -> None:
    (folder / "merges.txt").unlink()
    os.mkfifo(folder / "merges.txt")


def link_outside(folder: Path) -> None:
    (folder / "chat_template.jinja").symlink_to("/etc/passwd")


# A finding's rule, and where it is ("": the folder).
BROKEN: dict[str, tuple[Change, str, str]] = {
    "truncated header": (rewrite(ONE, lambda raw: raw[:1000]), "file-truncated", ONE),
    "truncated data": (rewrite(ONE, lambda raw: raw[:-1000]), "file-truncated", ONE),
    "offsets": (header_with(data_offsets=[10**9, 10**9 + 256]), "header-invalid", TWO),
    "shape": (header_with(shape=[63]), "header-invalid", TWO),
    "length": (rewrite(ONE, lambda raw: struct.pack("<Q", 2**62) + raw[8:]), "file-truncated", ONE),
    "missing shard": (removed(TWO), "shard-missing", ""),
    "index names more": (index_with(**{"model.layers.7.x": TWO}), "index-wrong", INDEX),
    "index names another file": (index_with(**{NORM: ONE}), "index-wrong", INDEX),
    "index names a parent": (index_with(**{NORM: "../outside.safetensors"}), "index-wrong", INDEX),
    "index names a path": (index_with(**{NORM: "/etc/passwd"}), "index-wrong", INDEX),
    "index names a folder": (index_with(**{NORM: "a/b.safetensors"}), "index-wrong", INDEX),
    "index without a map": (content(INDEX, "{}"), "index-wrong", INDEX),
    "neither index nor shard": (removed(INDEX, TWO), "shard-missing", ""),
    "no whole set": (no_whole_set, "weights-missing", ""),
    "pickle with code": (evil_pickle, "pickle-unreadable", "pytorch_model.bin"),
    "large tokenizer": (
        lambda folder: edit_json(folder / "added_tokens.json", **{"<extra>": 9999}), "tokenizer-size", "tokenizer"
    ),
    "no tokenizer": (removed("vocab.json"), "tokenizer-missing", ""),
    "no merges": (removed("merges.txt"), "tokenizer-missing", ""),
    "a pipe": (pipe, "file-unreadable", "merges.txt"),
    "a link outside": (link_outside, "link-leaves-folder", "chat_template.jinja"),
    "damaged tokenizer": (content("vocab.json", '{"a": "b"}'), "tokenizer-invalid", "vocab.json"),
    "NaN": (
        value(ONE, "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.bias", torch.nan),
        "weights-not-finite", "",
    ),
    "infinity": (value(TWO, NORM, torch.inf), "weights-not-finite", ""),
    "integers": (
        lambda folder: edit_tensors(folder, lambda held: {**held, NORM: torch.ones(64, dtype=torch.int8)}, TWO),
        "dtype-unsupported", "weights",
    ),
    "language only": (only_language, "tower-missing", "weights"),
    "weights in LFS": (content(ONE, LFS), "git-lfs-pointer", ONE),
    "config in LFS": (content("config.json", LFS), "git-lfs-pointer", "config.json"),
    "not JSON": (content("config.json", '{"model_type": '), "not-json", "config.json"),
    "NaN in JSON": (config(rms_norm_eps=math.nan), "not-json", "config.json"),
    "key twice": (content("config.json", '{"model_type": "a", "model_type": "b"}'), "duplicate-key", "config.json"),
    "quantized elsewhere": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}), "checkpoint-quantized", "config.json"
    ),
    "config without sizes": (
        lambda folder: edit_json(folder / "config.json", without=["hidden_size"]), "setting-missing", "config.json"
    ),
    "template that fails": (
        lambda folder: edit_json(folder / "tokenizer_config.json", chat_template="{{ raise_exception('no') }}"),
        "chat-template-fails", "chat template",
    ),
}  # fmt: skip
# What config.json says -> the finding's rule, and the key that it names.
CONFIGS: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "llama"}, "model-other", "model_type"),
    ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "resolution-missing", "mm_vision_tower"),
    ({"num_hidden_layers": 100_000}, "setting-invalid", "num_hidden_layers"),
    ({"num_attention_heads": 0}, "setting-invalid", "num_attention_heads"),
    ({"num_attention_heads": 3}, "config-contradictory", "head_dim"),
    ({"num_key_value_heads": 3}, "config-contradictory", "num_attention_heads"),
    ({"hidden_act": "x"}, "activation-unknown", "hidden_act"),
    ({"rope_theta": 0}, "setting-invalid", "rope_theta"),
    ({"mm_vision_model_args": {"embed_dims": [0, 16, 32, 64, 128]}}, "setting-invalid",
     "mm_vision_model_args.embed_dims"),
    ({"mm_vision_model_args": {"embed_dims": [8, 16, 32, 64, 127]}}, "config-unusable", ""),
    ({"mm_vision_model_args": {"loops": 1}}, "setting-unknown", "mm_vision_model_args"),
    ({"rope_scaling": {"type": "x"}}, "setting-invalid", "rope_scaling.type"),
    ({"rope_scaling": {"type": "yarn"}}, "config-unusable", ""),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [1, 2]}}, "rope-unusable",
     "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "config-contradictory", "rope_scaling"),
    ({"layer_types": ["sliding_attention"] * 2}, "config-contradictory", "layer_types"),
    ({"image_aspect_ratio": "anyres"}, "image-strategy-unknown", "image_aspect_ratio"),
    ({"vision_config": 5}, "setting-invalid", "vision_config"),
    ({"mm_use_im_start_end": True}, "prompt-unsupported", "mm_use_im_start_end"),
]  # fmt: skip
BROKEN |= {
    f"config: {next(iter(changes))} {number}": (
        config(**changes),
        rule,
        f"config.json: {key}" if key else "config.json",
    )
    for number, (changes, rule, key) in enumerate(CONFIGS)
}


def instead(*names: str, **texts: str) -> Change:
    """No weights, but these files."""

    def change(folder: Path) -> None:
        removed(ONE, TWO, INDEX)(folder)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_bytes(b"x")
        if texts:
            (folder / "adapter_config.json").write_text(json.dumps(texts))

    return change


def language_model(folder: Path, **changes: Any) -> None:
    edit_config(folder, **changes)
    tensors = {**load_file(folder / ONE), **load_file(folder / TWO)}
    removed(ONE, TWO, INDEX)(folder)
    save_file({f"language_model.{n}": t for n, t in tensors.items() if "vision_tower" not in n}, folder / WHOLE)


def app_model(folder: Path) -> None:
    (folder / "fastvithd.mlpackage").mkdir()
    language_model(folder)


def unmerged_adapter(folder: Path) -> None:
    tensors = {**load_file(folder / ONE), **load_file(folder / TWO)}
    removed(ONE, TWO, INDEX)(folder)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name.replace(".weight", ".lora_A.default.weight")] = torch.ones(8, 64)
    save_file({f"base_model.model.{name}": value for name, value in tensors.items()}, folder / WHOLE)


def adapter_beside_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT))


PEFT = {"peft_type": "LORA", "base_model_name_or_path": BASE}
SNAPSHOT = "snapshots/0123abc"
# What the folder is -> the kind's name, and what its line says that helps.
KINDS: list[tuple[Change, str, tuple[str, ...]]] = [
    (content("export.json", "{}"), "artefact", ("an exported artefact", "export.json", "fastvlm inspect")),
    (instead("Manifest.json", "Data/com.apple.CoreML/model.mlmodel"), "core-ml-package",
     ("a Core ML package", "the checkpoint that it was made from")),
    (instead("fastvithd.mlpackage/Manifest.json"), "artefact-elsewhere",
     ("an artefact exported elsewhere", "a Core ML encoder")),
    (config(quantization={"bits": 4, "group_size": 64}), "mlx-quantized",
     ("in MLX's format", "quantization in config.json", "original weights")),
    (app_model, "artefact-elsewhere", ("exported elsewhere", "a Core ML encoder and an MLX language model")),
    (lambda folder: language_model(folder, model_type="fast_vlm"), "mlx-language-model",
     ("without the vision tower", "language_model.")),
    (unmerged_adapter, "unmerged-adapter", ("unmerged", ".lora_A.default.weight", "merge_and_unload()")),
    (instead("refs/main", f"{SNAPSHOT}/config.json"), "hub-cache-repository", ("give a snapshot", SNAPSHOT)),
    (instead(f"models--apple--FastVLM-0.5B/{SNAPSHOT}/config.json"), "hub-cache",
     ("a hub cache", f"models--apple--FastVLM-0.5B/{SNAPSHOT}")),
    (instead("adapter_model.safetensors", **PEFT), "peft-adapter",
     (f"a PEFT adapter of {BASE}", "fastvlm merge --checkpoint BASE --adapter")),
    (adapter_beside_weights, "peft-adapter", (f"a PEFT adapter of {BASE}",)),
    (instead("adapter_model.safetensors", "non_lora_trainables.bin", **PEFT), "llava-lora",
     (f"a PEFT adapter of {BASE} with LLaVA's other trained weights", "fastvlm export")),
    (instead("adapters.safetensors", fine_tune_type="lora", model=BASE), "mlx-adapter",
     (f"an MLX adapter of {BASE}", "adapters.safetensors")),
    (instead("non_lora_trainables.bin"), "non-lora-trainables",
     ("one half of a LLaVA LoRA fine-tune", "adapter_model.safetensors")),
    (instead("mm_projector.bin"), "projector-only", ("LLaVA's projector alone", "fastvlm merge")),
    (instead("global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"), "zero-shards",
     ("ZeRO shards", "python zero_to_fp32.py . OUT")),
    (instead("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"), "zero-shards-step",
     ("one step's folder", "python zero_to_fp32.py . OUT")),
    (instead("pytorch_model_fsdp_0/__0_0.distcp"), "fsdp-shards",
     ("an FSDP training state", "accelerate merge-weights")),
    (instead("onnx/decoder_model_merged.onnx"), "onnx", ("an ONNX export", "the checkpoint that it was made from")),
    (instead("FastVLM-0.5B-Q4_K_M.gguf", "mmproj.gguf"), "gguf", ("a GGUF model", "original weights")),
]  # fmt: skip
