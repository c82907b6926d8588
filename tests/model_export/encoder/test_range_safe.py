"""Exports of encoders whose values do not fit float16: every one is exported, in float16, and computes the encoder."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import (
    compared_operations,
    computed,
    counts_of,
    exported,
    float64_features,
    heated,
    outputs_of,
    rewritten,
)

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import CheckFailed
from fastvlm.data import pictures
from fastvlm.data.preprocessing import read_preprocessor
from model_export import artefact, contract
from model_export.artefact import read_manifest
from model_export.audit import audit
from model_export.config import ExportConfig
from model_export.encoder import fp16, vision
from model_export.export import export, plan
from tests.helpers import snr_db

pytestmark = pytest.mark.slow

PEAKS = (3e4, 3e6)
HOTTEST = PEAKS[-1]
SIZE = 128
POLICIES = ("as-typed", "strict-fp16")
FORGOTTEN = "stages.4.blocks.0.mlp.fc2"


def prepared(folder: Path) -> list[np.ndarray]:
    """The pictures that an export measures on, at the tiny checkpoints' size."""
    return list(pictures.pixels(read_preprocessor(folder), SIZE))


def noise_db(folder: Path, package: Path, compute: str) -> float:
    """SNR over all pictures against the encoder in float64; -inf for anything that is not finite."""
    found = [snr_db(float64_features(folder, one), computed(package, one, compute)) for one in prepared(folder)]
    return float(-10 * np.log10(np.mean([10 ** (-snr / 10) for snr in found])))


@dataclass
class Family:
    """One encoder cool and at two temperatures, as checkpoints, artefacts and what the export said of them."""

    cool: Path
    hot: dict[float, Path]
    artefacts: dict[float, Path]
    snr: dict[tuple[float, str], float]


@pytest.fixture(scope="module")
def family(make_checkpoint: Callable[..., Path], shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
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
    artefacts = {
        peak: shared(
            f"hot-{peak:g}", lambda target, source=source: export(plan(ExportConfig(source, target), ("vision",)))
        )
        for peak, source in {0.0: cool, **hot}.items()
    }
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
    """The control: without powers of two even the less hot one is ruined in strict fp16, or its weights don't fit."""
    naively(monkeypatch)
    assert naive_db(family.hot[PEAKS[0]], tmp_path / "naive.mlpackage") < 15


def naive_db(folder: Path, package: Path) -> float:
    """The strict SNR of an export without powers of two; -inf where its weights leave float16."""
    try:
        exported(folder, package)
    except CheckFailed as error:
        assert "their weights do not fit float16" in str(error)
        return -np.inf
    return noise_db(folder, package, "strict-fp16")


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "one more": lambda layers: layers.update({FORGOTTEN: layers[FORGOTTEN] + 1}),
    "none at all": lambda layers: layers.clear(),
    "one forgotten": lambda layers: layers.pop(FORGOTTEN),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parity_fails_when_the_record_is_false(family: Family, tmp_path: Path, change: str) -> None:
    false, pixels = tmp_path / "false", prepared(family.cool)[0]
    shutil.copytree(family.artefacts[HOTTEST], false)
    document = read_manifest(false)
    CHANGES[change](document["vision"]["fp16"]["layer_exponents"])
    artefact.write_manifest(false, document)
    layers = compared_operations(family.hot[HOTTEST], false, pixels)["layers"]
    worst = min(layers, key=lambda error: float(error["snr_db"]))
    assert float(worst["snr_db"]) < 10
    if change != "none at all":
        assert {error["layer"] for error in layers if float(error["snr_db"]) < 40} == {FORGOTTEN}


# --- everywhere else: before and inside activations, attention, squeeze-and-excite, the features themselves

STAGE4 = r"stages\.4\.downsample\.proj\.1\.reparam_conv\."
HOT = {  # what is made how many times as large, and made up for: values before a GELU and attention's scores
    STAGE4 + "(weight|bias)": 1e6,
    r"stages\.4\.pos_emb\.reparam_conv\.weight": 1e-6,
    r"stages\.3\.blocks\.0\.norm\.(weight|bias)": 300.0,
}


def test_features_beyond_float16_leave_in_float32(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The output is float32 by contract: its factor is taken there, and is the one operation in float32."""
    hot = rewritten(make_checkpoint(), tmp_path / "hot", {r"final_conv\.reparam_conv\.(weight|bias)": 1e6})
    facts = exported(hot, tmp_path / "made.mlpackage")
    assert facts["fp16"]["features_exponent"] >= 4 and len(facts["float32_operations"]) == 1
    for policy in POLICIES:
        assert noise_db(hot, tmp_path / "made.mlpackage", policy) >= 45, policy


def test_parity_and_the_manifest_know_scaled_activations(
    family: Family, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softmax of huge scores is nearly one-hot, which makes small errors of its scores large ones: 40 dB."""
    hot = rewritten(make_checkpoint(), tmp_path / "hot", HOT)
    export(plan(ExportConfig(hot, tmp_path / "made"), ("vision",)))
    package = tmp_path / "made" / contract.PACKAGE
    result = compared_operations(hot, tmp_path / "made", prepared(hot)[0])
    assert result["fault"] is None and len(result["layers"]) == 42
    assert min(float(error["snr_db"]) for error in result["layers"]) >= 40
    assert min(noise_db(hot, package, policy) for policy in POLICIES) >= 40
    facts = read_manifest(tmp_path / "made")["vision"]
    assert facts["fp16"]["activation_exponents"].keys() == {
        "stages.4.downsample.proj.1.act", "stages.3.blocks.0.token_mixer.softmax",
    }  # fmt: skip
    assert facts["fp16"]["headroom"]["after"]["least"] >= 16 and facts["value_dtypes"]["float32"] == 1  # the output
    cool = family.artefacts[0.0] / contract.PACKAGE
    counts, audits = ([tell(one) for one in (package, cool)] for tell in (counts_of, audit.audit))
    assert facts["scaling"]["operations"] == sum(counts[0].values()) - sum(counts[1].values()) == 12
    assert 0 < facts["scaling"]["byte_share"] < 0.2
    assert audits[0]["rules"] == audits[1]["rules"]
    scaled = [one["functions"]["main"]["scaled_activations"] for one in audits]
    assert scaled == [{"gelu": 1, "softmax": 1}, {}]
    naively(monkeypatch)  # the control
    assert naive_db(hot, tmp_path / "naive.mlpackage") < 15


def test_noise_decides_beside_given_pictures(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Pictures of a user's are tame: black here. What they are measured on has N(0, 1) noise among it all the same."""
    black = np.zeros((1, 3, SIZE, SIZE), np.float32)
    config = ExportConfig(make_checkpoint(), tmp_path / "a", calibration_data=tmp_path / "given")
    found = list(vision.measured_on(config, [SIZE], lambda size: iter([black])))
    assert len(found) == 2 and found[0] is black and found[1].std() == pytest.approx(1, abs=0.02)
    plain = list(vision.measured_on(ExportConfig(make_checkpoint(), tmp_path / "a"), [SIZE], lambda size: [black]))
    assert len(plain) == 1
    assert np.array_equal(list(pictures.pixels(read_preprocessor(make_checkpoint()), SIZE))[-1], found[1])
