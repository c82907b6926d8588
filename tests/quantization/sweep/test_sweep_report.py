"""A sweep's report: a document that depends on neither order nor time, and a page that is whole and escaped."""

import csv
import io
import json
import re

import pytest
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st

from quantization.sweep import report
from quantization.sweep.engine import Outcome
from tests.quantization.sweep.sweep_documents import document_of, sweep_of

# Documents


def test_the_document_does_not_depend_on_order_or_time():
    points, outcome = sweep_of()
    first = document_of(points, outcome)
    late = Outcome(outcome.keys, dict(reversed(outcome.results.items())), {}, reused=3, seconds=99)
    for result in late.results.values():
        result["timings"] = {"ttft_s": 9.0, "peak_bytes": 1, "seconds": 1}
    second = document_of(points[::-1], late)
    assert first.pop("timings") != second.pop("timings")
    assert json.dumps(first) == json.dumps(second)
    assert [one["figures"]["bytes"] for one in first["points"]] == sorted(
        one["figures"]["bytes"] for one in first["points"]
    )
    assert "size and TTFT" not in first["pareto"] and "size and KL" in first["pareto"]


def test_files_hold_every_point_and_every_failure(tmp_path):
    points, outcome = sweep_of()
    lost = points[2]["name"]
    del outcome.results[lost]
    outcome.errors[lost] = "out of, memory"
    found = document_of(points, outcome)
    page = report.write(tmp_path / "new" / "report", found)
    read = json.loads((page.parent / "report.json").read_text())
    assert read == json.loads(json.dumps(found))
    table = list(csv.DictReader(io.StringIO((page.parent / "report.csv").read_text())))
    assert len(table) == 6 and table[-1]["error"] == "out of, memory" and table[-1]["bytes"] == ""
    assert {(r["recipe"], r["vision_quant"]) for r in table} == {
        (p["recipe"]["name"], p["vision_quant"]) for p in points
    }
    assert float(table[0]["bytes"]) == 500 and float(table[0]["ttft_s"]) == pytest.approx(0.15)


# The page


def test_points_have_tips_and_no_colour_but_the_pages():
    points, outcome = sweep_of()
    text = report.render(document_of(points, outcome), {})
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for svg in svgs:
        assert len(re.findall(r"<title>\w+ \w+ 256: ", svg)) == 6
        assert not re.findall(r"#01[0-9a-f]{4}", svg)
        defined = set(re.findall(r"--(\w+):", text[: text.index("</style>")]))
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= defined


@pytest.mark.parametrize("count", [0, 1])
def test_a_sweep_with_hardly_a_point_has_a_page(count):
    points, outcome = sweep_of()
    for point in points[count:]:
        del outcome.results[point["name"]]
        outcome.errors[point["name"]] = "no"
    text = report.render(document_of(points, outcome), {})
    assert Page(text).tags.count("svg") == (4 if count else 0)


def test_figures_that_are_not_there_are_left_out_or_dashed():
    points, outcome = sweep_of()
    for number, result in enumerate(outcome.results.values()):
        del result["figures"]["bits_per_weight"]
        if number == 1:
            result["figures"]["answer_kl_mean"] = None
    text = report.render(document_of(points, outcome), {})
    assert "bits a weight" not in text and "–" in text


def test_examples_are_where_points_part():
    points, outcome = sweep_of()
    found = report.examples(document_of(points, outcome))
    assert len(found["rows"]) == 8 and len(found["columns"]) == 6
    assert [row["name"] for row in found["rows"][:6]] == ["q1", "q3", "q5", "q7", "q9", "q11"]
    assert [[words for words, differs in cell if differs] for cell in found["rows"][0]["cells"]].count(["blue"]) == 2
    many = document_of(*sweep_of(("fp16", "int4", "int2", "a", "b", "c"), ("fp16", "int8", "palette4")))
    assert {point["vision_quant"] for point in report.examples(many)["columns"]} == {"fp16"}


@given(st.lists(st.sampled_from("abcd"), max_size=8), st.lists(st.sampled_from("abcd"), max_size=8))
def test_differences_hold_the_answer_and_mark_only_what_differs(reference, answer):
    pieces = report.differences(" ".join(reference), " ".join(answer))
    said = [word for words, _ in pieces if words != "[…]" for word in words.split()]
    assert said == answer
    assert any(differs for _, differs in pieces) == (reference != answer)
    same = [word for words, differs in pieces if not differs for word in words.split()]
    rest = iter(reference)
    assert all(word in rest for word in same), "what is not marked is in the reference, in order"
