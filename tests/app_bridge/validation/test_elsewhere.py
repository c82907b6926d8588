"""Artefacts made elsewhere, in Apple's way (tests/elsewhere.py): every verb that reads an artefact, by the command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from app_bridge.__main__ import build_parser as app_bridge
from benchmarks.__main__ import build_parser as benchmarks
from fastvlm.__main__ import build_parser as fastvlm
from fastvlm.checkpoint.exported import recognise
from fastvlm.common.cli import run
from model_export import artefact, contract
from model_export.__main__ import build_parser as model_export
from quantization.__main__ import build_parser as quantization
from tests.app_bridge.app.conftest import VIEWER, viewer_is_published  # noqa: F401 (a fixture for all tests here)
from tests.app_bridge.models import call, contents, snapshot
from tests.elsewhere import write_elsewhere

pytestmark = pytest.mark.slow

Make = Callable[[int | None], Path]
Told = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(shape="app", layout="llava_qwen2", dtype="bfloat16")


@pytest.fixture(scope="module")
def make(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[int | None, Path] = {}

    def once(bits: int | None) -> Path:
        if bits not in made:
            made[bits] = write_elsewhere(checkpoint, tmp_path_factory.mktemp("elsewhere") / "model", bits, licence=True)
        return made[bits]

    return once


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """The exit code of a command and its JSON document."""

    def tell(parser: Any, *arguments: object) -> tuple[int, dict[str, Any]]:
        code = run(parser, [*map(str, arguments), "--json"])
        out = capsys.readouterr().out.splitlines()
        return code, json.loads(out[-1]) if out else {}

    return tell


@pytest.fixture
def copied(make: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make(4), tmp_path / "copied"))


@pytest.mark.parametrize(("bits", "stored"), [(None, "float16"), (8, "int8"), (4, "int4")])
def test_what_is_in_it(make: Make, told: Told, bits: int | None, stored: str) -> None:
    folder = make(bits)
    code, found = told(model_export, "inspect", "--model", folder)
    assert (code, found["llm"]["stored_as"], found["unknown"]) == (0, stored, list(artefact.elsewhere.UNKNOWN))
    assert found["vision"] == {"image_size": 1024, "resolutions": [1024], "channels": 3072}
    assert (found["config"]["compute_precision"], found["package"]["specification_version"]) == ("float32", 7)
    assert not found.keys() & {"sources", "parity", "licences", "versions"}
    assert {*found["files"]} == contents(folder).keys()
    code, planned = told(app_bridge, "plan", folder, "--device", "iphone-15-pro")
    parts = {part["name"]: part["low"] for part in planned["parts"]}
    assert code == 0 and parts["language model"] + parts["projector"] == found["llm"]["bytes"]
    assert parts["encoder"] == found["files"]["fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"]["size"]
    assert told(model_export, "audit", folder)[1]["functions"]


def test_float16_is_the_checkpoint_in_every_layer_and_answer(checkpoint: Path, make: Make, told: Told) -> None:
    code, found = told(benchmarks, "parity", "--reference", checkpoint, "--candidate", make(None), "--limit", 1)
    assert code == 0 and found["passed"], found["verdict"]
    assert float(found["metrics"]["layer_snr"]["value"]) > 100 and len(found["operations"]["layers"]) > 30


def test_another_checkpoints_parity_fails(make_checkpoint: Callable[..., Path], make: Make, told: Told) -> None:
    other = make_checkpoint(shape="app", layout="llava_qwen2", dtype="bfloat16", seed=1)
    code, found = told(benchmarks, "parity", "--reference", other, "--candidate", make(None), "--limit", 1)
    assert code == 1 and "layer_snr" in found["broken"] and "encoder_snr" in found["broken"]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_ones_answer_alike_in_mlx_and_pytorch(make: Make, told: Told, bits: int) -> None:
    answers = []
    for runner in ("torch", "mlx"):
        arguments = ("--prompt", "What is it?", "--max-new-tokens", 4, "--llm", runner, "--compute", "as-typed")
        code, found = told(model_export, "generate", "--model", make(bits), *arguments)
        assert code == 0 and f"int{bits} tensors" in found["runners"]["projector"]
        answers.append(found["answers"])
    assert answers[0] == answers[1]


def test_evaluate_and_ttft_take_it(checkpoint: Path, make: Make, told: Told, tmp_path: Path) -> None:
    asked = ("--model", make(8), "--reference", checkpoint, "--samples", "drawn", "--count", 1)
    code, found = told(quantization, "evaluate", *asked)
    (figures,) = (one["figures"] for one in found["candidates"])
    assert code == 0 and 0 < figures["bytes_language"] == (make(8) / "model.safetensors").stat().st_size
    runs = ("--runner", "executor-as-typed", "--launches", 1, "--rounds", 1, "--work-dir", tmp_path)
    code, found = told(benchmarks, "ttft", "--checkpoint", checkpoint, "--artefact", make(8), *runs)
    (runner,) = found["points"][0]["runners"]
    assert code == 0 and runner["name"] == "elsewhere-int8/executor-as-typed" and "error" not in runner


@pytest.mark.parametrize("against", [(), ("--app", VIEWER)])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_validate_finds_no_error_and_says_what_is_unknown(
    make: Make, told: Told, bits: int | None, against: tuple[object, ...]
) -> None:
    code, found = told(app_bridge, "validate", make(bits), *against)
    rules = {finding["rule"] for finding in found["findings"]}
    assert code == 0, found["findings"]
    assert rules >= {"made-elsewhere", "image-strategy"} and not any("sha256" in line for line in found["checked"][-3:])


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-7])


def without_projector(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in held.items() if not name.startswith(contract.PROJECTOR_PREFIX)}
    save_file(kept, folder / "model.safetensors")


def renamed(folder: Path) -> None:
    (folder / "fastvithd.mlpackage").rename(folder / "encoder.mlpackage")


def other_bits(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["bits"] = 8
    (folder / "config.json").write_text(json.dumps(config))


def unlicensed(folder: Path) -> None:
    (folder / "LICENSE").unlink()


@pytest.mark.parametrize(
    ("harm", "rule"),
    [
        (cut, "weights-unreadable"),
        (without_projector, "weight-missing"),
        (renamed, "package-name"),
        (other_bits, "quantization-mismatch"),
        (unlicensed, "licence-missing"),
    ],
)
def test_validate_and_bundle_refuse(
    copied: Path, told: Told, tmp_path: Path, harm: Callable[[Path], None], rule: str
) -> None:
    harm(copied)
    code, found = told(app_bridge, "validate", copied)
    errors = [finding for finding in found["findings"] if finding["severity"] == "error"]
    assert code == 1 and [finding["rule"] for finding in errors] == [rule]
    assert not any(finding["remedy"] == "export again" for finding in errors)
    assert call("bundle", copied, "--output-dir", tmp_path / "bundle") == 1 and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("harm", [cut, without_projector, renamed, other_bits])
def test_running_a_damaged_one_is_one_line(
    copied: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    harm(copied)
    assert run(model_export, ["generate", "--model", str(copied), "--prompt", "x"]) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(copied) in line and not any("Traceback" in one for one in before)


def test_bundled_into_an_app_and_back(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = Path(shutil.copytree(VIEWER, tmp_path / "app"))
    before = {bits: snapshot(make(bits)) for bits in (8, 4)}
    for bits in (8, 4):
        assert call("bundle", make(bits), "--app", app) == 0
        (held,) = [path.parent for path in app.rglob("model.safetensors") if ".fastvlm-bundle" not in path.parts]
        assert contents(held) == contents(make(bits))
    capsys.readouterr()
    assert call("bundle", make(4), "--app", app) == 0 and "already this model" in capsys.readouterr().out
    assert call("restore", "--app", app) == 0 and contents(held) == contents(make(8))
    assert {bits: snapshot(make(bits)) for bits in (8, 4)} == before


def test_a_bundle_of_its_own_is_replaced_only_as_it_was_made(make: Make, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    assert call("bundle", make(4), "--output-dir", target) == 0
    guide = json.loads((target / "bundle.json").read_text())
    assert guide["core_ml"]["minimum_deployment_target"] == "iOS16" and guide["language_model"]["quantization"]
    assert call("bundle", make(8), "--output-dir", target, "--overwrite") == 0
    (target / "model" / "mine.txt").write_text("mine")
    assert call("bundle", make(4), "--output-dir", target, "--overwrite") == 2 and (target / "model/mine.txt").exists()


@pytest.mark.parametrize("verb", ["verify", "doctor", "predict", "publish"])
def test_what_needs_more_than_it_has_says_what_it_is(
    make: Make, capsys: pytest.CaptureFixture[str], verb: str, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    parser, arguments = {
        "verify": (model_export, ["verify", "--model", make(8)]),
        "doctor": (fastvlm, ["doctor", make(8)]),
        "predict": (fastvlm, ["predict", "--model-path", make(8), "--prompt", "x", "--image-file", picture]),
        "publish": (app_bridge, ["publish", make(8), "--repo", "a/b"]),
    }[verb]
    assert run(parser, list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: ")
    assert "exported elsewhere" in said.out + said.err and contract.MANIFEST in said.out + said.err


def test_links_into_the_hub_cache_are_followed_and_others_are_not(copied: Path, tmp_path: Path, told: Told) -> None:
    snapshot_ = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot_.parent.mkdir(parents=True)
    copied.rename(snapshot_)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot_ / "model.safetensors").rename(blobs / "abc")
    (snapshot_ / "model.safetensors").symlink_to("../../blobs/abc")
    assert told(model_export, "inspect", "--model", snapshot_)[0] == 0
    (tmp_path / "secret").write_text("secret")
    (snapshot_ / "LICENSE2").symlink_to(tmp_path / "secret")
    assert told(model_export, "inspect", "--model", snapshot_)[0] == 2
    assert call("bundle", snapshot_, "--output-dir", tmp_path / "bundle") == 2


def test_a_checkpoint_stays_a_checkpoint(checkpoint: Path, make: Make, tmp_path: Path) -> None:
    """Apple's script writes the package into the checkpoint; mlx-vlm's own layout isn't the app's."""
    assert recognise(checkpoint) is None
    both = Path(shutil.copytree(checkpoint, tmp_path / "both"))
    shutil.copytree(make(None) / "fastvithd.mlpackage", both / "fastvithd.mlpackage")
    assert recognise(both) is None and run(fastvlm, ["doctor", str(both)]) == 0
    weights = load_file(make(None) / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("model.norm.weight")]
    theirs = tmp_path / "mlx-vlm"
    theirs.mkdir()
    save_file({name: weights[name], "vision_tower.stem.weight": weights[name]}, theirs / "model.safetensors")
    shutil.copy(make(None) / "config.json", theirs)
    found = recognise(theirs)
    assert found is not None and (found.layout, found.parts) == ("mlx-vlm", ("llm",))
    assert call("validate", theirs) == 1
