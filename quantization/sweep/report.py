"""What a sweep found: report.json, report.csv and one self-contained page, with a recommendation in a sentence.

The same points give the same document, in whatever order and on however many machines they were measured, but for what
is under "timings".
"""

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm.common.page import templates
from fastvlm.common.staging import write_file
from quantization.sweep.engine import WIDE, Outcome, Point

FILES = ("report.json", "report.csv", "index.html")
_EXAMPLES = 8  # questions shown
_MOST_COLUMNS = 14  # points whose answers stand side by side
_SHARE_KEPT = 0.99  # what is kept when nothing is asked for
KL, AGREEMENT = "answer_kl_mean", "same_answers"  # of a point's figures, what quality is judged by
_MISSING = "[…]"  # stands for words of the reference that an answer lacks

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A figure of a point. `unit` says how it is shown; `more` whether more of it is better."""

    key: str
    label: str
    unit: str
    more: bool = False
    timing: bool = False


COLUMNS = (
    Column("bytes", "size", "MB"),
    Column("bytes_language", "language model", "MB"),
    Column("bytes_vision", "encoder", "MB"),
    Column("bits_per_weight", "bits a weight", "bits"),
    Column(KL, "KL of the answers", "nats"),
    Column("answer_top1", "same tokens", "%", more=True),
    Column(AGREEMENT, "same answers", "%", more=True),
    Column("exact", "right answers", "%", more=True),
    Column("perplexity_ratio", "perplexity / reference's", ""),
    Column("ttft_s", "TTFT", "ms", timing=True),
    Column("peak_bytes", "peak memory", "GB", timing=True),
    Column("seconds", "took", "s", timing=True),
)
# The trade-offs that are drawn, and the two figures that each trades.
FRONTS = {
    "size and KL": ("bytes", KL),
    "size and answers": ("bytes", AGREEMENT),
    "size and TTFT": ("bytes", "ttft_s"),
    "TTFT and answers": ("ttft_s", AGREEMENT),
}
_SCALES = {"MB": 1e-6, "GB": 1e-9, "%": 100.0, "ms": 1e3}


@dataclass(frozen=True)
class Wish:
    """What the recommendation has to keep: bytes at most, share of the reference's answers at least."""

    max_size: float | None = None
    min_agreement: float | None = None


def column(key: str) -> Column:
    return next(one for one in COLUMNS if one.key == key)


def document(
    points: Sequence[Point], outcome: Outcome, about: Mapping[str, Any], machine: Mapping[str, Any], wish: Wish
) -> dict[str, Any]:
    """Everything that was found. `about` says what was swept; `machine` (a timing) where and with what it was timed."""
    rows, timings = [], {}
    for point in points:
        if (result := outcome.results.get(point["name"])) is not None:
            rows.append({**_head(point), "key": outcome.keys[point["name"]], **_kept(result, "figures", "answers")})
            timings[point["name"]] = result["timings"]
    rows.sort(key=lambda row: (_worst(row["figures"].get("bytes")), row["name"]))
    timed = [{**row, "figures": row["figures"] | timings[row["name"]]} for row in rows]
    fronts = {name: front(timed, *axes) for name, axes in FRONTS.items()}
    of_timings = {name for name, axes in FRONTS.items() if any(column(key).timing for key in axes)}
    failed = [
        _head(point) | {"error": outcome.errors[point["name"]]} for point in points if point["name"] in outcome.errors
    ]
    return {
        **about,
        "wish": asdict(wish),
        "recommendation": recommend(rows, wish),
        "pareto": {name: names for name, names in fronts.items() if name not in of_timings},
        "points": rows,
        "failed": sorted(failed, key=lambda row: str(row["name"])),
        "timings": {
            **machine,
            "points": {row["name"]: timings[row["name"]] for row in rows},
            "pareto": {name: names for name, names in fronts.items() if name in of_timings},
            "sweep_seconds": outcome.seconds,
            "found": outcome.found,
        },
    }


def _head(point: Point) -> dict[str, Any]:
    return {**_kept(point, "name", "vision_quant", "resolution"), "recipe": point["recipe"]["name"]}


def _kept(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: mapping[key] for key in keys}


def _worst(value: float | None) -> float:
    """A figure that is to be small; one that was not finite, or not measured, is worse than all."""
    return float("inf") if value is None else value


