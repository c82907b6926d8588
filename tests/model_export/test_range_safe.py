"""Exports of encoders whose values do not fit float16: rescaled by default, refused or mixed where that can't help."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import heated, operations_of, outputs_of, rewritten, snr_db

from benchmarks import parity
from fastvlm import pictures
from fastvlm.checkpoint import open_checkpoint
from fastvlm.cli import run
from fastvlm.errors import CheckFailed
from fastvlm.preprocessing import read_preprocessor
from model_export import artefact, contract, mil, vision
from model_export.__main__ import build_parser
from model_export.artefact import read_manifest
from model_export.config import ExportConfig
from model_export.export import export, plan

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


def test_the_executor_would_see_it(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without rescaling the coolest of the three is ruined in strict fp16, the others are refused."""
    monkeypatch.setattr("model_export.fp16.stream_exponents", lambda fastvit, ranges: [0] * len(fastvit.stages))
    exported(family.hot[PEAKS[0]], tmp_path / "naive.mlpackage")
    assert not noise_db(family.hot[PEAKS[0]], tmp_path / "naive.mlpackage", "strict-fp16") >= 10
    for peak in PEAKS[1:]:
        with pytest.raises(
            CheckFailed, match=r"stages\.[34]\.\S+ reaches .*65504: export with --compute-precision mixed"
        ):
            exported(family.hot[peak], tmp_path / "other.mlpackage")
        assert not (tmp_path / "other.mlpackage").exists()


def test_exponents_are_recorded_and_right(family: Family) -> None:
    def document(peak: float) -> dict[str, Any]:
        return json.loads((family.artefacts[peak] / contract.MANIFEST).read_text())["vision"]["fp16"]

    assert document(0.0)["stage_exponents"] == [0] * 5 and document(0.0)["branch_exponents"] == {}
    for peak in PEAKS:
        recorded = document(peak)
        assert recorded["stage_exponents"][:3] == [0, 0, 0]
        after, before = recorded["headroom"]["after"], recorded["headroom"]["before"]
        assert after["least"] >= 16 and after["squares"] >= 16
        assert before["least"] == pytest.approx(65504 / peak, rel=0.1) and before["squares"] < 1e-3
        # (16 x the square / 65504) / 4^k <= 1 and not for k - 1, of the stage that is the nearer one
        wanted = math.ceil(math.log2(16 / before["squares"]) / 2)
        assert wanted == max(recorded["stage_exponents"])
    assert document(PEAKS[2])["branch_exponents"]  # 1 / F and 2^-k together made weights subnormal


def test_hot_programs_are_of_the_same_operations(family: Family) -> None:
    """Powers of two are in weights: nothing is added, but for a `Gain` where a branch's last layer was lifted."""
    counts = {peak: read_manifest(made)["vision"]["operations"] for peak, made in family.artefacts.items()}
    for peak in PEAKS:
        lifted = read_manifest(family.artefacts[peak])["vision"]["fp16"]["branch_exponents"]
        gains = sum(name.endswith(("fc2", "proj")) for name in lifted)
        assert counts[peak] == counts[0.0] | {"mul": counts[0.0]["mul"] + gains}


def test_said_in_a_line(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    fastvit = vision.folded_encoder(open_checkpoint(family.hot[3e5]))[0]
    facts = vision.make_range_safe(fastvit, "float16", [SIZE], lambda size: prepared(family.cool))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"float16: stages carry x / 2^k, k = {facts['stage_exponents']}: headroom 0.2")


