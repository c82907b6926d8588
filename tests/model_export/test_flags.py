"""The encoder's flags on the command line: every refusal is one line and exit 2, --dry-run, the same bytes again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from encoders import forms_recipe
from PIL import Image

from fastvlm.common.errors import UserError
from model_export import contract
from model_export.artefact import read_manifest, verify
from model_export.config import ExportConfig
from tests.helpers import contents


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
    for name, text in {
        "twice": '{"name": "a", "name": "b"}',
        "list": "[]",
        "broken": "{",
    }.items():
        (folder / f"{name}.json").write_text(text)
    for name, rules in {
        "rules": {"stages.4.*": "palette4", "*": "int8"},
        "grouped": {"*": "palette4-g16"},
        "unknown": {"*": "palette5"},
        "nothing": {},
        "stranger": {"layers.*": "int8"},
    }.items():
        forms_recipe(folder / f"{name}.json", rules)
    return folder


EXPORT, TARGET = ("export-vision", "--checkpoint"), "--minimum-deployment-target"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compute-precision", "fp16"], "--compute-precision: got fp16, expected one of float16, float32"),
        (["--compute-precision", "float32"], "the Neural Engine has no float32"),
        (["--vision-quant", "palette5"], "--vision-quant: got palette5, expected fp16, "),
        (["--vision-quant", "{at}/none.json"], "recipe {at}/none.json: no such file"),
        (["--vision-quant", "{at}/broken.json"], "no JSON ("),
        (["--vision-quant", "{at}/twice.json"], "twice.json"),
        (["--vision-quant", "{at}/list.json"], "list.json: "),
        (["--vision-quant", "{at}/nothing.json"], "nothing.json: the recipe has no rule for the encoder"),
        (["--vision-quant", "{at}/unknown.json"], "'palette5'"),
        (["--vision-quant", "int8", "--compute-precision", "float32", "--compute-units", "CPU_ONLY"], "are float16"),
        (["--vision-quant", "palette4-g16", TARGET, "iOS17"], "new in iOS18: ask for iOS18, or leave the flag"),
        (["--vision-quant", "{at}/grouped.json", TARGET, "iOS17"], "too old for --vision-quant palette4-g16"),
        (["--vision-quant", "palette4", TARGET, "iOS15"], "too old for --vision-quant palette4, new in iOS16"),
        (["--min-snr", "0"], "--min-snr: got 0, expected decibels between 0 and 100"),
        (["--min-snr", "nan"], "--min-snr: got nan, expected a number"),
        (["--min-snr", "30", TARGET, "iOS15"], "ask for iOS16"),
        (["--min-snr", "30", "--vision-quant", "int8"], "--vision-quant and --min-snr: one says"),
        (["--min-snr", "30", "--compute-precision", "float32", "--compute-units", "ALL"], "--min-snr with"),
        (["--calibration-data", "{at}/none"], "--calibration-data: {at}/none: no such file or folder"),
        (["--calibration-data", "{at}/rules.json"], "got an object, expected a list of records"),
        (["--calibration-data", "{at}/empty"], "--calibration-data: folder {at}/empty: no pictures"),
        (["--vision-quant", "{at}/stranger.json"], "matches no layer: layers.*"),
        (
            ["--resolutions", "64", "0"],
            "--resolutions: got 0, expected a whole number from 64 to 2048, a multiple of 64",
        ),
        (["--resolutions", "4096"], "--resolutions: got 4096, expected"),
        (["--resolutions"], "--resolutions"),
        (["--resolutions", "256", TARGET, "iOS16"], "too old for several functions in one package, new in iOS18"),
    ],
)
def test_refusals_are_one_line_and_exit_2(
    cli: Any, tiny_checkpoint: Path, tmp_path: Path, folders: Path, flags: list[str], message: str
) -> None:
    given = [flag.format(at=folders) for flag in flags]
    for more in ((), ("--dry-run",)):
        answer = cli(*EXPORT, tiny_checkpoint, "--output-dir", tmp_path / "made", *given, *more)
        line = answer.err.splitlines()[-1]
        assert answer.code == 2 and line.startswith("error: ") and message.replace("{at}", str(folders)) in line
    assert list(tmp_path.iterdir()) == []


def test_damaged_picture_is_named_and_nothing_is_left(
    cli: Any, tiny_checkpoint: Path, tmp_path: Path, folders: Path
) -> None:
    """Files are opened when they are needed, and not before."""
    command = (*EXPORT, tiny_checkpoint, "--output-dir", tmp_path / "made")
    answer = cli(*command, "--calibration-data", folders / "damaged")
    error = answer.err.splitlines()[-1]
    assert answer.code == 2 and error.startswith("error: ") and "a.png" in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            "export . --output-dir {at} --image-size 100 --min-snr -3 --quant int7 --vision-quant palete4"
            " --calibration-data {at}/none --parity-limit 0 --bogus --compute-units NPU",
            ["--image-size: got 100", "--min-snr: got -3", "--quant: unknown recipe 'int7'", "mean palette4?",
             "--calibration-data: {at}/none: no such", "--parity-limit: got 0", "--bogus: unknown", "--compute-units"],
        ),
        (
            "sweep --checkpoint . --quant int9 bogus --count 0 --text {at}/none --resolutions 1",
            ["--quant: unknown recipe 'int9'", "did you mean int", "unknown recipe 'bogus'", "--count: got 0", "--text",
             "--resolutions: got 1"],
        ),
    ],
)  # fmt: skip
def test_faults_of_a_command_line_come_at_once(cli: Any, tmp_path: Path, words: str, named: list[str]) -> None:
    answer = cli(*words.format(at=tmp_path).split())
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert [word for word in named if word.format(at=tmp_path) not in answer.err] == []


def test_faults_of_all_settings_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        ExportConfig(
            tmp_path, tmp_path, compute_precision="half", resolutions=(1, 2), vision_quant="x", min_snr=-1.0
        )  # fmt: skip
    for flag in ("--compute-precision", "--resolutions: got 1", "--resolutions: got 2", "--vision-quant: got x",
                 "--min-snr", "--output-dir"):  # fmt: skip
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
    cli: Any, tiny_checkpoint: Path, tmp_path: Path, folders: Path, flags: list[str], target: str
) -> None:
    given = [flag.format(at=folders) for flag in flags]
    answer = cli(*EXPORT, tiny_checkpoint, "--output-dir", tmp_path / "made", *given, "--dry-run", "--json")
    document = answer.document
    assert answer.code == 0 and document["config"]["minimum_deployment_target"] == target
    raised = document["config"].get("newer_target", {})
    assert bool(raised) == (target == "iOS18") == ("deployment target iOS18: " in answer.err)
    assert document["estimated_bytes"][contract.PACKAGE] > 0
    assert str(folders) not in json.dumps(document["config"])  # where the user's files lie is nobody's business
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_same_flags_give_the_same_bytes(cli: Any, tiny_checkpoint: Path, tmp_path: Path, folders: Path) -> None:
    """All that go together, and a checkpoint, a folder of pictures and rules that lie elsewhere."""
    moved = shutil.copytree(folders, tmp_path / "moved")
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    for target, at, checkpoint in (("0", folders, tiny_checkpoint), ("1", moved, source)):
        flags = ["--vision-quant", at / "rules.json", "--calibration-data", at / "pictures", "--resolutions", 64]
        assert cli(*EXPORT, checkpoint, "--output-dir", tmp_path / target, *flags).code == 0
        assert verify(tmp_path / target) == []
    assert contents(tmp_path / "0") == contents(tmp_path / "1")
    forms = read_manifest(tmp_path / "0")["vision"]["compression"]["forms"]
    assert set(forms.values()) == {"palette4", "int8"} and forms["stages.4.blocks.0.mlp.fc1"] == "palette4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "moved", "source"]