def front(rows: Sequence[Row], x: str, y: str) -> list[str]:
    """Names of the points that no other beats in one figure without losing in the other, along `x`."""

    def cost(row: Row) -> tuple[float, ...]:
        values = ((row["figures"].get(key), column(key).more) for key in (x, y))
        return tuple(_worst(None if value is None else -value if more else value) for value, more in values)

    costs = {row["name"]: cost(row) for row in rows}
    finite = {name: both for name, both in costs.items() if float("inf") not in both}
    best = [
        name
        for name, (a, b) in finite.items()
        if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in finite.values())
    ]
    return sorted(best, key=lambda name: (finite[name], name))


# The recommendation


def recommend(rows: Sequence[Row], wish: Wish) -> dict[str, Any]:
    """{"point": a name or None, "sentence"}: the smallest point that keeps `min_agreement` within `max_size`.

    With `max_size` alone the best that fits; with nothing asked for, the smallest that keeps 99 % of the answers.
    """
    known = [row for row in rows if None not in (row["figures"].get("bytes"), row["figures"].get(AGREEMENT))]
    if not known:
        return {"point": None, "sentence": "Nothing to recommend: no point has a size and answers to compare."}
    share = wish.min_agreement
    if share is None and wish.max_size is None:
        share = _SHARE_KEPT
    fits = [row for row in known if wish.max_size is None or row["figures"]["bytes"] <= wish.max_size]
    keeps = [row for row in known if share is None or row["figures"][AGREEMENT] >= share]
    both = [row for row in fits if row in keeps]
    if not both:
        return {"point": None, "sentence": _nothing(known, fits, keeps, wish.max_size, share)}
    chosen = min(both, key=_size_first if share is not None else _quality_first)
    rest = _smaller(chosen, known) if share is not None else _larger(chosen, known)
    sentence = f"Ship {label(chosen, known)}: {_facts(chosen)} of the answers as the reference's; {rest}."
    return {"point": chosen["name"], "sentence": sentence}


def _size_first(row: Row) -> tuple[Any, ...]:
    figures = row["figures"]
    return figures["bytes"], -figures[AGREEMENT], _worst(figures.get(KL)), row["name"]


def _quality_first(row: Row) -> tuple[Any, ...]:
    figures = row["figures"]
    return -figures[AGREEMENT], _worst(figures.get(KL)), figures["bytes"], row["name"]


def _facts(row: Row) -> str:
    return f"{shown(row['figures']['bytes'], 'MB')}, {shown(row['figures'][AGREEMENT], '%')}"


def _smaller(chosen: Row, known: Sequence[Row]) -> str:
    below = [row for row in known if row["figures"]["bytes"] < chosen["figures"]["bytes"]]
    if not below:
        return "no point is smaller"
    following = max(below, key=lambda row: (row["figures"]["bytes"], row["figures"][AGREEMENT], row["name"]))
    return f"the next smaller point, {label(following, known)}, falls to {shown(following['figures'][AGREEMENT], '%')}"


def _larger(chosen: Row, known: Sequence[Row]) -> str:
    above = [row for row in known if row["figures"][AGREEMENT] > chosen["figures"][AGREEMENT]]
    if not above:
        return "no larger point is better"
    following = min(above, key=_size_first)
    return f"the smallest better one is {label(following, known)}: {_facts(following)}"


def _nothing(
    known: Sequence[Row], fits: Sequence[Row], keeps: Sequence[Row], size: float | None, share: float | None
) -> str:
    """Which points come nearest, and what they lack."""
    asked = [f"is within {shown(size, 'MB')}"] if size is not None else []
    asked += [f"keeps {shown(share, '%')} of the answers"] if share is not None else []
    parts = [f"No point {' and '.join(asked)}"]
    if fits:
        best = min(fits, key=_quality_first)
        within = f"within {shown(size, 'MB')}" if size is not None else "of all"
        parts.append(f"the best {within} is {label(best, known)}: {_facts(best)} of the answers as the reference's")
    if keeps and size is not None:
        least = min(keeps, key=_size_first)
        over = shown(least["figures"]["bytes"] - size, "MB")
        kept = f"that keeps {shown(share, '%')}" if share is not None else "of all"
        parts.append(f"the smallest {kept} is {label(least, known)}: {_facts(least)}, {over} too large")
    elif not fits:
        least = min(known, key=_size_first)
        parts.append(f"the smallest of all is {label(least, known)}: {_facts(least)}")
    return "; ".join(parts) + "."


