"""The per-layer error plot of a parity page, as inline SVG in the page's own colours."""

import io
import re
from typing import Any

from fastvlm.common.page import inline_svg

# Colours that stand for the page's CSS variables, so that one picture serves light and dark.
_INK, _SOFT, _LINE, _ROUND, _LAYER, _BAD, _CARD = (f"#{n:06x}" for n in range(0x010101, 0x010108))
_VARIABLES = {
    _INK: "ink",
    _SOFT: "soft",
    _LINE: "line",
    _ROUND: "rounding",
    _LAYER: "layers",
    _BAD: "bad",
    _CARD: "card",
}
_BEHIND = {"facecolor": _CARD, "edgecolor": "none", "pad": 1.5, "alpha": 0.85}


def error_plot(operations: dict[str, Any], limits: dict[str, Any], first: dict[str, Any] | None) -> str:
    """SVG text: SNR in dB of every operation (line) and every layer (dots) over the order of execution.

    `operations` as in `encoders.compare_operations`, `limits` the document's metrics (for the tolerance), `first` the
    operation that left its tolerance. Exact values lie above any scale and are left out; broken ones lie on the floor.
    """
    import matplotlib

    style: Any = {"svg.hashsalt": "parity", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(style):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.5, 3.9))
        FigureCanvasSVG(figure)
        _draw(figure.add_axes((0.065, 0.13, 0.92, 0.78)), operations, limits["layer_snr"]["tolerance"], first)
        figure.patch.set_visible(False)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return inline_svg(target.getvalue(), _VARIABLES)


def _draw(axes: Any, operations: dict[str, Any], tolerance: float, first: dict[str, Any] | None) -> None:
    rounding, layers = _points(operations["rounding"]), _points(operations["layers"])
    everything = [value for _, value, _ in rounding + layers]
    top = max([*everything, tolerance + 10]) + 8
    bottom = 0.0 if first else max(0.0, min([*everything, tolerance]) - 14)
    count = len(operations["rounding"])
    dots: Any = {"color": _LAYER, "marker": ".", "linestyle": "", "markersize": 7, "markeredgewidth": 0}
    for points, marks, label in (
        (rounding, {"color": _ROUND, "linewidth": 1.1}, "rounding: as typed against float32"),
        (layers, dots, "layers: as typed against PyTorch"),
    ):
        axes.plot([x for x, _, _ in points], [max(y, bottom) for _, y, _ in points], label=label, **marks)
    axes.axhline(tolerance, color=_BAD, linestyle=(0, (5, 3)), linewidth=1)
    at_right = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "top", "fontsize": 9}
    axes.text(1.0, tolerance - 0.8, f"tolerance {tolerance:g} dB", color=_BAD, bbox=_BEHIND, **at_right)
    axes.set_xlim(-2, count + 1)
    axes.set_ylim(bottom, top)
    _stages(axes, operations["layers"], count, top)
    _mark(axes, layers or rounding, first, bottom, top)
    _dress(axes)


def _dress(axes: Any) -> None:
    axes.set_ylabel("signal to noise, dB", color=_SOFT)
    axes.set_xlabel("operation, in order of execution", color=_SOFT)
    axes.tick_params(colors=_SOFT, length=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "borderaxespad": 0.2, "borderpad": 0.1}
    axes.legend(frameon=False, labelcolor=_SOFT, handlelength=1.4, **place)


def _points(errors: list[dict[str, Any]]) -> list[tuple[int, float, dict[str, Any]]]:
    """(index, dB, error) without the exact ones; what is broken beyond measure gets −1000 and lies on the floor."""
    values = ((error["index"], max(-1000.0, float(error["snr_db"])), error) for error in errors)
    return [(index, value, error) for index, value, error in values if value != float("inf")]


def _stages(axes: Any, layers: list[dict[str, Any]], count: int, top: float) -> None:
    """Name the encoder's stages along the top, from the layers' own names; `count` operations in all."""
    starts: dict[str, int] = {}
    for layer in layers:
        stage = re.match(r"stages\.\d+|[^.]+", layer["layer"])
        starts.setdefault(stage.group().replace("stages.", "stage ") if stage else "", layer["index"])
    for (name, start), end in zip(starts.items(), [*list(starts.values())[1:], count]):
        axes.axvline(start - 0.5, color=_LINE, linewidth=0.8)
        if end - start > 0.05 * count:  # room for the name
            axes.text((start + end) / 2, top - 1, name, color=_SOFT, ha="center", va="top", fontsize=8.5)


def _mark(
    axes: Any, points: list[tuple[int, float, dict[str, Any]]], first: dict[str, Any] | None, bottom: float, top: float
) -> None:
    """Annotate the operation that left its tolerance, or else the weakest."""
    if first:
        index, value, error, text = first["index"], float(first["snr_db"]), first, "first out of tolerance"
    elif points:
        index, value, error = min(points, key=lambda point: point[1])
        text = "weakest"
    else:
        return
    colour = _BAD if first else _INK
    height = max(bottom, value)
    name = error["layer"] or f"{error['type']} {error['name']}"
    span = axes.get_xlim()[1]
    axes.plot(
        [index],
        [height],
        "o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=colour,
        markeredgewidth=1.4,
        clip_on=False,
    )
    axes.annotate(
        f"{text}: {name}, {value:.1f} dB", (index, height), color=colour, fontsize=9, textcoords="offset points",
        xytext=(-12 if index > span / 2 else 12, 16 if height < bottom + 0.15 * (top - bottom) else -14),
        ha="right" if index > span / 2 else "left", va="center", bbox=_BEHIND, zorder=5,
    )  # fmt: skip
