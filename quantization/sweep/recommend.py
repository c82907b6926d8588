"""The Pareto front of a sweep's points, and the recommended one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantization.sweep.columns import AGREEMENT, KL, Row, column, label, shown

_DEFAULT_AGREEMENT = 0.99  # without a constraint
_LEVEL = 0.95  # of Wilson's score interval of a share of answers: it stays within 0 and 1, and is sound for few trials


@dataclass(frozen=True)
class Constraints:
    """Bounds on the recommended point: size in bytes at most, share of the reference's answers at least."""

    max_size: float | None = None
    min_agreement: float | None = None

    def __str__(self) -> str:
        parts = [f"at most {shown(self.max_size, 'MB')}"] if self.max_size is not None else []
        parts += [f"at least {shown(self.min_agreement, '%')} of the answers"] if self.min_agreement is not None else []
        return ", ".join(parts) or "nothing in particular"


def worst(value: float | None) -> float:
    """A figure that should be small; one that was not finite, or not measured, is worse than all."""
    return float("inf") if value is None else value


def front(rows: Sequence[Row], x: str, y: str) -> list[str]:
    """Names of the points that no other beats in one figure without losing in the other, along `x`."""

    def cost(row: Row) -> tuple[float, ...]:
        values = ((row["figures"].get(key), column(key).more) for key in (x, y))
        return tuple(worst(None if value is None else -value if more else value) for value, more in values)

    costs = {row["name"]: cost(row) for row in rows}
    finite = {name: both for name, both in costs.items() if float("inf") not in both}
    best = [
        name
        for name, (a, b) in finite.items()
        if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in finite.values())
    ]
    return sorted(best, key=lambda name: (finite[name], name))


def recommend(rows: Sequence[Row], constraints: Constraints) -> dict[str, Any]:
    """The smallest point that keeps `min_agreement` within `max_size`, as {"point", "sentence", "questions",
    "interval"}.

    With `max_size` alone the best that fits; without constraints, the smallest that keeps 99 % of the answers. Where no
    point does, "point" is None, and the sentence names the nearest. "interval" is that of the share of same answers.
    """
    from scipy.stats import binomtest

    known = [row for row in rows if None not in (row["figures"].get("bytes"), row["figures"].get(AGREEMENT))]
    size, share = constraints.max_size, constraints.min_agreement
    if share is None and size is None:
        share = _DEFAULT_AGREEMENT
    fits = [row for row in known if size is None or row["figures"]["bytes"] <= size]
    keeps = [row for row in known if share is None or row["figures"][AGREEMENT] >= share]
    both = [row for row in fits if row in keeps]
    if not both:
        return {"point": None, "sentence": _no_point(known, fits, keeps, size, share)}
    chosen = min(both, key=_size_first if share is not None else _quality_first)
    rest = _smaller(chosen, known) if share is not None else _larger(chosen, known)
    count = chosen["figures"]["questions"]
    same = round(chosen["figures"][AGREEMENT] * count)
    low, high = binomtest(same, count).proportion_ci(_LEVEL, method="wilson")
    sentence = (
        f"Ship {label(chosen, known)}: {_facts(chosen)} of the answers as the reference's ({same} of {count} questions;"
        f" 95 % interval {100 * low:.3g} to {100 * high:.3g} %); {rest}."
    )
    interval = [round(float(low), 4), round(float(high), 4)]
    return {"point": chosen["name"], "sentence": sentence, "questions": count, "interval": interval}


def _size_first(row: Row) -> tuple[Any, ...]:
    figures = row["figures"]
    return figures["bytes"], -figures[AGREEMENT], worst(figures.get(KL)), row["name"]


def _quality_first(row: Row) -> tuple[Any, ...]:
    figures = row["figures"]
    return -figures[AGREEMENT], worst(figures.get(KL)), figures["bytes"], row["name"]


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


def _no_point(
    known: Sequence[Row], fits: Sequence[Row], keeps: Sequence[Row], size: float | None, share: float | None
) -> str:
    """The points that come nearest, and what they lack."""
    if not known:
        return "Nothing to recommend: no point has a size and answers to compare."
    needs = [f"is within {shown(size, 'MB')}"] if size is not None else []
    needs += [f"keeps {shown(share, '%')} of the answers"] if share is not None else []
    parts = [f"No point {' and '.join(needs)}"]
    if fits:
        best = min(fits, key=_quality_first)
        within = f"within {shown(size, 'MB')}" if size is not None else "of all"
        parts.append(f"the best {within} is {label(best, known)}: {_facts(best)} of the answers as the reference's")
    if keeps and size is not None:
        least = min(keeps, key=_size_first)
        over = shown(least["figures"]["bytes"] - size, "MB")
        which = f"that keeps {shown(share, '%')}" if share is not None else "of all"
        parts.append(f"the smallest {which} is {label(least, known)}: {_facts(least)}, {over} too large")
    elif not fits:
        least = min(known, key=_size_first)
        parts.append(f"the smallest of all is {label(least, known)}: {_facts(least)}")
    return "; ".join(parts) + "."