def label(row: Row, rows: Sequence[Row]) -> str:
    """A point's name without what all points of the sweep share."""
    forms, sizes = {one["vision_quant"] for one in rows}, {one["resolution"] for one in rows}
    form = f" with {row['vision_quant']}" if forms != {WIDE} and (len(forms) > 1 or row["vision_quant"] != WIDE) else ""
    return row["recipe"] + form + (f" at {row['resolution']}" if len(sizes) > 1 else "")


def shown(value: float | None, unit: str) -> str:
    """A figure for people: three or four digits, shares in percent, sizes in decimal units."""
    if value is None:
        return "–"
    number = value * _SCALES.get(unit, 1.0)
    if unit == "%":
        return f"{number:.4g} %"
    text = f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
    return f"{text} {unit}" if unit not in ("", "bits", "nats") else text


# Files


def write(folder: Path, found: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> Path:
    """Write report.json, report.csv and index.html, each whole; returns the page. `pictures`: question -> data URL."""
    data, rows, page = (folder / name for name in FILES)
    write_file(data, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    write_file(rows, table(found).encode())
    write_file(page, render(found, pictures or {}).encode())
    return page


def table(found: Mapping[str, Any]) -> str:
    """All points as CSV, the failed ones last; figures in bytes, shares, nats and seconds."""
    target = io.StringIO()
    fields = ["recipe", "vision_quant", "resolution", *(one.key for one in COLUMNS), "error"]
    writer = csv.DictWriter(target, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in found["points"]:
        writer.writerow({**row, **row["figures"], **found["timings"]["points"][row["name"]]})
    writer.writerows(found["failed"])
    return target.getvalue()


def render(found: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The page. Names, questions, answers and errors are data: all of them are escaped."""
    from markupsafe import Markup

    from quantization.sweep.plot import HUES, plots

    points, timings = found["points"], found["timings"]
    rows = [{**row, "figures": row["figures"] | timings["points"][row["name"]]} for row in points]
    columns = [one for one in COLUMNS if any(row["figures"].get(one.key) is not None for row in rows)]
    pages = templates(Path(__file__).with_name("templates"))
    pages.filters |= {"shown": shown}
    chart = plots(rows, found["pareto"] | timings["pareto"], found)
    best = set(found["pareto"]["size and KL"]) | set(found["pareto"]["size and answers"])
    return pages.get_template("sweep.html.j2").render(
        found=found,
        rows=rows,
        columns=columns,
        hues=HUES,
        plots=[(name, Markup(svg)) for name, svg in chart.items()],
        best=best,
        largest=max((row["figures"]["bytes"] or 0 for row in rows), default=0) or 1,
        asked=_asked(found["wish"]),
        examples=examples(found),
        pictures=pictures,
        label=lambda row: label(row, points),
    )


def _asked(wish: Mapping[str, float | None]) -> str:
    size, share = wish["max_size"], wish["min_agreement"]
    asked = [f"at most {shown(size, 'MB')}"] if size is not None else []
    asked += [f"at least {shown(share, '%')} of the answers"] if share is not None else []
    return ", ".join(asked) or "nothing in particular"


def examples(found: Mapping[str, Any]) -> dict[str, Any]:
    """The questions on which most points part: {"columns": points, "rows": answers' documents with "cells" added}.

    A cell is a point's answer as `differences`. Of a large grid, the points with the recommended one's form and
    resolution.
    """
    points = [row for row in found["points"] if row["answers"]]
    if len(points) > _MOST_COLUMNS:
        wanted = found["recommendation"]["point"]
        like = next((row for row in points if row["name"] == wanted), points[0])
        points = [row for row in points if all(row[axis] == like[axis] for axis in ("vision_quant", "resolution"))]
    points = points[:_MOST_COLUMNS]
    rows = []
    for number, asked in enumerate(points[0]["answers"] if points else ()):
        given = [row["answers"][number]["candidate"] for row in points]
        cells = [differences(asked["reference"], answer) for answer in given]
        several = len({asked["reference"], *given})
        rows.append((several, sum(answer != asked["reference"] for answer in given), {**asked, "cells": cells}))
    rows.sort(key=lambda row: (-row[0], -row[1]))  # stable: otherwise as asked
    return {"columns": points, "rows": [row for _, _, row in rows[:_EXAMPLES]]}


def differences(reference: str, answer: str) -> list[tuple[str, bool]]:
    """The answer in pieces of words, each with whether the reference has other words there."""
    theirs, words = reference.split(), answer.split()
    pieces = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, theirs, words, autojunk=False).get_opcodes():
        pieces.append((" ".join(words[start:end]) or _MISSING, kind != "equal"))
    return pieces
