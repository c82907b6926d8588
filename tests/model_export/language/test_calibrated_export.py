"""Recipes that calibrate, in an export: what they see, what they store, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.data.conversations import demo_samples
from fastvlm.data.scenes import CHECKPOINT
from model_export.artefact import read_manifest, verify
from model_export.config import ExportConfig
from model_export.export import export, plan
from model_export.stored import StoredTensors

pytestmark = pytest.mark.slow


def made(target: Path, parts: tuple[str, ...] = ("llm",), **settings: Any) -> Path:
    export(plan(ExportConfig(CHECKPOINT, target, **settings), parts))
    return target


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
    return made(tmp_path_factory.mktemp("gptq") / "artefact", quant="int4-gptq", calibration_data=questions)


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
    int4 = made(tmp_path / "int4", quant="int4")
    plain, calibrated = weights(int4), weights(gptq)
    assert plain.keys() == calibrated.keys()
    different = {name for name in plain if not np.array_equal(plain[name], calibrated[name])}
    assert different == {name for name in plain if ".layers." in name and name.endswith("_proj.weight")}
    assert (int4 / "config.json").read_bytes() == (gptq / "config.json").read_bytes()  # loads as int4 does


def test_the_same_questions_give_the_same_bytes_and_others_do_not(gptq: Path, questions: Path, tmp_path: Path) -> None:
    for data, same in ((questions, True), (questions.parent, False)):
        again = made(tmp_path / data.name, quant="int4-gptq", calibration_data=data)
        weights = [(folder / "model.safetensors").read_bytes() for folder in (again, gptq)]
        assert (weights[0] == weights[1]) is same


def test_all_calibrates_through_the_exported_encoder(questions: Path, tmp_path: Path) -> None:
    target = made(tmp_path / "fit", ("vision", "llm"), quant="fit:4.9bpw", calibration_data=questions)
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
    fit = made(tmp_path / "fit", quant="fit:10MB")
    assert "fit:10MB: every weight fits at 8 bit, the largest that fit chooses among" in capsys.readouterr().err
    document = read_manifest(fit)["llm"]
    assert "calibration" not in document and document["recipe"]["name"] == "fit:10MB"
    int8 = made(tmp_path / "int8", quant="int8")  # 8 bits are the largest choice
    for name in ("config.json", "model.safetensors"):
        assert (fit / name).read_bytes() == (int8 / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quant", "fit:0.3MB"], "recipe fit:0.3MB: 300 kB is less than the"),
        (["--quant", "fit"], "leaves the schemes open: say how large"),
        (["--quant", "fit:lots"], "expected one such as 400MB"),
        (["--quant", "int4-gptq", "--calibration-data", "{none}"], "--calibration-data: "),
        (["--quant", "int4", "--calibration-data", "{questions}"], "recipe int4 has nothing to calibrate"),
    ],
)
def test_refusals_are_one_line_before_any_work(
    cli: Any, words: list[str], message: str, questions: Path, tmp_path: Path
) -> None:
    given = [word.format(none=tmp_path / "none.jsonl", questions=questions) for word in words]
    for more in ((), ("--dry-run",)):
        answer = cli("export-llm", "--checkpoint", CHECKPOINT, "--output-dir", tmp_path / "made", *given, *more)
        line = answer.err.splitlines()[-1]
        assert answer.code == 2 and line.startswith("error: ") and message in line and list(tmp_path.iterdir()) == []
