"""The one style of all plots: muted axes, a grid, names beside their points; as a file, or as SVG inside a page.

matplotlib is imported only when something is drawn. Functions take a mapping of colours by name: `FILE` holds real
ones, `page_colours` makes stand-ins that `page_svg` replaces by a page's CSS variables, so that one plot serves light
and dark.
"""

import io
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastvlm.common.staging import write_file

FILE: Mapping[str, str] = {
    "ink": "#1d1d1f", "soft": "#6e6e73", "line": "#d2d2d7", "card": "#ffffff", "good": "#248a3d", "bad": "#d70015",
    "goodwash": "#e4f5e7", "warnwash": "#fff3d6", "badwash": "#fde3e1",
    "blue": "#0066cc", "purple": "#8944ab", "orange": "#c93400",
}  # fmt: skip
# One place after another to put a name beside its point: distance in points, and the directions in degrees.
_RINGS = ((9, 8), (15, 12), (23, 16), (33, 16))
_NEAR = 16.0  # points of distance from which on a line leads from a name to its point


def page_colours(*names: str) -> dict[str, str]:
    """Stand-ins for the CSS variables of these names, and for the base page's own."""
    known = ("ink", "soft", "line", "card", "good", "warn", "bad", *names)
    return {name: f"#{0x010101 + number:06x}" for number, name in enumerate(known)}


@contextmanager
def figure(width: float, height: float, salt: str) -> Iterator[Any]:
    """A matplotlib Figure, in inches; text stays text, and the same figure has the same bytes. Save it within."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # its notes on fonts are nobody's business
    import matplotlib

    style: Any = {
        "svg.hashsalt": salt, "svg.fonttype": "none", "font.family": ["DejaVu Sans"], "font.size": 10,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(width, height), dpi=150)
        FigureCanvasAgg(drawn).draw()  # it has the renderer that names are measured with
        yield drawn


def write(drawn: Any, target: Path) -> None:
    """Write a figure to `target` (.png or .svg), which appears whole or not at all. OSError where it cannot be."""
    content, kind = io.BytesIO(), target.suffix.lower().removeprefix(".")
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    drawn.savefig(content, format=kind, metadata=metadata)
    write_file(target, content.getvalue())


def page_svg(drawn: Any, colours: Mapping[str, str]) -> str:
    """A figure as SVG for an HTML page: no prologue, metadata or addresses, as wide as its place, in the page's font
    and, where `colours` were stand-ins, in its colours."""
    drawn.patch.set_visible(False)
    for axes in drawn.axes:
        axes.patch.set_visible(False)
    target = io.StringIO()
    drawn.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    svg = target.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = svg.replace("xlink:href", "href")  # HTML knows SVG, and nothing in the page names an address
    svg = re.sub(r"font: ([^;\"]*)'[^\"]*\"", r'font: \1inherit"', svg)
    for name, colour in colours.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def dress(axes: Any, colours: Mapping[str, str], grid: str = "y", legend: int = 0, above: float = 1.0) -> None:
    """Muted ticks and labels, a grid, no frame; a legend of so many columns at `above` (1: the top edge)."""
    axes.tick_params(colors=colours["soft"], length=0, which="both")
    axes.grid(axis=grid, color=colours["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(colours["soft"])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if legend:
        axes.legend(
            frameon=False, labelcolor=colours["soft"], fontsize=9, ncols=legend, handlelength=1.2, handletextpad=0.4,
            columnspacing=1.2, loc="lower left", bbox_to_anchor=(0, above), borderaxespad=0.2, borderpad=0.1,
        )  # fmt: skip


def behind(colours: Mapping[str, str]) -> dict[str, Any]:
    """The box that keeps a text readable over lines."""
    return {"facecolor": colours["card"], "edgecolor": "none", "pad": 0.8, "alpha": 0.85}


def percent_axis(axis: Any, limits: tuple[float, float]) -> None:
    """No share above 100 %: no tick, and no more room than names need."""
    low, high = limits
    top = min(high, 100 + 0.1 * (100 - low))
    axis.axes.set_ylim(low, top) if axis.axis_name == "y" else axis.axes.set_xlim(low, top)
    axis.set_ticks([tick for tick in axis.get_ticklocs() if low <= tick <= 100])


def name_points(
    axes: Any, places: Mapping[str, tuple[float, float]], texts: Mapping[str, str], tints: Mapping[str, str],
    colours: Mapping[str, str], optional: bool = False,
) -> None:  # fmt: skip
    """Write `texts` beside their `places` (data coordinates), over no point, no other name and not over the edge.

    A name that finds room only some way off has a line to its point. With `optional`, one that finds none is left out.
    """
    axes.autoscale_view()  # or points would be measured before they have their places
    renderer = axes.figure.canvas.get_renderer()
    frame, scale = axes.get_window_extent(renderer), axes.figure.dpi / 72
    pixels = {name: axes.transData.transform(place) for name, place in places.items()}
    taken: list[tuple[float, ...]] = [
        (x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in pixels.values()
    ]
    for name in sorted(texts, key=lambda name: (len(_near(pixels, name)), places[name])):
        text = axes.annotate(
            texts[name], places[name], (0, 0), textcoords="offset points", color=tints[name], fontsize=8.5, va="center",
            bbox=behind(colours), zorder=6,
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        width, height = box.width * 1.03, box.height * 1.05
        candidates = [
            (_cost(_box(pixels[name], offset, width, height, scale), taken, frame), number, distance, offset)
            for number, (distance, offset) in enumerate(_offsets())
        ]
        cost, _, distance, offset = min(candidates)
        if cost >= 1 and optional:
            text.remove()
            continue
        text.set_ha(_side(offset))
        text.set_position(offset)
        taken.append(_box(pixels[name], offset, width, height, scale))
        if distance > _NEAR:
            axes.annotate(
                "", places[name], offset, textcoords="offset points", zorder=5,
                arrowprops={"arrowstyle": "-", "color": tints[name], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip


def _offsets() -> Iterator[tuple[float, tuple[float, float]]]:
    """Where a name may stand, the nearest first, and among those the one to the right."""
    for distance, directions in _RINGS:
        for number in range(directions):
            angle = 2 * math.pi * number / directions
            yield distance, (round(distance * math.cos(angle), 3), round(distance * math.sin(angle), 3))


def _near(pixels: Mapping[str, Any], name: str) -> list[str]:
    """The points around a point: who has many of them is named last."""
    x, y = pixels[name]
    return [other for other, (a, b) in pixels.items() if abs(a - x) < 60 and abs(b - y) < 30]


def _side(offset: tuple[float, float]) -> str:
    return "left" if offset[0] > 1 else "right" if offset[0] < -1 else "center"


def _box(at: Any, offset: tuple[float, float], width: float, height: float, scale: float) -> tuple[float, ...]:
    x, y = at[0] + scale * offset[0], at[1] + scale * offset[1]
    left = {"left": x, "right": x - width, "center": x - width / 2}[_side(offset)]
    return left, y - height / 2, left + width, y + height / 2


def _cost(box: tuple[float, ...], taken: Sequence[tuple[float, ...]], frame: Any) -> float:
    """Square pixels that a name would cover of others; far more where it leaves the frame."""
    outside = box[0] < frame.x0 or box[1] < frame.y0 or box[2] > frame.x1 or box[3] > frame.y1
    return 1e6 * outside + sum(
        max(0.0, min(box[2], x1) - max(box[0], x0)) * max(0.0, min(box[3], y1) - max(box[1], y0))
        for x0, y0, x1, y1 in taken
    )
