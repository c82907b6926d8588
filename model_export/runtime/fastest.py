"""Which arithmetic is the fastest on this machine for each stage: measured, since instructions alone don't tell.

A measurement takes about half a second and is kept in the user's cache folder, beside what it was obtained on. It is
processor time of one thread, which a busy machine changes by a few per cent (three times as many runnable threads as
cores: 3 %), so that what it gave is kept as well.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from fastvlm.common import threads
from fastvlm.common.cli import log
from fastvlm.common.documents import load
from fastvlm.common.staging import write_file
from model_export.mil import onednn
from model_export.runtime.linear import ROWS

DTYPES = ("float32", "bfloat16")
_ROUNDS = 7
_HELD = 96 << 20  # bytes of matrices for single tokens: more than the caches hold
_FORMAT = 1
Run = Callable[[], object]


@dataclass(frozen=True)
class Stages:
    """What each stage computes in, of `DTYPES`."""

    encode: str
    prefill: str
    decode: str


def choose() -> Stages:
    """The fastest for each stage, from the cache or measured now; logs what it is, and where it comes from."""
    path, machine = _path(), _machine()
    if (kept := _kept(path, machine)) is not None:
        log(f"fastest here: {_line(kept)} ({path})")
        return kept
    times = measure()
    fastest = {stage: min(DTYPES, key=lambda dtype: found[dtype]) for stage, found in times.items()}
    if fastest["prefill"] == "bfloat16":  # the matrices are held once, and float32 has nothing to gain from these
        fastest["decode"] = "bfloat16"
    stages = Stages(**fastest)
    log(f"fastest here: {_line(stages, times)}")
    with suppress(OSError):  # a home that can't be written: it is measured again
        write_file(path, json.dumps({"machine": machine, "stages": asdict(stages), "seconds": times}).encode())
    return stages


def measure() -> dict[str, dict[str, float]]:
    """Seconds of processor time of a typical product of each stage on one thread, by dtype."""
    with torch.inference_mode(), threads.alone():
        return {stage: _fastest_of({dtype: make(getattr(torch, dtype)) for dtype in DTYPES})
                for stage, make in (("encode", _convolution), ("prefill", _prompt), ("decode", _token))}  # fmt: skip


def _fastest_of(runs: dict[str, Run]) -> dict[str, float]:
    """The least of some interleaved rounds, in processor time, which others on these cores hardly change; the first
    round, which creates kernels, is left out."""
    least = dict.fromkeys(runs, float("inf"))
    for number in range(_ROUNDS):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if number:
                least[name] = min(least[name], time.thread_time() - start)
    return least


def _convolution(dtype: torch.dtype) -> Run:
    """FastViTHD's most frequent layer at 1024 x 1024 (stage 3, its first expansion), on a quarter of the picture."""
    x = torch.rand(1, 384, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(1536, 384, 1, 1, dtype=dtype)
    if not onednn.packs(dtype):
        return lambda: torch.nn.functional.conv2d(x, weight)
    run = onednn.conv2d(weight, None, [1, 1], [0, 0], [1, 1], 1, x.shape)
    return lambda: run(x, "none")


def _prompt(dtype: torch.dtype) -> Run:
    """A picture's tokens through one of Qwen2-0.5B's matrices."""
    x, weight = torch.rand(ROWS, 896, dtype=dtype), torch.rand(4864, 896, dtype=dtype)
    if not onednn.packs(dtype):
        return lambda: torch.nn.functional.linear(x, weight)
    run = onednn.linear(weight, None, ROWS)
    return lambda: run(x)


def _token(dtype: torch.dtype) -> Run:
    """One token through such matrices, each read from memory."""
    x, size = torch.rand(1, 896, dtype=dtype), 4864 * 896
    weights = [torch.ones(4864, 896, dtype=dtype) for _ in range(_HELD // (size * dtype.itemsize))]
    turn = cycle(weights)
    return lambda: [torch.nn.functional.linear(x, next(turn)) for _ in range(2)]


# The cache


def _path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastvlm" / "fastest.json"


def _machine() -> dict[str, Any]:
    """What decides the measurement."""
    limits = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    return {
        "format": _FORMAT,
        "processor": dict(torch.cpu.get_capabilities()),
        "limits": {name: os.environ[name] for name in limits if name in os.environ},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _kept(path: Path, machine: dict[str, Any]) -> Stages | None:
    """What was measured on this machine; None where nothing was, or it can't be read or believed."""
    try:
        document = load(path)
        stages = Stages(**document["stages"])
        whole = document["machine"] == machine and set(asdict(stages).values()) <= set(DTYPES)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return stages if whole else None


def _line(stages: Stages, times: dict[str, dict[str, float]] | None = None) -> str:
    parts = []
    for stage, dtype in asdict(stages).items():
        found = ", ".join(f"{name} {1e3 * spent:.2f} ms" for name, spent in (times or {}).get(stage, {}).items())
        parts.append(f"{stage} in {dtype}{f' ({found})' if found else ''}")
    return ", ".join(parts)
