"""The per-layer error plot of a parity page, as inline SVG in the page's own colours."""

import io
import re
from typing import Any

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

    `operations` as in `parity.compare_operations`, `limits` the document's metrics (for the tolerance), `first` the
    operation that left its tolerance. Exact values lie above any scale and are left out; broken ones lie on the floor.
    """
    import matplotlib

    style: Any = {"svg.hashsalt": "parity", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(style):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.5, 3.9))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.065, 0.13, 0.92, 0.78))
        rounding, layers = _points(operations["rounding"]), _points(operations["layers"])
        tolerance = limits["layer_snr"]["tolerance"]
        everything = [value for _, value, _ in rounding + layers]
        top = max([*everything, tolerance + 10]) + 8
        bottom = min([0.0, tolerance]) if first else max(0.0, min([*everything, tolerance]) - 14)
        _stages(axes, operations["layers"], top)
        axes.plot(
            [x for x, _, _ in rounding],
            [max(y, bottom) for _, y, _ in rounding],
            color=_ROUND,
            linewidth=1.1,
            label="rounding: as typed against float32",
        )
        axes.plot(
            [x for x, _, _ in layers],
            [max(y, bottom) for _, y, _ in layers],
            "o",
            color=_LAYER,
            markersize=3.4,
            markeredgewidth=0,
            label="layers: as typed against PyTorch",
        )
        axes.axhline(tolerance, color=_BAD, linestyle=(0, (5, 3)), linewidth=1)
        axes.text(
            1.0,
            tolerance - 0.8,
            f"tolerance {tolerance:g} dB",
            color=_BAD,
            ha="right",
            va="top",
            fontsize=9,
            transform=axes.get_yaxis_transform(),
            bbox=_BEHIND,
        )
        _mark(axes, layers or rounding, first, bottom, top)
        axes.set_xlim(-2, len(operations["rounding"]) + 1)
        axes.set_ylim(bottom, top)
        axes.set_ylabel("signal to noise, dB", color=_SOFT)
        axes.set_xlabel("operation, in order of execution", color=_SOFT)
        axes.tick_params(colors=_SOFT, length=0)
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=2,
            frameon=False,
            labelcolor=_SOFT,
            borderaxespad=0.2,
            borderpad=0.1,
            handlelength=1.4,
        )
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(target.getvalue())


def _points(errors: list[dict[str, Any]]) -> list[tuple[int, float, dict[str, Any]]]:
    """(index, dB, error) without the exact ones; what is broken beyond measure gets −1000 and lies on the floor."""
    values = ((error["index"], max(-1000.0, float(error["snr_db"])), error) for error in errors)
    return [(index, value, error) for index, value, error in values if value != float("inf")]


def _stages(axes: Any, layers: list[dict[str, Any]], top: float) -> None:
    """Name the encoder's stages along the top, from the layers' own names."""
    spans: dict[str, list[int]] = {}
    for layer in layers:
        stage = re.match(r"stages\.\d+|[^.]+", layer["layer"] or "")
        spans.setdefault(stage.group().replace("stages.", "stage ") if stage else "", []).append(layer["index"])
    for number, (name, indices) in enumerate(spans.items()):
        if number:
            axes.axvline(indices[0] - 0.5, color=_LINE, linewidth=0.8)
        if indices[-1] - indices[0] > 12:
            axes.text((indices[0] + indices[-1]) / 2, top - 1, name, color=_SOFT, ha="center", va="top", fontsize=8.5)


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


def _inline(svg: str) -> str:
    """Drop the XML prologue and metadata, put the page's CSS variables in place of the stand-in colours."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = svg.replace("xlink:href", "href")  # HTML knows SVG, and nothing in the page names an address
    svg = re.sub(r"font: ([^;\"]*)'[^\"]*\"", r'font: \1inherit"', svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
