"""The smallest encoder that keeps a ratio: sensitivities, their cache, the choice, and what is really kept."""

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import computed, float64_features
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastvlm.common.errors import CheckFailed
from fastvlm.data import pictures
from fastvlm.data.images import open_image
from fastvlm.data.preprocessing import read_preprocessor
from model_export import contract
from model_export.artefact import read_manifest
from model_export.config import ExportConfig
from model_export.encoder import sensitivity
from model_export.encoder.channel_first import Encoder
from model_export.encoder.package import WEIGHTS
from quantization.coreml.compression import COMPRESSIONS, Compression
from quantization.coreml.compression import compress as compressed_weight
from tests.helpers import snr_db

pytestmark = pytest.mark.slow

SIZE = 64
ASKED = 42.0
LAYERS = {
    "stem.0.reparam_conv": ["palette4", "int8"],
    "stages.0.blocks.0.mlp.fc1": ["palette6"],
    "stages.2.blocks.1.mlp.fc2": ["palette4-g16", "palette6-g16"],
    "stages.3.blocks.0.token_mixer.qkv": ["int4-b32", "palette4"],
    "stages.4.blocks.0.mlp.fc1": ["palette4"],
    "final_conv.se.fc1": ["palette4-g16", "int8"],
    "final_conv.reparam_conv": ["int8"],
}
CANDIDATES = {layer: [COMPRESSIONS[name] for name in names] for layer, names in LAYERS.items()}


@pytest.fixture
def fastvit(tiny_encoder: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny_encoder)


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.random((1, 3, SIZE, SIZE), dtype=np.float32) for _ in range(2)]


# --- one layer's sensitivity


def noise_of(fastvit: nn.Module, layer: str, form: Compression, pixels: list[np.ndarray]) -> float:
    """In float64, by a whole run of a copy."""
    plain, changed = copy.deepcopy(fastvit).double(), copy.deepcopy(fastvit).double()
    weight = fastvit.get_submodule(layer).weight.detach().numpy().astype(np.float16)
    decoded = compressed_weight(weight, form).decode()
    changed.get_submodule(layer).weight.data = torch.from_numpy(decoded.astype(np.float64))
    ratios = []
    with torch.no_grad():
        for array in pixels:
            a, b = (m.forward_features(torch.from_numpy(array).double()).numpy() for m in (plain, changed))
            ratios.append(((a - b) ** 2).sum() / (a**2).sum())
    return float(np.mean(ratios))


def test_measures_what_one_compressed_layer_costs(fastvit: nn.Module, pixels: list[np.ndarray]) -> None:
    before = {name: value.clone() for name, value in fastvit.state_dict().items()}
    found = sensitivity.measure(fastvit, CANDIDATES, pixels)
    assert {layer: list(forms) for layer, forms in found.items()} == LAYERS
    for layer, forms in CANDIDATES.items():
        for form in forms:
            expected = noise_of(fastvit, layer, form, pixels)
            assert found[layer][form.name] == pytest.approx(expected, rel=2e-3), (layer, form.name)
            assert found[layer][form.name] != pytest.approx(expected * 1.01, rel=2e-3)
    assert all(torch.equal(value, before[name]) for name, value in fastvit.state_dict().items())


# --- the cache


