"""A checkpoint with an adapter from the flag to the artefact: the same bytes as a merged one, proved against both, its
own questions, and nothing that was made with another one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastvlm
from benchmarks.parity import compare
from benchmarks.quality import job, sweep
from benchmarks.quality.evaluate import _vocabulary
from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import UserError
from fastvlm.data.scenes import CHECKPOINT
from model_export import artefact, contract
from model_export.config import ExportConfig
from model_export.export import _pictures, export, plan
from quantization.sweep import engine
from tests.helpers import contents, relative

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"
PARTS = ("llm",)


def write_lora(base: Path, folder: Path, size: float = 0.05, rank: int = 2) -> Path:
    """A LoRA of every attention's queries and every MLP's last matrix, as PEFT saves one."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, info in open_checkpoint(base).tensors.items():
        if "language_model" in name and name.endswith(("q_proj.weight", "down_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, info.shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = size * torch.randn(info.shape[0], rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "down_proj"]}
    settings |= {"base_model_name_or_path": "/home/me/models/base", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def lora(tiny_fast_vlm: Path, tmp_path: Path) -> Path:
    """One for `tiny_fast_vlm`."""
    return write_lora(tiny_fast_vlm, tmp_path / "lora")


def write_questions(folder: Path, file: str, count: int) -> Path:
    """What a fine-tune leaves: records about pictures elsewhere, by absolute paths."""
    records = []
    for number in range(count):
        path = folder.parent / f"{file}-{number}.png"
        Image.new("RGB", (20, 30), (number, 0, 0)).save(path)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
        records.append({"id": f"own {number}", "image": str(path), "conversations": turns})
    (folder / file).write_text(json.dumps(records))
    return folder / file


# --- the artefact


@pytest.mark.parametrize("recipe", ["fp16", "int4"])
def test_its_bytes_are_those_of_a_merged_checkpoints_export(
    cli: Any, tiny_fast_vlm: Path, lora: Path, tmp_path: Path, recipe: str
) -> None:
    merged, before = tmp_path / "merged", contents(tiny_fast_vlm)
    held_out = write_questions(lora, "evaluation.json", 1)
    done = cli("merge", tiny_fast_vlm, "--adapter", lora, "--dtype", "float32", "--output-dir", merged)
    assert done.code == 0, done.err
    assert (merged / held_out.name).read_text() == held_out.read_text()
    made = {}
    for name, config in {
        "adapted": ExportConfig(tiny_fast_vlm, tmp_path / "adapted", recipe, adapter=lora),
        "merged": ExportConfig(merged, tmp_path / "other", recipe),
        "base": ExportConfig(tiny_fast_vlm, tmp_path / "base", recipe),
    }.items():
        export(plan(config, PARTS))
        made[name] = contents(config.output_dir)
        for told in (contract.MANIFEST, contract.NOTICE):  # where the weights came from, which is another thing
            made[name].pop(told)
    assert made["adapted"] == made["merged"]
    assert made["adapted"][contract.WEIGHTS] != made["base"][contract.WEIGHTS]  # the control
    assert contents(tiny_fast_vlm) == before


def test_a_merged_matrix_is_base_plus_product(tiny_fast_vlm: Path, lora: Path, tmp_path: Path) -> None:
    """From what safetensors and PyTorch read, without this project's merging."""
    export(plan(ExportConfig(tiny_fast_vlm, tmp_path / "out", adapter=lora), PARTS))
    name = "layers.1.mlp.down_proj"
    theirs, factors = load_file(tiny_fast_vlm / "model.safetensors"), load_file(lora / WEIGHTS)
    (base,) = (value.float() for key, value in theirs.items() if key.endswith(f"{name}.weight"))
    a, b = (value for key, value in sorted(factors.items()) if name in key)
    got = load_file(tmp_path / "out" / contract.WEIGHTS)[f"language_model.model.{name}.weight"]
    assert got.dtype == torch.float16
    assert relative(got, base + 2 * b @ a) < 5e-4 < relative(got, base)


def test_manifest_notice_and_inspect_tell_of_it(cli: Any, tiny_fast_vlm: Path, lora: Path, tmp_path: Path) -> None:
    (lora / "LICENSE.txt").write_text("theirs")
    shutil.copy(tiny_fast_vlm / "LICENSE", lora)
    target = tmp_path / "out"
    done = cli("export-llm", tiny_fast_vlm, "--adapter", lora, "--output-dir", target, "--quant", "int4")
    assert done.code == 0, done.err
    told = artefact.read_manifest(target)["sources"]["adapter"]
    assert (told["name"], told["kind"], told["base"]) == ("lora", "PEFT LoRA", "base")
    assert {*told["files"]} == {WEIGHTS, "adapter_config.json"} and artefact.verify(target) == []
    assert [path.name for path in target.glob("adapter-*")] == ["adapter-LICENSE.txt"]
    assert (target / "adapter-LICENSE.txt").read_text() == "theirs"
    assert "PEFT LoRA lora, of base" in (target / "NOTICE").read_text()
    assert "fine-tuned: PEFT LoRA lora, of base" in cli("inspect", target).out


def test_another_adapter_is_another_source(tiny_fast_vlm: Path, lora: Path, tmp_path: Path) -> None:
    """Every key that says whether something is made already has this hash in it."""

    def source(adapter: Path | None) -> str:
        return str(artefact.sources(open_checkpoint(tiny_fast_vlm, adapter=adapter))["sha256"])

    moved = shutil.copytree(lora, tmp_path / "moved")
    other = shutil.copytree(lora, tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, other / WEIGHTS)
    scaled = shutil.copytree(lora, tmp_path / "scaled")
    settings = json.loads((scaled / "adapter_config.json").read_text()) | {"lora_alpha": 5}
    (scaled / "adapter_config.json").write_text(json.dumps(settings))
    assert source(moved) == source(lora)
    assert len({source(folder) for folder in (None, lora, other, scaled)}) == 4


def test_an_adapter_that_changes_meanwhile_ends_the_export(tiny_fast_vlm: Path, lora: Path, tmp_path: Path) -> None:
    def touch(folder: Path) -> dict[str, bool]:
        os.utime(lora / WEIGHTS)
        return {"passed": True}

    with pytest.raises(UserError, match="lora: changed while it was exported"):
        export(plan(ExportConfig(tiny_fast_vlm, tmp_path / "out", adapter=lora), PARTS), touch)
    assert not (tmp_path / "out").exists()


# --- held against its checkpoint


def test_parity_is_with_checkpoint_and_adapter(
    demo_artefact: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoder is the base's own: its package is that of the base's export."""

    def copy(checkpoint: Any, config: Any, target: Path, *others: Any) -> Any:
        shutil.copytree(demo_artefact / contract.PACKAGE, target)
        return artefact.read_manifest(demo_artefact)["vision"]

    monkeypatch.setattr("model_export.encoder.vision.export_vision", copy)
    lora, target = write_lora(CHECKPOINT, tmp_path / "lora", 0.2), tmp_path / "out"
    seen = []

    def prove(folder: Path) -> dict[str, Any]:
        seen.append(compare.compare(CHECKPOINT, folder, limit=2, adapter=lora))
        return {"passed": seen[0]["passed"]}

    export(plan(ExportConfig(CHECKPOINT, target, adapter=lora)), prove)
    assert seen[0]["passed"] and seen[0]["reference"]["name"] == "demo_checkpoint + lora"
    assert "was exported" not in capsys.readouterr().err
    alone = compare.compare(CHECKPOINT, target, limit=2)
    assert "was exported with an adapter (PEFT LoRA lora, of base)" in capsys.readouterr().err
    assert not alone["passed"] and "prefill_kl" in alone["broken"]
    assert "encoder_snr" not in alone["broken"]


def test_python_and_predict_take_it(cli: Any, tiny_fast_vlm: Path, lora: Path, tmp_path: Path) -> None:
    def logits(model: Any) -> np.ndarray:
        return np.asarray(model.language.prefill(model.language.embed(model.tokenize("Why?")))[0])

    base, adapted = (logits(fastvlm.load(tiny_fast_vlm, adapter=adapter)) for adapter in (None, str(lora)))
    merged = tmp_path / "merged"
    cli("merge", tiny_fast_vlm, "--adapter", lora, "--dtype", "float32", "--output-dir", merged)
    assert relative(adapted, logits(fastvlm.load(merged))) < 1e-6 < relative(adapted, base)
    answer = cli("predict", tiny_fast_vlm, "--adapter", lora, "--prompt", "Why?", "--max-new-tokens", 2, "--json")
    assert answer.code == 0 and answer.document["adapter"] == str(lora)
    assert _vocabulary(tiny_fast_vlm, lora) == _vocabulary(tiny_fast_vlm)


# --- its own questions


def test_its_own_questions_are_the_defaults_and_flags_win(
    tiny_fast_vlm: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.source(None, tiny_fast_vlm, lora) == "drawn"  # the control: nothing is left there
    (lora / "evaluation.json").write_text("[]\n")
    assert job.source(None, tiny_fast_vlm, lora) == "drawn"  # nor is a question
    held_out = write_questions(lora, "evaluation.json", 3)
    trained_on = write_questions(lora, "training_pictures.json", 40)
    capsys.readouterr()
    source = job.source(None, tiny_fast_vlm, lora)
    assert source == str(held_out) and str(held_out) in capsys.readouterr().err
    assert [sample.name for sample in job.choose(source)] == ["own 0", "own 1", "own 2"]
    assert [sample.name for sample in job.choose(source, 2)] == ["own 0", "own 1"]
    assert "held out" in job.told(source) and "held out" not in job.told("drawn")
    assert job.source("drawn", tiny_fast_vlm, lora) == "drawn"
    assert job.source(str(tmp_path), tiny_fast_vlm, lora) == str(tmp_path.resolve())
    assert job.source(None, tiny_fast_vlm) == "drawn"

    def planned(parts: tuple[str, ...], quant: str = "fp16", **given: Any) -> Any:
        return plan(ExportConfig(tiny_fast_vlm, tmp_path / "out", quant, adapter=lora, **given), parts)

    calibrated = planned(("vision", "llm"), "int4-awq")
    assert calibrated.config.calibration_data == trained_on and len(calibrated.calibration) == 40
    assert str(trained_on) in capsys.readouterr().err
    assert 10 < sum(1 for _ in _pictures(calibrated)(64)) <= 16  # each takes an encoder's time
    assert planned(("llm",)).calibration is None  # nothing to calibrate
    mine = planned(("vision", "llm"), "int4-awq", calibration_data=held_out)
    assert len(mine.calibration) == 3
    whole = shutil.copytree(tiny_fast_vlm, tmp_path / "whole")  # what was trained whole has them in its own folder
    shutil.copy(trained_on, whole)
    config = plan(ExportConfig(whole, tmp_path / "out", "int4-awq"), ("vision", "llm")).config
    assert config.calibration_data == whole / trained_on.name


def test_the_manifest_says_what_was_calibrated_on(tiny_fast_vlm: Path, lora: Path, tmp_path: Path) -> None:
    told = set()
    write_questions(lora, "training_pictures.json", 2)
    other = write_questions(tmp_path, "mine.json", 2)
    for number, given in enumerate((None, other)):
        config = ExportConfig(tiny_fast_vlm, tmp_path / str(number), "int4-awq", adapter=lora, calibration_data=given)
        told.add(export(plan(config, PARTS))["llm"]["calibration"]["questions"])
    assert told == {"the fine-tune's", "given"}


def test_a_sweeps_points_are_an_adapters_own(
    cli: Any, tiny_fast_vlm: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of a finished point, and that of the exports that points share."""
    other = write_lora(tiny_fast_vlm, tmp_path / "other", 0.06)
    asked = []

    def run(sweeping: Any, points: Any, *limits: Any) -> Any:
        asked.append((engine.key(sweeping, {}, points[0]), sweeping.settings))
        raise UserError("enough")

    monkeypatch.setattr(sweep.engine, "run", run)

    def sweeping(*flags: Any) -> tuple[Any, str]:
        answer = cli("sweep", "--checkpoint", tiny_fast_vlm, "--quant", "int4", "--count", 2, *flags)
        assert "error: enough" in answer.err
        return asked.pop(), answer.err

    runs = [sweeping(*flags)[0] for flags in ((), ("--adapter", lora), ("--adapter", other), ("--adapter", lora))]
    assert len({key for key, _ in runs}) == 3 and runs[1][0] == runs[3][0]
    assert len({settings["common"] for _, settings in runs}) == 3
    assert [settings["adapter"] for _, settings in runs[:2]] == [None, str(lora)]
    write_questions(lora, "evaluation.json", 3)
    write_questions(lora, "training_pictures.json", 2)
    (key, settings), said = sweeping("--adapter", lora)
    assert settings["samples"] == str(lora / "evaluation.json") and key != runs[1][0]
    assert "evaluation.json" in said and "training_pictures.json" in said
    write_questions(lora, "training_pictures.json", 1)
    assert sweeping("--adapter", lora)[0][0] != key


# --- refusals


def test_what_is_no_adapter_is_refused_in_one_line(
    cli: Any, tiny_fast_vlm: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, target = tmp_path / "made", tmp_path / "out"
    made.mkdir()
    (made / "export.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for verb in ("export", "export-vision", "export-llm", "export-coreai"):
        for given, parts in {
            tiny_fast_vlm: ("a checkpoint", "expected adapter_config.json"),
            made: ("an exported artefact", "beside the --checkpoint"),
            lora / WEIGHTS: ("got a file", "give the folder that it is in"),
            tmp_path: ("a folder without an adapter",),
            "org/name": ("hf download",),
            "nothing": ("nothing there",),
        }.items():
            answer = cli(verb, tiny_fast_vlm, "--adapter", given, "--output-dir", target)
            assert answer.code == 2 and answer.err.count("\n") == 1
            assert "--adapter: " in answer.err and [part for part in parts if part not in answer.err] == []
        over = cli(verb, tiny_fast_vlm, "--adapter", lora, "--output-dir", lora)
        assert over.code == 2 and "is --adapter" in over.err and "only read" in over.err
    with pytest.raises(UserError, match=r"is inside --adapter .*, which is only read"):
        ExportConfig(tiny_fast_vlm, lora / "out", adapter=lora)
    tensors = load_file(lora / WEIGHTS)
    first, second = sorted(tensors)[:2]
    wide = torch.zeros(2, 7)
    save_file(
        {"base_model.model.nothing.lora_A.weight": wide, first: wide + 0, second: tensors[second]}, lora / WEIGHTS
    )
    answer = cli("predict", tiny_fast_vlm, "--adapter", lora, "--prompt", "Why?")
    assert answer.code == 2 and len(answer.err.splitlines()) <= 2
    assert "adapter-half" in answer.err and "adapter-misshapen" in answer.err


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--model", "M", "--adapter", "A", "--prompt", "Why?"),
        ("inspect", "M", "--adapter", "A"),
        ("verify", "--adapter", "A", "M"),
    ],
)
def test_verbs_of_an_artefact_say_where_it_belongs(cli: Any, words: tuple[str, ...]) -> None:
    answer = cli(*words)
    assert answer.code == 2 and "--adapter: not here: it goes with a checkpoint" in answer.err
    assert "unknown" not in answer.err and "twice" not in answer.err


def test_it_goes_with_a_checkpoint_only(cli: Any, lora: Path, demo_artefact: Path) -> None:
    answer = cli("ranges", "--model", demo_artefact, "--adapter", lora)
    assert answer.code == 2 and "--adapter: is merged into a checkpoint: it goes with --checkpoint" in answer.err
    answer = cli("evaluate", "--reference", demo_artefact, "--adapter", lora, "--model", demo_artefact)
    assert answer.code == 2 and "is merged into a checkpoint, which --reference" in answer.err
