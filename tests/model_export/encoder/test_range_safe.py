"""Exports of encoders whose values do not fit float16: every one is exported, in float16, and computes the encoder."""

import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import compared_operations, counts_of, heated, outputs_of, rewritten, snr_db

from benchmarks.parity import compare
from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.cli import run
from fastvlm.common.errors import CheckFailed
from fastvlm.data import pictures
from fastvlm.data.preprocessing import read_preprocessor
from model_export import artefact, contract, mil
from model_export.__main__ import build_parser
from model_export.artefact import read_manifest
from model_export.audit import audit
from model_export.config import ExportConfig
from model_export.encoder import fp16, vision
from model_export.export import export, plan

pytestmark = pytest.mark.slow

PEAKS = (3e4, 3e5, 3e6)
SIZE = 128
POLICIES = ("as-typed", "strict-fp16")
HOT_MLP = r"stages\.2\.blocks\.1\.mlp\."


def prepared(folder: Path) -> list[np.ndarray]:
    """The pictures that an export measures on, at the tiny checkpoints' size."""
    return list(pictures.pixels(read_preprocessor(folder), SIZE))


def exported(folder: Path, target: Path, **settings: Any) -> dict[str, Any]:
    config = ExportConfig(folder, target.with_name("no-artefact"), **settings)
    return vision.export_vision(
        open_checkpoint(folder), config, target, lambda size: pictures.pixels(read_preprocessor(folder), size)
    )


def noise_db(folder: Path, package: Path, compute: str) -> float:
    """SNR over all pictures against the folded encoder in float64; -inf for anything that is not finite."""
    reference = vision.folded_encoder(open_checkpoint(folder))[0].double()
    executor = mil.load(package, compute=compute)
    found = []
    for pixels in prepared(folder):
        expected = outputs_of(reference, torch.from_numpy(pixels).double())["features"].flatten(2).transpose(1, 2)
        found.append(snr_db(expected.numpy(), executor.predict({contract.INPUT: pixels})[contract.OUTPUT]))
    return float(-10 * np.log10(np.mean([10 ** (-snr / 10) for snr in found])))


@dataclass
class Family:
    """One encoder cool and at three temperatures, as checkpoints, artefacts and what the export said of them."""

    cool: Path
    hot: dict[float, Path]
    artefacts: dict[float, Path]
    snr: dict[tuple[float, str], float]


