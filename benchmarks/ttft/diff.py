"""Stages that became slower or faster between two saved runs, by more than their noise.

On a machine that others use, a change is separated from noise in four steps. A stage's time is without the time that
its thread waited for a processor that others had (as Linux counts it; sleeping or working longer still counts). It is
divided by the time of the yardstick, the same work before every round of every run, because crowded caches and a slower
clock last longer than a run. A process counts once, by the median of its rounds: the layout of its memory is the same
for all of them. The logarithms of both runs' processes go into Welch's t-test, with Bonferroni's correction over all
stages of a comparison. docs/TTFT.md has what each step is for, measured.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.ttft.figures import medians, title
from benchmarks.ttft.runner import STAGES, TOTALS, totals
from fastvlm.common.errors import UserError

FALSE = 0.05  # probability of a false call in a whole comparison
LEAST = 0.05  # no change below this is called, however quiet the machine
_MACHINE = ("cpu", "machine", "cores", "memory_gib", "system")
Document = Mapping[str, Any]


def compare(old: Document, new: Document) -> dict[str, Any]:
    """Compare two runs of the same benchmark on the same machine.

    Returns:
        {"changes", "rows", "left_out", "delays"}; `changes` are the rows whose "called" is "slower" or "faster". A row:
        "point", "runner", "stage", "old" and "new" (median seconds as measured), "change" (new / old - 1, by
        those ratios), "threshold" (the least change that would be called).

    Raises:
        UserError: the runs are not comparable; names every difference.
    """
    known = {_point_key(point): point for point in old["points"]}
    pairs = [(known[_point_key(point)], point) for point in new["points"] if _point_key(point) in known]
    before, after = (_conditions(run, bool(pairs)) for run in (old, new))
    if differences := [f"{name} {before[name]} and {after[name]}" for name in before if before[name] != after[name]]:
        raise UserError(
            f"the runs are not comparable: {'; '.join(differences)}: measure both on one machine with the same flags"
        )
    left_out: list[str] = []
    both = [
        (title(old, a), first, second, stage)
        for a, b in pairs
        for first, second in _runners(a, b, left_out)
        for stage in (*STAGES, *TOTALS)
        if stage in values(first) and stage in values(second)
    ]
    if not both:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise UserError(f"nothing to compare: no runner and stage that both runs measured{why}")
    rows = []
    for point, first, second, stage in both:
        change, threshold = map(float, welch(values(first)[stage], values(second)[stage], len(both)))
        rows.append({
            "point": point, "runner": first["name"], "stage": stage,
            "old": medians(first, old["tokens"])[stage], "new": medians(second, new["tokens"])[stage],
            "change": math.expm1(change), "threshold": math.expm1(threshold),
            "called": None if abs(change) <= threshold else "slower" if change > 0 else "faster",
        })  # fmt: skip
    changes = [row for row in rows if row["called"]]
    return {"changes": changes, "rows": rows, "left_out": left_out, "delays": [old["delay"], new["delay"]]}


def welch(old: npt.ArrayLike, new: npt.ArrayLike, comparisons: int) -> tuple[np.ndarray, np.ndarray]:
    """The differences of means and the least differences that count in one of so many comparisons, over the last axis
    of arrays (..., processes) of log seconds."""
    from scipy import stats

    result = stats.ttest_ind(new, old, axis=-1, equal_var=False)
    interval = result.confidence_interval(1 - FALSE / comparisons)
    threshold = np.maximum((interval.high - interval.low) / 2, math.log1p(LEAST))
    return np.asarray(new).mean(-1) - np.asarray(old).mean(-1), threshold


def values(runner: Document) -> dict[str, list[float]]:
    """Stage or total -> for each process the median of its rounds: logarithms of the time without waiting, as a part of
    the yardstick's. Waiting never takes more than nine tenths of a stage."""
    columns: dict[str, list[float]] = {}
    for launch in runner["launches"]:
        rounds = []
        for record in launch["rounds"]:
            least = {name: max(0.1 * took, 1e-9) for name, took in record["stages"].items()}
            alone = {name: max(took - record["waited"][name], least[name]) for name, took in record["stages"].items()}
            rounds.append(
                {name: took / (record["yardstick_s"] or 1.0) for name, took in (alone | totals(alone)).items()}
            )
        for name in rounds[0]:
            columns.setdefault(name, []).append(math.log(statistics.median(record[name] for record in rounds)))
    return columns


def _point_key(point: Document) -> tuple[Any, ...]:
    return point["resolution"], point["prompt"], point["question"]


def _conditions(run: Document, same_points: bool) -> dict[str, Any]:
    """The conditions that must be the same in both runs."""
    return {
        **{name: run["environment"].get(name) for name in _MACHINE},
        "checkpoint": run["checkpoint"]["sha256"][:12],
        **{name: run[name] for name in ("picture", "tokens", "threads")},
        "resolution and prompt": same_points or ", ".join(title(run, point) for point in run["points"]),
    }


def _runners(a: Document, b: Document, left_out: list[str]) -> Iterator[tuple[Document, Document]]:
    """The runners that both points measured with the same settings; the reasons for others go to `left_out`."""
    first, second = ({runner["name"]: runner for runner in point["runners"]} for point in (a, b))
    for name in dict.fromkeys([*first, *second]):
        pair = [runners.get(name, {"error": ""}) for runners in (first, second)]
        if any("error" in runner for runner in pair):
            left_out.append(f"{name}: not measured in both")
            continue
        old, new = (runner["settings"] if runner["kind"] == "checkpoint" else {} for runner in pair)
        unlike = [
            f"{key} {old.get(key)} and {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
        ]
        if min(len(runner["launches"]) for runner in pair) < 2:
            left_out.append(f"{name}: measured in one process, expected two or more, which show the noise")
        elif unlike:
            left_out.append(f"{name}: {', '.join(unlike)}")
        else:
            yield pair[0], pair[1]
