"""The model card: what is in the manifest is in it, what isn't is not; the hub can read it; nothing of the machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from app_bridge.publishing import card, checks
from model_export import artefact as exported

Make = Callable[..., Path]
Written = Callable[..., str]
RESEARCH = "Disclaimer: This Apple Machine Learning Research Model is for scientific research.\n"
MODEL = "Apple Machine Learning Research Model"
ATTRIBUTION = f"{MODEL} is licensed under the {MODEL} License Agreement."
PARITY: dict[str, Any] = {
    "passed": True,
    "verdict": "The artefact is the model it came from: 7 figures within tolerance",
    "exact": {"questions": 40, "reference": 39, "candidate": 38},
    "pictures": {"demo": 40, "yours": 3},
    "runners": {
        "reference": dict.fromkeys(("vision", "projector", "language"), "PyTorch cpu float32"),
        "candidate": {"vision": "MIL executor (as-typed)", "projector": "PyTorch", "language": "PyTorch over int4"},
    },
    "metrics": {
        name: {"value": 0.1234 + index, "unit": unit, "sense": ">=", "tolerance": bound, "passed": passed}
        for index, (name, unit, bound, passed) in enumerate(
            [
                ("preprocessing", "", 0.0, True), ("operation_snr", "dB", 40.0, True), ("layer_snr", "dB", 40.0, True),
                ("encoder_snr", "dB", 50.0, False), ("encoder_cosine", "", 0.9, True),
                ("encoder_max_abs", "of the largest feature", 0.02, True), ("merged_snr", "dB", 12.0, True),
                ("prefill_kl", "nats", None, None), ("prefill_top1", "of positions", None, None),
                ("greedy_tokens", "of questions", None, None), ("greedy_answers", "of questions", None, None),
            ]
        )
    },
}  # fmt: skip
MACHINE = {
    "cpu": "Some CPU", "cpu_features": ["avx2"], "cores": 2, "torch_threads": 1, "memory_gib": 16.0, "system": "Linux",
}  # fmt: skip


@pytest.fixture
def made(app_artefact: Path, tmp_path: Path) -> Make:
    """`made(files={name: text}, **manifest keys) -> Path`: the artefact as if an export had written that, too."""

    def make(files: dict[str, str | None] | None = None, **changed: Any) -> Path:
        folder = tmp_path / "artefact"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(app_artefact, folder)
        for name, text in (files or {}).items():
            (folder / name).unlink() if text is None else (folder / name).write_text(text)
        manifest = exported.read_manifest(folder) | {"files": None, **changed}
        exported.write_manifest(folder, {key: value for key, value in manifest.items() if key != "manifest_sha256"})
        return folder

    return make


@pytest.fixture
def written(cli: Callable[..., Any]) -> Callable[..., str]:
    """`written(folder, *flags)`: the text of the card."""

    def write(folder: Path, *flags: object) -> str:
        path = folder.parent / "README.md"
        assert cli("card", folder, "--output", path, "--overwrite", *flags).code == 0
        return path.read_text()

    return write


@pytest.fixture
def refused(cli: Callable[..., Any]) -> Callable[..., str]:
    """The one error line of a card that can't be written."""

    def refuse(*words: object) -> str:
        answer = cli("card", *words)
        lines = answer.err.splitlines()
        assert answer.code == 2 and not answer.out, words
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and "Traceback" not in answer.err
        return str(lines[-1])

    return refuse


def front(text: str) -> dict[str, Any]:
    """The front matter, read without the code under test."""
    _, matter, _ = text.split("---\n", 2)
    loaded = yaml.safe_load(matter)
    assert isinstance(loaded, dict)
    return loaded