@pytest.fixture(scope="module")
def family(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The streams of the stages that attend peak at PEAKS. Attention is loud, so that its normalization matters."""
    folder = tmp_path_factory.mktemp("hot")
    louder = {r"stages\.[34]\.blocks\.\d+\.layer_scale_1\.gamma": 12.0}
    cool = rewritten(make_checkpoint(), folder / "cool", louder)
    reference = vision.folded_encoder(open_checkpoint(cool))[0]
    peaks = {3: 0.0, 4: 0.0}
    for pixels in prepared(cool):
        for name, values in outputs_of(reference, torch.from_numpy(pixels)).items():
            if found := re.fullmatch(r"stages\.([34])\.(pos_emb|blocks\.\d+)", name):
                peaks[int(found[1])] = max(peaks[int(found[1])], float(values.abs().max()))
    hot = {
        peak: heated(cool, folder / f"{peak:g}", {stage: peak / found for stage, found in peaks.items()})
        for peak in PEAKS
    }
    artefacts = {}
    for peak, source in {0.0: cool, **hot}.items():
        artefacts[peak] = folder / f"{peak:g}.artefact"
        export(plan(ExportConfig(source, artefacts[peak])))
    snr = {
        (peak, policy): noise_db(hot.get(peak, cool), made / contract.PACKAGE, policy)
        for peak, made in artefacts.items()
        for policy in POLICIES
    }
    return Family(cool, hot, artefacts, snr)


# --- a hot residual stream


@pytest.mark.parametrize("policy", POLICIES)
def test_hot_checkpoints_lose_nothing(family: Family, policy: str) -> None:
    assert family.snr[0.0, policy] >= 50
    for peak in PEAKS:
        assert family.snr[peak, policy] >= family.snr[0.0, policy] - 1, peak


def naively(patch: pytest.MonkeyPatch) -> None:
    """Exports that choose no power of two."""
    patch.setattr("model_export.encoder.fp16.choose", lambda fastvit, ranges: fp16.flow(fastvit))


def test_the_executor_would_see_it(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without powers of two all are ruined in strict fp16, or their weights don't fit."""
    naively(monkeypatch)
    for peak in PEAKS:
        assert naive_db(family.hot[peak], tmp_path / f"{peak}.mlpackage") < 15


def naive_db(folder: Path, package: Path) -> float:
    """The strict SNR of an export without powers of two; -inf where its weights leave float16."""
    try:
        exported(folder, package)
    except CheckFailed as error:
        assert "their weights do not fit float16" in str(error)
        return -np.inf
    return noise_db(folder, package, "strict-fp16")


def test_exponents_are_recorded_and_right(family: Family) -> None:
    def document(peak: float) -> dict[str, Any]:
        return json.loads((family.artefacts[peak] / contract.MANIFEST).read_text())["vision"]["fp16"]

    assert document(0.0)["layer_exponents"] == {} and document(0.0)["activation_exponents"] == {}
    for peak in PEAKS:
        recorded = document(peak)
        layers = recorded["layer_exponents"]
        assert layers and all(re.match(r"stages\.[34]\.", name) for name in layers)
        after, before = recorded["headroom"]["after"], recorded["headroom"]["before"]
        assert after["least"] >= 16 and after["squares"] >= 16
        assert before["least"] < 65504 / peak * 1.1 and before["squares"] < 1e-3
        # (16 x the square / 65504) / 4^k <= 1 and not for k - 1, of the stage that is the nearer one
        wanted = math.ceil(math.log2(16 / before["squares"]) / 2)
        assert -wanted == min(layers[f"stages.{stage}.pos_emb.reparam_conv"] for stage in (3, 4))


def test_hot_programs_are_of_the_same_operations(family: Family) -> None:
    """Of streams alone, powers of two are in weights: nothing is added, but for a `Gain` where a branch's last layer
    has an exponent of its own."""
    counts = {peak: read_manifest(made)["vision"]["operations"] for peak, made in family.artefacts.items()}
    for peak in PEAKS:
        vision_facts = read_manifest(family.artefacts[peak])["vision"]
        assert vision_facts["fp16"]["activation_exponents"] == {}
        gains = vision_facts.get("scaling", {"operations": 0})["operations"]
        assert counts[peak] == counts[0.0] | {"mul": counts[0.0]["mul"] + gains}


def test_said_in_a_line(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    fastvit = vision.folded_encoder(open_checkpoint(family.hot[3e5]))[0]
    vision.range_safe(fastvit, prepared(family.cool))
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"float16: \d+ values carry x / 2\^k, k up to \d+: minimum headroom 0\.2\d*x -> \d\S+x", line)


def falsified(made: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of an artefact whose export.json says something else of its powers of two, and is whole otherwise."""
    shutil.copytree(made, target)
    document = read_manifest(target)
    change(document["vision"]["fp16"])
    artefact.write_manifest(target, document)
    assert artefact.verify(target) == []
    return target


def test_parity_knows_the_factors(family: Family) -> None:
    result = compare.compare(family.hot[3e5], family.artefacts[3e5], limit=1)
    assert result["passed"], result["verdict"]
    assert len(result["operations"]["layers"]) == 42 and result["metrics"]["layer_snr"]["value"] >= 45


def one_more_in_a_layer(facts: dict[str, Any]) -> None:
    facts["layer_exponents"]["stages.3.pos_emb.reparam_conv"] += 1


def none_at_all(facts: dict[str, Any]) -> None:
    facts["layer_exponents"] = {}


def one_layer_forgotten(facts: dict[str, Any]) -> None:
    facts["layer_exponents"].pop("stages.4.blocks.0.mlp.fc2")


@pytest.mark.parametrize("change", [one_more_in_a_layer, none_at_all, one_layer_forgotten])
def test_parity_fails_when_the_record_is_false(
    family: Family, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    false = falsified(family.artefacts[3e5], tmp_path / "false", change)
    pixels = prepared(family.cool)[0]
    operations = compared_operations(family.hot[3e5], false, pixels)
    worst = min(operations["layers"], key=lambda error: float(error["snr_db"]))
    assert float(worst["snr_db"]) < 10
    if change is one_layer_forgotten:
        assert {error["layer"] for error in operations["layers"] if float(error["snr_db"]) < 40} == {worst["layer"]}
        assert worst["layer"] == "stages.4.blocks.0.mlp.fc2"
        result = compare.compare(family.hot[3e5], false, limit=1)
        assert result["broken"] == ["layer_snr"] and result["first_operation"]["layer"] == worst["layer"]


# --- everywhere else: before and inside activations, attention, squeeze-and-excite, the features themselves

STAGE4 = r"stages\.4\.downsample\.proj\.1\.reparam_conv\."
MLP = r"stages\.2\.blocks\.1\.mlp\."
HOT = {  # what is made how many times as large, and made up for
    "patch embedding": {STAGE4 + "(weight|bias)": 1e6, r"stages\.4\.pos_emb\.reparam_conv\.weight": 1e-6},
    "first of a patch embedding": {
        r"stages\.3\.downsample\.proj\.0\.reparam_conv\.(weight|bias)": 1e5,
        r"stages\.3\.downsample\.proj\.1\.reparam_conv\.weight": 1e-5,
    },
    "stem": {r"stem\.0\.reparam_conv\.(weight|bias)": 1e6, r"stem\.1\.reparam_conv\.weight": 1e-6},
    "MLP": {MLP + r"fc1\.(weight|bias)": 3e4, MLP + r"fc2\.weight": 1 / 3e4},
    "scores": {r"stages\.3\.blocks\.0\.norm\.(weight|bias)": 300.0},
    "gate": {r"final_conv\.se\.fc2\.(weight|bias)": 1e6},
    "squeeze": {r"final_conv\.se\.fc1\.(weight|bias)": 1e7, r"final_conv\.se\.fc2\.weight": 1e-7},
    "stream of an early stage": {
        r"stages\.1\.blocks\.0\.token_mixer\.reparam_conv\.(weight|bias)": 1e6,
        r"stages\.2\.downsample\.proj\.0\.reparam_conv\.weight": 1e-6,
    },
}


@pytest.mark.parametrize("place", HOT)
def test_hot_anywhere_is_exported_in_float16(
    place: str, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softmax of huge scores is nearly one-hot, which makes small errors of its scores large ones: 40 dB there."""
    hot = rewritten(make_checkpoint(), tmp_path / "hot", HOT[place])
    facts = exported(hot, tmp_path / "made.mlpackage")
    assert facts["fp16"]["layer_exponents"]
    assert "float32_operations" not in facts and facts["value_dtypes"]["float32"] == 1  # the output
    assert facts["fp16"]["headroom"]["after"]["least"] >= 16
    for policy in POLICIES:
        assert noise_db(hot, tmp_path / "made.mlpackage", policy) >= (40 if place == "scores" else 45), policy
    assert audit.audit(tmp_path / "made.mlpackage")["rules"] == audit.audit(cool_package(make_checkpoint))["rules"]
    naively(monkeypatch)  # the control
    assert naive_db(hot, tmp_path / "naive.mlpackage") < 15


@functools.cache
def cool_package(make_checkpoint: Callable[..., Path]) -> Path:
    """An ordinary encoder's package."""
    target = make_checkpoint().parent / "cool.mlpackage"
    exported(make_checkpoint(), target)
    return target


def test_features_beyond_float16_leave_in_float32(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The output is float32 by contract: its factor is taken there, and is the one operation in float32."""
    hot = rewritten(make_checkpoint(), tmp_path / "hot", {r"final_conv\.reparam_conv\.(weight|bias)": 1e6})
    facts = exported(hot, tmp_path / "made.mlpackage")
    assert facts["fp16"]["features_exponent"] >= 4 and len(facts["float32_operations"]) == 1
    for policy in POLICIES:
        assert noise_db(hot, tmp_path / "made.mlpackage", policy) >= 45, policy


def test_parity_and_the_manifest_know_scaled_activations(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    hot = rewritten(make_checkpoint(), tmp_path / "hot", HOT["patch embedding"] | HOT["scores"])
    export(plan(ExportConfig(hot, tmp_path / "made")))
    result = compared_operations(hot, tmp_path / "made", prepared(hot)[0])
    assert result["fault"] is None and len(result["layers"]) == 42
    assert min(float(error["snr_db"]) for error in result["layers"]) >= 40
    facts = read_manifest(tmp_path / "made")["vision"]
    assert facts["fp16"]["activation_exponents"].keys() == {
        "stages.4.downsample.proj.1.act", "stages.3.blocks.0.token_mixer.softmax",
    }  # fmt: skip
    plain = counts_of(cool_package(make_checkpoint))
    scaled = counts_of(tmp_path / "made" / contract.PACKAGE)
    assert facts["scaling"]["operations"] == sum(scaled.values()) - sum(plain.values()) == 12
    assert 0 < facts["scaling"]["byte_share"] < 0.2
    audited = audit.audit(tmp_path / "made" / contract.PACKAGE)
    assert audited["functions"]["main"]["scaled_activations"] == {"gelu": 1, "softmax": 1}
    assert any("activations that take x / 2^k" in line for line in audit.lines(audited))
    plain_audit = audit.audit(cool_package(make_checkpoint))
    assert plain_audit["functions"]["main"]["scaled_activations"] == {}


def test_ranges_knows_what_an_export_does(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = rewritten(make_checkpoint(), tmp_path / "hot", HOT["patch embedding"] | HOT["scores"] | HOT["MLP"])
    facts = exported(hot, tmp_path / "made.mlpackage")["fp16"]
    assert run(build_parser, ["ranges", "--checkpoint", str(hot), "--json", "--plot", str(tmp_path / "p.png")]) == 0
    output = capsys.readouterr().out.splitlines()
    document = json.loads(output[-1])
    layers = {one["layer"]: -one["exponent"] for one in document["operations"] if one["type"] == "conv2d"}
    wanted = {name: e for name, e in facts["layer_exponents"].items() if not name.endswith("qkv")}
    assert {name: e for name, e in layers.items() if e and not name.endswith("qkv")} == wanted and len(wanted) >= 3
    scores = next(one for one in document["operations"] if one["type"] == "matmul")
    assert scores["exponent"] == facts["activation_exponents"]["stages.3.blocks.0.token_mixer.softmax"]
    assert document["smallest_exported_headroom"] >= 16 > document["smallest_headroom"]
    assert f"an export lets {document['scaled_operations']} operations carry x / 2^k" in document["verdict"]
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_noise_decides_beside_given_pictures(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Pictures of a user's are tame: black here. What they are measured on has N(0, 1) noise among it all the same."""
    black = np.zeros((1, 3, SIZE, SIZE), np.float32)
    config = ExportConfig(make_checkpoint(), tmp_path / "a", calibration_data=tmp_path / "given")
    found = list(vision._measured_on(config, [SIZE], lambda size: iter([black])))
    assert len(found) == 2 and found[0] is black and found[1].std() == pytest.approx(1, abs=0.02)
    plain = list(vision._measured_on(ExportConfig(make_checkpoint(), tmp_path / "a"), [SIZE], lambda size: [black]))
    assert len(plain) == 1
    assert np.array_equal(list(pictures.pixels(read_preprocessor(make_checkpoint()), SIZE))[-1], found[1])