def falsified(made: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of an artefact whose export.json says something else of its powers of two, and is whole otherwise."""
    shutil.copytree(made, target)
    document = read_manifest(target)
    change(document["vision"]["fp16"])
    artefact.write_manifest(target, document)
    assert artefact.verify(target) == []
    return target


def test_parity_knows_the_factors(family: Family) -> None:
    result = parity.compare(family.hot[3e5], family.artefacts[3e5], limit=1)
    assert result["passed"], result["verdict"]
    assert len(result["operations"]["layers"]) == 42 and result["metrics"]["layer_snr"]["value"] >= 45


def one_more_in_a_stage(facts: dict[str, Any]) -> None:
    facts["stage_exponents"][3] += 1


def none_in_a_stage(facts: dict[str, Any]) -> None:
    facts["stage_exponents"] = [0] * 5


def one_branch_forgotten(facts: dict[str, Any]) -> None:
    facts["branch_exponents"].pop(sorted(facts["branch_exponents"])[0])


@pytest.mark.parametrize("change", [one_more_in_a_stage, none_in_a_stage, one_branch_forgotten])
def test_parity_fails_when_the_record_is_false(
    family: Family, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    false = falsified(family.artefacts[3e5], tmp_path / "false", change)
    pixels = prepared(family.cool)[0]
    operations = parity.compare_operations(family.hot[3e5], false, pixels)
    worst = min(operations["layers"], key=lambda error: float(error["snr_db"]))
    assert float(worst["snr_db"]) < 10
    if change is one_branch_forgotten:
        assert {error["layer"] for error in operations["layers"] if float(error["snr_db"]) < 40} == {worst["layer"]}
        assert worst["layer"].endswith("mlp.conv.conv")
        result = parity.compare(family.hot[3e5], false, limit=1)
        assert result["broken"] == ["layer_snr"] and result["first_operation"]["layer"] == worst["layer"]


# --- inside a GELU, and inside attention: mixed precision


BOILING = {HOT_MLP + r"fc1\.(weight|bias)": 3e4, HOT_MLP + r"fc2\.weight": 1 / 3e4}
STARING = {r"stages\.3\.blocks\.0\.norm\.(weight|bias)": 300.0}


@pytest.fixture(scope="module")
def boiling(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Values of about 5e5 before a GELU, which no power of two reaches."""
    return rewritten(make_checkpoint(), tmp_path_factory.mktemp("boiling") / "model", BOILING)


@pytest.fixture(scope="module")
def staring(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of attention of more than 65504: each position looks at one alone. Every module's output is small."""
    return rewritten(make_checkpoint(), tmp_path_factory.mktemp("staring") / "model", STARING)


@pytest.fixture(scope="module")
def both(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(make_checkpoint(), tmp_path_factory.mktemp("both") / "model", BOILING | STARING)


def test_float16_is_refused_and_mixed_named(boiling: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["vision", "--checkpoint", str(boiling), "--output-dir", str(tmp_path / "made")]
    assert run(build_parser, command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: float16: stages\.2\.blocks\.1\.mlp\.fc1 reaches 5\S+e\+05, where no power of two helps; float16 ends"
        r" at 65504: export with --compute-precision mixed",
        error,
    )
    assert list(tmp_path.iterdir()) == []


def test_scores_that_overflow_are_refused_and_mixed_named(staring: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="--compute-precision mixed"):
        exported(staring, tmp_path / "a.mlpackage")


def test_near_the_end_it_warns(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between a headroom of 1 and 4: a picture that is brighter than those measured could overflow."""
    gains = {HOT_MLP + r"fc1\.(weight|bias)": 1500.0, HOT_MLP + r"fc2\.weight": 1 / 1500.0}
    warm = rewritten(make_checkpoint(), tmp_path / "warm", gains)
    for precision, warned in (("float16", True), ("mixed", False)):
        fastvit = vision.folded_encoder(open_checkpoint(warm))[0]
        vision.make_range_safe(fastvit, precision, [SIZE], lambda size: prepared(warm))
        error = capsys.readouterr().err
        assert ("warning: float16: stages.2.blocks.1.mlp.fc1 reaches" in error) == warned
        assert ("consider --compute-precision mixed" in error) == warned


@pytest.fixture(scope="module")
def mixed(both: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """The artefact, its manifest and what its export said."""
    target = tmp_path_factory.mktemp("mixed") / "made"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model_export.vision.log", said.append)
        export(plan(ExportConfig(both, target, compute_precision="mixed")))
    yield target, read_manifest(target), "\n".join(said)


def float32_values(package: Path) -> list[tuple[str, str]]:
    """(type, name) of the operations that put out float32, by protobuf; without casts."""
    return [
        (operation.type, operation.outputs[0].name)
        for operation in operations_of(package)
        if operation.type != "cast" and operation.outputs[0].type.tensorType.dataType == 11  # FLOAT32
    ]


def test_mixed_keeps_just_those_operations_in_float32(mixed: tuple[Path, dict[str, Any], str]) -> None:
    folder, document, _ = mixed
    wide = float32_values(folder / contract.PACKAGE)
    assert [kind for kind, _ in wide] == ["conv", "gelu", "conv", "matmul", "softmax"]
    recorded = document["vision"]["float32_operations"]
    assert len(recorded) == 5 and all(name.startswith(one) for one, (_, name) in zip(recorded, wide))
    halves = document["vision"]["value_dtypes"]["float16"]
    assert halves > 80 and document["config"]["compute_precision"] == "mixed"


def test_mixed_computes_the_encoder(mixed: tuple[Path, dict[str, Any], str], both: Path) -> None:
    """A softmax that is nearly one-hot makes small errors of its scores large ones: so 40 dB, not 50."""
    for policy in POLICIES:
        assert noise_db(both, mixed[0] / contract.PACKAGE, policy) >= 40
    operations = parity.compare_operations(both, mixed[0], prepared(both)[0])
    assert operations["fault"] is None and len(operations["layers"]) == 42
    for series in ("layers", "rounding"):
        assert min(float(error["snr_db"]) for error in operations[series]) >= 40


def test_what_mixed_costs_is_reported(mixed: tuple[Path, dict[str, Any], str]) -> None:
    _, document, said = mixed
    cost = document["vision"]["mixed"]
    channels, hidden, positions = 32, 128, (SIZE // 16) ** 2
    scores = 2 * channels * (positions // 4) ** 2
    assert cost["operations"] == 5
    assert cost["extra_weight_bytes"] == 2 * (2 * channels * hidden + hidden + channels)
    assert 0.05 < cost["mac_share"] < 0.12
    total = (2 * channels * hidden * positions + scores) / cost["mac_share"]
    assert total == pytest.approx(macs_of_the_tiny_encoder(), rel=0.01)
    assert "mixed: 5 operations stay float32, off the Neural Engine: 8" in said


def macs_of_the_tiny_encoder() -> float:
    """By torch's own counter, on the module of timm."""
    from encoders import folded
    from torch.utils.flop_counter import FlopCounterMode

    model = folded(depths=(1, 1, 2, 1, 1), widths=(8, 16, 32, 64, 128), dtype=torch.float32)
    for block in (model.stages[3].blocks[0], model.stages[4].blocks[0]):
        block.token_mixer.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_features(torch.zeros(1, 3, SIZE, SIZE))
    return counter.get_total_flops() / 2
