"""A test of `diff` on this machine with its present load: does it keep its promise?

The same benchmark is measured again and again: whatever is called between neighbours is false. Between them it is
measured with one stage slowed by 15 %, which has to be named for every runner. A runner that failed, or that was left
out of a comparison, doesn't count as quiet.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.ttft import diff
from benchmarks.ttft.runner import DELAY, TOTALS

SLOWDOWN = 1.15
FALSE_SHARE = 0.05  # of the pairs, at most
RUNNERS = ("executor-as-typed", "transformers-cpu")
Measure = Callable[[], dict[str, Any]]


def repeat(measure: Measure, pairs: int, stages: Sequence[str]) -> dict[str, Any]:
    """Measure `pairs` pairs of equal runs, and as many with a stage slowed, the stages in turn (none without stages).

    Returns:
        {"pairs": the false calls of each pair of equal runs, "slowed": {"stage", "missed", "false"} of each other one,
        "false": how many pairs of either kind have false calls, "left_out": what wasn't compared, "passed"}.
    """
    before = measure()
    equal: list[list[str]] = []
    slowed: list[dict[str, Any]] = []
    left_out: list[str] = []
    for number in range(pairs):
        for stage in (stages[number % len(stages)], None) if stages else (None,):
            if stage:
                os.environ[DELAY] = f"{stage}=x{SLOWDOWN}"
            try:
                after = measure()
            finally:
                os.environ.pop(DELAY, None)
            comparison = diff.compare(before, after)
            left_out += comparison["left_out"]
            if stage:
                slowed.append({"stage": stage, **_judge(stage, comparison["changes"])})
            else:
                equal.append([_words(row) for row in comparison["changes"]])
                before = after
    false = sum(map(bool, [*equal, *(pair["false"] for pair in slowed)]))
    missed = any(pair["missed"] for pair in slowed)
    passed = false <= FALSE_SHARE * (len(equal) + len(slowed)) and not missed and not left_out
    unique = list(dict.fromkeys(left_out))
    return {"pairs": equal, "slowed": slowed, "false": false, "left_out": unique, "passed": passed}


def _judge(stage: str, changes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """{"missed": runners whose slowed stage wasn't called slower, "false": calls but for that stage and its totals}."""
    within = {stage, *(total for total, parts in TOTALS.items() if stage in parts)}
    named = {row["runner"].rpartition("/")[2] for row in changes if row["stage"] == stage and row["called"] == "slower"}
    return {
        "missed": [name for name in RUNNERS if name not in named],
        "false": [_words(row) for row in changes if row["stage"] not in within],
    }


def _words(row: Mapping[str, Any]) -> str:
    return f"{row['runner']} {row['stage']} {row['change']:+.1%}"
