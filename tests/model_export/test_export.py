"""The export as a whole: its bytes, what it refuses, what it leaves behind when it fails or is killed."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastvlm
from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data.preprocessing import read_preprocessor
from model_export import contract
from model_export.artefact import read_manifest, verify
from model_export.config import ExportConfig
from model_export.encoder import package, vision
from model_export.export import _rounded, export, plan
from tests.helpers import contents

pytestmark = pytest.mark.slow

DEMO = Path(fastvlm.__file__).with_name("demo_checkpoint")


@pytest.fixture
def quick_vision(monkeypatch: pytest.MonkeyPatch, tiny_artefact: Path) -> None:
    """The vision stage replaced by a copy of what it made before, for tests of everything around it."""

    def copy(checkpoint: Any, config: ExportConfig, target: Path, pictures: Any, source: Any) -> dict[str, Any]:
        shutil.copytree(tiny_artefact / contract.PACKAGE, target)
        return read_manifest(tiny_artefact)["vision"]

    monkeypatch.setattr("model_export.encoder.vision.export_vision", copy)


# --- configuration


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"compute_units": "NE"}, "CPU_AND_NE, CPU_AND_GPU, CPU_ONLY, ALL"),
        ({"minimum_deployment_target": "iOS14"}, "iOS15, iOS16, iOS17, iOS18"),
        ({"layout": "gguf"}, "app, mlx-vlm"),
        ({"image_size": -64}, "a multiple of 64"),
        ({"image_size": True}, "a multiple of 64"),
        ({"output_dir": "in"}, "is --checkpoint in, which is only read"),
        ({"output_dir": "in/out"}, "is inside --checkpoint in, which is only read"),
        ({"output_dir": "."}, "holds --checkpoint in, and would be replaced"),
        ({"output_dir": "link/out"}, "is inside --checkpoint in"),
    ],
)
def test_illegal_settings_are_refused_with_the_legal_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("link").symlink_to("in")
    ExportConfig("in", "out", "fp16", "float32", "ALL", "iOS15", 1024)  # the control
    with pytest.raises(UserError, match=expected):
        ExportConfig(**{"checkpoint": "in", "output_dir": "out", **settings})


# --- what is written


def test_artefact_is_complete_and_says_what_it_is(tiny_artefact: Path, tiny_checkpoint: Path) -> None:
    assert verify(tiny_artefact) == []
    document = read_manifest(tiny_artefact)
    assert document["parts"] == ["vision", "llm"]
    assert document["config"]["minimum_deployment_target"] == "iOS17"
    assert document["llm"]["recipe"]["name"] == "fp16" and document["llm"]["recipe"]["rules"]
    assert document["vision"]["fold"]["relative_error_below"] <= 1e-10
    assert document["versions"]["coremltools"] == "9.0"
    source = document["sources"]["files"]["model.safetensors"]
    assert source == {
        "sha256": hashlib.sha256((tiny_checkpoint / "model.safetensors").read_bytes()).hexdigest(),
        "size": (tiny_checkpoint / "model.safetensors").stat().st_size,
    }
    text = (tiny_artefact / contract.MANIFEST).read_text()
    assert not [word for word in (tiny_checkpoint.parent, tiny_artefact.parent, os.uname()[1]) if str(word) in text]


def test_the_app_finds_its_keys(tiny_artefact: Path) -> None:
    processor = json.loads((tiny_artefact / contract.PREPROCESSOR_CONFIG).read_text())
    for path, kind in contract.PREPROCESSOR_REQUIRED.items():
        value = processor
        for key in path.split("."):
            value = value[key]
        assert type(value) is kind, path
    assert processor["processor_class"] == "LlavaProcessor" and processor["image_strategy"] == "center_crop"
    processor = json.loads((tiny_artefact / contract.PROCESSOR_CONFIG).read_text())
    assert processor.pop("processor_class") == "LlavaProcessor"
    assert processor == {"image_token": "<image>", "num_additional_image_tokens": 0, "patch_size": 64}


def test_tokenizer_is_the_checkpoints(tiny_artefact: Path, tiny_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(tiny_checkpoint)
    original, copied = checkpoint.tokenizer(), AutoTokenizer.from_pretrained(tiny_artefact, local_files_only=True)
    config = json.loads((tiny_artefact / contract.TOKENIZER_CONFIG).read_text())
    assert config["tokenizer_class"] == "Qwen2Tokenizer" and "<|im_start|>" in config["chat_template"]
    assert copied.convert_tokens_to_ids("<image>") == checkpoint.image_token_id
    assert copied.eos_token == original.eos_token and copied.pad_token == original.pad_token
    for text in (
        "How many circles?",
        "  two  spaces\n\n",
        "naïve 🙂 漢字",
        "<|im_start|>user\n<image>\nWhat?<|im_end|>",
        "1234",
    ):
        ids = original(text)["input_ids"]
        assert copied(text)["input_ids"] == ids and copied.decode(ids) == original.decode(ids)
    messages = [{"role": "user", "content": "hello"}]
    rendered = [one.apply_chat_template(messages, tokenize=False) for one in (original, copied)]
    assert rendered[0] == rendered[1]


@pytest.mark.usefixtures("quick_vision")
@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
def test_image_strategy_and_size_are_carried(make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    source = make_checkpoint(layout=layout)
    export(plan(ExportConfig(source, tmp_path / "made", image_size=192)))
    written, original = read_preprocessor(tmp_path / "made"), read_preprocessor(source)
    assert written == dataclasses.replace(original, image_size=192)
    assert written.image_strategy == ("pad" if layout == "llava_qwen2" else "center_crop")


def test_another_checkpoint_gives_other_bytes(
    tiny_artefact: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: one weight that differs shows in the package, the weights and the manifest.
    Meanwhile nothing is in the temporary folder of the machine, nor left there."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    convert, seen = vision._convert, []

    def watch(*args: Any) -> None:
        convert(*args)
        seen.append(os.listdir(tmp_path / "temporary"))

    monkeypatch.setattr(vision, "_convert", watch)
    export(plan(ExportConfig(make_checkpoint(form="training", dtype="float16", seed=1), tmp_path / "out")))
    assert seen == [[]] and os.listdir(tmp_path / "temporary") == []
    ours, other = contents(tiny_artefact), contents(tmp_path / "out")
    changed = {name for name in ours if ours[name] != other[name]}
    assert {contract.MANIFEST, f"{contract.PACKAGE}/{package.WEIGHTS.as_posix()}", "model.safetensors"} <= changed


def test_rounding_keeps_what_threads_do_not_change() -> None:
    assert _rounded({"tolerance": 0.99999, "value": 0.99999}) == {"tolerance": 0.99999, "value": 1.0}
    assert _rounded({"a": [56.4305, {"b": 3.34578e-06}], "passed": True, "n": 123456}) == {
        "a": [56.4, {"b": 3.35e-06}], "passed": True, "n": 123456
    }  # fmt: skip


# --- one half alone, overwriting, failing


@pytest.mark.usefixtures("quick_vision")
def test_overwrite_replaces_the_whole_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    export(plan(ExportConfig(tiny_checkpoint, target, quant="int8")))
    with pytest.raises(UserError, match="--overwrite"):
        plan(ExportConfig(tiny_checkpoint, target))
    export(plan(ExportConfig(tiny_checkpoint, target, overwrite=True)))
    assert verify(target) == [] and read_manifest(target)["llm"]["recipe"]["name"] == "fp16"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.usefixtures("quick_vision")
@pytest.mark.parametrize("verdict", [{"passed": False, "verdict": "too noisy"}, {}])
def test_broken_parity_publishes_nothing(tiny_checkpoint: Path, tmp_path: Path, verdict: dict[str, Any]) -> None:
    target = tmp_path / "model"
    with pytest.raises(CheckFailed, match="nothing was written"):
        export(plan(ExportConfig(tiny_checkpoint, target)), lambda folder: verdict)
    assert os.listdir(tmp_path) == []
    export(plan(ExportConfig(tiny_checkpoint, target)), lambda folder: {"passed": True, "snr": 50.123})
    before = contents(target)
    assert read_manifest(target)["parity"] == {"passed": True, "snr": 50.1}
    with pytest.raises(CheckFailed):
        export(plan(ExportConfig(tiny_checkpoint, target, quant="int8", overwrite=True)), lambda folder: verdict)
    assert contents(target) == before and os.listdir(tmp_path) == ["model"]


@pytest.mark.usefixtures("quick_vision")
def test_checkpoint_that_changes_meanwhile_is_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")

    def touch(folder: Path) -> dict[str, bool]:
        os.utime(source / "model.safetensors")
        return {"passed": True}

    def fail(folder: Path) -> dict[str, bool]:
        raise CheckFailed("values are NaN")

    with pytest.raises(CheckFailed, match="values are NaN"):
        export(plan(ExportConfig(source, tmp_path / "model")), fail)

    with pytest.raises(UserError, match="changed while it was exported"):
        export(plan(ExportConfig(source, tmp_path / "model")), touch)
    assert os.listdir(tmp_path) == ["source"]


# --- the command line


def test_estimate_is_near_the_truth(tiny_checkpoint: Path, tiny_artefact: Path, tmp_path: Path) -> None:
    sizes = plan(ExportConfig(tiny_checkpoint, tmp_path / "model")).sizes
    files = {name: entry["size"] for name, entry in read_manifest(tiny_artefact)["files"].items()}
    package = sum(size for name, size in files.items() if name.startswith(contract.PACKAGE))
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    assert package == pytest.approx(sizes[contract.PACKAGE], rel=0.3)
    assert weights == pytest.approx(sizes[contract.WEIGHTS_GLOB], rel=0.3)


@pytest.mark.parametrize(
    "words",
    [
        ["export", "--checkpoint", "{tmp}/nothing", "--output-dir", "{tmp}/model"],
        ["export", "--checkpoint", "{checkpoint}", "--output-dir", "{tmp}/model", "--quant", "int7"],
        ["export", "--checkpoint", "{checkpoint}", "--output-dir", "{tmp}/model", "--image-size", "big"],
        ["export", "--checkpoint", "{checkpoint}", "--output-dir", "{checkpoint}/model"],
        ["export", "--checkpoint", "{checkpoint}", "--output-dir", "{checkpoint}/config.json/model"],
        ["export-vision", "--checkpoint", "{checkpoint}", "--output-dir", "{tmp}/model", "--quant", "int4"],
        ["export-llm", "--checkpoint", "{checkpoint}", "--output-dir", "{artefact}"],
        ["verify", "{checkpoint}"],
        ["inspect", "{tmp}/nothing"],
        ["inspect", "{tmp}/nothing.mlpackage"],
        ["generate", "{checkpoint}", "--prompt", "hello"],
        ["generate", "{artefact}", "--prompt", "hello", "--vision", "gpu"],
        ["generate", "{artefact}", "--prompt", "hello", "--max-new-tokens", "0"],
        ["generate", "{artefact}", "--prompt", "hello", "--image-file", "{tmp}/nothing.jpg"],
    ],
)
def test_unusable_input_is_one_line_and_exit_2(
    cli: Any, tiny_checkpoint: Path, tiny_artefact: Path, tmp_path: Path, words: list[str]
) -> None:
    places = {"tmp": tmp_path, "checkpoint": tiny_checkpoint, "artefact": tiny_artefact}
    answer = cli(*(word.format(**places) for word in words))
    lines = [line for line in answer.err.splitlines() if not line.startswith(("vision: ", "projector: ", "language: "))]
    assert answer.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert os.listdir(tmp_path) == []


def test_verify_and_inspect(cli: Any, tiny_artefact: Path, tmp_path: Path) -> None:
    answer = cli("verify", tiny_artefact, "--json")
    assert answer.code == 0 and answer.document == {"passed": True, "findings": []} | answer.document
    answer = cli("inspect", tiny_artefact, "--json")
    assert "conv 42" in answer.err and answer.document["package"]["opset"] == "CoreML7"
    assert cli("inspect", tiny_artefact / contract.PACKAGE).code == 0
    copied = shutil.copytree(tiny_artefact, tmp_path / "copy")
    path = copied / contract.PACKAGE / package.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    answer = cli("verify", copied, "--json")
    assert answer.code == 1 and answer.document["passed"] is False and "weight.bin" in answer.document["findings"][0]


# The command, which the system ends, as by SIGKILL, when it has worked on the step argv[1] for a moment.
KILLED = """
import runpy, signal, sys
from fastvlm.common import cli
begin, name = cli._display.begin, sys.argv.pop(1)
def begin_and_die(step):
    begin(step)
    if step.what.startswith(name):
        signal.setitimer(signal.ITIMER_PROF, 0.05)  # of the processor's time, however busy the machine is
cli._display.begin = begin_and_die
runpy.run_module("model_export", run_name="__main__")
"""


def test_killed_command_leaves_the_old_artefact(tiny_artefact: Path, tmp_path: Path) -> None:
    """The real command, killed at its end (the moments between its steps are test_staging's); then another one runs."""
    target = shutil.copytree(tiny_artefact, tmp_path / "model")
    before = contents(target)
    command = ["all", "--checkpoint", str(DEMO), "--output-dir", str(target), "--overwrite", "--parity-limit", "1"]
    step = "parity: encoders"
    killed = subprocess.run([sys.executable, "-c", KILLED, step, *command], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGPROF, killed.stderr
    assert contents(target) == before
    assert len(os.listdir(tmp_path)) == 2  # the artefact, and a staging folder, which the next run removes
    export(plan(ExportConfig(DEMO, target, overwrite=True), ("llm",)))
    assert verify(target) == [] and os.listdir(tmp_path) == ["model"]
