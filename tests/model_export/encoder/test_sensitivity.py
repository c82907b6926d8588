"""The smallest encoder that keeps a ratio: sensitivities, their cache, the choice, and what is really kept."""

import contextlib
import copy
import hashlib
import io
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
from encoders import snr_db
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.cli import run
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data import pictures
from fastvlm.data.preprocessing import open_image, read_preprocessor
from fastvlm.model.build import encoder
from model_export import contract, mil
from model_export.__main__ import build_parser
from model_export.artefact import read_manifest
from model_export.config import ExportConfig
from model_export.encoder import compress, sensitivity, vision
from model_export.encoder.channel_first import Encoder, channel_first
from model_export.encoder.package import WEIGHTS
from quantization.coreml.compression import COMPRESSIONS, Compression
from quantization.coreml.compression import compress as compressed_weight

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


def call(*arguments: Any) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = run(build_parser, [str(argument) for argument in arguments])
    return code, errors.getvalue()


def prepared(checkpoint: Path) -> nn.Module:
    return channel_first(vision.folded_encoder(open_checkpoint(checkpoint))[0])


@pytest.fixture
def fastvit(tiny_checkpoint: Path) -> nn.Module:
    return prepared(tiny_checkpoint)


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


def test_interruption_leaves_the_weights_alone(
    fastvit: nn.Module, pixels: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> float:
        raise Stopped

    before = {name: value.clone() for name, value in fastvit.state_dict().items()}
    monkeypatch.setattr(sensitivity._Tails, "_noise", stop)
    with pytest.raises(Stopped):
        sensitivity.measure(fastvit, CANDIDATES, pixels)
    assert all(torch.equal(value, before[name]) for name, value in fastvit.state_dict().items())


def test_cache_of_something_else_is_not_used(
    fastvit: nn.Module,
    pixels: list[np.ndarray],
    counted: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache.json"
    one = {"final_conv.se.fc1": [COMPRESSIONS["int8"]]}
    sensitivity.measure(fastvit, one, pixels, cache)
    assert len(counted["measured"]) == 1
    sensitivity.measure(fastvit, one, [pixels[0], pixels[1] + np.float32(1e-3)], cache)
    assert len(counted["measured"]) == 2 and "of another encoder or other pictures" in capsys.readouterr().err
    fastvit.get_submodule("stem.0.reparam_conv").bias.data[0] += 1e-3  # type: ignore[index, union-attr]
    sensitivity.measure(fastvit, one, pixels, cache)
    assert len(counted["measured"]) == 3 and "of another encoder or other pictures" in capsys.readouterr().err
    sensitivity.measure(fastvit, one, pixels, cache)  # the control
    assert len(counted["measured"]) == 3 and "1 of 1 sensitivities are known" in capsys.readouterr().err


def test_damaged_cache_is_measured_anew(
    fastvit: nn.Module,
    pixels: list[np.ndarray],
    counted: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache, layer = tmp_path / "cache.json", "final_conv.se.fc1"
    one = {layer: [COMPRESSIONS["int8"]]}
    expected = sensitivity.measure(fastvit, one, pixels, cache)
    sound = cache.read_bytes()
    key = json.loads(sound)["key"]
    noises: list[Any] = [[], "x", None, {layer: "int8"}, {layer: {"int8": "x"}}, {layer: {"int8": -1.0}}]
    documents = [json.dumps({"key": key, "noise": noise}).encode() for noise in noises]
    documents.append(json.dumps({"key": key, "noise": {layer: {"int8": math.nan}}}).encode())
    for damaged in (*documents, sound[: len(sound) // 2], b"", b"\xff\xfe", b"[]", b'{"key": 1}', b"3"):
        capsys.readouterr()
        cache.write_bytes(damaged)
        counted["measured"].clear()
        assert sensitivity.measure(fastvit, one, pixels, cache) == expected
        assert len(counted["measured"]) == 1, damaged
        assert "measured anew" in capsys.readouterr().err
        assert cache.read_bytes() == sound


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


@pytest.mark.parametrize("factor", [1.0, 0.2, 3.0, 30.0])
def test_choice_is_corrected_by_what_was_measured(factor: float) -> None:
    encoder = Simulated(ordinary(), factor=factor)
    chosen, facts = sensitivity.fit(encoder.layers, 30.0, encoder.base, encoder)
    assert encoder.noise(chosen) <= 1e-3 and chosen
    assert facts["kept_db"] == round(-10 * math.log10(encoder.noise(chosen)), 2)
    assert facts["kept_db"] < 31.5  # the options are steps, and the first round alone misses by 5 to 15 dB
    assert [one["weight_bytes"] for one in facts["rounds"]] == [size for size, _ in encoder.asked_for]


def test_smallest_of_the_passing_rounds_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a later round fails; and no package is written that could only be larger than one that passed."""
    layers = ordinary()
    failed_last = several = 0
    for seed in range(200):
        encoder = Simulated({f"{seed}-{name}": options for name, options in layers.items()}, jitter=2.0)
        chosen, _ = sensitivity.fit(encoder.layers, 30.0, encoder.base, encoder)
        passing = [size for size, noise in encoder.asked_for if noise <= 1e-3]
        assert encoder.size(chosen) == min(passing) and encoder.noise(chosen) <= 1e-3
        assert passing == sorted(set(passing), reverse=True)
        failed_last += encoder.asked_for[-1][1] > 1e-3
        several += len(passing) > 1
    assert failed_last > 10 and several > 10  # the cases did occur
    assert "too little" in capsys.readouterr().err


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


@settings(max_examples=60)
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
    with contextlib.redirect_stderr(io.StringIO()):
        chosen, facts = sensitivity.fit(layers, asked, encoder.base, encoder)
    assert encoder.noise(chosen) <= 10 ** (-asked / 10)
    passing = [size for size, noise in encoder.asked_for if noise <= 10 ** (-asked / 10)]
    assert not passing or encoder.size(chosen) == min(passing)
    assert len(encoder.asked_for) <= 30 and len(facts["rounds"]) >= 1


# --- the whole search


@pytest.fixture(scope="module")
def searched(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An artefact by the command, and what it logged."""
    folder = tmp_path_factory.mktemp("searched")
    target = folder / "out"
    (folder / "pictures").mkdir()
    next(pictures.drawn(1)).save(folder / "pictures" / "one.png")
    flags = ("--output-dir", target, "--image-size", SIZE, "--min-snr", ASKED)
    flags += ("--calibration-data", folder / "pictures")
    code, log = call("vision", "--checkpoint", tiny_checkpoint, *flags)
    assert code == 0, log
    return target, log


def shown(searched: tuple[Path, str], checkpoint: Path) -> list[np.ndarray]:
    """The pixels that the command measured on."""
    files = pictures.files(searched[0].with_name("pictures"))
    return list(pictures.pixels(read_preprocessor(checkpoint), SIZE, [partial(open_image, path) for path in files]))


def test_published_package_keeps_the_ratio(searched: tuple[Path, str], tiny_checkpoint: Path) -> None:
    """The saved bytes in the executor, against the unfolded encoder in float64."""
    target, log = searched
    facts = read_manifest(target)["vision"]
    original = encoder(open_checkpoint(tiny_checkpoint), torch.float32).double()
    executor = mil.load(target / contract.PACKAGE)
    ratios = []
    for array in shown(searched, tiny_checkpoint):
        with torch.no_grad():
            features = original.forward_features(torch.from_numpy(array).double())
        expected = features.flatten(2).transpose(1, 2).numpy()
        ratios.append(snr_db(expected, executor.predict({contract.INPUT: array})[contract.OUTPUT]))
    kept = facts["sensitivity"]["kept_db"]
    assert min(ratios) >= ASKED and abs(min(ratios) - kept) < 0.02
    assert kept < ASKED + 2 < facts["sensitivity"]["float16_db"]  # no larger than it has to be

    said = facts["compression"]
    assert said["weight_bytes"] < 0.6 * said["float16_weight_bytes"]
    assert (target / contract.PACKAGE / WEIGHTS).stat().st_size < 0.65 * said["float16_weight_bytes"]
    assert len(said["forms"]) + len(said["wide"]) == 42 and all(said["wide"].values())
    assert "8 output channels do not divide" in json.dumps(said["wide"]) or "more noise" in json.dumps(said["wide"])
    config = read_manifest(target)["config"]
    assert config["minimum_deployment_target"] == "iOS18" and config["min_snr"] == ASKED
    assert config["newer_target"] == {"the forms that --min-snr chooses among": "iOS18"}
    assert "deployment target iOS18: " in log and f"--min-snr {ASKED:g}: " in log
    assert {path.name for path in target.parent.iterdir()} == {"out", "out.sensitivity.json", "pictures"}


@dataclass
class InTorch:
    """Stands for `_Check`: the noise of all forms together, without writing a package."""

    encoder: Encoder
    pictures: Any
    write: Any
    folder: Path

    def __call__(self, forms: Mapping[str, Compression]) -> float:
        changed = copy.deepcopy(self.encoder)
        for name, weight in compress.compressed(self.encoder.fastvit, forms).items():
            changed.fastvit.get_submodule(name).weight.data = torch.from_numpy(weight.decode().astype(np.float32))
        noise = []
        with torch.no_grad():
            for array in map(torch.from_numpy, self.pictures(SIZE)):
                a, b = (model(array) for model in (self.encoder, changed))
                noise.append(float((a - b).square().sum() / a.square().sum()))
        return 1e-6 + max(noise)


def test_lower_ratio_is_smaller_and_older_target_has_its_own_forms(
    searched: tuple[Path, str], tiny_checkpoint: Path, counted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_Check", InTorch)
    fastvit = prepared(tiny_checkpoint)
    shapes = {name: weight.shape for name, weight in compress.weights(fastvit).items()}
    arrays = shown(searched, tiny_checkpoint)

    def size(asked: float, target: str | None = None) -> tuple[int, set[str]]:
        config = ExportConfig(
            tiny_checkpoint, searched[0], min_snr=asked, image_size=SIZE, minimum_deployment_target=target
        )
        assigned, facts = sensitivity.search(Encoder(fastvit), config, lambda _: arrays, None, Path())  # type: ignore[arg-type]
        assert facts["asked_db"] == asked <= facts["kept_db"]
        assert sorted([*assigned.forms, *assigned.uncompressed]) == sorted(shapes)
        return compress.size_of(shapes, assigned.forms), {form.target for form in assigned.forms.values()}

    sizes = [size(asked) for asked in (20.0, 30.0, 45.0)]
    assert [one for one, _ in sizes] == sorted({one for one, _ in sizes})
    assert sizes[-1][0] < compress.size_of(shapes, {}) and sizes[1][1] == {"iOS16", "iOS18"}
    older = size(30.0, "iOS17")
    assert older[1] == {"iOS16"} and older[0] >= sizes[1][0]
    assert counted["measured"] == []  # all from the command's cache


def test_more_than_float16_keeps_is_refused_before_measuring(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--output-dir", tmp_path / "x", "--image-size", SIZE, "--min-snr", 75)
    code, log = call("vision", "--checkpoint", tiny_checkpoint, *flags)
    error = log.splitlines()[-1]
    assert (
        code == 2 and error.startswith("error: --min-snr 75: float16 alone keeps 5") and error.endswith("ask for less")
    )
    assert "sensitivity" not in log and list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_named(fastvit: nn.Module, tiny_checkpoint: Path, tmp_path: Path) -> None:
    fastvit.get_submodule("final_conv.se.fc1").weight.data[0, 0] = 1e6  # type: ignore[index, union-attr]
    config = ExportConfig(tiny_checkpoint, tmp_path / "x", min_snr=30.0)
    with pytest.raises(CheckFailed, match=r"do not fit float16, compressed or not: final_conv\.se\.fc1$"):
        sensitivity.search(Encoder(fastvit), config, lambda size: [], None, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no compressed weights"):
        older = ExportConfig(tiny_checkpoint, tmp_path / "x", min_snr=30.0, minimum_deployment_target="iOS15")
        sensitivity.search(Encoder(fastvit), older, lambda size: [], None, tmp_path)  # type: ignore[arg-type]
