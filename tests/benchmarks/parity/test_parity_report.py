"""The page: self-contained, escaped, whole for passed, failed and hostile results, and written in one piece."""

import re

import pytest
from html_page import Page

from benchmarks.parity import compare, report, verdict

HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> {{ 7*7 }} & </style>'


@pytest.fixture
def rendered(reference, candidate, shown, operations, sides, compared):
    def run(command="python -m benchmarks parity", change=None, family="fp16"):
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


@pytest.mark.parametrize("change", [None, failing])
def test_the_page_fetches_nothing(rendered, change):
    text = rendered(change=change)
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith(("data:image/", "#")), (tag, name, value)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert page.tags.count("img") == 4
    assert page.tags.count("svg") == 1


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


def test_the_passing_page(rendered):
    text = rendered()
    assert "parity passed" in text and "<mark>" not in text
    assert "python -m benchmarks parity" in text and "coremltools" in text


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


def test_hostile_names_prompts_and_answers_stay_text(rendered):
    def change(rows, operations, sides):
        for row in rows:
            row.name = row.question = row.truth = row.reference = row.candidate = HOSTILE
        failing(rows, operations, sides)
        rows[1].divergence["common"] = rows[1].divergence["candidate"]["token"] = HOSTILE
        for error in operations["rounding"] + operations["layers"]:
            error["name"] = HOSTILE
        for layer in operations["layers"]:
            layer["layer"] = HOSTILE
        sides["candidate"] = {"name": HOSTILE, "runners": {"vision": HOSTILE}}

    page = Page(rendered(command=HOSTILE, change=change))
    assert "script" not in page.tags
    assert page.tags.count("img") == 4
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert any("<script>alert(1)</script>" in text for text in page.texts)
    assert not any(text.strip() == "49" for text in page.texts)


def test_the_page_is_the_same_twice(rendered):
    assert rendered() == rendered()


def test_each_row_needs_its_picture(reference, candidate, shown, operations, sides, compared):
    rows = compared(reference, candidate, shown)
    with pytest.raises(ValueError):
        report.render(verdict.document(rows, operations, "fp16", sides), [])


def test_writing_replaces_in_one_piece(tmp_path, monkeypatch, reference, candidate, shown, operations, sides, compared):
    rows = compared(reference, candidate, shown[:1])
    result = verdict.document(rows, operations, "fp16", sides)
    path = tmp_path / "new" / "index.html"
    report.write(path, result, [shown[0].image])
    before = path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write(path, result, [shown[0].image])
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]


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
