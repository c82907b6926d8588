"""The page of passed and failed results; that it fetches nothing and is escaped: tests/benchmarks/test_pages.py."""

import re

import pytest

from benchmarks.parity import compare, report, verdict


@pytest.fixture
def rendered(reference, candidate, shown, operations, sides, compared):
    def run(command="fastvlm parity", change=None, family="fp16"):
        rows = compared(reference, candidate, shown)
        if change:
            change(rows, operations, sides)
        result = verdict.document(rows, operations, family, sides)
        return report.render(result, [compare.thumbnail(picture.image) for picture in shown], command)

    return run


def failing(rows, operations, sides):
    for error in operations["layers"][4:]:
        error["snr_db"] = 20.0
    operations["layers"][6]["snr_db"] = "-inf"
    rows[1].divergence = {
        "position": 2, "common": "There are", "margin": 0.02,
        "reference": {"token": " three", "rest": " stars."}, "candidate": {"token": " four", "rest": " stars."},
    }  # fmt: skip
    rows[1].candidate = "There are four stars."
    rows[1].truth = "There are 3 stars."


def test_the_failing_page_shows_what_a_reader_needs(rendered):
    text = rendered(change=failing)
    for expected in (
        "parity failed",
        "stages.0.blocks.12.fc1",
        "<mark>three</mark>",
        "<mark>four</mark>",
        "There are 3 stars.",
        "part at token 3",
    ):
        assert expected in text
    assert text.index("<mark>") < text.index("picture 0")  # answers that part come first
    assert "parity passed" not in text


def moods(text):
    """The colours of a page's verdicts."""
    return re.findall(r'<header class="verdict (\w+)">', text)


def test_below_8_bits_the_page_has_two_verdicts(rendered, capsys):
    def change(rows, operations, sides):
        rows[0].candidate = "another answer"
        rows[0].figures |= {"prefill_kl": 0.5, "prefill_top1": 0.6, "greedy_tokens": 0.0, "greedy_answers": 0.0}

    assert moods(rendered()) == ["good"] and moods(rendered(family="int4")) == ["good", "good"]
    text = rendered(change=change, family="int2")
    assert moods(text) == ["good", "warn"] and "changed 1 of 4 answers" in text
    assert moods(rendered(change=failing)) == ["bad"]


def test_each_row_needs_its_picture(reference, candidate, shown, operations, sides, compared):
    rows = compared(reference, candidate, shown)
    with pytest.raises(ValueError):
        report.render(verdict.document(rows, operations, "fp16", sides), [])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        ("inf", "dB", "exact"),
        (53.8612, "dB", "53.86 dB"),
        (0.995, "of questions", "99.5 %"),
        (0.00412, "of the largest feature", "0.41 %"),
        (0.999999, "", "1 − 1.0e-06"),
        (None, "dB", "not compared"),
    ],
)
def test_figures_for_people(value, unit, text):
    assert report.figure(value, unit) == text
