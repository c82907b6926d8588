"""The encoder's flags on the command line: every refusal is one line and exit 2, --dry-run, the same bytes again."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fastvlm.common.cli import run
from fastvlm.common.errors import UserError
from model_export import contract
from model_export.__main__ import build_parser
from model_export.artefact import read_manifest, verify
from model_export.config import ExportConfig


def call(*arguments: object) -> int:
    try:
        return run(build_parser, [str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse's way
        return int(str(stopped.code))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What flags can point at: folders of pictures, of none, of damaged ones, and rules for compression."""
    folder = tmp_path_factory.mktemp("folders")
    for name in ("pictures", "empty", "damaged"):
        (folder / name).mkdir()
    for index, mode in enumerate(("L", "RGB")):
        Image.linear_gradient("L").convert(mode).rotate(90 * index).save(folder / "pictures" / f"{index}.png")
    (folder / "empty" / "notes.txt").write_text("no picture")
    (folder / "damaged" / "a.png").write_bytes(b"not a picture")
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, text in {
        "rules": recipe({"stages.4.*": "palette4", "*": "int8"}),
        "grouped": recipe({"*": "palette4-g16"}),
        "unknown": recipe({"*": "palette5"}),
        "twice": '{"name": "a", "name": "b"}',
        "list": "[]",
        "nothing": recipe({}),
        "broken": "{",
        "stranger": recipe({"layers.*": "int8"}),
    }.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def recipe(rules: dict[str, str]) -> str:
    """A recipe with rules {glob over the encoder's layers: form}."""
    schemes = [
        {"pattern": f"vision_encoder.{glob}", "scheme": {"mode": "coreml", "form": form}}
        for glob, form in rules.items()
    ]
    return json.dumps(
        {"name": "mine", "version": 2, "rules": [*schemes, {"pattern": "*", "scheme": {"dtype": "float16"}}]}
    )


