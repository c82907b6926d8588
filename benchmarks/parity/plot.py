"""The per-layer error plot of a parity page, as inline SVG in the page's own colours."""

from typing import Any

from fastvlm.common import plots

_COLOURS = plots.page_colours("rounding", "layers")


def error_plot(operations: dict[str, Any], limits: dict[str, Any], first: dict[str, Any] | None) -> str:
    """SVG text: SNR in dB of every operation (line) and every layer (dots) over the order of execution.

    `operations` as in `encoders.compare_operations`, `limits` the document's metrics (for the tolerance), `first` the
    operation that left its tolerance. Exact values lie above any scale and are left out; broken ones lie on the floor.
    """
    with plots.figure(10.5, 3.9, "parity") as figure:
        _draw(figure.add_axes((0.065, 0.13, 0.92, 0.76)), operations, limits["layer_snr"]["tolerance"], first)
        return plots.page_svg(figure, _COLOURS)


def _draw(axes: Any, operations: dict[str, Any], tolerance: float, first: dict[str, Any] | None) -> None:
    rounding, layers = _points(operations["rounding"]), _points(operations["layers"])
    everything = [value for _, value, _ in rounding + layers]
    top = max([*everything, tolerance + 10]) + 8
    bottom = 0.0 if first else max(0.0, min([*everything, tolerance]) - 14)
    count = len(operations["rounding"])
    axes.set_xlim(-2, count + 1)
    axes.set_ylim(bottom, top)
    dots: Any = {"color": _COLOURS["layers"], "marker": ".", "linestyle": "", "markersize": 7, "markeredgewidth": 0}
    for points, marks, label in (
        (rounding, {"color": _COLOURS["rounding"], "linewidth": 1.1}, "rounding: as typed against float32"),
        (layers, dots, "layers: as typed against PyTorch"),
    ):
        axes.plot([x for x, _, _ in points], [max(y, bottom) for _, y, _ in points], label=label, **marks)
    axes.axhline(tolerance, color=_COLOURS["bad"], linestyle=(0, (5, 3)), linewidth=1)
    text = f"tolerance {tolerance:g} dB"
    plots.note(axes, (count, tolerance), text, _COLOURS["bad"], _COLOURS, above=-7)
    stages = [(layer["index"], layer["layer"]) for layer in operations["layers"]]
    plots.stage_bands((axes,), stages, count, _COLOURS)
    _mark(axes, layers or rounding, first)
    axes.set_ylabel("signal to noise, dB")
    axes.set_xlabel("operation, in order of execution")
    plots.dress(axes, _COLOURS, legend=2, above=1.065)


def _points(errors: list[dict[str, Any]]) -> list[tuple[int, float, dict[str, Any]]]:
    """(index, dB, error) without the exact ones; what is broken beyond measure gets −1000 and lies on the floor."""
    values = ((error["index"], max(-1000.0, float(error["snr_db"])), error) for error in errors)
    return [(index, value, error) for index, value, error in values if value != float("inf")]


def _mark(axes: Any, points: list[tuple[int, float, dict[str, Any]]], first: dict[str, Any] | None) -> None:
    """Annotate the operation that left its tolerance, or else the weakest."""
    if first:
        index, value, error, text = first["index"], float(first["snr_db"]), first, "first out of tolerance"
    elif points:
        index, value, error = min(points, key=lambda point: point[1])
        text = "weakest"
    else:
        return
    colour = _COLOURS["bad"] if first else _COLOURS["ink"]
    bottom, top = axes.get_ylim()
    height = max(bottom, value)
    ring: Any = {"markersize": 9, "markerfacecolor": "none", "markeredgecolor": colour, "markeredgewidth": 1.4}
    axes.plot([index], [height], "o", clip_on=False, **ring)
    name = error["layer"] or f"{error['type']} {error['name']}"
    above = 16 if height < bottom + 0.15 * (top - bottom) else -14
    plots.note(axes, (index, height), f"{text}: {name}, {value:.1f} dB", colour, _COLOURS, above)
