"""`python -m benchmarks ttft diff OLD NEW`: what became slower or faster, by more than the noise of the two runs.

How a change is told from noise on a machine that others use, too:

1. From each stage's wall time goes what its thread waited for a processor that others had (Linux counts it). A stage
   that sleeps, or works longer, keeps that time. Runners with more threads than cores keep it as well: they wait for
   themselves.
2. Of a process's rounds, some at a time, a low quantile counts: what else disturbs a round only makes it longer.
3. The yardstick, the same work beside every round of every run, tells how fast the machine was ("products", which is
   divided by) and how crowded its caches ("tokens" / "products"). How each stage follows the crowding is found from
   both runs, by least squares within them, and taken out; what that leaves uncertain is added to the noise.
4. Processes differ by the layout of their memory, which no number of rounds in one of them averages out. So a process
   counts once, and the difference of the runs' means (of logarithms) is held against the spread of the processes:
   Student's t, with the stage's own variance drawn towards that of all stages (few processes know their own spread
   badly), for the probability `FALSE` of one false call in the whole comparison (Bonferroni), never less than `LEAST`.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ttft.report import figures, shown, title
from benchmarks.ttft.runner import STAGES, TOTALS
from fastvlm.common.cli import add_common
from fastvlm.common.errors import UserError
from fastvlm.common.terminal import Console

FALSE = 0.05  # probability of a false call in a whole comparison
LEAST = 0.05  # no change below this is called, however quiet the machine
QUANTILE = 0.25  # of some rounds
TOGETHER = 12  # rounds at least that a quantile is taken of, if a process has so many
_PRIOR = 6  # degrees of freedom that the variance of all stages weighs
_FOLLOWS = (0.8, 0.03)  # how a stage follows the crowding before it is measured, and the weight of that: a variance
_CORRECTED = 0.15  # of all that was taken out (waiting, speed, crowding) is added to what a change must exceed
# The processes of a run share its minutes: runs differ by more than their processes' spread says. 18 stages and totals
# of 3 pairs of equal runs of the demo on 2 cores at load 3 to 6: by 1.3² to 1.4² of its variance.
_SHARED = 1.5
_ONE_PROCESS = 0.08  # standard deviation between processes where there is one of each, so that none can be measured

# (runner, stage or total) -> for each process, for some of its rounds at a time: (crowding, log seconds)
Values = dict[tuple[str, str], list[list[tuple[float, float]]]]


def add_parser(verbs: Any) -> None:
    """Add `diff`."""
    parser = verbs.add_parser(
        "diff",
        help="what changed between two saved runs by more than their noise",
        description="Compare two runs of the same benchmark, each runner, point and stage.",
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--fail-on-slower", action="store_true", help="exit 1 when a stage became slower")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare, and print what changed."""
    from benchmarks.ttft.document import load_document

    found = compare(load_document(args.old), load_document(args.new))
    if not args.json:
        print_comparison(found)
    slower = any(row["called"] == "slower" for row in found["changes"])
    return {**found, **({"passed": not slower} if args.fail_on_slower else {})}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """{"changes", "rows", "left_out", "delays"}; `changes` are the rows with "called" "slower" or "faster".

    A row: "point", "runner", "stage", "old" and "new" (median seconds as measured), "change" (new / old - 1, noise and
    drift taken out as the module says), "threshold" (the least change that is called). UserError when the runs aren't
    comparable, in a line that names what differs.
    """
    _refuse(_differences(old, new))
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    pairs = list(_points(old, new))
    comparisons = sum(len(_common(*pair, old, new, [])) for pair in pairs)
    for a, b in pairs:
        values = _values(a, old), _values(b, new)
        common = _common(a, b, old, new, left_out)
        follows = {stage: _follows([one[key] for one in values for key in common if key[1] == stage])
                   for stage in {stage for _, stage in common}}  # fmt: skip
        even = {key: [_even(one[key], follows[key[1]]) for one in values] for key in common}
        usual = _usual(even.values())
        for key in common:
            moved = _crowding(values[1][key]) - _crowding(values[0][key])
            medians = [_median(point, document, *key) for point, document in ((a, old), (b, new))]
            noise = follows[key[1]][1] * moved**2
            row = _judge(even[key][0], even[key][1], math.log(medians[1] / medians[0]), noise, usual, comparisons)
            head = {"point": title(old, a), "runner": key[0], "stage": key[1]}
            rows.append(head | dict(zip(("old", "new"), medians)) | row)
    if not rows:
        raise UserError(f"nothing to compare: no runner and stage that both runs measured{_why(left_out)}")
    return {
        "changes": [row for row in rows if row["called"]], "rows": rows, "left_out": left_out,
        "delays": [old["delay"], new["delay"]],
    }  # fmt: skip


