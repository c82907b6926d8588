"""The export as a whole: its bytes, what it refuses, what it leaves behind when it fails or is killed."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoders import hashes

import fastvlm
from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.cli import run
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data import pictures
from fastvlm.data.preprocessing import read_preprocessor
from model_export import contract
from model_export.__main__ import build_parser
from model_export.artefact import read_manifest, verify
from model_export.config import COMPUTE_UNITS, DEPLOYMENT_TARGETS, PRECISIONS, ExportConfig
from model_export.encoder import package, vision
from model_export.export import _rounded, export, plan

pytestmark = pytest.mark.slow

DEMO = Path(fastvlm.__file__).with_name("demo_checkpoint")


@pytest.fixture
def quick_vision(monkeypatch: pytest.MonkeyPatch, tiny_artefact: Path) -> None:
    """The vision stage replaced by a copy of what it made before, for tests of everything around it."""

    def copy(checkpoint: Any, config: ExportConfig, target: Path, pictures: Any, notes: Any) -> dict[str, Any]:
        shutil.copytree(tiny_artefact / contract.PACKAGE, target)
        return read_manifest(tiny_artefact)["vision"]

    monkeypatch.setattr("model_export.encoder.vision.export_vision", copy)


# --- configuration


def test_every_legal_setting_is_accepted(tmp_path: Path) -> None:
    for precision in PRECISIONS:
        for units in COMPUTE_UNITS:
            for target in DEPLOYMENT_TARGETS:
                if (precision, units) != ("float32", "CPU_AND_NE"):
                    ExportConfig(tmp_path / "in", tmp_path / "out", "fp16", precision, units, target, 1024)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"compute_precision": "fp16"}, "float16, float32"),
        ({"compute_units": "NE"}, "CPU_AND_NE, CPU_AND_GPU, CPU_ONLY, ALL"),
        ({"minimum_deployment_target": "iOS14"}, "iOS15, iOS16, iOS17, iOS18"),
        ({"layout": "gguf"}, "app, mlx-vlm"),
        ({"image_size": 100}, "a multiple of 64"),
        ({"image_size": -64}, "a multiple of 64"),
        ({"image_size": 1 << 20}, "a multiple of 64"),
        ({"image_size": True}, "a multiple of 64"),
        ({"compute_precision": "float32"}, "CPU_AND_GPU, CPU_ONLY or ALL"),
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
    assert (
        str(tiny_checkpoint.parent) not in text and str(tiny_artefact.parent) not in text and os.uname()[1] not in text
    )


def test_the_app_finds_its_keys(tiny_artefact: Path) -> None:
    config = json.loads((tiny_artefact / contract.CONFIG).read_text())
    assert {key: type(config.get(key)) for key in contract.CONFIG_REQUIRED} == contract.CONFIG_REQUIRED
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
    assert copied.convert_tokens_to_ids("<image>") == checkpoint.image_token_id == config_image_token(tiny_artefact)
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


def config_image_token(folder: Path) -> int:
    return json.loads((folder / contract.CONFIG).read_text())["image_token_index"]


@pytest.mark.usefixtures("quick_vision")
@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
def test_image_strategy_and_size_are_carried(make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    source = make_checkpoint(layout=layout)
    for size in (None, 192):
        target = tmp_path / f"{size}"
        export(plan(ExportConfig(source, target, image_size=size)))
        written, original = read_preprocessor(target), read_preprocessor(source)
        assert (
            written.image_strategy == original.image_strategy == ("pad" if layout == "llava_qwen2" else "center_crop")
        )
        assert written.image_size == (size or 128)
        assert (written.mean, written.std) == (original.mean, original.std)


@pytest.mark.slow
def test_command_twice_in_other_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    """The demo checkpoint, read-only and under another name, each run with its own hash seed; parity included."""
    moved = shutil.copytree(DEMO, tmp_path / "elsewhere" / "other-name")
    before = hashes(moved)
    for path in (*moved.iterdir(), moved):
        path.chmod(0o555 if path.is_dir() else 0o444)
    results = []
    for number, source in enumerate((moved, DEMO)):
        command = ["all", "--checkpoint", str(source), "--output-dir", str(tmp_path / f"{number}"), "--json"]
        results.append(call([*command, "--parity-limit", "1"], PYTHONHASHSEED=str(number)))
    moved.chmod(0o755)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert hashes(moved) == before
    assert hashes(tmp_path / "0") == hashes(tmp_path / "1")
    assert verify(tmp_path / "0") == []
    document = json.loads(results[0].stdout.splitlines()[-1])
    assert document["parity"]["passed"] is True and document["files"] == read_manifest(tmp_path / "0")["files"]
    assert "coremltools" not in results[0].stderr and "Warning" not in results[0].stderr


def call(arguments: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "model_export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_another_checkpoint_gives_other_bytes(
    tiny_artefact: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The control of the test above: one weight that differs shows in the package, the weights and the manifest."""
    target = tmp_path / "out"
    export(plan(ExportConfig(make_checkpoint(form="training", dtype="float16", seed=1), target)))
    ours, other = hashes(tiny_artefact), hashes(target)
    changed = {name for name in ours if ours[name] != other[name]}
    assert {contract.MANIFEST, f"{contract.PACKAGE}/{package.WEIGHTS.as_posix()}", "model.safetensors"} <= changed


