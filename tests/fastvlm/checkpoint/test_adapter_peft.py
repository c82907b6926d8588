"""A checkpoint opened with a PEFT adapter has the tensors that PEFT's merge_and_unload makes, to 1e-6."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm.checkpoint.checkpoint import open_checkpoint
from tests.fastvlm.checkpoint import trained
from tests.fastvlm.checkpoint.edits import edit_json

peft = pytest.importorskip("peft")
BOUND = 1e-6
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV = r".*(stem\.0\.reparam_conv|stages\.1\.blocks\.0\.mlp\.fc[12]|[qv]_proj)"  # 3 x 3 and 1 x 1
CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LINEAR},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
                 "alpha_pattern": {"k_proj": 1, r"^model\.language_model\.layers\.0\.mlp\.up_proj": 40}},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "convolutions": {"target_modules": CONV},
    "dora convolutions": {"target_modules": CONV, "use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora embeddings": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "every bias": {"target_modules": ["q_proj"], "bias": "all"},
    "adapted biases": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "a bias of the factor": {"target_modules": ["q_proj", "linear_1"], "lora_bias": True},
    "whole modules": {"target_modules": ["v_proj"],
                      "modules_to_save": ["multi_modal_projector", "embed_tokens", "lm_head", "language_model.norm"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [0, 17, 575]},
    "tokens of both": {"target_modules": ["v_proj"],
                       "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [7]}},
}  # fmt: skip


def lora(**changes: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=10, **changes)


@pytest.mark.parametrize("case", CASES)
def test_merge_is_pefts(case: str, tiny_fast_vlm: Path, tmp_path: Path) -> None:
    wrapped = trained.train(trained.load(tiny_fast_vlm), lora(**CASES[case]), tmp_path / "adapter")
    expected = trained.merged(wrapped)
    checkpoint = open_checkpoint(tiny_fast_vlm, adapter=tmp_path / "adapter")
    assert trained.distance(checkpoint, expected) <= BOUND
    assert trained.distance(open_checkpoint(tiny_fast_vlm), expected) > 1e-3  # the base alone: the bound can fail
    changed = [name for name, info in checkpoint.tensors.items() if info.change is not None]
    for name in changed:  # rows by themselves, in the middle and at the end
        whole, last = checkpoint.read(name).numpy(), checkpoint.tensors[name].shape[0]
        assert checkpoint.tensors[name].dtype == "float32"
        for start, stop in ((0, 1), (1, last), (last - 1, last + 5)):
            np.testing.assert_allclose(checkpoint.rows(name, start, stop), whole[start:stop], rtol=0, atol=BOUND)


@pytest.mark.parametrize("case", ["lora", "dora convolutions", "whole modules", "tokens", "every bias"])
def test_merge_in_llavas_names(case: str, tiny_fast_vlm: Path, tiny_llava: Path, tmp_path: Path) -> None:
    changes = CASES[case] | ({"bias": "none"} if case == "every bias" else {})
    wrapped = trained.train(trained.load(tiny_fast_vlm), lora(**changes), tmp_path / "adapter")
    trained.as_llava(tmp_path / "adapter")
    expected = trained.merged(wrapped)
    assert trained.distance(open_checkpoint(tiny_llava, adapter=tmp_path / "adapter"), expected) <= BOUND
    assert trained.distance(open_checkpoint(tiny_llava), expected) > 1e-3


@pytest.mark.parametrize("names", ["bin", "adapter's name", "distributed", "compiled", "Transformers 4"])
def test_every_way_of_saving(names: str, tiny_fast_vlm: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "adapter", lora(target_modules=["q_proj"], modules_to_save=["linear_1"])
    wrapped = trained.train(trained.load(tiny_fast_vlm), config, folder)
    if names == "bin":
        torch.save(trained.load_file(folder / trained.WEIGHTS), folder / "adapter_model.bin")
        (folder / trained.WEIGHTS).unlink()
    elif names == "adapter's name":  # a state dict that PEFT didn't save
        state = {name: value.contiguous() for name, value in wrapped.state_dict().items()
                 if "lora_" in name or "linear_1" in name}  # fmt: skip
        trained.save_file(state, folder / trained.WEIGHTS)
    else:
        change: dict[str, Callable[[str], str]] = {
            "distributed": lambda name: "module." + name,
            "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
            "Transformers 4": lambda name: name.replace("model.model.language_model.", "model.language_model.model.")
            .replace("model.model.multi_modal_projector", "model.multi_modal_projector"),
        }  # fmt: skip
        trained.rename(folder, change[names])
    assert trained.distance(open_checkpoint(tiny_fast_vlm, adapter=folder), trained.merged(wrapped)) <= BOUND


def test_a_bfloat16_base_is_merged_in_float32(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = make_checkpoint(layout="fast_vlm", form="folded", dtype="bfloat16")
    wrapped = trained.train(trained.load(base), lora(**CASES["dora"]), tmp_path / "adapter")  # its float32 copy
    expected = trained.merged(wrapped)
    checkpoint = open_checkpoint(base, adapter=tmp_path / "adapter")
    assert trained.distance(checkpoint, expected) <= BOUND and checkpoint.dtype == "bfloat16"
    rounded = {name: value.bfloat16() for name, value in expected.items()}
    assert trained.distance(checkpoint, rounded) > BOUND


def test_trainable_tokens_alone(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[5, 570], target_modules=["embed_tokens"])
    wrapped = trained.train(trained.load(tiny_fast_vlm), config, tmp_path / "adapter")
    checkpoint = open_checkpoint(tiny_fast_vlm, adapter=tmp_path / "adapter")
    assert trained.distance(checkpoint, trained.merged(wrapped)) <= BOUND
    assert checkpoint.adapter is not None and checkpoint.adapter.kind == "PEFT trainable tokens"


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"trainable_token_indices": [3, 570]}, True),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
)
def test_tied_embeddings(
    make_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], tied: bool
) -> None:
    """What PEFT's model answered while it was trained, before any merge: merging changes both where one is adapted."""
    base = make_checkpoint(layout="fast_vlm", form="folded", tied=True)
    wrapped = trained.train(
        trained.load(base), lora(**({"target_modules": ["v_proj"]} | changes)), tmp_path / "adapter"
    )
    ids = torch.tensor([[3, 200, 570, 9]])
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
    checkpoint = open_checkpoint(base, adapter=tmp_path / "adapter")
    from fastvlm.model.build import build

    with torch.no_grad():
        got = build(checkpoint)(input_ids=ids).logits
        plain = build(open_checkpoint(base))(input_ids=ids).logits
    assert float((got - expected).abs().max()) <= 2e-5 < float((plain - expected).abs().max())
    assert checkpoint.tied is tied and ("lm_head.weight" in checkpoint.tensors) is not tied
    assert any("adapter-unties" in warning for warning in checkpoint.warnings) is not tied


