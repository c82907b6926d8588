"""The table is whole, refuses what it does not know, and a value on the wrong side of a bound never passes."""

import json
import math

import pytest

from benchmarks.parity import tolerances, verdict

ALL = [
    *map(tolerances.for_encoder, tolerances.PRECISIONS),
    *map(tolerances.for_language, tolerances.FAMILIES),
    *(tolerances.for_encoder(precision, coreai=True) for precision in tolerances.COREAI_PRECISIONS),
    *(tolerances.for_language(family, coreai=width) for width in (128, 896) for family in tolerances.FAMILIES),
]
EVERY = [tolerance for column in ALL for tolerance in column.values()]


def test_every_figure_has_a_tolerance_and_every_tolerance_a_reason():
    for precision in tolerances.PRECISIONS:
        for family in tolerances.FAMILIES:
            names = {**tolerances.for_encoder(precision), **tolerances.for_language(family)}
            assert set(names) == set(verdict.LABELS) - {"prefill_snr"}
            bundles = {**tolerances.for_encoder("float16", True), **tolerances.for_language(family, coreai=128)}
            assert set(bundles) == set(verdict.LABELS) - {"operation_snr", "layer_snr"}
    for rows, columns in (
        (tolerances._ENCODER, tolerances.PRECISIONS),
        (tolerances._LANGUAGE, tolerances.FAMILIES),
        (tolerances._COREAI_ENCODER, tolerances.COREAI_PRECISIONS),
        (tolerances._COREAI_LANGUAGE, tolerances.FAMILIES),
    ):
        for row in rows.values():
            assert set(row.bounds) >= set(columns)
            assert len(row.reason) > 40
            assert row.sense in (">=", "<=")


def test_the_bounds_that_the_project_promises():
    of_encoder = {name: tolerances.for_encoder(name)["encoder_snr"].bound for name in ("float16", "float32")}
    of_answers = {name: tolerances.for_language(name)["greedy_answers"].bound for name in ("fp16", "int8", "int4")}
    assert of_encoder == {"float16": 50, "float32": 100} and of_answers == {"fp16": 0.99, "int8": 0.97, "int4": None}


def test_a_wide_decoder_has_wider_bounds_and_none_that_a_coarse_recipe_has_not():
    narrow, wide = (tolerances.for_language("fp16", coreai=width) for width in (256, 896))
    assert (narrow["prefill_snr"].bound, wide["prefill_snr"].bound) == (40, 15)
    assert wide["greedy_answers"].bound is None and wide["merged_snr"] == narrow["merged_snr"]
    coarse = tolerances.for_language("int4", coreai=896)
    assert coarse["prefill_snr"].bound is coarse["prefill_kl"].bound is None


def test_unknown_keys_are_refused():
    with pytest.raises(KeyError, match="expected one of float16, float32"):
        tolerances.for_encoder("float64")
    with pytest.raises(KeyError, match="expected one of fp16"):
        tolerances.for_language("FP16")


@pytest.mark.parametrize("tolerance", EVERY, ids=lambda t: f"{t.metric} {t.bound}")
def test_a_bound_divides(tolerance):
    better = 1 if tolerance.sense == ">=" else -1
    if tolerance.bound is None:
        assert tolerances.judge(tolerance, 0.5)["passed"] is None
    else:
        assert tolerances.judge(tolerance, tolerance.bound)["passed"] is True
        assert tolerances.judge(tolerance, tolerance.bound + better * 1e-12)["passed"] is True
        assert tolerances.judge(tolerance, tolerance.bound - better * 1e-9)["passed"] is False
    for worst in (math.nan, -better * math.inf):
        judged = tolerances.judge(tolerance, worst)
        assert judged["passed"] is False
        json.dumps(judged, allow_nan=False)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1.23456789e-12, 0.0, -5.0])
def test_number_reads_back(value):
    assert float(tolerances.number(value)) == pytest.approx(value, rel=1e-5)
    json.dumps(tolerances.number(value), allow_nan=False)
    assert math.isnan(float(tolerances.number(math.nan)))