TARGET = "--minimum-deployment-target"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compute-precision", "fp16"], "--compute-precision: got 'fp16', expected one of float16, float32"),
        (["--compute-precision", "float32"], "the Neural Engine has no float32"),
        (["--vision-quant", "palette5"], "--vision-quant palette5: expected fp16, "),
        (["--vision-quant", ""], "--vision-quant"),
        (["--vision-quant", "{at}/none.json"], "recipe {at}/none.json: no such file"),
        (["--vision-quant", "{at}/broken.json"], "not readable as JSON"),
        (["--vision-quant", "{at}/binary.json"], "not readable as JSON"),
        (["--vision-quant", "{at}/twice.json"], "twice.json"),
        (["--vision-quant", "{at}/list.json"], "json: expected "),
        (["--vision-quant", "{at}/nothing.json"], "nothing.json: the recipe has no rule for the encoder"),
        (["--vision-quant", "{at}/unknown.json"], "form 'palette5' is not one of"),
        (["--vision-quant", "int8", "--compute-precision", "float32", "--compute-units", "CPU_ONLY"], "are float16"),
        (["--vision-quant", "palette4-g16", TARGET, "iOS17"], "new in iOS18: ask for iOS18, or leave the flag"),
        (["--vision-quant", "{at}/grouped.json", TARGET, "iOS17"], "too old for --vision-quant palette4-g16"),
        (["--vision-quant", "palette4", TARGET, "iOS15"], "too old for --vision-quant palette4, new in iOS16"),
        (["--min-snr", "0"], "--min-snr: got 0, expected decibels between 0 and 100"),
        (["--min-snr", "-3"], "--min-snr: got -3, expected decibels"),
        (["--min-snr", "nan"], "--min-snr: got nan, expected a number"),
        (["--min-snr", "inf"], "--min-snr: got inf, expected a number"),
        (["--min-snr", "30", TARGET, "iOS15"], "ask for iOS16"),
        (["--min-snr", "high"], "--min-snr"),
        (["--min-snr", "30", "--vision-quant", "int8"], "--vision-quant and --min-snr: one says"),
        (["--min-snr", "30", "--compute-precision", "float32", "--compute-units", "ALL"], "--min-snr with"),
        (["--calibration-data", "{at}/none"], "--calibration-data: {at}/none: no such file or folder"),
        (["--calibration-data", "{at}/rules.json"], "got an object, expected a list of LLaVA-format records"),
        (["--calibration-data", "{at}/empty"], "--calibration-data: folder {at}/empty: no pictures"),
        (["--vision-quant", "{at}/stranger.json"], "matches no layer: layers.*"),
        (["--resolutions", "64", "0"], "--resolutions: got 0, expected a multiple of 64 from 64 to 2048"),
        (["--resolutions", "4096"], "--resolutions: got 4096, expected"),
        (["--resolutions", "large"], "--resolutions"),
        (["--resolutions"], "--resolutions"),
        (["--resolutions", "256", TARGET, "iOS16"], "too old for several functions in one package, new in iOS18"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_refusals_are_one_line_and_exit_2(
    tiny_checkpoint: Path, tmp_path: Path, folders: Path, capsys: pytest.CaptureFixture[str],
    flags: list[str], message: str, more: list[str],
) -> None:  # fmt: skip
    given = [flag.format(at=folders) for flag in flags]
    assert call("vision", "--checkpoint", tiny_checkpoint, "--output-dir", tmp_path / "made", *given, *more) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and message.replace("{at}", str(folders)) in line
    assert list(tmp_path.iterdir()) == []


def test_damaged_picture_is_named_and_nothing_is_left(
    tiny_checkpoint: Path, tmp_path: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are opened when they are needed, and not before."""
    command = ["vision", "--checkpoint", tiny_checkpoint, "--output-dir", tmp_path / "made"]
    assert call(*command, "--calibration-data", folders / "damaged") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "a.png" in error and list(tmp_path.iterdir()) == []


def test_faults_of_all_flags_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        ExportConfig(
            tmp_path, tmp_path, compute_precision="half", resolutions=(1, 2), vision_quant="x", min_snr=-1.0
        )  # fmt: skip
    for flag in ("--compute-precision", "--resolutions: got 1", "--resolutions: got 2", "--vision-quant x", "--min-snr",
                 "--output-dir"):  # fmt: skip
        assert flag in str(error.value)


def test_a_recipe_says_how_the_encoder_is_stored(tmp_path: Path, folders: Path) -> None:
    paths, grouped = (tmp_path / "in", tmp_path / "out"), str(folders / "grouped.json")
    config = ExportConfig(*paths, quant=grouped)
    assert config.compression == ExportConfig(*paths, vision_quant=grouped).compression
    assert config.deployment_target == "iOS18" and config.document()["vision_quant"] == {"*": "palette4-g16"}
    assert config.document()["quant"] == "grouped.json" and str(folders) not in str(config.document())
    assert ExportConfig(*paths, quant="int4").document()["vision_quant"] == "fp16"
    for other in ({"vision_quant": "int8"}, {"min_snr": 30.0}):
        with pytest.raises(UserError, match=r"and --quant .*grouped.json: the recipe has rules for the encoder"):
            ExportConfig(*paths, quant=grouped, **other)


@pytest.mark.parametrize(
    ("flags", "target"),
    [
        ([], "iOS17"),
        (["--calibration-data", "{at}/pictures"], "iOS17"),
        (["--resolutions", "64", "192"], "iOS18"),
        (["--vision-quant", "palette4"], "iOS17"),
        (["--vision-quant", "{at}/rules.json"], "iOS17"),
        (["--vision-quant", "int4-b32"], "iOS18"),
        (["--min-snr", "30"], "iOS18"),
        (["--min-snr", "30", TARGET, "iOS16"], "iOS16"),
        (["--vision-quant", "palette4", TARGET, "iOS16"], "iOS16"),
    ],
)
def test_dry_run_says_what_would_be_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, folders: Path, capsys: pytest.CaptureFixture[str],
    flags: list[str], target: str,
) -> None:  # fmt: skip
    given = [flag.format(at=folders) for flag in flags]
    command = ["vision", "--checkpoint", tiny_checkpoint, "--output-dir", tmp_path / "made", *given]
    assert call(*command, "--dry-run", "--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert document["config"]["minimum_deployment_target"] == target
    raised = document["config"].get("newer_target", {})
    assert bool(raised) == (target == "iOS18") == ("deployment target iOS18: " in captured.err)
    assert document["estimated_bytes"][contract.PACKAGE] > 0
    assert str(folders) not in json.dumps(document["config"])  # where the user's files lie is nobody's business
    assert list(tmp_path.iterdir()) == []


def test_the_same_flags_give_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path, folders: Path) -> None:
    """All that go together, and a checkpoint, a folder of pictures and rules that lie elsewhere."""
    moved = shutil.copytree(folders, tmp_path / "moved")
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    results = []
    for number, (at, checkpoint) in enumerate(((folders, tiny_checkpoint), (moved, source))):
        target = tmp_path / f"{number}"
        flags = ["--vision-quant", at / "rules.json", "--calibration-data", at / "pictures"]
        assert call("vision", "--checkpoint", checkpoint, "--output-dir", target, *flags) == 0
        assert verify(target) == []
        results.append({
            path.relative_to(target).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in target.rglob("*") if path.is_file()
        })  # fmt: skip
    assert results[0] == results[1]
    forms = read_manifest(tmp_path / "0")["vision"]["compression"]["forms"]
    assert set(forms.values()) == {"palette4", "int8"} and forms["stages.4.blocks.0.mlp.fc1"] == "palette4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "moved", "source"]
