"""Stages that became slower or faster between two saved runs, by more than their noise.

On a machine that others use, a change is told from noise in four steps. A stage's time is what its thread didn't spend
waiting for a processor that others had (Linux counts that; a stage that sleeps or works longer keeps its time). It is
divided by the time of the yardstick, the same work before every round of every run, because crowded caches and a slower
clock last longer than a run. A process counts once, by the median of its rounds: the layout of its memory is the same
for all of them. The logarithms of both runs' processes go into Welch's t-test, with Bonferroni's correction over all
stages of a comparison. docs/TTFT.md has what each step is for, measured.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

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
    pairs = list(_points(old, new))
    if differences := _differences(old, new, bool(pairs)):
        raise UserError(
            f"the runs are not comparable: {'; '.join(differences)}: measure both on one machine with the same flags"
        )
    left_out: list[str] = []
    tests = [(title(old, a), *one) for a, b in pairs for one in _runners(a, b, left_out)]
    both = [
        (point, first, second, stage)
        for point, first, second in tests
        for stage in (*STAGES, *TOTALS)
        if stage in values(first) and stage in values(second)
    ]
    if not both:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise UserError(f"nothing to compare: no runner and stage that both runs measured{why}")
    rows = []
    for point, first, second, stage in both:
        seconds = [medians(one, run["tokens"])[stage] for one, run in ((first, old), (second, new))]
        row = {"point": point, "runner": first["name"], "stage": stage, "old": seconds[0], "new": seconds[1]}
        rows.append(row | judge(values(first)[stage], values(second)[stage], len(both)))
    changes = [row for row in rows if row["called"]]
    return {"changes": changes, "rows": rows, "left_out": left_out, "delays": [old["delay"], new["delay"]]}


def judge(old: Sequence[float], new: Sequence[float], comparisons: int) -> dict[str, Any]:
    """The change between two samples of log seconds, and whether it is more than noise; one of `comparisons` tests."""
    change, threshold = map(float, welch(np.array(old), np.array(new), comparisons))
    called = None if abs(change) <= threshold else "slower" if change > 0 else "faster"
    return {"change": math.expm1(change), "threshold": math.expm1(threshold), "called": called}


def welch(old: np.ndarray, new: np.ndarray, comparisons: int) -> tuple[np.ndarray, np.ndarray]:
    """The differences of means and the least differences that count, over the last axis of arrays (..., processes)."""
    from scipy import stats

    result = stats.ttest_ind(new, old, axis=-1, equal_var=False)
    interval = result.confidence_interval(1 - FALSE / comparisons)
    threshold = np.maximum((interval.high - interval.low) / 2, math.log1p(LEAST))
    return new.mean(-1) - old.mean(-1), threshold


def values(runner: Document) -> dict[str, list[float]]:
    """Stage or total -> for each process the median of its rounds: logarithms of the time without waiting, as a part of
    the yardstick's."""
    columns: dict[str, list[float]] = {}
    for launch in runner["launches"]:
        rounds = [_ratios(one) for one in launch["rounds"]]
        for name in rounds[0]:
            columns.setdefault(name, []).append(math.log(statistics.median(one[name] for one in rounds)))
    return columns


def _ratios(one: Document) -> dict[str, float]:
    """A round's stages and totals; waiting never takes more than nine tenths of a stage."""
    yardstick, waited = one["yardstick_s"] or 1.0, one["waited"]
    stages = {name: max(took - waited[name], 0.1 * took, 1e-9) / yardstick for name, took in one["stages"].items()}
    return stages | totals(stages)


def _differences(old: Document, new: Document, same_points: bool) -> list[str]:
    """The conditions that must be the same and aren't."""
    conditions = [
        {
            **{name: run["environment"].get(name) for name in _MACHINE},
            "checkpoint": run["checkpoint"]["sha256"][:12],
            **{name: run[name] for name in ("picture", "tokens", "threads")},
            "resolution and prompt": same_points or ", ".join(title(run, point) for point in run["points"]),
        }
        for run in (old, new)
    ]
    return [f"{name} {a} and {b}" for (name, a), b in zip(conditions[0].items(), conditions[1].values()) if a != b]


def _points(old: Document, new: Document) -> Iterator[tuple[Document, Document]]:
    def key(point: Document) -> tuple[Any, ...]:
        return point["resolution"], point["prompt"], point["question"]

    known = {key(point): point for point in old["points"]}
    return ((known[key(point)], point) for point in new["points"] if key(point) in known)


def _runners(a: Document, b: Document, left_out: list[str]) -> Iterator[tuple[Document, Document]]:
    """The runners that both points measured with the same settings; the reasons for others go to `left_out`."""
    first, second = ({runner["name"]: runner for runner in point["runners"]} for point in (a, b))
    for name in dict.fromkeys([*first, *second]):
        pair = [runners.get(name, {"error": ""}) for runners in (first, second)]
        if any("error" in one for one in pair):
            left_out.append(f"{name}: not measured in both")
        elif min(len(one["launches"]) for one in pair) < 2:
            left_out.append(f"{name}: measured in one process, expected two or more, which show the noise")
        elif unlike := _unlike(*(one["settings"] for one in pair)) if pair[0]["kind"] == "checkpoint" else []:
            left_out.append(f"{name}: {', '.join(unlike)}")
        else:
            yield pair[0], pair[1]


def _unlike(a: Document, b: Document) -> list[str]:
    return [f"{key} {a.get(key)} and {b.get(key)}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
