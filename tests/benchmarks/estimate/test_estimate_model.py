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


@given(parameters, any_device, st.integers(1, 31), st.integers(1, 2000), factors)
def test_times_grow_with_the_work_and_shrink_with_the_device(
    p: dict[str, float], device: Device, side: int, tokens: int, factor: float
) -> None:
    """Whatever the parameters are."""
    device = dataclasses.replace(device, ne_gbps=device.ne_gbps or p["ne_phone_gbps"])
    weights = 2.0 * LANGUAGE.matrices

    def encode(on: Device = device, sides: int = side, part: float = 1.0) -> float:
        work = encoder_work("fastvithd", 64 * sides)
        return model.encode_time(p, on, work, work.weights * part).seconds

    def prefill(on: Device = device, length: int = tokens, size: float = weights) -> float:
        return model.prefill_time(p, on, LANGUAGE, length, size, LANGUAGE.output).seconds

    def decode(on: Device = device, layers: int = 24, size: float = weights) -> float:
        return model.decode_time(p, on, layers, size).seconds

    assert 0 < encode() <= encode(sides=side + 1)
    assert max(encode(faster(device, factor, one)) for one in ("ne_tops", "ne_gbps")) <= encode()
    assert encode(faster(device, factor, "ne_tops", "ne_gbps")) < encode() and encode(part=1 / factor) <= encode()
    assert 0 < prefill() <= min(prefill(length=tokens + 100), prefill(size=2 * weights))
    assert prefill(faster(device, factor, "gpu_tflops")) < prefill()
    assert prefill(faster(device, factor, "memory_gbps")) <= prefill()
    assert max(decode(faster(device, factor, "memory_gbps")), decode(size=weights / factor)) < decode()
    assert decode(layers=25) > decode()


def test_what_dominates_is_said() -> None:
    p = dict(STORED["parameters"])
    device = devices()["iphone-12-pro"]
    assert model.encode_time(p, device, EncoderWork(10**12, 10)).dominant == "compute"
    assert model.encode_time(p, device, EncoderWork(10**6, 10**9)).dominant == "bandwidth"
    assert model.encode_time(p, device, EncoderWork(10**6, 10)).dominant == "dispatch"
    few, tile, more = (
        model.prefill_time({**p, "gpu_scores": 0.0}, device, LANGUAGE, tokens, 1.0).seconds for tokens in (16, 64, 65)
    )
    assert few == tile < more  # matrix products go in tiles of 64 tokens


# --- calibration


def test_known_parameters_are_found_again() -> None:
    """Points made from parameters, instead of published, give those parameters back."""
    truth = {name: 1.15 * one["first"] for name, one in PUBLISHED["parameters"].items()} | {"ne_rate": 0.3}
    made = [dataclasses.replace(point, seconds=point.predict(truth)) for point in fit.points() if not point.outside]
    assert fit.fit(made) == pytest.approx(truth, rel=0.02)


@pytest.mark.slow
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


def test_every_held_out_point_is_within_the_bar() -> None:
    off = {point.id: point.predict(STORED["parameters"]) / point.seconds - 1 for point in HELD_OUT}
    assert len(off) == 43 and not {name: error for name, error in off.items() if abs(error) > BAR}


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


def test_every_figure_and_every_point_has_a_source() -> None:
    figures = [figure for chip in FACTS["chips"].values() for figure in chip.values() if isinstance(figure, dict)]
    points: list[dict[str, Any]] = PUBLISHED["points"]
    for document, used in ((FACTS, figures), (PUBLISHED, points)):
        assert {one["source"] for one in used} == set(document["sources"])
        for key, source in document["sources"].items():
            assert set(source) == {"url", "says"} and source["says"]
            assert source["url"].startswith("https://") or key == "not-confirmed"
    assert all(figure["value"] > 0 and figure.get("precision") in (None, "float16", "int8") for figure in figures)
    assert len({point["id"] for point in points}) == len(points)
    for point in points:
        assert ("ms" in point) != ("tokens_per_s" in point) and point["device"] in devices()


def test_no_point_rests_on_an_unconfirmed_figure_or_on_this_machine() -> None:
    used = {"encode": {"neural_engine_float16_tops", "neural_engine_gbps", "system_cache_mb"},
            "prefill": {"gpu_tflops", "memory_gbps"}, "decode": {"memory_gbps"}}  # fmt: skip
    for point in fit.points():
        assert point.device.kind in ("mac", "phone", "tablet") and point.device.chip.startswith(("M", "A"))
        if point.outside is None:
            assert not used.get(point.stage, set()) & set(point.device.unconfirmed), point.id
