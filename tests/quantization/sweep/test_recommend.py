"""The front and the recommendation of a sweep, against brute force and by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantization.sweep.columns import label, shown
from quantization.sweep.recommend import Constraints, front, recommend


def row(name, size, agreement, kl=0.1, form="fp16", resolution=1024):
    figures = {"bytes": size, "same_answers": agreement, "answer_kl_mean": kl, "questions": 500}
    return {"name": name, "recipe": name, "vision_quant": form, "resolution": resolution, "figures": figures}


POINTS = [
    row("fp16", 1000e6, 1.0, 0.0),
    row("int8", 550e6, 0.999, 0.001),
    row("mixed", 480e6, 0.996, 0.004),
    row("int4-awq", 412e6, 0.992, 0.01),
    row("int3-mixed", 350e6, 0.97, 0.1),
    row("int2", 300e6, 0.4, 2.0),
]


# Fronts


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(pairs):
    rows = [row(f"r{n}", size, share / 6) for n, (size, share) in enumerate(pairs)]
    found = front(rows, "bytes", "same_answers")
    for n, (size, share) in enumerate(pairs):
        beaten = any((s <= size and a > share) or (s < size and a >= share) for s, a in pairs)
        assert (f"r{n}" in found) != beaten
    sizes = [pairs[int(name[1:])][0] for name in found]
    assert sizes == sorted(sizes)


def test_a_figure_that_is_missing_or_not_finite_is_on_no_front():
    rows = [row("a", 1, 0.5), row("b", 0, None), row("c", 2, 0.6)]
    del rows[2]["figures"]["same_answers"]
    assert front(rows, "bytes", "same_answers") == ["a"]


# Recommendation


@pytest.mark.parametrize(
    ("constraints", "point", "parts"),
    [
        (Constraints(500e6, 0.99), "int4-awq", ["Ship int4-awq: 412 MB, 99.2 %", "smaller point, int3-mixed"]),
        (Constraints(), "int4-awq", ["Ship int4-awq"]),  # 99 % when nothing is asked for
        (Constraints(None, 0.3), "int2", ["Ship int2: 300 MB, 40 %", "(200 of 500 questions; 95 % interval 35.8 to"
                                          " 44.4 %)", "no point is smaller"]),
        (Constraints(500e6, None), "mixed", ["Ship mixed", "smallest better one is int8: 550 MB, 99.9 %"]),
        (Constraints(2000e6, None), "fp16", ["Ship fp16: 1,000 MB, 100 %", "no larger point is better"]),
        (Constraints(400e6, 0.99), None, ["No point is within 400 MB and keeps 99 %", "best within 400 MB is int3-m",
                                          "the smallest that keeps 99 % is int4-awq: 412 MB, 99.2 %, 12 MB too large"]),
        (Constraints(100e6, None), None, ["No point is within 100 MB", "is int2: 300 MB, 40 %, 200 MB too large"]),
    ],
)  # fmt: skip
def test_the_recommendation(constraints, point, parts):
    for order in (POINTS, POINTS[::-1], POINTS[2:] + POINTS[:2]):
        found = recommend(order, constraints)
        assert found["point"] == point and [part for part in parts if part not in found["sentence"]] == []


def test_none_keeps_enough():
    found = recommend(POINTS[1:], Constraints(None, 0.9999))
    assert found["point"] is None and "No point keeps 99.99 %" in found["sentence"]
    assert "the best of all is int8: 550 MB, 99.9 %" in found["sentence"]
    assert recommend([], Constraints())["sentence"].startswith("Nothing to recommend")


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(1, 9) | st.none(),
    st.integers(0, 9) | st.none(),
)
def test_what_is_recommended_keeps_the_constraints_and_nothing_smaller_does(pairs, size, share):
    rows = [row(f"r{n}", s, a / 9) for n, (s, a) in enumerate(pairs)]
    constraints = Constraints(size, None if share is None else share / 9)
    least = share / 9 if share is not None else (0.99 if size is None else None)
    able = [(s, a) for s, a in pairs if (size is None or s <= size) and (least is None or a / 9 >= least)]
    found = recommend(rows, constraints)["point"]
    assert (found is None) == (not able)
    if found:
        chosen = pairs[int(found[1:])]
        assert chosen in able
        best = min(able, key=lambda p: (p[0], -p[1])) if least is not None else min(able, key=lambda p: (-p[1], p[0]))
        assert chosen == best


def test_labels_say_what_tells_points_apart():
    one = [row("int4", 1, 1)]
    forms = [row("int4", 1, 1, form="fp16"), row("int4", 1, 1, form="int8")]
    sizes = [row("int4", 1, 1, resolution=512), row("int4", 1, 1, resolution=1024)]
    assert label(one[0], one) == "int4"
    assert [label(r, forms) for r in forms] == ["int4 with fp16", "int4 with int8"]
    assert [label(r, sizes) for r in sizes] == ["int4 at 512", "int4 at 1024"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(412e6, "MB", "412 MB"), (1.2e9, "MB", "1,200 MB"), (0.9917, "%", "99.17 %"), (None, "s", "–"),
     (0.0471, "ms", "47.1 ms"), (4.5, "bits", "4.5"), (0.0, "", "0"), (1.0, "%", "100 %")],
)  # fmt: skip
def test_figures_for_people(value, unit, text):
    assert shown(value, unit) == text


def test_a_recommendation_says_on_how_many_questions_it_rests():
    few = recommend(
        [row("a", 10e6, 1.0) | {"figures": {"bytes": 10e6, "same_answers": 1.0, "questions": 30}}], Constraints()
    )
    assert few["questions"] == 30 and few["interval"] == [0.8865, 1.0]
    assert "(30 of 30 questions; 95 % interval 88.6 to 100 %)" in few["sentence"]
