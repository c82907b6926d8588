"""The texts of findings: rules.json has each rule's severity, what is expected, and what to do.

A check names the rule, the place and what is there. A rule that is broken in several ways has an entry for each, as
"config-value" and "config-value/rope".
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from fastvlm.common.findings import Finding

AGAIN = "export again"  # what to do about everything that an export writes


def finding(rule: str, where: str, got: object, **values: object) -> Finding:
    """Return the finding of a rule. `values` fill its texts' fields."""
    entry = table()[rule]
    return Finding(
        rule.partition("/")[0],
        where,
        str(got),
        entry.get("expected", "").format(**values),
        entry.get("remedy", AGAIN).format(**values),
        entry.get("severity", "error"),
    )


@cache
def table() -> dict[str, dict[str, Any]]:
    """Return rules.json's rules."""
    document: dict[str, Any] = json.loads(Path(__file__).with_name("rules.json").read_text(encoding="utf-8"))
    return document
