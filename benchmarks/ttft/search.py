"""Transformers' best setting on this machine, found by trying: one setting after the other, the best kept."""

import platform
from collections.abc import Callable
from typing import Any

from benchmarks.ttft.process import RunnerError, Specification
from benchmarks.ttft.run import trial
from fastvlm.common import threads

ROUNDS = 3  # of each trial after a first one; the fastest counts, because what disturbs a round only makes it slower
_HOPELESS = 3.0  # a first round so many times slower than the best ends the trial
_COMPILES = 600.0  # s that a first round with torch.compile may take


def search(base: Specification, compiled: bool, budget: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Try the settings of a checkpoint's runner, each in a process of its own and within `budget` seconds for its first
    round -> {"device", "rows", "best"}.

    A row is {"setting", "value", "ttft_paper", "kept"} in seconds, with "compile_s" or "error" where there is one;
    "best" is what to add to the specification. The first row is Transformers' default.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    least = float("inf")
    for setting, value in [("default", ""), *_options(base, compiled)]:
        tried = {**base, **best} | ({} if setting == "default" else {setting: value})
        row: dict[str, Any] = {"setting": setting, "value": value, "kept": False}
        rows.append(row)
        try:
            found = trial(tried, ROUNDS, _COMPILES if setting == "compile" else min(budget, _HOPELESS * least))
        except RunnerError as error:
            row["error"] = str(error)
            say(f"{base['name']}: {setting} {value}: {error}")
            continue
        row["ttft_paper"] = found["ttft_paper"]
        if setting == "compile":
            row["compile_s"] = found["first"] - found["ttft_paper"]
        if row["ttft_paper"] < least:
            least, row["kept"] = row["ttft_paper"], True
            best |= {} if setting == "default" else {setting: value}
        say(f"{base['name']}: {setting} {value}: {row['ttft_paper']:.4g} s")
    return {"device": base["device"], "rows": rows, "best": best}


def _options(base: Specification, compiled: bool) -> list[tuple[str, Any]]:
    """What is tried, in this order; the default is float32, contiguous, sdpa, the system's allocator, and the threads
    that were asked for, or all: only then fewer are tried."""
    options: list[tuple[str, Any]] = [("dtype", "bfloat16"), ("dtype", "float16"), ("memory_format", "channels_last")]
    if base["device"] == "cpu":
        if platform.libc_ver()[0] == "glibc":
            options.append(("keep_buffers", True))
        most = 0 if base.get("threads") else threads.count()
        options += [("threads", number) for number in sorted({1, most // 2}, reverse=True) if 0 < number < most]
    options.append(("attention", "eager"))
    return [*options, ("compile", True)] if compiled else options