def _why(left_out: Sequence[str]) -> str:
    return f" ({'; '.join(left_out)})" if left_out else ""


# What can be compared


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What must be the same and isn't."""
    faults = []
    for name in ("cpu", "machine", "cores", "memory_gib", "system"):
        faults += _unlike(name, old["environment"].get(name), new["environment"].get(name))
    faults += _unlike("checkpoint", old["checkpoint"]["sha256"][:12], new["checkpoint"]["sha256"][:12])
    for name in ("picture", "tokens", "threads"):
        faults += _unlike(name, old[name], new[name])
    if not any(True for _ in _points(old, new)):
        each = (", ".join(title(one, point) for point in one["points"]) for one in (old, new))
        faults += _unlike("resolution and prompt", *each)
    return faults


def _unlike(name: str, a: Any, b: Any) -> list[str]:
    return [] if a == b else [f"{name} {a} and {b}"]


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise UserError(
            f"the runs are not comparable: {'; '.join(faults)}: measure both on one machine with the same flags"
        )


def _points(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    known = {_key(point): point for point in old["points"]}
    for point in new["points"]:
        if _key(point) in known:
            yield known[_key(point)], point


def _key(point: Mapping[str, Any]) -> tuple[Any, ...]:
    return point["resolution"], point["prompt"], point["question"]


def _common(
    a: Mapping[str, Any], b: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any], left_out: list[str]
) -> list[tuple[str, str]]:
    """Runners and stages that both measured with the same settings; why others are left out is added to `left_out`."""
    found = []
    others = {runner["name"]: runner for runner in b["runners"]}
    for runner in a["runners"]:
        name, other = runner["name"], others.pop(runner["name"], None)
        if other is None or "error" in runner or "error" in other:
            left_out.append(f"{name}: not measured in both")
            continue
        unlike = [
            f"{key} {runner['settings'].get(key)} and {other['settings'].get(key)}"
            for key in sorted({*runner["settings"], *other["settings"]})
            if runner["settings"].get(key) != other["settings"].get(key)
        ]
        if unlike and runner["kind"] == "checkpoint":
            left_out.append(f"{name}: {', '.join(unlike)}")
            continue
        both = _values_of(runner, old).keys() & _values_of(other, new).keys()
        found += [(name, stage) for stage in (*STAGES, *TOTALS) if stage in both]
    left_out += [f"{name}: not measured in both" for name in others]
    return found


# Noise


def _values(point: Mapping[str, Any], document: Mapping[str, Any]) -> Values:
    return {
        (runner["name"], stage): values
        for runner in point["runners"]
        if "error" not in runner
        for stage, values in _values_of(runner, document).items()
    }


