"""LLaVA's and MLX's adapters, and projectors alone: merged as their own code merges them, to 1e-6."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from fastvlm.checkpoint.checkpoint import examine, open_checkpoint
from tests.fastvlm.checkpoint import trained

BOUND = 1e-6
PROJECTOR = "model.multi_modal_projector."


def others(model: Any, *parts: str) -> dict[str, torch.Tensor]:
    """Trained values of every parameter whose name has one of `parts`."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: value.detach() + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
        if any(part in name for part in parts)
    }


def write_llava(folder: Path, state: dict[str, torch.Tensor], prefix: str = "base_model.model.") -> None:
    torch.save({prefix + trained.llava_name(name): value for name, value in state.items()}, folder)


@pytest.mark.parametrize("form", ["folded", "training"])
def test_llavas_adapter_and_its_other_weights(make_checkpoint: Callable[..., Path], tmp_path: Path, form: str) -> None:
    """As llava/model/builder.py: load_state_dict(strict=False), then the adapter, then merge_and_unload."""
    peft = pytest.importorskip("peft")
    ours = make_checkpoint(layout="llava_qwen2", form=form)
    theirs, folder = make_checkpoint(layout="fast_vlm", form=form), tmp_path / "adapter"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    trained.train(trained.load(theirs), config, folder)
    model = trained.load(theirs)
    state = others(model, PROJECTOR, "embed_tokens", "stages.1.blocks.0.mlp.fc")
    if form == "training":
        state |= others(model, "timm_model.stem.0.")
        assert any(".bn." in name for name in state)  # a BatchNorm's weights; its statistics are the base's
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    trained.as_llava(folder)
    rename = {".conv_kxk.": ".rbr_conv.", ".conv_scale.": ".rbr_scale.", ".identity.": ".rbr_skip."}
    saved = {f"base_model.model.{trained.llava_name(name)}": value for name, value in state.items()}
    for timm, apple in rename.items():
        saved = {name.replace(timm, apple): value for name, value in saved.items()}
    torch.save(saved, folder / "non_lora_trainables.bin")
    checkpoint = open_checkpoint(ours, adapter=folder)
    assert trained.distance(checkpoint, expected) <= BOUND
    assert checkpoint.adapter is not None and checkpoint.adapter.kind == "LLaVA LoRA"
    (folder / "non_lora_trainables.bin").unlink()  # the control: without it, it is another model
    assert trained.distance(open_checkpoint(ours, adapter=folder), expected) > 1e-3


@pytest.mark.parametrize("place", ["mm_projector.bin", "mm_projector.safetensors", "mm_projector/checkpoint-{}.bin"])
@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", ""])
def test_a_projector_alone(tiny_fast_vlm: Path, tiny_llava: Path, tmp_path: Path, place: str, prefix: str) -> None:
    state = others(trained.load(tiny_fast_vlm), PROJECTOR)
    named = {prefix + trained.llava_name(name).removeprefix("model."): value for name, value in state.items()}
    file = tmp_path / place.format(1000)
    file.parent.mkdir(exist_ok=True)
    save = save_file if place.endswith("safetensors") else torch.save
    save(named, file)
    if "{}" in place:
        torch.save({name: value * 0 for name, value in named.items()}, tmp_path / place.format(500))  # an earlier step
    for base in (tiny_fast_vlm, tiny_llava):
        checkpoint, plain = open_checkpoint(base, adapter=tmp_path), open_checkpoint(base)
        assert checkpoint.adapter is not None and checkpoint.adapter.kind == "projector"
        for name in checkpoint.tensors:
            same = torch.equal(checkpoint.read(name), plain.read(name))
            assert torch.equal(checkpoint.read(name), state[name]) if name in state else same