class Stopped(Exception):
    pass


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Counts measurements; raises Stopped when `left` of them are done."""
    state: dict[str, Any] = {"measured": [], "left": math.inf}
    noise_of = sensitivity._Tails.noise_of

    def counting(tails: Any, layer: str, form: Compression) -> float:
        if len(state["measured"]) >= state["left"]:
            raise Stopped
        state["measured"].append((layer, form.name))
        return noise_of(tails, layer, form)

    monkeypatch.setattr(sensitivity._Tails, "noise_of", counting)
    return state


def test_interrupted_measurement_goes_on(
    fastvit: nn.Module, pixels: list[np.ndarray], counted: dict[str, Any], tmp_path: Path
) -> None:
    cache = tmp_path / "cache.json"
    counted["left"] = 4  # in the middle of the third layer
    with pytest.raises(Stopped):
        sensitivity.measure(fastvit, CANDIDATES, pixels, cache)
    finished = counted["measured"][:3]
    counted.update(measured=[], left=math.inf)
    resumed = sensitivity.measure(fastvit, CANDIDATES, pixels, cache)
    every = [(layer, form) for layer, forms in LAYERS.items() for form in forms]
    assert counted["measured"] == [one for one in every if one not in finished] and len(finished) == 3
    assert resumed == sensitivity.measure(fastvit, CANDIDATES, pixels)
    counted.update(measured=[])
    assert sensitivity.measure(fastvit, CANDIDATES, pixels, cache) == resumed and counted["measured"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_a_cache_of_something_else_or_damaged_is_not_used(
    fastvit: nn.Module, pixels: list[np.ndarray], counted: dict[str, Any], tmp_path: Path
) -> None:
    cache = tmp_path / "cache.json"
    one = {"final_conv.se.fc1": [COMPRESSIONS["int8"]]}

    def measured(arrays: list[np.ndarray] = pixels) -> int:
        counted["measured"].clear()
        sensitivity.measure(fastvit, one, arrays, cache)
        return len(counted["measured"])

    assert [measured(), measured()] == [1, 0]
    assert measured([pixels[0], pixels[1] + np.float32(1e-3)]) == 1
    fastvit.get_submodule("stem.0.reparam_conv").bias.data[0] += 1e-3  # type: ignore[index, union-attr]
    assert [measured(pixels), measured(pixels)] == [1, 0]
    sound = cache.read_bytes()
    key = json.loads(sound)["key"]
    noises = [json.dumps({"key": key, "noise": noise}).encode() for noise in ([], "x", None, {"final_conv.se.fc1": 1})]
    for damaged in (*noises, sound[: len(sound) // 2], b"", b"\xff\xfe", b"[]", b'{"key": 1}', b"3"):
        cache.write_bytes(damaged)
        assert measured() == 1 and cache.read_bytes() == sound, damaged


# --- the choice


@dataclass
class Simulated:
    """An encoder whose noise is `base` plus `factor` of what was predicted, times what `jitter` says of the choice."""

    layers: Mapping[str, Mapping[str, tuple[int, float]]]
    base: float = 1e-5
    factor: float = 1.0
    jitter: float = 0.0  # decibels up or down
    asked_for: list[tuple[int, float]] = field(default_factory=list)  # bytes, noise

    def size(self, forms: Mapping[str, Compression]) -> int:
        return sum(o[forms[name].name if name in forms else "fp16"][0] for name, o in self.layers.items())

    def noise(self, forms: Mapping[str, Compression]) -> float:
        digest = hashlib.sha256(repr(sorted((name, form.name) for name, form in forms.items())).encode()).digest()
        moved = self.factor * 10 ** (self.jitter * (digest[0] / 127.5 - 1) / 10)
        return self.base + moved * sum(self.layers[name][form.name][1] for name, form in forms.items())

    def __call__(self, forms: Mapping[str, Compression]) -> float:
        self.asked_for.append((self.size(forms), self.noise(forms)))
        return self.noise(forms)


def ordinary(count: int = 12) -> dict[str, dict[str, tuple[int, float]]]:
    rng = np.random.default_rng(0)
    bits = {"palette8": 8, "palette6": 6, "palette4": 4}
    layers = {}
    for number in range(count):
        size, loud = int(rng.integers(1000, 9000)), 10 ** rng.uniform(-6, -3)
        options = {form: (size * bit // 8, float(loud * 4.0 ** (8 - bit))) for form, bit in bits.items()}
        layers[f"layer{number}"] = {"fp16": (2 * size, 0.0)} | options
    return layers


@pytest.mark.parametrize("factor", [0.2, 30.0])
def test_choice_is_corrected_by_what_was_measured(factor: float) -> None:
    encoder = Simulated(ordinary(), factor=factor)
    chosen, facts = sensitivity.fit(encoder.layers, 30.0, encoder.base, encoder)
    assert encoder.noise(chosen) <= 1e-3 and chosen
    assert facts["kept_db"] == round(-10 * math.log10(encoder.noise(chosen)), 2)
    assert facts["kept_db"] < 31.5  # the options are steps, and the first round alone misses by 5 to 15 dB
    assert [one["weight_bytes"] for one in facts["rounds"]] == [size for size, _ in encoder.asked_for]


def test_more_rounds_where_none_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """Something that no correction foresees: nothing but very little keeps it; and nothing at all."""

    class Grudging(Simulated):
        def noise(self, forms: Mapping[str, Compression]) -> float:
            return self.base + (0.0 if len(forms) < 3 else 0.0011)

    encoder = Grudging(ordinary())
    chosen, facts = sensitivity.fit(encoder.layers, 30.0, encoder.base, encoder)
    assert 0 < len(chosen) < 3 and 5 < len(facts["rounds"]) < 25
    assert "warning" not in capsys.readouterr().err

    class Refusing(Simulated):
        def noise(self, forms: Mapping[str, Compression]) -> float:
            return 1.0 if forms else self.base

    encoder = Refusing(ordinary())
    chosen, facts = sensitivity.fit(encoder.layers, 30.0, encoder.base, encoder)
    assert chosen == {} and facts["kept_db"] == facts["float16_db"] == 50.0
    assert "warning: --min-snr 30: only float16 keeps it: no layer is compressed" in capsys.readouterr().err


@settings(max_examples=40)
@given(
    count=st.integers(1, 8),
    factor=st.floats(0.01, 100),
    jitter=st.floats(0, 6),
    asked=st.floats(5, 49.99),
    zero=st.booleans(),
)
def test_what_is_chosen_always_keeps_it(count: int, factor: float, jitter: float, asked: float, zero: bool) -> None:
    layers = ordinary(count)
    if zero:
        layers["layer0"] |= {"palette8": (layers["layer0"]["palette8"][0], 0.0)}
    encoder = Simulated(layers, factor=factor, jitter=jitter)
    chosen, facts = sensitivity.fit(layers, asked, encoder.base, encoder)
    assert encoder.noise(chosen) <= 10 ** (-asked / 10)
    passing = [size for size, noise in encoder.asked_for if noise <= 10 ** (-asked / 10)]
    assert not passing or encoder.size(chosen) == min(passing)
    assert passing == sorted(set(passing), reverse=True)  # no package is written that could only be larger
    assert len(encoder.asked_for) <= 30 and len(facts["rounds"]) >= 1


# --- the whole search


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one picture."""
    folder = tmp_path_factory.mktemp("searched") / "pictures"
    folder.mkdir()
    next(pictures.drawn(1)).save(folder / "one.png")
    return folder


