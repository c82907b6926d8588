"""The curve of `python -m benchmarks encoder`: what a compressed encoder weighs, against what it keeps."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvlm.common.staging import write_file

_INK, _SOFT, _LINE = "#1d1d1f", "#6e6e73", "#d2d2d7"
# Family of forms -> colour, marker.
_FAMILIES = {
    "fp16": (_INK, "s"),
    "palette of the tensor": ("#0066cc", "o"),
    "palettes of 16 channels": ("#8944ab", "o"),
    "integers": ("#c93400", "D"),
    "chosen for each layer by --min-snr": ("#248a3d", "^"),
}
_BEHIND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
_OFFSETS = ((8, 0), (-8, 0), (0, 10), (0, -10), (8, 11), (-8, 11), (8, -11), (-8, -11))  # of a label, in points
_FAR = (1.0, 1.7, 2.6)  # times an offset, until there is room


def write_plot(encoders: Mapping[str, Mapping[str, float]], target: Path, title: str) -> None:
    """Draw encoders {name: {"bytes", "snr" in dB, "agreement" in 0..1}} to `target` (.png), which appears whole or not.

    Above the ratio over the package's size, below the share of same answers over it. OSError where it can't be written.
    """
    import matplotlib

    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 10}):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.5, 8.2), dpi=150, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        upper = figure.add_axes((0.075, 0.47, 0.905, 0.435))
        lower = figure.add_axes((0.075, 0.075, 0.905, 0.345), sharex=upper)
        figure.text(0.075, 0.972, title, color=_INK, fontsize=11, va="center")
        _points(upper, encoders, "snr", 1.0)
        _points(lower, encoders, "agreement", 100.0)
        upper.set_ylabel("signal to noise, dB", color=_SOFT)
        lower.set_ylabel("same answers, %", color=_SOFT)
        lower.set_xlabel("encoder package, MB", color=_SOFT)
        upper.tick_params(labelbottom=False)
        place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2, "borderpad": 0.1}
        upper.legend(
            frameon=False, labelcolor=_SOFT, fontsize=9, ncols=5, handletextpad=0.2, columnspacing=1.2, **place
        )
        canvas.draw()
        for axes, key, factor in ((upper, "snr", 1.0), (lower, "agreement", 100.0)):
            _label(axes, encoders, key, factor)
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    write_file(target, content.getvalue())


def family(name: str) -> str:
    """Which of the plot's series an encoder belongs to."""
    if name.startswith("min-snr"):
        return "chosen for each layer by --min-snr"
    if name.startswith("int"):
        return "integers"
    if name.startswith("palette"):
        return "palettes of 16 channels" if "-g16" in name else "palette of the tensor"
    return "fp16"


def _points(axes: Any, encoders: Mapping[str, Mapping[str, float]], key: str, factor: float) -> None:
    for name, (colour, marker) in _FAMILIES.items():
        found = sorted(
            (one["bytes"] / 1e6, factor * one[key]) for form, one in encoders.items() if family(form) == name
        )
        line = (0, (4, 3)) if name.endswith("--min-snr") else ""
        style = {"color": colour, "marker": marker, "linestyle": line, "linewidth": 1, "markeredgewidth": 0}
        axes.plot([x for x, _ in found], [y for _, y in found], markersize=7, label=name, zorder=3, **style)
    axes.margins(0.09, 0.13)
    axes.tick_params(colors=_SOFT, length=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label(axes: Any, encoders: Mapping[str, Mapping[str, float]], key: str, factor: float) -> None:
    """Name every point, at the first place around it where no point and no other name is."""
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    at = {name: (one["bytes"] / 1e6, factor * one[key]) for name, one in encoders.items()}
    pixels = {name: axes.transData.transform(place) for name, place in at.items()}
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in pixels.values()]
    frame = axes.get_window_extent(renderer)
    for name in sorted(at, key=lambda name: at[name]):
        colour = _FAMILIES[family(name)][0]
        best: Any = None
        for far in _FAR:
            for dx, dy in _OFFSETS:
                text = axes.annotate(
                    name.replace("min-snr-", "≥ ") + (" dB" if name.startswith("min-snr") else ""),
                    at[name], xytext=(dx * far, dy * far), textcoords="offset points", color=colour, fontsize=8.5,
                    ha="left" if dx > 0 else "right" if dx < 0 else "center", va="center", bbox=_BEHIND, zorder=4,
                )  # fmt: skip
                box = text.get_window_extent(renderer).expanded(1.03, 1.1)
                inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
                overlap = sum(_area(Bbox.intersection(box, other)) for other in taken) + (0 if inside else 1e6)
                if best is None or overlap < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = overlap, text, box
                else:
                    text.remove()
                if best[0] == 0:
                    break
            if best[0] == 0:
                break
        taken.append(best[2])


def _area(box: Any) -> float:
    return 0.0 if box is None else max(box.width, 0.0) * max(box.height, 0.0)
