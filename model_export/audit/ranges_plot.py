"""The plot of `fastvlm ranges`: every operation's largest value against float16's limit."""

from pathlib import Path
from typing import Any

from fastvlm.common import plots
from model_export.audit.range_summary import computing, times
from model_export.encoder.fp16 import HEADROOM, LARGEST
from model_export.encoder.ranges import Range

_COLOURS = plots.FILE
_VALUE, _SQUARE, _WEIGHT = _COLOURS["blue"], _COLOURS["purple"], _COLOURS["orange"]
_FLOOR = 2.0**-8  # what is smaller (all zero, too) lies on the axis: nothing of interest to the limit


def write_plot(ranges: list[Range], target: Path, title: str) -> None:
    """Draw to `target` (.png or .svg), which appears whole or not at all. OSError where it cannot be written."""
    with plots.figure(12, 6.4, "ranges") as figure:
        _draw(figure, ranges, title)
        plots.write(figure, target)


def _draw(figure: Any, ranges: list[Range], title: str) -> None:
    shown = computing(ranges)
    operations, names = [operation for operation, _ in shown], [place for _, place in shown]
    values = figure.add_axes((0.07, 0.30, 0.915, 0.575))
    shares = figure.add_axes((0.07, 0.09, 0.915, 0.155), sharex=values)
    figure.text(0.07, 0.965, title, color=_COLOURS["ink"], fontsize=11, va="center")
    shares.set_xlim(-1, len(operations))
    _values(values, operations, names)
    _shares(shares, operations)
    plots.stage_bands((values, shares), enumerate(names), len(names), _COLOURS)
    moves = len(ranges) - len(operations)
    shares.set_xlabel(
        f"operation, in order of execution ({len(operations)}; {moves} that only move values are left out)"
    )


def _values(axes: Any, operations: list[Range], names: list[str]) -> None:
    """The upper half."""
    largest = [max(operation.largest, _FLOOR) for operation in operations]
    squares = [(index, max(operation.square, _FLOOR)) for index, operation in enumerate(operations) if operation.square]
    everything = [*largest, *(square for _, square in squares)]
    top, bottom = max(*everything, LARGEST) * 2**4, min(*everything, 0.5) / 2
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom, top)
    axes.set_yticks([2.0**power for power in range(-8, 128, 4) if bottom <= 2.0**power <= top])
    axes.axhspan(LARGEST / HEADROOM, LARGEST, color=_COLOURS["warnwash"], linewidth=0, zorder=0)
    axes.axhspan(LARGEST, top, color=_COLOURS["badwash"], linewidth=0, zorder=0)
    for height, text in ((LARGEST, "65504: overflow"), (LARGEST / HEADROOM, f"65504 / {HEADROOM:g}: little headroom")):
        axes.axhline(height, color=_COLOURS["bad"], linewidth=1, linestyle="-" if height == LARGEST else (0, (5, 3)))
        place = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "bottom", "fontsize": 9}
        axes.text(0.004, height * 1.08, text, color=_COLOURS["bad"], **place)
    axes.plot(range(len(largest)), largest, color=_VALUE, linewidth=1.1, label="largest magnitude", zorder=3)
    if any(operation.exponent for operation in operations):
        held = [max(operation.largest * 2.0**-operation.exponent, _FLOOR) for operation in operations]
        axes.plot(
            range(len(held)), held, color=_COLOURS["good"], linewidth=1.1, label="as the export carries it", zorder=3
        )
    hot = [(index, value) for index, value in enumerate(largest) if value * HEADROOM > LARGEST]
    axes.plot(*_columns(hot), ".", color=_VALUE, markersize=7, markeredgewidth=0, zorder=4)
    if squares:
        label = "largest square inside a LayerNorm"
        axes.plot(*_columns(squares), "D", color=_SQUARE, markersize=5, markeredgewidth=0, label=label, zorder=4)
    _mark(axes, operations, names)
    axes.set_ylabel("magnitude")
    axes.tick_params(labelbottom=False)
    plots.dress(axes, _COLOURS, legend=3, above=1.04)


def _shares(axes: Any, operations: list[Range]) -> None:
    """The lower half: shares of subnormals, in percent."""
    values = [100 * operation.subnormal for operation in operations]
    weights = [
        (index, 100 * operation.weight_subnormal)
        for index, operation in enumerate(operations)
        if operation.weight_subnormal
    ]
    axes.vlines(range(len(values)), 0, values, color=_VALUE, linewidth=1.2, label="subnormal values")
    axes.plot(*_columns(weights), ".", color=_WEIGHT, markersize=5, markeredgewidth=0, label="subnormal weights")
    axes.set_ylim(0, max(*values, *(share for _, share in weights), 1.0) * 1.15)
    axes.set_ylabel("%")
    plots.dress(axes, _COLOURS, legend=3)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [index for index, _ in points], [value for _, value in points]


def _mark(axes: Any, operations: list[Range], names: list[str]) -> None:
    """Annotate the largest value and the largest square."""
    value = max(range(len(operations)), key=lambda index: operations[index].largest)
    square = max(range(len(operations)), key=lambda index: operations[index].square)
    marks = [(operations[value].largest, value, _VALUE, "")]
    if operations[square].square:
        marks.append((operations[square].square, square, _SQUARE, "square "))
    marks.sort()
    close = len(marks) == 2 and marks[1][0] < marks[0][0] * 2**3
    for (height, index, colour, what), above in zip(marks, (14, 30 if close else 14)):
        text = f"{what}{height:.4g} at {names[index]}: headroom {times(LARGEST / height)}" if height else "all zero"
        plots.note(axes, (index, max(height, _FLOOR)), text, colour, _COLOURS, above)
