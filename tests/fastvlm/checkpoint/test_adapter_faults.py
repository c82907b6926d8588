"""Every malformed adapter is refused on one line, before anything is written; what is sound beside it is taken."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fastvlm.checkpoint.checkpoint import examine
from fastvlm.checkpoint.doctor import diagnose
from tests.conftest import Answer
from tests.fastvlm.checkpoint.broken import Evil
from tests.fastvlm.checkpoint.edits import edit_json

Change = Callable[[Path], Any]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.0.self_attn."
Q_A, Q_B = f"{LAYER}q_proj.lora_A.weight", f"{LAYER}q_proj.lora_B.weight"
PROJECTOR = "base_model.model.model.mm_projector.0.weight"
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}


def write(folder: Path) -> None:
    """A sound adapter of the small checkpoint in LLaVA's layout."""
    rng = np.random.default_rng(0)
    shapes = {
        Q_A: (4, 64),
        Q_B: (64, 4),
        f"{LAYER}v_proj.lora_A.weight": (4, 64),
        f"{LAYER}v_proj.lora_B.weight": (32, 4),
    }
    folder.mkdir(exist_ok=True)
    save_file({name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )


def config(without: tuple[str, ...] = (), **changes: Any) -> Change:
    return lambda folder: edit_json(folder / CONFIG, without, **changes)


def tensors(**changes: Any) -> Change:
    """Arrays that are added or changed, None for one that is left out; `{layer}` and `{model}` in names."""

    def change(folder: Path) -> None:
        held: dict[str, Any] = dict(load_file(folder / WEIGHTS))
        for name, value in changes.items():
            held[name.format(layer=LAYER, model="base_model.model.")] = value
        save_file({name: value for name, value in held.items() if value is not None}, folder / WEIGHTS)

    return change


def zeros(*shape: int, dtype: Any = np.float32, value: float = 0) -> Any:
    return np.full(shape, value, dtype)


def instead(files: dict[str, Any], keep: tuple[str, ...] = ()) -> Change:
    """These files alone: text, bytes, JSON, or the tensors of a safetensors or .bin file."""

    def change(folder: Path) -> None:
        for name in {WEIGHTS, CONFIG} - set(keep):
            (folder / name).unlink()
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            elif name.endswith(".json"):
                (folder / name).write_text(json.dumps(content))
            elif name.endswith(".bin"):
                torch.save({key: torch.from_numpy(value) for key, value in content.items()}, folder / name)
            else:
                save_file(content, folder / name)

    return change


def evil(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with (folder / "adapter_model.bin").open("wb") as file:
        pickle.dump({Q_A: Evil(folder.parent / "written")}, file)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


TOKENS = "{model}model.embed_tokens.token_adapter.trainable_tokens_delta"
PICTURES = {"model_type": "fast_vlm", "image_seq_length": 16}
TOWER = "{model}model.vision_tower.vision_tower.model.patch_embed.0.rbr_conv.0.conv.weight"
# name -> what is done to the sound one, the rule of the one fault, and what its line says
FAULTS: dict[str, tuple[Change, str, str]] = {
    "no lora_B": (tensors(**{Q_B: None}), "adapter-half", "q_proj"),
    "empty shards": (tensors(**{Q_A: zeros(0)}), "adapter-half", "shards gathered"),
    "another size": (tensors(**{Q_A: zeros(4, 128), Q_B: zeros(128, 4)}), "adapter-misshapen", "[64, 64]"),
    "more layers": (
        tensors(**{"{model}model.layers.7.self_attn.q_proj.lora_A.weight": zeros(4, 64),
                   "{model}model.layers.7.self_attn.q_proj.lora_B.weight": zeros(64, 4)}),
        "adapter-target-unknown", "layers.7",
    ),
    "another module": (tensors(**{"{layer}rotary.lora_A.weight": zeros(4, 64),
                                  "{layer}rotary.lora_B.weight": zeros(64, 4)}), "adapter-target-unknown", "rotary"),
    "IA3": (config(peft_type="IA3"), "adapter-type", "IA3"),
    "LoHa": (config(peft_type="LOHA"), "adapter-type", "LOHA"),
    "prompt tuning": (config(peft_type="PROMPT_TUNING"), "adapter-type", "PROMPT_TUNING"),
    "VeRA": (config(peft_type="VERA"), "adapter-type", "VERA"),
    "no type": (config(without=("peft_type",)), "adapter-type", "null"),
    "no r": (config(without=("r",)), "setting-missing", "no r"),
    "r of no number": (config(r="4"), "setting-invalid", "whole number"),
    "alpha 0": (config(lora_alpha=0), "setting-invalid", "not 0"),
    "alpha null": (config(lora_alpha=None), "setting-missing", "lora_alpha"),
    "alpha of text": (config(lora_alpha="8"), "setting-invalid", "number"),
    "another rank": (config(r=8), "adapter-rank", "q_proj: lora_A has 4"),
    "rslora of text": (config(use_rslora="yes"), "setting-invalid", "true or false"),
    "endless pattern": (config(alpha_pattern={"(a+)+b": 4}), "setting-invalid", "two repetitions"),
    "pattern of many ways": (config(rank_pattern={"(a|a)" * 30: 4}), "setting-invalid", "two groups"),
    "no pattern": (config(rank_pattern={"[": 4}), "setting-invalid", "regular expression"),
    "layer replication": (config(layer_replication=[[0, 2], [1, 2]]), "adapter-unmergeable", "more layers"),
    "aLoRA": (config(alora_invocation_tokens=[1, 2]), "adapter-unmergeable", "invocation"),
    "experts": (config(target_parameters=["experts"]), "adapter-unmergeable", "target_parameters"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), "adapter-base-changed", "path_initial_model"),
    "LoftQ": (config(init_lora_weights="loftq"), "adapter-base-changed", "loftq"),
    "DoRA without lengths": (config(use_dora=True), "adapter-contradictory", "lora_magnitude_vector"),
    "lengths without DoRA": (tensors(**{"{layer}q_proj.lora_magnitude_vector": zeros(64, value=1)}),
                             "adapter-contradictory", "no lora_magnitude_vector"),
    "DoRA with a bias": (config(use_dora=True, lora_bias=True), "adapter-unmergeable", "lora_bias"),
    "NaN": (tensors(**{Q_A: zeros(4, 64, value=math.nan)}), "weights-not-finite", "q_proj.lora_A"),
    "infinity": (tensors(**{PROJECTOR: zeros(64, 256, value=math.inf)}), "weights-not-finite", "mm_projector"),
    "integers": (tensors(**{Q_A: zeros(4, 64, dtype=np.int8)}), "dtype-unsupported", "int8"),
    "two adapters": (tensors(**{"{layer}o_proj.lora_A.other.weight": zeros(4, 64),
                                "{layer}o_proj.lora_B.other.weight": zeros(64, 4)}), "adapter-several", "other"),
    "twice": (tensors(**{f"module.{PROJECTOR}": zeros(64, 256), PROJECTOR: zeros(64, 256)}),
              "adapter-twice", "mm_projector"),
    "a promised module": (config(modules_to_save=["mm_projector"]), "adapter-module-missing", "mm_projector"),
    "too many tokens": (both(tensors(**{TOKENS: zeros(1, 64)}), config(trainable_token_indices=[999])),
                        "adapter-misshapen", "tokens up to 999"),
    "a row too few": (both(tensors(**{TOKENS: zeros(1, 64)}), config(trainable_token_indices=[1, 2])),
                      "adapter-tokens", "1 rows for 2 tokens"),
    "embeddings alone": (tensors(**{"{model}model.embed_tokens.weight": zeros(580, 64)}),
                         "tensors-misshapen", "lm_head"),
    "half a tower": (tensors(**{TOWER: zeros(8, 3, 3, 3)}), "adapter-tower", "training form"),
    "cut": (lambda folder: os.truncate(folder / WEIGHTS, 300), "file-truncated", WEIGHTS),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "not-json", CONFIG),
    "settings alone": (lambda folder: (folder / WEIGHTS).unlink(), "adapter-missing", "adapter_config.json alone"),
    "tensors alone": (lambda folder: (folder / CONFIG).unlink(), "adapter-missing", "alone"),
    "a pickle with code": (evil, "pickle-unreadable", "adapter_model.bin"),
    "a part of a tokenizer": (lambda folder: (folder / "added_tokens.json").write_text("{}"),
                              "adapter-tokenizer", "added_tokens.json alone"),
    "a link outside": (lambda folder: (folder / "merges.txt").symlink_to("/etc/passwd"),
                       "link-leaves-folder", "merges"),
    "MLX without a scale": (instead({"adapters.safetensors": {"model.layers.0.self_attn.q_proj.lora_a": zeros(64, 4)},
                                     CONFIG: {"lora_parameters": {"rank": 4}}}), "setting-missing", "scale"),
    "MLX's half": (instead({"adapters.safetensors": {"model.layers.0.self_attn.q_proj.lora_a": zeros(64, 4)},
                            CONFIG: MLX}), "adapter-half", "q_proj"),
    "a wide projector": (instead({"mm_projector.bin": {"model.mm_projector.0.weight": zeros(64, 3072)}}),
                         "adapter-misshapen", "3072"),
    "other pictures": (lambda folder: (folder / "config.json").write_text(json.dumps(PICTURES)),
                       "adapter-pictures", "256"),
    "MLX's old file": (instead({"adapters.npz": b"x"}, keep=(CONFIG,)), "adapter-missing", "mx.save_safetensors"),
    "a folder in it": (lambda folder: (shutil.copytree(folder, folder / "checkpoint-9"), (folder / CONFIG).unlink()),
                       "adapter-missing", "its folder checkpoint-9?"),
    "LLaVA's half": (instead({"non_lora_trainables.bin": {PROJECTOR: zeros(64, 256)}}), "adapter-missing", "alone"),
}  # fmt: skip


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    write(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_line(
    name: str, sound: Path, tiny_llava: Path, tmp_path: Path, cli: Callable[..., Answer]
) -> None:
    change, rule, words = FAULTS[name]
    change(sound)
    (fault,) = examine(tiny_llava, adapter=sound).faults
    assert fault.rule == rule and words in fault.line() and "\n" not in fault.line()
    answer = cli("merge", tiny_llava, "--adapter", sound, "--output-dir", tmp_path / "out")
    assert answer.code == 2 and answer.err.count("\n") == 1 and rule in answer.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "written").exists()


