"""Names beside points, shares up to 100 %, and SVG that fits into a page."""

import logging
import re
from itertools import combinations

import pytest
from plot_points import CROWDED

from fastvlm.common import plots


def named(figure, places, **options):
    axes = figure.add_axes((0.1, 0.1, 0.85, 0.85))
    axes.plot(*zip(*places.values()), "o")
    axes.margins(0.09, 0.13)
    texts = {name: name for name in places}
    plots.name_points(axes, places, texts, dict.fromkeys(places, "#000000"), plots.FILE, **options)
    renderer = figure.canvas.get_renderer()
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts if text.get_text()}
    return axes, boxes


def test_every_point_has_a_name_near_it_and_over_nothing_else():
    with plots.figure(10.5, 4, "test") as figure:
        axes, boxes = named(figure, CROWDED)
        frame = axes.get_window_extent(figure.canvas.get_renderer())
        points = {name: axes.transData.transform(place) for name, place in CROWDED.items()}
        lines = sum(not text.get_text() for text in axes.texts)
    assert boxes.keys() == CROWDED.keys()
    assert not any(a.overlaps(b) for a, b in combinations(boxes.values(), 2))
    far = 0
    for name, box in boxes.items():
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.contains(*place) for place in points.values())
        x, y = points[name]
        distance = max(box.x0 - x, x - box.x1, 0) ** 2 + max(box.y0 - y, y - box.y1, 0) ** 2
        far += distance**0.5 > 20 * 150 / 72
    assert far <= lines, "a name that is far from its point has a line to it"


@pytest.mark.parametrize("optional, names", [(True, range(1, 30)), (False, range(30, 31))])
def test_names_without_room_are_left_out_only_where_they_may(optional, names):
    with plots.figure(3, 2, "test") as figure:
        _, boxes = named(
            figure, {f"a long name {number}": (1, 1 + number / 1e4) for number in range(30)}, optional=optional
        )
    assert len(boxes) in names


@pytest.mark.parametrize("values", [[100, 100, 90], [100, 100], [3, 50, 99.5]])
def test_no_share_above_100_percent(values):
    with plots.figure(4, 3, "test") as figure:
        axes = figure.add_axes((0.1, 0.1, 0.85, 0.85))
        axes.margins(0.1)
        axes.plot(range(len(values)), values)
        before = max(axes.get_yticks())
        plots.percent_axis(axes.yaxis, axes.get_ylim())
        low, high = axes.get_ylim()
        assert max(axes.get_yticks()) <= 100 and low < min(values) and max(values) <= high
        assert before > 100  # the control: what matplotlib would have drawn


def test_a_page_gets_its_own_colours_and_no_address(caplog):
    colours = plots.page_colours("mine")
    with caplog.at_level(logging.WARNING), plots.figure(4, 3, "test") as figure:
        axes = figure.add_axes((0.1, 0.1, 0.85, 0.85))
        axes.plot([1, 2], [1e-3, 10], color=colours["mine"])
        axes.set_yscale("log")  # whose ticks need mathematical fonts
        plots.dress(axes, colours)
        svg = plots.page_svg(figure, colours)
    assert "var(--mine)" in svg and not re.search(r"#0101\d\d|https?://|<metadata|<svg[^>]* width=", svg)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_file_is_written_whole_and_the_same_twice(tmp_path, kind):
    for name in ("one", "two"):
        with plots.figure(2, 2, "test") as figure:
            named(figure, {"a": (1, 1), "b": (2, 2)})
            plots.write(figure, tmp_path / f"{name}.{kind}")
    one, two = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("one", "two"))
    assert one == two and len(list(tmp_path.iterdir())) == 2
