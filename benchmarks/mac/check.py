"""A check of `mac-report`: its command in a process of its own, and what that process did, judged.

Whatever the process does is a result: a crash, a time-out, garbage, an endless output.
"""

import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.checks import Check, result_in, values_at
from fastvlm.common import children
from fastvlm.common.children import ChildFailed, Finished

_TAIL = 4000  # characters of an output that are kept
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Outcome:
    """The result of a process: its exit, its JSON document (or pytest's counts), and the ends of its outputs."""

    done: Finished
    document: dict[str, Any] | None
    stdout: str = ""
    stderr: str = ""


def run(words: Sequence[str], seconds: float) -> Outcome:
    """Run a command for so long at most. Never raises for what it does."""
    lines: deque[str] = deque(maxlen=_TAIL)
    try:
        done = children.run(words, lines.append, timeout=seconds, environment={"NO_COLOR": "1", "COLUMNS": "120"})
    except ChildFailed as error:  # it did not start
        return Outcome(Finished(children.EXIT_UNUSABLE, 0.0, 0, "", str(error)), None)
    document, stdout = result_in(done.stdout)
    if document is not None:  # NaN is no JSON
        document = json.loads(json.dumps(document), parse_constant=lambda name: None)
    lines.append(done.last_line if done.last_line not in lines else "")
    return Outcome(done, document, _end(stdout), _end("\n".join(lines)))


def _end(text: str) -> str:
    return _CONTROL.sub("", text.replace("\r", "\n")).strip()[-_TAIL:]


def judge(check: Check, outcome: Outcome) -> str | None:
    """The command's faults in one line; None when it passed. A comparison that did not happen did not pass."""
    done, document = outcome.done, outcome.document
    if done.timed_out or done.returncode < 0 or (done.returncode and document is None):
        return done.ending + (f": {done.last_line.strip()[:300]}" if done.last_line else "")
    if document is None and check.require:
        return "ended well, but printed no JSON document"
    faults = []
    for path, operator, value in check.require:
        values = list(values_at(document, path.split(".")))
        if (not values) != (operator == "absent") or not all(_holds(actual, operator, value) for actual in values):
            got = ", ".join(map(str, values)) if values else "nothing"
            expected = {"is": f"{value}", "absent": "none"}.get(operator, f"{operator} {value}")
            faults.append(f"{path}: got {got[:200]}, expected {expected}")
    return "; ".join(faults) or (done.ending if done.returncode else None)


def _holds(actual: Any, operator: str, value: Any) -> bool:
    if operator in ("<=", ">="):
        return isinstance(actual, (int, float)) and (actual <= value if operator == "<=" else actual >= value)
    return {"is": actual == value, "contains": str(value) in str(actual), "absent": False}[operator]


def shown(document: Any, path: str, unit: str) -> str:
    """The values at a path for people; empty when there are none."""
    from benchmarks.parity.report import figure  # matplotlib comes with it

    values = [value for value in values_at(document, path.split(".")) if value is not None]
    pairs = [f"{key} {value}" for value in values if isinstance(value, dict) for key, value in value.items()]
    texts = [value for value in values if isinstance(value, str)]
    numbers = [figure(value, unit) for value in values if isinstance(value, (int, float))]
    return ", ".join([*pairs, *dict.fromkeys(texts), *numbers])
