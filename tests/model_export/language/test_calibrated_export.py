"""Recipes that calibrate, in an export: what they see, what they store, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastvlm.common.cli import run
from fastvlm.data.conversations import demo_samples
from fastvlm.data.scenes import CHECKPOINT
from model_export.__main__ import build_parser
from model_export.artefact import read_manifest, verify
from model_export.stored import StoredTensors


def call(verb: str, target: Path, *flags: object) -> int:
    return run(build_parser, [verb, "--checkpoint", str(CHECKPOINT), "--output-dir", str(target), *map(str, flags)])


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-format file with eight of the demo's questions, one of them without an answer."""
    folder = tmp_path_factory.mktemp("questions")
    records = []
    for number, sample in enumerate(demo_samples(8, "train")):
        assert sample.image is not None and sample.answer is not None
        sample.image().save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{sample.question}"}, {"from": "gpt", "value": sample.answer}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns[: 2 if number else 1]})
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture(scope="module")
def gptq(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "artefact"
    assert call("llm", folder, "--quant", "int4-gptq", "--calibration-data", questions) == 0
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    stored = StoredTensors(folder)
    return {name: stored.read(name).float().numpy() for name in stored.names()}


def test_the_manifest_says_what_was_calibrated_on(gptq: Path) -> None:
    document = read_manifest(gptq)
    facts = document["llm"]["calibration"]
    assert facts["method"] == "gptq" and facts["samples"] == 8 and facts["computed_in"] == "float32"
    assert facts["encoder"] == "the checkpoint's" and len(facts["sha256"]) == 64
    assert document["llm"]["recipe"]["method"] == "gptq" and verify(gptq) == []


def test_only_the_decoders_matrices_differ_from_rounding(gptq: Path, tmp_path: Path) -> None:
    assert call("llm", tmp_path / "int4", "--quant", "int4") == 0
    plain, calibrated = weights(tmp_path / "int4"), weights(gptq)
    assert plain.keys() == calibrated.keys()
    different = {name for name in plain if not np.array_equal(plain[name], calibrated[name])}
    assert different == {name for name in plain if ".layers." in name and name.endswith("_proj.weight")}
    assert (tmp_path / "int4" / "config.json").read_bytes() == (gptq / "config.json").read_bytes()  # loads as int4 does


def test_the_same_questions_give_the_same_bytes_and_others_do_not(gptq: Path, questions: Path, tmp_path: Path) -> None:
    assert call("llm", tmp_path / "again", "--quant", "int4-gptq", "--calibration-data", questions) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (gptq / "model.safetensors").read_bytes()
    assert call("llm", tmp_path / "pictures", "--quant", "int4-gptq", "--calibration-data", questions.parent) == 0
    assert (tmp_path / "pictures" / "model.safetensors").read_bytes() != (gptq / "model.safetensors").read_bytes()


def test_all_calibrates_through_the_exported_encoder(questions: Path, tmp_path: Path) -> None:
    target = tmp_path / "fit"
    assert call("all", target, "--quant", "fit:4.9bpw", "--calibration-data", questions, "--parity-limit", 2) == 0
    document = read_manifest(target)
    assert document["llm"]["calibration"]["encoder"] == "the exported package"
    assert document["vision"]["fp16"]["pictures"] == "8 given and noise"
    assert 4.7 < document["llm"]["bits_per_weight"] <= 4.9
    bits = {entry["bits"] for entry in document["llm"]["quantization"].values() if isinstance(entry, dict)}
    assert len(bits) > 1 and document["llm"]["recipe"]["name"] == "fit:4.9bpw"
    assert "budget" not in document["llm"]["recipe"]  # the choices are made
    stored = StoredTensors(target)
    assert "/" in stored.label


def test_a_budget_with_nothing_to_choose_is_not_calibrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_export.language.calibrate.calibrate", None)  # would be an error
    assert call("llm", tmp_path / "fit", "--quant", "fit:10MB") == 0
    assert "fit:10MB: every weight fits in its largest form" in capsys.readouterr().err
    document = read_manifest(tmp_path / "fit")["llm"]
    assert "calibration" not in document and document["recipe"]["name"] == "fit:10MB"
    assert call("llm", tmp_path / "int8", "--quant", "int8") == 0  # 8 bits are the largest choice
    assert (tmp_path / "fit/config.json").read_bytes() == (tmp_path / "int8/config.json").read_bytes()
    assert (tmp_path / "fit/model.safetensors").read_bytes() == (tmp_path / "int8/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quant", "fit:0.3MB"], "recipe fit:0.3MB: 0.3 MB is less than the"),
        (["--quant", "fit"], "leaves the schemes open: say how large"),
        (["--quant", "fit:lots"], "expected one such as 400MB"),
        (["--quant", "int4-gptq", "--calibration-data", "{none}"], "--calibration-data: "),
        (["--quant", "int4", "--calibration-data", "{questions}"], "recipe int4 has nothing to calibrate"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_refusals_are_one_line_before_any_work(
    flags: list[str], message: str, more: list[str], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag.format(none=tmp_path / "none.jsonl", questions=questions) for flag in flags]
    assert call("llm", tmp_path / "made", *given, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and list(tmp_path.iterdir()) == []