def mlx_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], kind: str, prefix: str, old: bool = False) -> Any:
    """Write an adapter of mlx-lm (or `old`: of mlx-vlm before 0.4) and return its values by module."""
    rng, rank, scale, values = np.random.default_rng(3), 4, 1.5, {}
    for module, (rows, columns) in shapes.items():
        first, last = (rows, columns) if "embed" in module else (columns, rows)
        values[module] = {"lora_a": rng.normal(0, 0.1, (first, rank)), "lora_b": rng.normal(0, 0.1, (rank, last))}
        if kind == "dora":
            values[module]["m"] = rng.uniform(0.5, 2, rows)
    names = {"lora_a": "A", "lora_b": "B"} if old else {}
    arrays = {
        f"{prefix}{module}.{names.get(part, part)}": value.astype(np.float32)
        for module, parts in values.items()
        for part, value in parts.items()
    }
    folder.mkdir()
    save_arrays(arrays, folder / "adapters.safetensors")
    config = {"fine_tune_type": kind, "num_layers": 16, "lora_parameters": {"rank": rank, "scale": scale}}
    (folder / "adapter_config.json").write_text(json.dumps({"rank": rank, "alpha": scale} if old else config))
    return values


@pytest.mark.parametrize(
    ("kind", "prefix", "old"),
    [
        ("lora", "", False),
        ("dora", "", False),
        ("lora", "language_model.", False),
        ("lora", "language_model.", True),
    ],
)
def test_mlxs_adapter(tiny_llava: Path, tmp_path: Path, kind: str, prefix: str, old: bool) -> None:
    """mlx-lm's own layers fuse the same values."""
    mx, nn = pytest.importorskip("mlx.core"), pytest.importorskip("mlx.nn")
    from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

    plain = open_checkpoint(tiny_llava)
    modules = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    modules += [] if old else ["model.embed_tokens"]
    canonical = {module: f"{module.replace('model.', 'model.language_model.')}.weight" for module in modules}
    shapes = {module: plain.tensors[name].shape for module, name in canonical.items()}
    values = mlx_adapter(tmp_path / "adapter", shapes, kind, prefix, old)
    checkpoint = open_checkpoint(tiny_llava, adapter=tmp_path / "adapter")
    for module, name in canonical.items():
        weight, embedding = plain.read(name).numpy(), "embed" in module
        rows, columns = weight.shape
        base = nn.Embedding(rows, columns) if embedding else nn.Linear(columns, rows, bias=False)
        base.weight = mx.array(weight)
        layers = {"lora": (LoRALinear, LoRAEmbedding), "dora": (DoRALinear, DoRAEmbedding)}
        layer = layers[kind][embedding].from_base(base, r=4, scale=1.5)
        for part, value in values[module].items():
            setattr(layer, part, mx.array(value.astype(np.float32)))
        fused = np.array(layer.fuse().weight)
        assert np.abs(checkpoint.read(name).numpy() - fused).max() <= BOUND < np.abs(weight - fused).max()
    assert checkpoint.adapter is not None and checkpoint.adapter.kind == f"MLX {'LoRA' if kind == 'lora' else 'DoRA'}"


def test_mlxs_full_fine_tune_stays_tied(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = make_checkpoint(layout="llava_qwen2", form="folded", tied=True)
    new = np.random.default_rng(0).normal(size=(576, 64)).astype(np.float32)
    save_arrays({"model.embed_tokens.weight": new}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": -1}))
    checkpoint = open_checkpoint(base, adapter=tmp_path)
    name = "model.language_model.embed_tokens.weight"
    assert checkpoint.tied and np.array_equal(checkpoint.rows(name, 0, 576), new)


def test_llavas_own_settings_are_used(tiny_fast_vlm: Path, tiny_llava: Path, tmp_path: Path) -> None:
    """As its loader does, but for how the base was loaded; those of the other layout only if they mean the same."""
    state = others(trained.load(tiny_fast_vlm), PROJECTOR)
    write_llava(tmp_path / "mm_projector.bin", state, "")
    config = json.loads((tiny_llava / "config.json").read_text())
    changed = config | {"image_aspect_ratio": "square", "quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert open_checkpoint(tiny_llava).image_strategy == "pad"
    assert open_checkpoint(tiny_llava, adapter=tmp_path).image_strategy == "center_crop"
    assert open_checkpoint(tiny_fast_vlm, adapter=tmp_path).image_strategy == "center_crop"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [fault.rule for fault in examine(tiny_fast_vlm, adapter=tmp_path).faults] == ["adapter-pictures"]
