"""Runs of `fastvlm ttft` made up from seeded noise: runs and processes differ, rounds are disturbed, and wait."""

import copy

import numpy as np

BASE = {
    "preprocess": 0.002, "encode": 0.010, "project": 0.0003, "prefill": 0.004, "first_token": 0.0001, "decode": 0.030,
    "next_question": 0.003,
}  # fmt: skip
ENVIRONMENT = {
    "machine": "x86_64", "cpu": "A processor", "cpu_features": [], "cores": 2, "torch_threads": None, "memory_gib": 8.0,
    "system": "A system", "python": "3.11", "packages": {"torch": "2"},
}  # fmt: skip
LAUNCHES, ROUNDS = 8, 9


def document(seed: int, slowed: dict[str, float] | None = None, quiet: bool = False, launches: int = LAUNCHES) -> dict:
    """Two runners; `slowed`: stage -> factor, for both. `quiet`: next to no noise."""
    rng = np.random.default_rng(seed)
    noise = 1e-6 if quiet else 1.0
    speed = np.exp(noise * rng.uniform(-0.15, 0.15))  # of the machine, for the whole run
    runners = [
        {
            "name": name, "kind": kind, "recipe": None, "settings": {"dtype": "float32", "threads": 1}, "answer": [1],
            "cold": {"dropped": True, "load_s": 1.0, "import_s": 2.0, "process_s": 4.0,
                     "round": {"stages": dict(BASE), "waited": dict.fromkeys(BASE, 0.0), "yardstick_s": None}},
            "peak_bytes": 10**9, "note": "",
            "launches": [
                {"load_s": 0.5, "rounds": _rounds(rng, slowed or {}, speed, noise)} for _ in range(launches)
            ],
        }
        for name, kind in (("fp16/executor-as-typed", "artefact"), ("transformers-cpu", "checkpoint"))
    ]  # fmt: skip
    return {
        "benchmark": "ttft", "format": 2, "date": "2026-01-01T00:00:00+00:00", "command": "fastvlm ttft",
        "commit": None, "delay": ",".join(f"{stage}=x{factor}" for stage, factor in (slowed or {}).items()),
        "checkpoint": {"name": "demo", "dtype": "float16", "sha256": "0" * 64}, "picture": "a drawn scene",
        "tokens": 16,
        "effort": {"launches": launches, "rounds": ROUNDS, "budget": 120.0}, "threads": 1,
        "environment": dict(ENVIRONMENT),
        "load_before": {"1min": 0.1}, "load_after": {"1min": 2.0}, "search": [],
        "points": [{"resolution": 256, "text_tokens": None, "prompt": "Describe the image.", "question": "What?",
                    "turns": False, "runners": runners}],
    }  # fmt: skip


def _rounds(rng, slowed: dict, speed: float, noise: float) -> list[dict]:
    layout = {stage: np.exp(noise * rng.normal(0, 0.025)) for stage in BASE}  # of a process's memory
    crowd = noise * rng.uniform(0, 2)  # how much others want the processors while it runs
    rounds = []
    for _ in range(ROUNDS):
        took, waited = {}, {}
        for stage, seconds in BASE.items():
            work = seconds * speed * layout[stage] * slowed.get(stage, 1.0) * np.exp(noise * rng.gamma(1.0, 0.02))
            if rng.random() < 0.1:
                work *= 1 + noise * rng.pareto(1.5)  # whatever else disturbs a round
            waited[stage] = seconds * crowd * rng.exponential(0.3)
            took[stage] = work + waited[stage]
        yardstick = 0.006 * speed * np.exp(noise * rng.gamma(1.0, 0.02))
        rounds.append({"stages": took, "waited": waited, "yardstick_s": yardstick})
    return rounds


def changed(original: dict, **keys) -> dict:
    """A copy with other values at the top."""
    return copy.deepcopy(original) | keys
