"""The curve of `python -m benchmarks encoder`: the size of a compressed encoder against its fidelity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvlm.common import plots

_COLOURS = plots.FILE
# Family of forms -> colour, marker.
_FAMILIES = {
    "fp16": (_COLOURS["ink"], "s"),
    "palette of the tensor": (_COLOURS["blue"], "o"),
    "palettes of 16 channels": (_COLOURS["purple"], "o"),
    "integers": (_COLOURS["orange"], "D"),
    "chosen for each layer by --min-snr": (_COLOURS["good"], "^"),
}


def write_plot(encoders: Mapping[str, Mapping[str, float]], target: Path, title: str) -> None:
    """Draw encoders {name: {"bytes", "snr" in dB, "agreement" in 0..1}} to `target` (.png), which appears whole or not.

    Above the ratio over the package's size, below the share of same answers over it. OSError where it can't be written.
    """
    with plots.figure(10.5, 8.2, "compression") as figure:
        upper = figure.add_axes((0.075, 0.47, 0.905, 0.435))
        lower = figure.add_axes((0.075, 0.075, 0.905, 0.345), sharex=upper)
        figure.text(0.075, 0.972, title, color=_COLOURS["ink"], fontsize=11, va="center")
        upper.set_ylabel("signal to noise, dB")
        lower.set_ylabel("same answers, %")
        lower.set_xlabel("encoder package, MB")
        upper.tick_params(labelbottom=False)
        for axes, key, factor in ((upper, "snr", 1.0), (lower, "agreement", 100.0)):
            places = {name: (one["bytes"] / 1e6, factor * one[key]) for name, one in encoders.items()}
            _points(axes, places)
            if axes is lower:
                plots.percent_axis(axes.yaxis, axes.get_ylim())
            plots.dress(axes, _COLOURS, legend=5 if axes is upper else 0)
            texts = {name: f"≥ {name[8:]} dB" if name.startswith("min-snr-") else name for name in encoders}
            tints = {name: _FAMILIES[family(name)][0] for name in encoders}
            plots.name_points(axes, places, texts, tints, _COLOURS)
        plots.write(figure, target)


def family(name: str) -> str:
    """Which of the plot's series an encoder belongs to."""
    if name.startswith("min-snr"):
        return "chosen for each layer by --min-snr"
    if name.startswith("int"):
        return "integers"
    if name.startswith("palette"):
        return "palettes of 16 channels" if "-g16" in name else "palette of the tensor"
    return "fp16"


def _points(axes: Any, places: Mapping[str, tuple[float, float]]) -> None:
    for name, (colour, marker) in _FAMILIES.items():
        series = sorted(place for form, place in places.items() if family(form) == name)
        line = (0, (4, 3)) if name.endswith("--min-snr") else ""
        style = {"color": colour, "marker": marker, "linestyle": line, "linewidth": 1, "markeredgewidth": 0}
        axes.plot([x for x, _ in series], [y for _, y in series], markersize=7, label=name, zorder=3, **style)
    axes.margins(0.09, 0.13)