def test_the_sound_one_is_taken(sound: Path, tiny_llava: Path) -> None:
    examination = examine(tiny_llava, adapter=sound)
    assert not examination.findings and examination.checkpoint is not None
    assert sum(info.change is not None for info in examination.checkpoint.tensors.values()) == 2


def test_every_fault_at_once(sound: Path, tiny_llava: Path) -> None:
    for name in ("another module", "NaN", "a part of a tokenizer", "half a tower"):
        FAULTS[name][0](sound)
    rules = {fault.rule for fault in examine(tiny_llava, adapter=sound).faults}
    assert rules == {"adapter-target-unknown", "weights-not-finite", "adapter-tokenizer", "adapter-tower"}


def test_what_changes_nothing_is_a_warning(sound: Path, tiny_llava: Path) -> None:
    edit_json(sound / CONFIG, fan_in_fan_out=True, lorap_lr_ratio=16.0, some_new_key=None, eva_config={"rho": 2.0})
    examination = examine(tiny_llava, adapter=sound)
    assert [finding.rule for finding in examination.warnings] == ["adapter-key-unknown", "config-ignored"]
    assert "lorap_lr_ratio" in examination.warnings[0].line() and not examination.faults


@pytest.mark.parametrize(("given", "rule"), [("absent", "path-missing"), ("base", "adapter-missing")])
def test_what_is_no_adapter(tiny_llava: Path, tmp_path: Path, given: str, rule: str) -> None:
    path = tiny_llava if given == "base" else tmp_path / given
    (fault,) = examine(tiny_llava, adapter=path).faults
    assert fault.rule == rule and "adapter" in fault.line()


def test_the_doctor_describes_an_adapter(sound: Path, tiny_llava: Path, cli: Callable[..., Answer]) -> None:
    report = diagnose(sound)  # an adapter alone is no checkpoint
    assert [fault.rule for fault in report.faults] == ["folder-is-peft-adapter"]
    assert report.facts["adapter"] == "PEFT LoRA" and report.facts["adapted_matrices"] == 2
    assert (
        "\nmatrices        2\n" in report.text()
        and report.facts["ranks"] == "4"
        and "--adapter" in report.faults[0].line()
    )
    FAULTS["NaN"][0](sound)
    assert [fault.rule for fault in diagnose(sound).faults] == ["folder-is-peft-adapter", "weights-not-finite"]
    assert cli("doctor", tiny_llava, "--adapter", sound).code == 2
    write(sound)
    answer = cli("doctor", tiny_llava, "--adapter", sound, "--json")
    assert answer.code == 0 and f"--adapter {sound}" in answer.document["export"]["command"]
    assert answer.document["adapter"] == "PEFT LoRA" and answer.document["weights"] == "all finite"
