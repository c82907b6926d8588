"""The trade-offs of a sweep as inline SVG: a colour for each recipe, a marker for each form and resolution."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastvlm.common.page import inline_svg
from quantization.sweep.report import AGREEMENT, FRONTS, Column, column, label, shown

HUES = (255, 25, 145, 300, 75, 200, 345, 110, 275, 50, 170, 320)  # degrees on the colour circle, unlike ones first
# Colours that stand for the page's CSS variables.
_INK, _SOFT, _LINE, _CARD, _GOOD = (f"#{n:06x}" for n in range(0x010101, 0x010106))
_RECIPES = tuple(f"#{0x010201 + n:06x}" for n in range(len(HUES)))
_VARIABLES = {_INK: "ink", _SOFT: "soft", _LINE: "line", _CARD: "card", _GOOD: "good"}
_VARIABLES |= {colour: f"r{n}" for n, colour in enumerate(_RECIPES)}
_MARKERS = "osD^vPX*<>ph"
_ALL_NAMED = 16  # points; of more, only those on the front are
_OFFSETS = ((7, 0), (-7, 0), (0, 9), (0, -9), (7, 8), (-7, 8), (7, -8), (-7, -8))  # of a name, in points
_FAR = (1.0, 1.8, 2.8)  # times an offset, until there is room
_FLOOR = 0.3  # of the smallest figure above zero: where zero is drawn on a logarithmic axis
_BEHIND: dict[str, Any] = {"facecolor": _CARD, "edgecolor": "none", "pad": 0.6, "alpha": 0.8}

Row = Mapping[str, Any]


def plots(rows: Sequence[Row], fronts: Mapping[str, Sequence[str]], found: Mapping[str, Any]) -> dict[str, str]:
    """SVG text by the trade-off's name, of those whose figures there are.

    `rows` have their timings among their figures; `found` is the report's document (wish, recommendation).
    """
    import matplotlib

    style: Any = {"svg.hashsalt": "sweep", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5}
    drawn = {}
    with matplotlib.rc_context(style):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        for number, (name, axes) in enumerate(FRONTS.items()):
            known = [row for row in rows if all(row["figures"].get(key) is not None for key in axes)]
            if not known:
                continue
            figure = Figure(figsize=(5.8, 4.3))
            FigureCanvasAgg(figure).draw()  # has the renderer that names are measured with
            _draw(figure.add_axes((0.12, 0.11, 0.865, 0.79)), known, axes, fronts[name], found, f"p{number}")
            figure.patch.set_visible(False)
            target = io.StringIO()
            figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
            drawn[name] = _with_tips(inline_svg(target.getvalue(), _VARIABLES), known, axes, f"p{number}")
    return drawn


def _draw(
    axes: Any, rows: Sequence[Row], keys: tuple[str, str], best: Sequence[str], found: Mapping[str, Any], prefix: str
) -> None:
    recipes = list(dict.fromkeys(row["recipe"] for row in found["points"]))
    kinds = list(dict.fromkeys((row["vision_quant"], row["resolution"]) for row in found["points"]))
    x, y = (column(key) for key in keys)
    places = {row["name"]: (_value(row, x, rows), _value(row, y, rows)) for row in rows}
    axes.set_yscale("log" if y.unit == "nats" else "linear")
    along = [places[name] for name in best if name in places]
    if len(along) > 1:
        axes.plot(*zip(*along), color=_SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    for number, row in enumerate(rows):
        marker = _MARKERS[kinds.index((row["vision_quant"], row["resolution"])) % len(_MARKERS)]
        on_front = row["name"] in best
        axes.plot(
            *places[row["name"]], marker=marker, color=_RECIPES[recipes.index(row["recipe"]) % len(_RECIPES)],
            markersize=8 if on_front else 6, markeredgecolor=_CARD, markeredgewidth=0.8, alpha=1 if on_front else 0.75,
            gid=f"{prefix}-{number}", zorder=4 if on_front else 3,
        )  # fmt: skip
    _dress(axes, x, y)
    # from zero, or else the noise of a clock would look like a difference
    if x.timing:
        axes.set_xlim(0, 1.15 * max(place[0] for place in places.values()))
    if y.timing:
        axes.set_ylim(0, 1.15 * max(place[1] for place in places.values()))
    if len(kinds) > 1:
        _legend(axes, kinds)
    _wishes(axes, keys, found, places)
    named = rows if len(rows) <= _ALL_NAMED else [row for row in rows if row["name"] in best]
    texts = {row["name"]: row["recipe"] if len(kinds) > 1 else label(row, found["points"]) for row in named}
    colours = {row["name"]: _RECIPES[recipes.index(row["recipe"]) % len(_RECIPES)] for row in named}
    _name(axes, places, texts, colours)


def _value(row: Row, one: Column, rows: Sequence[Row]) -> float:
    """In the plot's unit; a zero that a logarithmic axis hasn't, a little below the smallest figure."""
    value = row["figures"][one.key] * {"MB": 1e-6, "%": 100.0, "ms": 1e3}.get(one.unit, 1.0)
    if one.unit == "nats" and value <= 0:
        return _FLOOR * min((r["figures"][one.key] for r in rows if r["figures"][one.key] > 0), default=1e-9)
    return float(value)


def _dress(axes: Any, x: Column, y: Column) -> None:
    axes.margins(0.12, 0.12)
    for one, put in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
        put(f"{one.label}{', ' + one.unit if one.unit else ''}", color=_SOFT)
    axes.tick_params(which="both", colors=_SOFT, length=0)
    axes.grid(color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(axes: Any, kinds: Sequence[tuple[str, int]]) -> None:
    """Which marker is which form and resolution, above the plot."""
    forms, sizes = ({kind[axis] for kind in kinds} for axis in (0, 1))
    for number, (form, size) in enumerate(kinds):
        text = " at ".join(([form] if len(forms) > 1 else []) + ([str(size)] if len(sizes) > 1 else []))
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot([], [], marker=marker, color=_SOFT, linestyle="", markersize=6, markeredgewidth=0, label=text)
    place: Any = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.1, "borderpad": 0.1}
    axes.legend(
        frameon=False,
        labelcolor=_SOFT,
        fontsize=8,
        ncols=min(4, len(kinds)),
        handletextpad=0.1,
        columnspacing=1,
        **place,
    )


def _wishes(axes: Any, keys: tuple[str, str], found: Mapping[str, Any], places: Mapping[str, Any]) -> None:
    """Lines where the wish ends, and a ring around what is recommended."""
    size, share = found["wish"]["max_size"], found["wish"]["min_agreement"]
    line: Any = {"color": _GOOD, "linewidth": 1, "linestyle": (0, (1, 2)), "zorder": 1}
    if size is not None and keys[0] == "bytes":
        axes.axvline(size / 1e6, **line)
    if share is not None and keys[1] == AGREEMENT:
        axes.axhline(100 * share, **line)
    chosen = found["recommendation"]["point"]
    if chosen in places:
        ring: Any = {"marker": "o", "markersize": 14, "markerfacecolor": "none", "markeredgewidth": 1.6, "zorder": 5}
        axes.plot(*places[chosen], markeredgecolor=_GOOD, **ring)


def _name(axes: Any, places: Mapping[str, Any], texts: Mapping[str, str], colours: Mapping[str, str]) -> None:
    """Name points, each at the first place around it where no point and no other name is, or else the emptiest."""
    axes.autoscale_view()  # or else points would be measured before they have their places
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [_box(x - 6, y - 6, x + 6, y + 6) for x, y in map(axes.transData.transform, places.values())]
    for name in sorted(texts, key=lambda name: places[name]):
        best: Any = None
        for far in _FAR:
            for dx, dy in _OFFSETS:
                side = "left" if dx > 0 else "right" if dx < 0 else "center"
                text = axes.annotate(
                    texts[name], places[name], (dx * far, dy * far), textcoords="offset points",
                    color=colours[name], fontsize=8.5, ha=side, va="center", bbox=_BEHIND, zorder=6,
                )  # fmt: skip
                box = text.get_window_extent(renderer).expanded(1.02, 1.05)
                outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
                cost = sum(_overlap(box, other) for other in taken) + 1e6 * outside
                if best is not None and best[0] <= cost:
                    text.remove()
                    continue
                if best is not None:
                    best[1].remove()
                best = cost, text, box
            if best[0] == 0:
                break
        if best[0] > 0 and len(places) > _ALL_NAMED:  # its tip says it
            best[1].remove()
        else:
            taken.append(best[2])


def _box(x0: float, y0: float, x1: float, y1: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x0, y0, x1, y1)


def _overlap(a: Any, b: Any) -> float:
    return float(max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0)))


def _with_tips(svg: str, rows: Sequence[Row], keys: tuple[str, str], prefix: str) -> str:
    """Each point says its name and figures when the pointer rests on it."""
    for number, row in enumerate(rows):
        facts = ", ".join(f"{column(k).label} {shown(row['figures'][k], column(k).unit)}" for k in keys)
        mark = f'<g id="{prefix}-{number}">'
        svg = svg.replace(mark, f"{mark}<title>{escape(row['name'])}: {escape(facts)}</title>", 1)
    return svg
