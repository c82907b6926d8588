"""`python -m benchmarks ttft repeatability`: does `diff` keep its word on this machine, with the load that it has now?

The demo checkpoint is measured again and again, each run held against the one before it: nothing has changed, so
whatever is called is false. Then each stage in turn is slowed by 15 %, and has to be named, for every
runner and nothing else. A runner that failed, or was left out of a comparison, doesn't count as quiet.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.suites.suite import DEMO
from benchmarks.ttft import command, diff, plan
from benchmarks.ttft.run import Effort
from benchmarks.ttft.runner import DELAY, STAGES, TOTALS
from fastvlm.common.cli import add_common, progress
from fastvlm.common.errors import UserError

SLOWDOWN = 1.15
FALSE_SHARE = 0.05  # of the pairs, at most
RUNNERS = ("executor-as-typed", "transformers-cpu")
EFFORT = Effort(launches=5, rounds=36)
Measure = Callable[[], dict[str, Any]]


def add_parser(verbs: Any) -> None:
    """Add `repeatability`."""
    parser = verbs.add_parser(
        "repeatability",
        help="whether `diff` calls nothing between equal runs, and names a stage slowed by 15 %%",
        description="Measure the demo checkpoint again and again: pairs of equal runs, then one stage after the other"
        " slowed by 15 %%. Exit 1 when more than one pair in 20 is called different, or a slowdown isn't named.",
    )
    parser.add_argument(
        "--pairs", type=int, default=20, metavar="N", help="of neighbouring runs (default: %(default)s)"
    )
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=list(STAGES), help="slowed in turn (default: all)"
    )
    command.add_effort(parser, EFFORT)
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, judge, print."""
    faults = command.effort_faults(args)
    if args.pairs < 1:
        faults.append(f"--pairs {args.pairs}: expected 1 or more")
    if os.environ.get(DELAY):
        faults.append(f"{DELAY} is set to {os.environ[DELAY]}: expected none, unset it")
    if faults:
        raise UserError("; ".join(faults))
    effort = Effort(args.launches, args.rounds, args.budget)
    asked = plan.Asked(DEMO, patterns=RUNNERS, search=False, effort=effort, work=args.work_dir)
    with progress("runs", args.pairs + 1 + len(args.stage)) as advance:

        def measure() -> dict[str, Any]:
            document = plan.measure(asked, say=lambda line: None)
            advance()
            return document

        found = repeat(measure, args.pairs, args.stage)
    if not args.json:
        print_found(found)
    return found


def repeat(measure: Measure, pairs: int, stages: list[str]) -> dict[str, Any]:
    """{"pairs": [changes called of each], "false": how many have some, "slowed": {stage: {"missed", "false"}},
    "left_out": what wasn't compared, of any run, "passed"}."""
    before, called, left_out = measure(), [], []
    for _ in range(pairs):
        after = measure()
        found = diff.compare(before, after)
        called.append([f"{row['runner']} {row['stage']} {row['change']:+.1%}" for row in found["changes"]])
        left_out += found["left_out"]
        before = after
    slowed = {}
    for stage in stages:
        os.environ[DELAY] = f"{stage}=x{SLOWDOWN}"
        try:
            found = diff.compare(before, measure())
        finally:
            del os.environ[DELAY]
        slowed[stage] = _judge(stage, found["rows"])
        left_out += found["left_out"]
    false = sum(map(bool, called))
    named = all(not one["missed"] and not one["false"] for one in slowed.values())
    passed = false <= FALSE_SHARE * pairs and named and not left_out
    unique = list(dict.fromkeys(left_out))
    return {"pairs": called, "false": false, "slowed": slowed, "left_out": unique, "passed": passed}


def _judge(stage: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """{"missed": runners whose slowed stage wasn't called slower, "false": what else was but for its totals}."""
    within = {stage, *(total for total, parts in TOTALS.items() if stage in parts)}
    slower = {row["runner"].rpartition("/")[2] for row in rows if row["stage"] == stage and row["called"] == "slower"}
    return {
        "missed": [name for name in RUNNERS if name not in slower],
        "false": [f"{row['runner']} {row['stage']}" for row in rows if row["called"] and row["stage"] not in within],
    }


def print_found(found: Mapping[str, Any]) -> None:
    """The two counts, and what went wrong."""
    print(f"equal runs called different: {found['false']} of {len(found['pairs'])}")
    for number, calls in enumerate(found["pairs"]):
        if calls:
            print(f"  pair {number + 1}: {', '.join(calls)}")
    for stage, one in found["slowed"].items():
        wrong = [f"not called for {', '.join(one['missed'])}"] if one["missed"] else []
        wrong += [f"also called: {', '.join(one['false'])}"] if one["false"] else []
        print(f"{stage} slowed by {SLOWDOWN - 1:.0%}: {'; '.join(wrong) or 'named, and nothing else'}")
    for line in found["left_out"]:
        print(f"left out: {line}")
