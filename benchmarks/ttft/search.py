"""Transformers' best setting on this machine, by a greedy search: one setting after the other, the faster one stays."""

import platform
from collections.abc import Callable
from typing import Any

from benchmarks.ttft.process import RunnerError, Specification
from benchmarks.ttft.run import trial
from fastvlm.common import threads

ROUNDS = 3  # of each trial after a first one; the fastest counts, because what disturbs a round only makes it slower
_HOPELESS = 3.0  # a first round so many times slower than the best ends the trial


def search(base: Specification, budget: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Try settings of a checkpoint's runner, each in a process of its own.

    Args:
        base: the specification with Transformers' default settings, which are tried first.
        budget: seconds for the first round of a trial.

    Returns:
        {"device", "rows", "best"}. A row: {"setting", "value", "ttft_paper" in s, "kept"}, with "error" where
        there is one; "best" is what to add to the specification.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    least = float("inf")
    for setting, value in options(base):
        change = {setting: value} if value else {}
        row: dict[str, Any] = {"setting": setting, "value": value, "kept": False}
        try:
            took = row["ttft_paper"] = trial({**base, **best, **change}, ROUNDS, min(budget, _HOPELESS * least))
            if took < least:
                least, row["kept"] = took, True
                best |= change
            say(f"{base['name']}: {setting} {value}: {took:.4g} s")
        except RunnerError as error:
            row["error"] = str(error)
            say(f"{base['name']}: {setting} {value}: {error}")
        rows.append(row)
    return {"device": base["device"], "rows": rows, "best": best}


def options(base: Specification) -> list[tuple[str, Any]]:
    """The settings to try in this order.

    The default is float32, contiguous, sdpa, the system's allocator, and the threads that the user wants, or all: only
    then fewer are tried.
    """
    tried: list[tuple[str, Any]] = [("default", ""), ("dtype", "bfloat16"), ("dtype", "float16")]
    tried.append(("memory_format", "channels_last"))
    if base["device"] == "cpu":
        if platform.libc_ver()[0] == "glibc":
            tried.append(("keep_buffers", True))
        most = 0 if base.get("threads") else threads.count()
        tried += [("threads", number) for number in sorted({1, most // 2}, reverse=True) if 0 < number < most]
    return [*tried, ("attention", "eager")]