def test_published_package_keeps_the_ratio(cli: Any, images: Path, tiny_checkpoint: Path) -> None:
    """The saved bytes in the executor, against the unfolded encoder in float64."""
    target = images.with_name("out")
    flags = ("--image-size", SIZE, "--min-snr", ASKED, "--calibration-data", images)
    answer = cli("export-vision", "--checkpoint", tiny_checkpoint, "--output-dir", target, *flags)
    assert answer.code == 0, answer.err
    facts = read_manifest(target)["vision"]
    opened = [partial(open_image, path) for path in pictures.files(images)]
    ratios = [
        snr_db(float64_features(tiny_checkpoint, array), computed(target / contract.PACKAGE, array))
        for array in pictures.pixels(read_preprocessor(tiny_checkpoint), SIZE, opened)
    ]
    kept = facts["sensitivity"]["kept_db"]
    assert min(ratios) >= ASKED and abs(min(ratios) - kept) < 0.02
    assert kept < ASKED + 2 < facts["sensitivity"]["float16_db"]  # no larger than it has to be

    said = facts["compression"]
    assert said["weight_bytes"] < 0.6 * said["float16_weight_bytes"]
    assert (target / contract.PACKAGE / WEIGHTS).stat().st_size < 0.65 * said["float16_weight_bytes"]
    assert len(said["forms"]) + len(said["wide"]) == 42 and all(said["wide"].values())
    config = read_manifest(target)["config"]
    assert config["minimum_deployment_target"] == "iOS18" and config["min_snr"] == ASKED
    assert config["newer_target"] == {"the forms that --min-snr chooses among": "iOS18"}
    assert {path.name for path in target.parent.iterdir()} == {"out", "out.sensitivity.json", "pictures"}


def test_an_older_target_has_its_own_forms(fastvit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no form costs anything, the smallest ones that the target has."""
    free = lambda _, options, *more: {name: {form.name: 0.0 for form in forms} for name, forms in options.items()}  # noqa: E731
    monkeypatch.setattr(sensitivity, "measure", free)
    monkeypatch.setattr(sensitivity, "_checker", lambda *_: lambda forms: 1e-6)
    for target, expected in (("iOS17", {"iOS16"}), ("iOS18", {"iOS16", "iOS18"})):
        config = ExportConfig(tmp_path / "in", tmp_path / "x", min_snr=30.0, minimum_deployment_target=target)
        assigned, _ = sensitivity.search(Encoder(fastvit), config, lambda size: [np.zeros(SIZE)], None, tmp_path)  # type: ignore[arg-type]
        assert {form.target for form in assigned.forms.values()} == expected and len(assigned.forms) > 15


def test_more_than_float16_keeps_is_refused_before_measuring(cli: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--output-dir", tmp_path / "x", "--image-size", SIZE, "--min-snr", 75)
    answer = cli("export-vision", "--checkpoint", tiny_checkpoint, *flags)
    assert answer.code == 2 and answer.err.splitlines()[-1].startswith("error: --min-snr 75: float16 alone keeps 5")
    assert "sensitivity" not in answer.err and list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_named(fastvit: nn.Module, tiny_checkpoint: Path, tmp_path: Path) -> None:
    fastvit.get_submodule("final_conv.se.fc1").weight.data[0, 0] = 1e6  # type: ignore[index, union-attr]
    config = ExportConfig(tiny_checkpoint, tmp_path / "x", min_snr=30.0)
    with pytest.raises(CheckFailed, match=r"do not fit float16, compressed or not: final_conv\.se\.fc1$"):
        sensitivity.search(Encoder(fastvit), config, lambda size: [], None, tmp_path)  # type: ignore[arg-type]
