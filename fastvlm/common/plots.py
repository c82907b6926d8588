"""The one style of all plots: muted axes, a grid, names beside their points; as a file, or as SVG inside a page.

matplotlib is imported only when something is drawn. Functions take a mapping of colours by name: `FILE` holds real
ones, `page_colours` makes stand-ins that `page_svg` replaces by a page's CSS variables, so that one plot serves light
and dark.
"""

import io
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def stage_bands(axes: Sequence[Any], layers: Iterable[tuple[int, str]], count: int, colours: Mapping[str, str]) -> None:
    """A line where each of the encoder's stages starts, by the (position, name) of its layers in order, of `count`
    positions in all; and the stage's name above the first axes where there is room for it."""
    starts: dict[str, int] = {}
    for position, layer in layers:
        if stage := re.search(r"stem|stages\.\d+|final_conv", layer):
            starts.setdefault(stage[0].replace("stages.", "stage ").replace("final_conv", "final"), position)
    for (name, start), end in zip(starts.items(), [*[*starts.values()][1:], count]):
        for each_axes in axes:
            each_axes.axvline(start - 0.5, color=colours["line"], linewidth=0.9, zorder=1)
        if end - start > 0.03 * count:
            place: Any = {"transform": axes[0].get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 9}
            axes[0].text((start + end) / 2, 1.008, name, color=colours["soft"], **place)


def note(
    axes: Any, place: tuple[float, float], text: str, colour: str, colours: Mapping[str, str], above: float = 14
) -> None:
    """A note beside a point, so many points `above` it, on the side where the axes have more room."""
    right = place[0] < sum(axes.get_xlim()) / 2
    axes.annotate(
        text, place, xytext=(12 if right else -12, above), textcoords="offset points", ha="left" if right else "right",
        va="center", color=colour, fontsize=9, zorder=6, bbox=behind(colours),
    )  # fmt: skip


def name_points(
    axes: Any, places: Mapping[str, tuple[float, float]], texts: Mapping[str, str], tints: Mapping[str, str],
    colours: Mapping[str, str], optional: bool = False,
) -> None:  # fmt: skip
    """Write `texts` beside their `places` (data coordinates), over no point, no other name and not over the edge.

    A name that finds room only some way off has a line to its point. With `optional`, one that finds none is left out.
    """
    from matplotlib.transforms import Bbox

    axes.autoscale_view()  # or points would be measured before they have their places
    renderer, frame = axes.figure.canvas.get_renderer(), axes.bbox
    pixels = {name: axes.transData.transform(place) for name, place in places.items()}
    half = 5 / 72 * axes.figure.dpi
    taken = [Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half) for x, y in pixels.values()]

    def neighbours(name: str) -> int:
        return sum(bool((abs(pixels[name] - other) < (60, 30)).all()) for other in pixels.values())

    for name in sorted(texts, key=lambda name: (neighbours(name), places[name])):
        text = axes.annotate(
            texts[name], places[name], textcoords="offset points", xytext=(0, 0), color=tints[name], fontsize=8.5,
            va="center", bbox=behind(colours), zorder=6,
        )  # fmt: skip
        for offset in _offsets():
            text.set_position(offset)
            text.set_ha("left" if offset[0] > 1 else "right" if offset[0] < -1 else "center")
            box = text.get_window_extent(renderer).padded(2)
            if frame.contains(*box.min) and frame.contains(*box.max) and not box.count_overlaps(taken):
                break
        else:
            if optional:
                text.remove()
                continue
        taken.append(box)
        if math.hypot(*offset) > _NEAR:
            axes.annotate(
                "", places[name], offset, textcoords="offset points", zorder=5,
                arrowprops={"arrowstyle": "-", "color": tints[name], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip


def _offsets() -> Iterator[tuple[float, float]]:
    """Where a name may stand, the nearest first, and among those the one to the right."""
    for distance, directions in _RINGS:
        for number in range(directions):
            angle = 2 * math.pi * number / directions
            yield round(distance * math.cos(angle), 3), round(distance * math.sin(angle), 3)