def test_added_tokens(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    """A resized vocabulary with the tokenizer that it is for."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_fast_vlm)
    tokenizer.add_tokens(["<box>", "</box>"])
    model = trained.load(tiny_fast_vlm)
    model.resize_token_embeddings(580)
    folder = tmp_path / "adapter"
    config = lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    wrapped = trained.train(model, config, folder)
    tokenizer.save_pretrained(folder)
    checkpoint = open_checkpoint(tiny_fast_vlm, adapter=folder)
    assert trained.distance(checkpoint, trained.merged(wrapped)) <= BOUND
    assert checkpoint.model_config.text.vocab_size == 580 and checkpoint.tokenizer_path == folder
    assert checkpoint.tokenizer().convert_tokens_to_ids("<box>") == tokenizer.convert_tokens_to_ids("<box>")
    assert open_checkpoint(tiny_fast_vlm).tokenizer().convert_tokens_to_ids("<box>") is None
    assert trained.WEIGHTS in {file.name for file in checkpoint.files}


@pytest.mark.parametrize("layout", ["fast_vlm", "llava_qwen2"])
def test_a_trained_tower_keeps_its_branches(make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """The training form's branches and BatchNorms, with their statistics, in modules_to_save."""
    base = make_checkpoint(layout="fast_vlm", form="training")
    config = lora(target_modules=["q_proj"], modules_to_save=["vision_tower"])
    wrapped = trained.train(trained.load(base), config, tmp_path / "adapter")
    checkpoint = open_checkpoint(base, adapter=tmp_path / "adapter")
    expected = trained.merged(wrapped)
    assert trained.distance(checkpoint, expected) <= BOUND and checkpoint.form == "training"
    assert checkpoint.adapter is not None and not checkpoint.warnings
    folded = make_checkpoint(layout=layout, form="folded")
    whole = open_checkpoint(folded, adapter=tmp_path / "adapter")  # of the other form, and whole: it is taken
    assert whole.form == "training" and any("adapter-tower" in warning for warning in whole.warnings)
    tower = {name: value for name, value in expected.items() if name in whole.tensors and "vision_tower" in name}
    assert all(torch.equal(whole.read(name), value) for name, value in tower.items()) and len(tower) > 100


def test_the_base_is_only_read(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_fast_vlm, tmp_path / "base")
    trained.train(trained.load(base), lora(target_modules=["q_proj"]), tmp_path / "adapter")

    def state(folder: Path) -> dict[str, tuple[bytes, int]]:
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}

    before = state(base), state(tmp_path / "adapter")
    checkpoint = open_checkpoint(base, adapter=tmp_path / "adapter")
    for name in checkpoint.tensors:
        checkpoint.read(name, mapped=True)[:] = 0
    assert (state(base), state(tmp_path / "adapter")) == before


def test_names_of_another_base_are_a_warning(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    trained.train(trained.load(tiny_fast_vlm), lora(target_modules=["q_proj"]), tmp_path / "adapter")
    assert open_checkpoint(tiny_fast_vlm, adapter=tmp_path / "adapter").warnings == ()
    for name, rule in (("apple/FastVLM-7B", "adapter-base:"), ("unsloth/model-bnb-4bit", "adapter-base-quantized:")):
        edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=name)
        warnings = open_checkpoint(tiny_fast_vlm, adapter=tmp_path / "adapter").warnings
        assert any(warning.startswith(rule) for warning in warnings), (rule, warnings)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_a_streamed_model_is_the_same(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    from fastvlm.model.build import build

    trained.train(trained.load(tiny_fast_vlm), lora(**CASES["embeddings"]), tmp_path / "adapter")
    checkpoint, ids = open_checkpoint(tiny_fast_vlm, adapter=tmp_path / "adapter"), torch.tensor([[5, 200, 5, 575]])
    with torch.no_grad():
        whole, streamed = (build(checkpoint, streamed=streamed)(input_ids=ids).logits for streamed in (False, True))
        plain = build(open_checkpoint(tiny_fast_vlm))(input_ids=ids).logits
    assert float((whole - streamed).abs().max()) <= 1e-5 < float((whole - plain).abs().max())
