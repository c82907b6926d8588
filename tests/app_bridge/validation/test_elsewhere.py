"""Artefacts made elsewhere, in Apple's way (tests/elsewhere.py): every verb that reads an artefact, by the command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from fastvlm.checkpoint.exported import recognise
from model_export import artefact, contract
from tests.app_bridge.app.conftest import VIEWER, viewer_is_published  # noqa: F401 (a fixture for all tests here)
from tests.app_bridge.broken import gone, in_json, in_tensors, in_text
from tests.app_bridge.models import snapshot
from tests.elsewhere import write_elsewhere
from tests.helpers import contents

pytestmark = pytest.mark.slow

Cli = Callable[..., Any]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoints(make_checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """Of the app's sizes, and a tiny one for what needs no app."""
    return {name: make_checkpoint(shape=name, layout="llava_qwen2", dtype="bfloat16") for name in ("app", "tiny")}


@pytest.fixture(scope="module")
def make(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(bits, shape="app")`"""
    made: dict[tuple[int | None, str], Path] = {}

    def once(bits: int | None, shape: str = "app") -> Path:
        if (bits, shape) not in made:
            folder = tmp_path_factory.mktemp("elsewhere") / "model"
            made[bits, shape] = write_elsewhere(checkpoints[shape], folder, bits, licence=True)
        return made[bits, shape]

    return once


@pytest.fixture
def copied(make: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make(4), tmp_path / "copied"))


@pytest.mark.parametrize(("bits", "stored"), [(None, "float16"), (8, "int8"), (4, "int4")])
def test_what_is_in_it(make: Make, cli: Cli, bits: int | None, stored: str) -> None:
    folder = make(bits)
    found = cli("inspect", "--model", folder, "--json").document
    assert (found["llm"]["stored_as"], found["unknown"]) == (stored, list(artefact.elsewhere.UNKNOWN))
    assert found["vision"] == {"image_size": 1024, "resolutions": [1024], "channels": 3072}
    assert (found["config"]["compute_precision"], found["package"]["specification_version"]) == ("float32", 7)
    assert not found.keys() & {"sources", "parity", "licences", "versions"}
    assert {*found["files"]} == contents(folder).keys()
    planned = cli("plan", folder, "--device", "iphone-15-pro", "--json")
    parts = {part["name"]: part["low"] for part in planned.document["parts"]}
    assert planned.code == 0 and parts["language model"] + parts["projector"] == found["llm"]["bytes"]
    assert parts["encoder"] == found["files"]["fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"]["size"]
    assert cli("audit", make(bits, "tiny"), "--json").document["functions"]


def test_float16_is_the_checkpoint_and_no_other(
    checkpoints: dict[str, Path], make: Make, make_checkpoint: Callable[..., Path], cli: Cli
) -> None:
    """In every layer and answer; the negative control is a checkpoint of another seed."""
    candidate = ("--candidate", make(None, "tiny"), "--limit", 1, "--json")
    answer = cli("parity", "--reference", checkpoints["tiny"], *candidate)
    assert answer.code == 0 and answer.document["passed"], answer.document["verdict"]
    assert float(answer.document["metrics"]["layer_snr"]["value"]) > 100
    assert len(answer.document["operations"]["layers"]) > 30
    other = make_checkpoint(layout="llava_qwen2", dtype="bfloat16", seed=1)
    answer = cli("parity", "--reference", other, *candidate)
    assert answer.code == 1 and {"layer_snr", "encoder_snr"} <= {*answer.document["broken"]}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_ones_answer_alike_in_mlx_and_pytorch(make: Make, cli: Cli, bits: int) -> None:
    asked = ("--prompt", "What is it?", "--max-new-tokens", 4, "--compute", "as-typed", "--json")
    torch, mlx = (
        cli("generate", "--model", make(bits), *asked, "--llm", runner).document for runner in ("torch", "mlx")
    )
    assert f"int{bits} tensors" in torch["runners"]["projector"] and torch["answers"] == mlx["answers"]


def test_evaluate_and_ttft_take_it(checkpoints: dict[str, Path], make: Make, cli: Cli, tmp_path: Path) -> None:
    checkpoint, folder = checkpoints["tiny"], make(8, "tiny")
    asked = ("--model", folder, "--reference", checkpoint, "--samples", "drawn", "--count", 1)
    (candidate,) = cli("evaluate", *asked, "--json").document["candidates"]
    assert 0 < candidate["figures"]["bytes_language"] == (folder / "model.safetensors").stat().st_size
    runs = ("--runner", "executor-as-typed", "--launches", 1, "--rounds", 1, "--work-dir", tmp_path)
    answer = cli("ttft", "--checkpoint", checkpoint, "--artefact", folder, *runs, "--json")
    (runner,) = answer.document["points"][0]["runners"]
    assert answer.code == 0 and runner["name"] == "elsewhere-int8/executor-as-typed" and "error" not in runner


@pytest.mark.parametrize("against", [(), ("--app", VIEWER)])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_validate_finds_no_error_and_says_what_is_unknown(
    make: Make, cli: Cli, bits: int | None, against: tuple[object, ...]
) -> None:
    answer = cli("validate", make(bits), *against, "--json")
    rules = {finding["rule"] for finding in answer.document["findings"]}
    assert answer.code == 0 and rules >= {"made-elsewhere", "image-strategy"}
    assert not any("sha256" in line for line in answer.document["checked"][-3:])


def without_projector(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith(contract.PROJECTOR_PREFIX)]:
        del tensors[name]


HARM: dict[str, Callable[[Path], object]] = {
    "weights-unreadable": in_text("model.safetensors", lambda data: data[:-7]),
    "weight-missing": in_tensors(without_projector),
    "package-name": lambda folder: (folder / "fastvithd.mlpackage").rename(folder / "encoder.mlpackage"),
    "quantization-mismatch": in_json("config.json", lambda config: config["quantization"].update(bits=8)),
    "licence-missing": gone("LICENSE"),
}


@pytest.mark.parametrize("rule", HARM)
def test_a_damaged_one_is_refused(copied: Path, cli: Cli, tmp_path: Path, rule: str) -> None:
    HARM[rule](copied)
    answer = cli("validate", copied, "--json")
    errors = [finding for finding in answer.document["findings"] if finding["severity"] == "error"]
    assert answer.code == 1 and [finding["rule"] for finding in errors] == [rule]
    assert not any(finding["remedy"] == "export again" for finding in errors)
    assert cli("bundle", copied, "--output-dir", tmp_path / "bundle").code == 1 and not (tmp_path / "bundle").exists()
    if rule != "licence-missing":  # which is needed to pass it on only
        answer = cli("generate", "--model", copied, "--prompt", "x")
        line = answer.err.splitlines()[-1]
        assert answer.code == 2 and line.startswith("error: ") and str(copied) in line


def test_bundled_into_an_app_and_back(make: Make, tmp_path: Path, cli: Cli) -> None:
    app = Path(shutil.copytree(VIEWER, tmp_path / "app"))
    before = {bits: snapshot(make(bits)) for bits in (8, 4)}
    for bits in (8, 4):
        assert cli("bundle", make(bits), "--app", app).code == 0
        (held,) = [path.parent for path in app.rglob("model.safetensors") if ".fastvlm-bundle" not in path.parts]
        assert contents(held) == contents(make(bits))
    assert "already this model" in cli("bundle", make(4), "--app", app).out
    assert cli("restore", "--app", app).code == 0 and contents(held) == contents(make(8))
    assert {bits: snapshot(make(bits)) for bits in (8, 4)} == before


def test_a_bundle_of_its_own_is_replaced_only_as_it_was_made(make: Make, tmp_path: Path, cli: Cli) -> None:
    target = tmp_path / "bundle"
    assert cli("bundle", make(4), "--output-dir", target).code == 0
    guide = json.loads((target / "bundle.json").read_text())
    assert guide["core_ml"]["minimum_deployment_target"] == "iOS16" and guide["language_model"]["quantization"]
    assert cli("bundle", make(8), "--output-dir", target, "--overwrite").code == 0
    (mine := target / "model" / "mine.txt").write_text("mine")
    assert cli("bundle", make(4), "--output-dir", target, "--overwrite").code == 2 and mine.exists()


def test_what_needs_more_than_it_has_says_what_it_is(make: Make, cli: Cli, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    for words in (
        ("verify", "--model", make(8)), ("doctor", make(8)), ("publish", make(8), "--repo", "a/b"),
        ("predict", "--model-path", make(8), "--prompt", "x", "--image-file", picture),
    ):  # fmt: skip
        answer = cli(*words)
        assert answer.code == 2 and answer.err.splitlines()[-1].startswith("error: "), words
        assert "exported elsewhere" in answer.out + answer.err and contract.MANIFEST in answer.out + answer.err


def test_links_into_the_hub_cache_are_followed_and_others_are_not(copied: Path, tmp_path: Path, cli: Cli) -> None:
    cached = tmp_path / "models--a--b" / "snapshots" / "0123"
    cached.parent.mkdir(parents=True)
    copied.rename(cached)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (cached / "model.safetensors").rename(blobs / "abc")
    (cached / "model.safetensors").symlink_to("../../blobs/abc")
    assert cli("inspect", "--model", cached).code == 0
    (tmp_path / "secret").write_text("secret")
    (cached / "LICENSE2").symlink_to(tmp_path / "secret")
    assert cli("inspect", "--model", cached).code == 2
    assert cli("bundle", cached, "--output-dir", tmp_path / "bundle").code == 2


def test_a_checkpoint_stays_a_checkpoint(checkpoints: dict[str, Path], make: Make, tmp_path: Path, cli: Cli) -> None:
    """Apple's script writes the package into the checkpoint; mlx-vlm's own layout isn't the app's."""
    checkpoint, made = checkpoints["tiny"], make(None, "tiny")
    both = Path(shutil.copytree(checkpoint, tmp_path / "both"))
    shutil.copytree(made / "fastvithd.mlpackage", both / "fastvithd.mlpackage")
    assert recognise(checkpoint) is recognise(both) is None and cli("doctor", both).code == 0
    weights = load_file(made / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("model.norm.weight")]
    theirs = tmp_path / "mlx-vlm"
    theirs.mkdir()
    save_file({name: weights[name], "vision_tower.stem.weight": weights[name]}, theirs / "model.safetensors")
    shutil.copy(made / "config.json", theirs)
    found = recognise(theirs)
    assert found is not None and (found.layout, found.parts) == ("mlx-vlm", ("llm",))
    assert cli("validate", theirs).code == 1
