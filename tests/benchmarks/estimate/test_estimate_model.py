"""The roofline: what it must do whatever the parameters are, and what its calibration says of published points."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.estimate import fit, model
from benchmarks.estimate.devices import Device, devices, facts
from benchmarks.estimate.work import EncoderWork, LanguageModel, encoder_work

BAR = 0.25  # of every held-out published point
LANGUAGE = LanguageModel(24, 896, 14, 2, 64, 4864, 151936)
FACTS, PUBLISHED, STORED = facts("devices.json"), facts("published.json"), facts("calibration.json")
HD = PUBLISHED["encoders"]["fastvithd"]
HELD_OUT = [point for point in fit.points() if point.use == "held out"]
INSIDE = [point for point in fit.points() if point.use == "calibrates"]

parameters = st.fixed_dictionaries(
    {name: st.floats(one["least"], one["most"]) for name, one in PUBLISHED["parameters"].items()}
)  # any within the bounds
any_device = st.sampled_from(list(devices().values()))
factors = st.floats(1.01, 10)


def faster(device: Device, factor: float, *fields: str) -> Device:
    changed: dict[str, Any] = {name: getattr(device, name) * factor for name in fields}
    return dataclasses.replace(device, **changed)


# --- what holds for any parameters


@given(parameters, any_device, st.integers(1, 31), factors)
def test_encoding_grows_with_the_picture_and_shrinks_with_the_engine(
    p: dict[str, float], device: Device, side: int, factor: float
) -> None:
    device = dataclasses.replace(device, ne_gbps=device.ne_gbps or p["ne_phone_gbps"])
    work, larger = (encoder_work(HD, 64 * sides) for sides in (side, side + 1))
    here = model.encode_time(p, device, work).seconds
    assert 0 < here <= model.encode_time(p, device, larger).seconds
    assert model.encode_time(p, faster(device, factor, "ne_tops"), work).seconds <= here
    assert model.encode_time(p, faster(device, factor, "ne_gbps"), work).seconds <= here
    assert model.encode_time(p, faster(device, factor, "ne_tops", "ne_gbps"), work).seconds < here
    assert model.encode_time(p, device, work, weights=work.weights / factor).seconds <= here


@given(parameters, any_device, st.integers(1, 2000), st.integers(1, 500), factors)
def test_prefill_grows_with_the_prompt_and_shrinks_with_the_gpu(
    p: dict[str, float], device: Device, tokens: int, more: int, factor: float
) -> None:
    weights = 2.0 * LANGUAGE.matrices

    def seconds(on: Device, length: int, size: float = weights) -> float:
        return model.prefill_time(p, on, LANGUAGE, length, size, LANGUAGE.output).seconds

    here = seconds(device, tokens)
    assert 0 < here <= seconds(device, tokens + more)
    assert seconds(faster(device, factor, "gpu_tflops"), tokens) < here
    assert seconds(faster(device, factor, "memory_gbps"), tokens) <= here
    assert seconds(device, tokens, weights * 2) >= here


@given(parameters, any_device, st.floats(1e6, 1e11), factors)
def test_decoding_shrinks_with_bandwidth_and_with_fewer_bytes(
    p: dict[str, float], device: Device, weights: float, factor: float
) -> None:
    here = model.decode_time(p, device, 24, weights)
    assert model.decode_time(p, faster(device, factor, "memory_gbps"), 24, weights).seconds < here.seconds
    assert model.decode_time(p, device, 24, weights / factor).seconds < here.seconds
    assert model.decode_time(p, device, 25, weights).seconds > here.seconds


def test_what_dominates_is_said() -> None:
    p = dict(STORED["parameters"])
    device = devices()["iphone-12-pro"]
    assert model.encode_time(p, device, EncoderWork(10**12, 10)).dominant == "compute"
    assert model.encode_time(p, device, EncoderWork(10**6, 10**9)).dominant == "bandwidth"
    assert model.encode_time(p, device, EncoderWork(10**6, 10)).dominant == "dispatch"
    assert model.decode_time(p, device, 24, 1e9).dominant == "bandwidth"


def test_sixteen_tokens_take_as_long_as_sixty_four_but_for_attention() -> None:
    p = {**STORED["parameters"], "gpu_scores": 0.0}
    device = devices()["m1-max"]
    few, tile, more = (model.prefill_time(p, device, LANGUAGE, tokens, 1.0).seconds for tokens in (16, 64, 65))
    assert few == tile < more


# --- calibration


def test_known_parameters_are_found_again() -> None:
    """Points made from parameters, instead of published, give those parameters back."""
    truth = {name: 1.15 * one["first"] for name, one in PUBLISHED["parameters"].items()} | {"ne_rate": 0.3}
    made = [dataclasses.replace(point, seconds=point.predict(truth)) for point in fit.points() if not point.outside]
    assert fit.fit(made) == pytest.approx(truth, rel=0.02)


def test_the_stored_calibration_is_what_the_fit_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(fit, "OUTPUT", tmp_path / "calibration.json")
    fit.main()
    now = json.loads((tmp_path / "calibration.json").read_text())
    assert now["behind"] == STORED["behind"] and now["held_out"].keys() == STORED["held_out"].keys()
    assert now["parameters"] == pytest.approx(STORED["parameters"], rel=1e-3)
    for stage in model.STAGES:
        assert now["spread"][stage] == pytest.approx(STORED["spread"][stage], rel=0.01)
        assert sum(point.stage == stage for point in HELD_OUT) >= 10
    for name, value in STORED["parameters"].items():
        limits = PUBLISHED["parameters"][name]
        assert limits["least"] < value < limits["most"], f"{name} sits on its bound"


@pytest.mark.parametrize("point", HELD_OUT, ids=lambda point: point.id)
def test_every_held_out_point_is_within_the_bar(point: fit.Point) -> None:
    assert abs(point.predict(STORED["parameters"]) / point.seconds - 1) <= BAR


@pytest.mark.parametrize("name", ["ne_rate", "gpu_rate", "decode_bandwidth", "gpu_scores_unfused", "ne_spill_gbps"])
def test_a_wrong_parameter_breaks_the_bar(name: str) -> None:
    errors = fit.held_out_errors(STORED["parameters"] | {name: 4 * STORED["parameters"][name]})
    assert max(abs(error["worst"]) for error in errors.values()) > BAR


def test_one_wrong_point_moves_the_calibration_and_a_held_out_one_does_not() -> None:
    assert not {point.id for point in INSIDE} & {point.id for point in HELD_OUT}
    wrong = [dataclasses.replace(one, seconds=3 * one.seconds) if one.id == "fastvithd-768" else one for one in INSIDE]
    assert fit.fit(wrong)["ne_rate"] != pytest.approx(STORED["parameters"]["ne_rate"], rel=0.02)
    assert fit.fit(INSIDE) == pytest.approx(STORED["parameters"], rel=1e-3)


def test_leaving_out_a_point_leaves_it_out() -> None:
    """However wrong a published time is, its own prediction must not follow it."""
    points = [one for one in fit.points() if one.stage == "decode" and not one.outside]
    wrong = [dataclasses.replace(points[0], seconds=5 * points[0].seconds), *points[1:]]
    before, after = (fit.leave_out(some, lambda one: one.id)[points[0].id] for some in (points, wrong))
    assert after == pytest.approx(before - math.log(5), abs=1e-6)


# --- facts


def test_every_figure_has_a_source() -> None:
    sources = FACTS["sources"]
    for key, source in sources.items():
        assert set(source) == {"url", "says"} and source["says"]
        assert source["url"].startswith("https://") or key == "not-confirmed"
    figures = [figure for chip in FACTS["chips"].values() for figure in chip.values() if isinstance(figure, dict)]
    assert {figure["source"] for figure in figures} == set(sources)
    assert all(figure["value"] > 0 for figure in figures)
    for chip in FACTS["chips"].values():
        published = chip.get("neural_engine_tops")
        assert published is None or published["precision"] in ("float16", "int8")


def test_every_point_has_a_source_and_known_keys() -> None:
    known = {"id", "stage", "device", "model", "language", "resolution", "tokens", "bits", "ms", "tokens_per_s",
             "source", "note", "outside", "unusable", "unfused", "gpu_part",
             "encoder_on_gpu"}  # fmt: skip
    entries: list[dict[str, Any]] = PUBLISHED["points"]
    assert len({entry["id"] for entry in entries}) == len(entries)
    assert {entry["source"] for entry in entries} == set(PUBLISHED["sources"])
    for entry in entries:
        assert set(entry) <= known
        assert ("ms" in entry) != ("tokens_per_s" in entry)
        assert entry["device"] in devices()
    assert all(source["url"].startswith("https://") for source in PUBLISHED["sources"].values())


def test_no_point_rests_on_an_unconfirmed_figure_or_on_this_machine() -> None:
    used = {"encode": {"neural_engine_float16_tops", "neural_engine_gbps", "system_cache_mb"},
            "prefill": {"gpu_tflops", "memory_gbps"}, "decode": {"memory_gbps"}}  # fmt: skip
    for point in fit.points():
        assert point.device.kind in ("mac", "phone", "tablet") and point.device.chip.startswith(("M", "A"))
        if point.outside is None:
            assert not used.get(point.stage, set()) & set(point.device.unconfirmed), point.id
