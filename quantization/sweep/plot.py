"""The trade-offs of a sweep as inline SVG: a colour for each recipe, a marker for each form and resolution."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastvlm.common import plots as common
from quantization.sweep.columns import AGREEMENT, FRONTS, KL, Column, Row, column, label, shown

HUES = (255, 25, 145, 300, 75, 200, 345, 110, 275, 50, 170, 320)  # degrees on the colour circle, unlike ones first
_RECIPES = [f"r{number}" for number in range(len(HUES))]  # the page's CSS variables
_COLOURS = common.page_colours(*_RECIPES)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p", "h")
_ALL_NAMED = 16  # points; of more, those on the front are named
_FLOOR = 0.3  # of the smallest figure above zero: where zero is drawn on a logarithmic axis


def plots(rows: Sequence[Row], fronts: Mapping[str, Sequence[str]], result: Mapping[str, Any]) -> dict[str, str]:
    """SVG text by the trade-off's name, of those whose figures there are.

    `rows` have their timings among their figures; `result` is the report's document (constraints, recommendation).
    """
    drawn = {}
    for number, (name, keys) in enumerate(FRONTS.items()):
        known = [row for row in rows if all(row["figures"].get(key) is not None for key in keys)]
        if known:
            with common.figure(5.8, 4.3, "sweep") as figure:
                axes = figure.add_axes((0.155, 0.11, 0.83, 0.79))
                _draw(axes, known, keys, fronts[name], result, f"p{number}")
                drawn[name] = _with_tips(common.page_svg(figure, _COLOURS), known, keys, f"p{number}")
    return drawn


def _draw(
    axes: Any, rows: Sequence[Row], keys: tuple[str, str], best: Sequence[str], result: Mapping[str, Any], prefix: str
) -> None:
    recipes = list(dict.fromkeys(row["recipe"] for row in result["points"]))
    tints = {row["name"]: _COLOURS[_RECIPES[recipes.index(row["recipe"]) % len(_RECIPES)]] for row in rows}
    kinds = list(dict.fromkeys((row["vision_quant"], row["resolution"]) for row in result["points"]))
    x, y = (column(key) for key in keys)
    places = {row["name"]: (_value(row, x, rows), _value(row, y, rows)) for row in rows}
    axes.set_yscale("log" if y.key == KL else "linear")
    axes.margins(0.12, 0.12)
    along = [places[name] for name in best if name in places]
    if len(along) > 1:
        axes.plot(*zip(*along), color=_COLOURS["soft"], linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    for number, row in enumerate(rows):
        marker = _MARKERS[kinds.index((row["vision_quant"], row["resolution"])) % len(_MARKERS)]
        on_front = row["name"] in best
        axes.plot(
            *places[row["name"]], marker=marker, color=tints[row["name"]], markersize=8 if on_front else 6,
            markeredgecolor=_COLOURS["card"], markeredgewidth=0.8, alpha=1 if on_front else 0.75,
            gid=f"{prefix}-{number}", zorder=4 if on_front else 3,
        )  # fmt: skip
    _axes(axes, x, y, places, kinds)
    _constraints(axes, keys, result, places)
    named = rows if len(rows) <= _ALL_NAMED else [row for row in rows if row["name"] in best]
    texts = {row["name"]: row["recipe"] if len(kinds) > 1 else label(row, result["points"]) for row in named}
    common.name_points(axes, places, texts, tints, _COLOURS, optional=True)


def _value(row: Row, column: Column, rows: Sequence[Row]) -> float:
    """The figure in the plot's unit; a zero, which a logarithmic axis lacks, a little below the smallest figure."""
    value: float = row["figures"][column.key]
    if column.key == KL and value <= 0:
        return _FLOOR * min((r["figures"][column.key] for r in rows if r["figures"][column.key] > 0), default=1e-9)
    return value * column.scale


def _axes(axes: Any, x: Column, y: Column, places: Mapping[str, Any], kinds: Sequence[tuple[str, int]]) -> None:
    """Labels, limits, and above the plot which marker is which form and resolution."""
    axes.set_xlabel(f"{x.label}{', ' + x.unit if x.unit else ''}")
    axes.set_ylabel(f"{y.label}{', ' + y.unit if y.unit else ''}")
    # from zero, or else the noise of a clock would look like a difference
    if x.timing:
        axes.set_xlim(0, 1.15 * max(place[0] for place in places.values()))
    if y.timing:
        axes.set_ylim(0, 1.15 * max(place[1] for place in places.values()))
    if y.unit == "%":
        common.percent_axis(axes.yaxis, axes.get_ylim())
    forms, sizes = ({kind[axis] for kind in kinds} for axis in (0, 1))
    for number, (form, size) in enumerate(kinds if len(kinds) > 1 else ()):
        text = " at ".join(([form] if len(forms) > 1 else []) + ([str(size)] if len(sizes) > 1 else []))
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot([], [], marker=marker, color=_COLOURS["soft"], linestyle="", markersize=6, label=text)
    common.dress(axes, _COLOURS, grid="both", legend=min(4, len(kinds)) if len(kinds) > 1 else 0)


def _constraints(axes: Any, keys: tuple[str, str], result: Mapping[str, Any], places: Mapping[str, Any]) -> None:
    """Lines where the constraints end, and a ring around what is recommended."""
    size, share = result["constraints"]["max_size"], result["constraints"]["min_agreement"]
    line: Any = {"color": _COLOURS["good"], "linewidth": 1, "linestyle": (0, (1, 2)), "zorder": 1}
    if size is not None and keys[0] == "bytes":
        axes.axvline(size / 1e6, **line)
    if share is not None and keys[1] == AGREEMENT:
        axes.axhline(100 * share, **line)
    chosen = result["recommendation"]["point"]
    if chosen in places:
        ring: Any = {"marker": "o", "markersize": 14, "markerfacecolor": "none", "markeredgewidth": 1.6, "zorder": 5}
        axes.plot(*places[chosen], markeredgecolor=_COLOURS["good"], **ring)


def _with_tips(svg: str, rows: Sequence[Row], keys: tuple[str, str], prefix: str) -> str:
    """Add a tooltip to each point: its name and figures."""
    for number, row in enumerate(rows):
        facts = ", ".join(f"{column(k).label} {shown(row['figures'][k], column(k).unit)}" for k in keys)
        mark = f'<g id="{prefix}-{number}">'
        svg = svg.replace(mark, f"{mark}<title>{escape(row['name'])}: {escape(facts)}</title>", 1)
    return svg
