"""A sweep's results: the document, and its files: report.json, report.csv and one self-contained page.

The same points give the same document, in whatever order and on however many machines they were measured, but for what
is under "timings".
"""

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastvlm.common import page
from fastvlm.common.staging import write_file
from quantization.sweep.columns import COLUMNS, FRONTS, column, label, shown
from quantization.sweep.engine import Outcome, Point
from quantization.sweep.plot import HUES, plots
from quantization.sweep.recommend import Constraints, front, recommend, worst

FILES = ("report.json", "report.csv", "index.html")
TEMPLATE = Path(__file__).parent / "templates" / "sweep.html.j2"
_EXAMPLES = 8  # questions shown
_MOST_COLUMNS = 14  # points whose answers stand side by side
_MISSING = "[…]"  # stands for words of the reference that an answer lacks


def document(
    points: Sequence[Point],
    outcome: Outcome,
    about: Mapping[str, Any],
    machine: Mapping[str, Any],
    constraints: Constraints,
) -> dict[str, Any]:
    """The whole result. `about` describes the sweep; `machine` (a timing) the machine and runners of the timings."""
    rows, timings = [], {}
    for point in points:
        if (result := outcome.results.get(point["name"])) is not None:
            rows.append(
                {
                    **_head(point), "key": outcome.keys[point["name"]], "figures": result["figures"],
                    "answers": result["answers"],
                }
            )  # fmt: skip
            timings[point["name"]] = result["timings"]
    rows.sort(key=lambda row: (worst(row["figures"].get("bytes")), row["name"]))
    timed = [{**row, "figures": row["figures"] | timings[row["name"]]} for row in rows]
    fronts = {name: front(timed, *axes) for name, axes in FRONTS.items()}
    of_timings = {name for name, axes in FRONTS.items() if any(column(key).timing for key in axes)}
    failed = [
        _head(point) | {"error": outcome.errors[point["name"]]} for point in points if point["name"] in outcome.errors
    ]
    return {
        **about,
        "constraints": asdict(constraints),
        "recommendation": recommend(rows, constraints),
        "pareto": {name: names for name, names in fronts.items() if name not in of_timings},
        "points": rows,
        "failed": sorted(failed, key=lambda row: str(row["name"])),
        "timings": {
            **machine,
            "points": {row["name"]: timings[row["name"]] for row in rows},
            "pareto": {name: names for name, names in fronts.items() if name in of_timings},
            "sweep_seconds": outcome.seconds,
            "found": outcome.reused,
        },
    }


def _head(point: Point) -> dict[str, Any]:
    return {key: point[key] for key in ("name", "vision_quant", "resolution")} | {"recipe": point["recipe"]["name"]}


def write(folder: Path, result: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> Path:
    """Write report.json, report.csv and index.html, each whole; returns the page. `pictures`: question -> data URL."""
    contents = (json.dumps(result, indent=1, allow_nan=False) + "\n", table(result), render(result, pictures or {}))
    for name, content in zip(FILES, contents):
        write_file(folder / name, content.encode())
    return folder / FILES[-1]


def table(result: Mapping[str, Any]) -> str:
    """All points as CSV, the failed ones last; figures in bytes, shares, nats and seconds."""
    target = io.StringIO()
    fields = ["recipe", "vision_quant", "resolution", *(column.key for column in COLUMNS), "error"]
    writer = csv.DictWriter(target, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in result["points"]:
        writer.writerow({**row, **row["figures"], **result["timings"]["points"][row["name"]]})
    writer.writerows(result["failed"])
    return target.getvalue()


def render(result: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The page. Names, questions, answers and errors are data: all of them are escaped."""
    points, timings = result["points"], result["timings"]
    rows = [{**row, "figures": row["figures"] | timings["points"][row["name"]]} for row in points]
    chart = plots(rows, result["pareto"] | timings["pareto"], result)
    return page.render(
        TEMPLATE,
        {"shown": shown},
        document=result,
        rows=rows,
        columns=[column for column in COLUMNS if any(row["figures"].get(column.key) is not None for row in rows)],
        hues=HUES,
        plots=[(name, Markup(svg)) for name, svg in chart.items()],
        best=set(result["pareto"]["size and KL"]) | set(result["pareto"]["size and answers"]),
        largest=max((row["figures"]["bytes"] or 0 for row in rows), default=0) or 1,
        constraints=Constraints(**result["constraints"]),
        examples=examples(result),
        pictures=pictures,
        label=lambda row: label(row, points),
        notes=[*result["notes"].items(), *timings["notes"].items()],
    )


def examples(result: Mapping[str, Any]) -> dict[str, Any]:
    """The questions on which most points part: {"columns": points, "rows": answers' documents with "cells" added}.

    A cell is a point's answer as `differences`. Of a large grid, the points with the recommended one's form and
    resolution.
    """
    points = [row for row in result["points"] if row["answers"]]
    if len(points) > _MOST_COLUMNS:
        wanted = result["recommendation"]["point"]
        like = next((row for row in points if row["name"] == wanted), points[0])
        points = [row for row in points if all(row[axis] == like[axis] for axis in ("vision_quant", "resolution"))]
    points = points[:_MOST_COLUMNS]
    rows = []
    for number, answer in enumerate(points[0]["answers"] if points else ()):
        given = [row["answers"][number]["candidate"] for row in points]
        cells = [differences(answer["reference"], text) for text in given]
        several = len({answer["reference"], *given})
        rows.append((several, sum(text != answer["reference"] for text in given), {**answer, "cells": cells}))
    rows.sort(key=lambda row: (-row[0], -row[1]))  # stable: otherwise in the order of the questions
    return {"columns": points, "rows": [row for _, _, row in rows[:_EXAMPLES]]}


def differences(reference: str, answer: str) -> list[tuple[str, bool]]:
    """The answer in pieces of words, each with whether the reference has other words there."""
    theirs, words = reference.split(), answer.split()
    pieces = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, theirs, words, autojunk=False).get_opcodes():
        pieces.append((" ".join(words[start:end]) or _MISSING, kind != "equal"))
    return pieces
