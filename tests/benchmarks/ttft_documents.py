"""Runs of `benchmarks ttft` made up from noise: a machine that drifts, processes that differ, rounds disturbed."""

import copy

import numpy as np

BASE = {
    "preprocess": 0.002, "encode": 0.010, "project": 0.0003, "prefill": 0.004, "first_token": 0.0001, "decode": 0.030,
    "next_question": 0.003,
}  # fmt: skip
# How each stage follows crowded caches; the instrument has to find out.
FOLLOWS = {
    "preprocess": 0.3, "encode": 0.5, "project": 0.7, "prefill": 0.5, "first_token": 1.0, "decode": 1.1,
    "next_question": 1.0,
}  # fmt: skip
ENVIRONMENT = {
    "machine": "x86_64", "cpu": "A processor", "cpu_features": [], "cores": 2, "torch_threads": None, "memory_gib": 8.0,
    "system": "A system", "python": "3.11", "packages": {"torch": "2"},
}  # fmt: skip


def document(seed: int, slowed: dict[str, float] | None = None, quiet: bool = False, launches: int = 4) -> dict:
    """Two runners, 24 rounds in each process; `slowed`: stage -> factor, for both."""
    rng = np.random.default_rng(seed)
    noise = 0.0 if quiet else 1.0
    speed = np.exp(noise * rng.uniform(-0.15, 0.15))  # of the processor, for the whole run
    crowd = noise * rng.uniform(0.0, 0.35)  # what others take of the caches, for the whole run
    runners = [
        {
            "name": name, "kind": kind, "recipe": None, "settings": {"dtype": "float32", "threads": 1}, "answer": [1],
            "cold": {"dropped": True, "load_s": 1.0, "import_s": 2.0, "process_s": 4.0,
                     "round": {"stages": dict(BASE), "waited": dict.fromkeys(BASE, 0.0), "yardstick": None}},
            "peak_bytes": 10**9, "note": "", "launches": [{"load_s": 0.5, "rounds": []} for _ in range(launches)],
        }
        for name, kind in (("fp16/executor-as-typed", "artefact"), ("transformers-cpu", "checkpoint"))
    ]  # fmt: skip
    for launch in range(launches):
        here = crowd + noise * rng.uniform(0.0, 0.25)  # others come and go
        for runner in runners:
            layout = {stage: np.exp(noise * rng.normal(0, 0.015)) for stage in BASE}
            for _ in range(24):
                now = max(0.0, here + noise * rng.normal(0, 0.05))
                runner["launches"][launch]["rounds"].append(_round(rng, noise, speed, now, layout, slowed or {}))
    return {
        "benchmark": "ttft", "format": 1, "date": "2026-01-01T00:00:00+00:00", "command": "python -m benchmarks ttft",
        "commit": None, "delay": ",".join(f"{stage}=x{factor}" for stage, factor in (slowed or {}).items()),
        "checkpoint": {"name": "demo", "dtype": "float16", "sha256": "0" * 64}, "picture": "a drawn scene",
        "tokens": 16,
        "effort": {"launches": launches, "rounds": 24, "budget": 120.0}, "threads": 1, "environment": dict(ENVIRONMENT),
        "load_before": {"1min": 1.0}, "load_after": {"1min": 2.0}, "search": [],
        "points": [{"resolution": 256, "text_tokens": None, "prompt": "Describe the image.", "question": "What?",
                    "turns": False, "runners": runners}],
    }  # fmt: skip


def _round(rng, noise: float, speed: float, now: float, layout: dict, slowed: dict) -> dict:
    stages, waited = {}, {}
    for stage, seconds in BASE.items():
        took = seconds * speed * np.exp(FOLLOWS[stage] * now) * layout[stage] * np.exp(noise * rng.gamma(1.0, 0.02))
        if noise and rng.random() < 0.1:
            took *= 1 + rng.pareto(1.5)  # whatever else disturbs a round
        took *= slowed.get(stage, 1.0)
        wait = noise * rng.exponential(0.004) if rng.random() < 0.3 else 0.0
        stages[stage], waited[stage] = took + wait, wait
    tick = {"products": 0.0055 * speed, "tokens": 0.007 * speed * np.exp(now)}
    tick = {name: seconds * np.exp(noise * rng.gamma(1.0, 0.02)) for name, seconds in tick.items()}
    return {
        "stages": stages, "waited": waited,
        "yardstick": {"stages": tick, "waited": dict.fromkeys(tick, 0.0)},
    }  # fmt: skip


def changed(original: dict, **keys) -> dict:
    """A copy with other values at the top."""
    return copy.deepcopy(original) | keys