def test_rounding_keeps_what_threads_do_not_change() -> None:
    assert _rounded({"tolerance": 0.99999, "value": 0.99999}) == {"tolerance": 0.99999, "value": 1.0}
    assert _rounded({"a": [56.4305, {"b": 3.34578e-06}], "passed": True, "n": 123456}) == {
        "a": [56.4, {"b": 3.35e-06}], "passed": True, "n": 123456
    }  # fmt: skip


# --- one half alone, overwriting, failing


def test_one_half_alone(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        build_parser,
        ["llm", "--checkpoint", str(tiny_checkpoint), "--output-dir", str(tmp_path / "llm"), "--quant", "int4"],
    )
    assert code == 0 and "recipe int4" not in capsys.readouterr().err
    assert verify(tmp_path / "llm") == [] and read_manifest(tmp_path / "llm")["parts"] == ["llm"]
    assert not (tmp_path / "llm" / contract.PACKAGE).exists()


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
    before = hashes(target)
    assert read_manifest(target)["parity"] == {"passed": True, "snr": 50.1}
    with pytest.raises(CheckFailed):
        export(plan(ExportConfig(tiny_checkpoint, target, quant="int8", overwrite=True)), lambda folder: verdict)
    assert hashes(target) == before and os.listdir(tmp_path) == ["model"]


@pytest.mark.usefixtures("quick_vision")
def test_checkpoint_that_changes_meanwhile_is_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")

    def touch(folder: Path) -> dict[str, bool]:
        os.utime(source / "model.safetensors")
        return {"passed": True}

    with pytest.raises(UserError, match="changed while it was exported"):
        export(plan(ExportConfig(source, tmp_path / "model")), touch)
    assert os.listdir(tmp_path) == ["source"]


def test_full_disk_is_seen_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match="GB free"):
        plan(ExportConfig(tiny_checkpoint, tmp_path / "model"))


# --- the command line