def tables(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of every row of every table."""
    rows = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) <= 3
    return {row[0]: row[1:] for row in rows}


def html(text: str) -> str:
    """The card as a hub shows it, by a parser that shares nothing with us."""
    return str(MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2]))


def quality(folder: Path, **figures: float) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "export.json")
    runners = {"vision": "MIL executor", "language": "PyTorch"}
    about = {"runners": runners, "reference_runners": runners, "text": "the answers: 2118 tokens"}
    kept = {"bytes": size, "questions": 200, "same_answers": 0.985, "prompt_kl_mean": 0.0489, "bytes_vision": 7}
    one = {"name": "/home/somebody/secret", "figures": kept | figures, "timings": {"peak_gb": 9.87}, "about": about}
    return {"reference": {"figures": {"exact": 0.5}}, "candidates": [one], "environment": MACHINE}


# --- what is in it


def test_figures_are_the_manifests(made: Make, written: Written) -> None:
    folder = made(parity=PARITY)
    manifest, text = exported.read_manifest(folder), written(folder)
    found = tables(text)
    assert found["worst layer against PyTorch"] == ["2.123 dB", "≥ 40 dB", "yes"]
    assert found["encoder features, signal to noise"] == ["3.123 dB", "≥ 50 dB", "no"]
    assert found["prefill logits, KL a position of the prompt"] == ["7.123 nats", "reported", "not judged"]
    assert found["vision"] == ["PyTorch cpu float32", "MIL executor (as-typed)"]
    assert (
        PARITY["verdict"] in text
        and "38 of 40" in text
        and "40 questions of the demo set and 3 pictures of yours" in text
    )
    for value in (manifest["sources"]["sha256"], manifest["llm"]["recipe"]["name"]):
        assert value in text
    assert all(f"{package} {version}" in text for package, version in manifest["versions"].items())
    total = sum(entry["size"] for entry in manifest["files"].values())
    assert found["all"][0] == f"{total / 1e6:.3g} MB"
    assert found["`multi_modal_projector.safetensors`"][0].endswith("B")
    shown = html(text)
    assert shown.count("<table>") == 3 and shown.count("<pre>") == 4 and "|" not in re.sub("<pre>.*?</pre>", "", shown)
    assert "no Apple hardware" in text and "time to first token" in text
    assert front(text)["pipeline_tag"] == "image-text-to-text" and front(text)["library_name"] == "mlx"
    assert str(folder.parent) not in text and str(Path.home()) + "/" not in text
    runners = PARITY["runners"]["candidate"] | {"vision": "Core ML CPU_AND_NE"}
    text = written(made(parity=PARITY | {"runners": {**PARITY["runners"], "candidate": runners}}))
    assert "Core ML ran the encoder" in text and "no Apple hardware" not in text


def test_what_was_not_measured_or_named_is_said(app_artefact: Path, cli: Callable[..., Any]) -> None:
    text = cli("card", app_artefact).out
    assert text.count("Not measured.") == 2 and "Nothing of this has been run" in text
    assert " dB" not in text and "KL" not in text and "within" not in text and "{{" not in text
    assert "base_model" not in text and card.PLACEHOLDER in text
    assert front(text)["license"] == "other" and front(text)["license_link"] == "LICENSE" and "esearch" not in text
    text = cli("card", app_artefact, "--base-model", "acme/FastVLM_base", "--repo", "acme/out_4").out
    assert front(text)["base_model"] == "acme/FastVLM_base"
    assert "base_model_relation" not in front(text)  # not quantized
    assert "Fine-tuned" not in text
    assert "# out\\_4\n" in text and "hf download acme/out_4 --local-dir MODEL" in text


def test_an_adapter_is_named(app_artefact: Path, made: Make, written: Written) -> None:
    adapter = {"name": "my|lora", "kind": "PEFT LoRA", "base": "acme/base", "files": {}}
    sources = exported.read_manifest(app_artefact)["sources"] | {"adapter": adapter}
    text = written(made(sources=sources), "--base-model", "acme/base")
    assert "merged with an adapter: PEFT LoRA my\\|lora, of acme/base." in text
    assert front(text)["base_model_relation"] == "finetune"


def test_quality_of_these_bytes_only(made: Make, written: Written, refused: Written) -> None:
    folder = made()
    path = folder.parent / "quality.json"
    path.write_text(json.dumps(document := quality(folder)))
    text = written(folder, "--quality", path)
    found = tables(text)
    assert found["same answers"] == ["–", "98.50%"] and found["prompt: KL, nats"] == ["–", "0.0489"]
    assert "200 questions" in text and "Some CPU" in text and "9.87" not in text and "somebody" not in text
    path.write_text(json.dumps(quality(folder, bytes=1)))
    assert "expected one candidate that is this artefact" in refused(folder, "--quality", path)
    document["candidates"][0]["about"]["text"] = "/home/somebody/book.txt: 3 tokens"
    path.write_text(json.dumps(document))
    assert "path of this machine, /home/somebody/book.txt" in refused(folder, "--quality", path)


@pytest.mark.parametrize(
    ("block", "no"),
    [
        (None, set()), ({"bits": 5, "group_size": 64}, {"demo app", "app 2.25"}),
        ({"bits": 4, "group_size": 64, "a": {"bits": 8, "group_size": 64}}, {"demo app"}),
        ({"bits": 4, "group_size": 64, "a": False, "mode": "affine"}, set()),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, {"demo app", "app 2.25"}),
    ],
)  # fmt: skip
def test_what_reads_these_weights(made: Make, written: Written, app_artefact: Path, block: Any, no: set[str]) -> None:
    text = written(made(llm=exported.read_manifest(app_artefact)["llm"] | {"quantization": block}))
    loaders = dict(re.findall(r"^- (.*) \(.*\): (yes|no)$", text, re.MULTILINE))
    assert set(loaders) == {"mlx-lm", "demo app", "app 2.25", "app 3.31"}
    assert {name for name, reads in loaders.items() if reads == "no"} == no


def test_the_licence_is_said_aloud(made: Make, cli: Callable[..., Any], written: Written) -> None:
    notice = f"What was changed:\n- all of it\n\n{ATTRIBUTION}\n"
    text = written(made({"LICENSE_MODEL": RESEARCH, "NOTICE": notice}))
    assert front(text)["license"] == "apple-amlr" and front(text)["license_link"] == "LICENSE_MODEL"
    assert text.index("For research only") < text.index("## Size") and ATTRIBUTION in text.split("## Licence")[1]
    assert "research" in cli("card", made({"LICENSE_MODEL": RESEARCH, "NOTICE": notice})).err
    answer = cli("card", made({"LICENSE": None}, licences=[]))
    assert "license" not in front(answer.out) and "Without a licence" in answer.out
    assert "it can't be published" in answer.err


def test_values_are_data(made: Make, written: Written, app_artefact: Path) -> None:
    llm = exported.read_manifest(app_artefact)["llm"]
    llm["recipe"] |= {"name": "a`b|c\n# d", "description": "<script>x</script> | *y* [z](javascript:1)\n\n# no"}
    notice = "What was changed:\n- ```\n# inner\n````\n"
    text = written(made({"NOTICE": notice}, llm=llm))
    assert "\n# no" not in text and "\n# d" not in text and r"\<script\>" in text and r"\[z\](javascript:1)" in text
    assert f"`````text\n{notice}`````\n" in text
    shown = html(text)
    assert shown.count("<h1>") == 1 and "<script" not in shown and 'href="javascript' not in shown
    assert "&lt;script&gt;x&lt;/script&gt; | *y* [z](javascript:1) # no" in shown and "# inner" in shown


def test_a_locale_without_utf8(app_artefact: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[3])}
    arguments = [sys.executable, "-m", "app_bridge", "card", app_artefact]
    ran = subprocess.run(arguments, env=environment, capture_output=True)
    assert ran.returncode == 0 and "…".encode() in ran.stdout


# --- what is refused


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"candidates": 3, "reference": {}}', b"null", b"[" * 100_000, None]
)
def test_no_quality(content: bytes | None, app_artefact: Path, tmp_path: Path, refused: Written) -> None:
    path = tmp_path / "quality.json"
    path.mkdir() if content is None else path.write_bytes(content)
    line = refused(app_artefact, "--quality", path)
    assert f"--quality {path}: " in line and ": expected the JSON" in line and "Error" not in line


def test_a_card_is_not_overwritten(
    app_artefact: Path, tmp_path: Path, refused: Written, cli: Callable[..., Any]
) -> None:
    (edited := tmp_path / "README.md").write_text("mine")
    assert "--overwrite" in refused(app_artefact, "--output", edited) and edited.read_text() == "mine"
    assert cli("card", app_artefact, "--output", edited, "--overwrite").code == 0 and "# " in edited.read_text()


def test_an_artefact_without_a_card(made: Make, app_artefact: Path, refused: Written) -> None:
    manifest = exported.read_manifest(app_artefact)
    for changed, message in (
        ({"config": manifest["config"] | {"layout": "mlx-vlm"}}, "export with --layout app"),
        ({"llm": manifest["llm"] | {"quantization": {"bits": "four"}}}, "lacks what a card tells (quantization: "),
        ({"vision": {}}, "no vision.channels"),
        ({"parity": {"passed": True}}, "lacks what a card tells"),
    ):
        assert message in refused(made(**changed))
    folder = made()
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    line = refused(folder)
    assert "config.json: changed" in line and "notes.txt: extra" in line


def test_unusable_input_is_one_line(app_artefact: Path, tmp_path: Path, refused: Written) -> None:
    (loop := tmp_path / "loop").symlink_to(loop)
    for argv in (
        (tmp_path / "none",), (app_artefact / "config.json",), (tmp_path,), (app_artefact, "--output", tmp_path),
        (app_artefact, "--output", app_artefact / "README.md"), (app_artefact, "--quality", tmp_path / "none"),
        (app_artefact, "--base-model", "x y"), (app_artefact, "--repo", "../x"), (app_artefact, "--repo", "single"),
        (app_artefact, "--repo", ""), (app_artefact, "--output", tmp_path / "no" / "card.md"),
        (loop, "--output", tmp_path / "card.md"), (app_artefact, "--output", loop / "card.md"),
    ):  # fmt: skip
        refused(*argv)
    assert not (app_artefact / "README.md").exists() and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("# no front matter\n", "no front matter"),
        ("---\n- a\n- b\n---\n", "not what the hub reads"),
        ("---\na: [\n---\n", "not what the hub reads"),
        ("---\nlicense: other\n---\n", "license_name"),
        ("---\nlicense: mit\n---\nsee ~/x\n", "line 4 tells a path"),
        ("---\nlicense: mit\n---\n\n/lustre7/me/x is mine\n", "line 5 tells a path of this machine, /lustre7/me/x"),
        ("---\nlicense: mit\n---\nmade from:/home/me/x\n", "/home/me/x"),
        ("---\nlicense: mit\n---\n# fine: https://a/tmp/b, and/or, a/home/b, ~5 GB, [x](/org/name)\n", ""),
    ],
)
def test_the_faults_of_a_card(text: str, fault: str) -> None:
    faults = "; ".join(checks.card_faults(text))
    assert fault in faults and bool(fault) == bool(faults)