def _values_of(runner: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, list[list[tuple[float, float]]]]:
    """A runner's part of `Values`."""
    threads = runner["settings"].get("threads") or document["threads"]
    alone = isinstance(threads, int) and threads > document["environment"]["cores"]
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for launch in runner["launches"]:
        rounds = launch["rounds"]
        parts = max(1, len(rounds) // TOGETHER)
        here: dict[str, list[tuple[float, float]]] = {}
        for part in (rounds[len(rounds) * n // parts : len(rounds) * (n + 1) // parts] for n in range(parts)):
            if not part:
                continue
            lows = _lows([_working(one, not alone) for one in part])
            lows |= {name: sum(lows[one] for one in of) for name, of in TOTALS.items() if set(of) <= set(lows)}
            yardstick = _lows([_working(one["yardstick"], True) for one in part if one["yardstick"]])
            speed = math.log(yardstick.get("products", 1.0))
            crowding = math.log(yardstick.get("tokens", 1.0)) - speed
            for name, low in lows.items():
                here.setdefault(name, []).append((crowding, math.log(low) - speed))
        for name, values in here.items():
            found.setdefault(name, []).append(values)
    return found


def _working(one: Mapping[str, Any], without_waiting: bool) -> dict[str, float]:
    """A round's stages in seconds; waiting never takes more than nine tenths of one."""
    waited = one.get("waited", {}) if without_waiting else {}
    return {name: max(seconds - waited.get(name, 0.0), 0.1 * seconds, 1e-9) for name, seconds in one["stages"].items()}


def _lows(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The low quantile of each stage."""
    found = {}
    for name in rounds[0] if rounds else ():
        values = [one[name] for one in rounds]
        several = len(values) > 1
        found[name] = (
            statistics.quantiles(values, n=round(1 / QUANTILE), method="inclusive")[0] if several else values[0]
        )
    return found


def _follows(runs: Sequence[Sequence[Sequence[tuple[float, float]]]]) -> tuple[float, float]:
    """The exponent by which a stage follows the crowding, and its variance: least squares over the rounds of all
    processes, each runner of each run about its own mean, drawn towards what is usual."""
    centred = []
    for run in runs:
        values = [value for process in run for value in process]
        x0, y0 = (statistics.fmean(value[axis] for value in values) for axis in (0, 1))
        centred += [(x - x0, y - y0) for x, y in values]
    usual, weight = _FOLLOWS
    squares = sum(x * x for x, _ in centred) + weight
    slope = min(max((sum(x * y for x, y in centred) + weight * usual) / squares, 0.0), 2.0)
    left = sum((y - slope * x) ** 2 for x, y in centred) / max(1, len(centred) - len(runs))
    return slope, left / squares


def _even(processes_: Sequence[Sequence[tuple[float, float]]], follows: tuple[float, float]) -> list[float]:
    """The log seconds of each process, with the crowding taken out."""
    return [statistics.fmean(y - follows[0] * x for x, y in values) for values in processes_]


def _crowding(processes_: Sequence[Sequence[tuple[float, float]]]) -> float:
    return statistics.fmean(x for values in processes_ for x, _ in values)


def _usual(pairs: Iterable[Sequence[Sequence[float]]]) -> float:
    """The variance between processes that stages have: the median over runners and stages of both runs."""
    found = [statistics.variance(values) for pair in pairs for values in pair if len(values) > 1]
    return statistics.median(found) if found else _ONE_PROCESS**2


def _judge(
    old: Sequence[float], new: Sequence[float], raw: float, noise: float, usual: float, comparisons: int
) -> dict[str, Any]:
    """The change of a stage, what it must exceed, and what it is called. `raw`: the change as measured, a logarithm;
    `noise`: the variance of what was taken out for the crowding; `usual`: the variance of all stages."""
    difference = statistics.fmean(new) - statistics.fmean(old)
    own = sum(statistics.variance(values) * (len(values) - 1) for values in (old, new) if len(values) > 1)
    freedom = len(old) + len(new) - 2
    variance = (own + _PRIOR * usual) / (freedom + _PRIOR)
    error = math.sqrt(_SHARED * variance * (1 / len(old) + 1 / len(new)) + noise)
    threshold = max(student(1 - FALSE / (2 * comparisons), freedom + _PRIOR) * error, math.log1p(LEAST))
    threshold += _CORRECTED * abs(raw - difference)
    called = None if abs(difference) <= threshold else "slower" if difference > 0 else "faster"
    return {"change": math.expm1(difference), "threshold": math.expm1(threshold), "called": called}


def student(probability: float, freedom: float) -> float:
    """The quantile of Student's t distribution: Hill's expansion (Abramowitz and Stegun 26.7.5), good to 1 % from five
    degrees of freedom on."""
    x = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def _median(point: Mapping[str, Any], document: Mapping[str, Any], name: str, stage: str) -> float:
    runner = next(one for one in point["runners"] if one["name"] == name)
    return figures(runner, document["tokens"])[stage]["median"]


def print_comparison(found: Mapping[str, Any]) -> None:
    """What changed, as a table; in a sentence what didn't."""
    from rich.table import Table

    console = Console(highlight=False)
    if found["changes"]:
        table = Table(title="changes beyond the noise", title_justify="left")
        for column in ("runner", "stage", "old", "new", "change", "called from", ""):
            table.add_column(column, overflow="fold")
        for row in found["changes"]:
            style = "red" if row["called"] == "slower" else "green"
            figures_ = (shown(row["stage"], row["old"]), shown(row["stage"], row["new"]), f"{row['change']:+.1%}")
            table.add_row(
                row["runner"], row["stage"], *figures_, f"{row['threshold']:.1%}", f"[{style}]{row['called']}[/]"
            )
        console.print(table)
    quiet = [row["threshold"] for row in found["rows"] if not row["called"]]
    if quiet:
        console.print(
            f"no change in {len(quiet)} of {len(found['rows'])} stages and totals; a change is called from"
            f" {min(quiet):.1%} to {max(quiet):.1%}, by the noise of each", markup=False,
        )  # fmt: skip
    for line in found["left_out"]:
        console.print(f"left out: {line}", markup=False)
    for name, delay in zip(("OLD", "NEW"), found["delays"]):
        if delay:
            console.print(f"{name} was slowed on purpose: {delay}", style="red", markup=False)