def test_dry_run_writes_nothing(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["all", "--checkpoint", str(tiny_checkpoint), "--output-dir", str(tmp_path / "model")]
    assert run(build_parser, [*arguments, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["estimated_bytes"]["fastvithd.mlpackage"] > 500_000 and os.listdir(tmp_path) == []


def test_estimate_is_near_the_truth(tiny_checkpoint: Path, tiny_artefact: Path, tmp_path: Path) -> None:
    sizes = plan(ExportConfig(tiny_checkpoint, tmp_path / "model")).sizes
    files = {name: entry["size"] for name, entry in read_manifest(tiny_artefact)["files"].items()}
    package = sum(size for name, size in files.items() if name.startswith(contract.PACKAGE))
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    assert package == pytest.approx(sizes[contract.PACKAGE], rel=0.3)
    assert weights == pytest.approx(sizes[contract.WEIGHTS_GLOB], rel=0.3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["all", "--checkpoint", "{tmp}/nothing", "--output-dir", "{tmp}/model"],
        ["all", "--checkpoint", "{checkpoint}", "--output-dir", "{tmp}/model", "--quant", "int7"],
        ["all", "--checkpoint", "{checkpoint}", "--output-dir", "{tmp}/model", "--image-size", "big"],
        ["all", "--checkpoint", "{checkpoint}", "--output-dir", "{checkpoint}/model"],
        ["all", "--checkpoint", "{checkpoint}", "--output-dir", "{checkpoint}/config.json/model"],
        ["vision", "--checkpoint", "{checkpoint}", "--output-dir", "{tmp}/model", "--quant", "int4"],
        ["llm", "--checkpoint", "{checkpoint}", "--output-dir", "{artefact}"],
        ["verify", "--model", "{checkpoint}"],
        ["inspect", "--model", "{tmp}/nothing"],
        ["inspect", "--model", "{tmp}/nothing.mlpackage"],
        ["generate", "--model", "{checkpoint}", "--prompt", "hello"],
        ["generate", "--model", "{artefact}", "--prompt", "hello", "--vision", "gpu"],
        ["generate", "--model", "{artefact}", "--prompt", "hello", "--max-new-tokens", "0"],
        ["generate", "--model", "{artefact}", "--prompt", "hello", "--image-file", "{tmp}/nothing.jpg"],
        ["publish"],
        [],
    ],
)
def test_unusable_input_is_one_line_and_exit_2(
    tiny_checkpoint: Path, tiny_artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    places = {"tmp": tmp_path, "checkpoint": tiny_checkpoint, "artefact": tiny_artefact}
    try:
        code = run(build_parser, [argument.format(**places) for argument in arguments])
    except SystemExit as stopped:  # argparse's way
        code = stopped.code
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("vision: ", "projector: ", "language: ", "fastest "))
    ]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert os.listdir(tmp_path) == []


def test_verify_and_inspect(tiny_artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(build_parser, ["verify", "--model", str(tiny_artefact)]) == 0
    assert "files as they were exported" in capsys.readouterr().out
    assert run(build_parser, ["inspect", "--model", str(tiny_artefact), "--json"]) == 0
    out, err = capsys.readouterr()
    assert any("conv 42" in line for line in err.splitlines())
    assert json.loads(out)["package"]["opset"] == "CoreML7"
    assert run(build_parser, ["inspect", "--model", str(tiny_artefact / contract.PACKAGE)]) == 0
    capsys.readouterr()
    copied = shutil.copytree(tiny_artefact, tmp_path / "copy")
    path = copied / contract.PACKAGE / package.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run(build_parser, ["verify", "--model", str(copied), "--json"]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["passed"] is False and "weight.bin" in document["findings"][0]


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


@pytest.mark.slow
def test_killed_command_leaves_the_old_artefact(tmp_path: Path) -> None:
    """The real command, killed in its stages (the moments between them are test_artefact's), then run to its end."""
    target = tmp_path / "model"
    export(plan(ExportConfig(DEMO, target, quant="int8"), ("llm",)))
    before = hashes(target)
    command = ["all", "--checkpoint", str(DEMO), "--output-dir", str(target), "--overwrite", "--parity-limit", "1"]
    for step in ("hash the checkpoint", "fold the branches", "parity: encoders"):
        killed = subprocess.run([sys.executable, "-c", KILLED, step, *command], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGPROF, f"{step}: {killed.stderr}"
        assert hashes(target) == before
        left = os.listdir(tmp_path)  # the artefact, one staging folder (each run removes the last one's), and
        assert len(left) == 3 and ".model.resume" in left  # the finished files
    finished = call(command)
    assert finished.returncode == 0, finished.stderr
    assert verify(target) == [] and os.listdir(tmp_path) == ["model"]


def test_nothing_is_left_in_the_temporary_folder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    config = ExportConfig(tiny_checkpoint, tmp_path / "out")
    seen: list[str] = []
    convert = vision._convert

    def watch(*args: Any) -> None:
        convert(*args)
        seen.extend(os.listdir(tmp_path / "temporary"))

    monkeypatch.setattr(vision, "_convert", watch)
    prepare = read_preprocessor(tiny_checkpoint)
    vision.export_vision(
        open_checkpoint(tiny_checkpoint),
        config,
        tmp_path / contract.PACKAGE,
        lambda size: pictures.pixels(prepare, size),
    )
    assert seen == [] and os.listdir(tmp_path / "temporary") == []
