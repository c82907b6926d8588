"""Measure functions for the sweep's tests, which other processes import by name, and a sweep to be killed."""

import hashlib
import json
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path

RECIPES, FORMS, RESOLUTIONS = ("fp16", "bf16", "int8", "int4"), ("fp16", "int8"), (128, 256)


def identity():
    return {"sources": os.environ.get("SWEEP_FAKES", "the tests' own")}


def need(point):
    return 1 << 20


def fake(point, settings):
    """Figures out of the point's hash; waits for ever when `most` points are finished. Notes that it ran."""
    digest = hashlib.sha256(point["name"].encode()).digest()
    while finished(Path(settings["ran"]).parent) >= (settings.get("most") or math.inf):
        time.sleep(0.05)
    with Path(settings["ran"]).open("a") as file:
        file.write(point["name"] + "\n")
    figures = {
        "bytes": 1000 + digest[0], "bytes_vision": 500, "bytes_language": 500 + digest[0],
        "answer_kl_mean": digest[1] / 2560, "same_answers": 1 - digest[1] / 2560,
        "questions": 40,
    }  # fmt: skip
    timings = {"ttft_s": time.perf_counter() % 1, "threads": os.environ.get("OMP_NUM_THREADS"), "process": os.getpid()}
    answer = f"A thing of {digest[2] % 3}."
    answers = [{"name": "q", "question": "What?", "reference": "A thing.", "candidate": answer, "expected": None}]
    return {"figures": figures, "timings": timings, "answers": answers}


def unwell(point, settings):
    """int8 points end in every bad way there is; a figure of the others is not finite."""
    ways = {
        "int8 fp16 128": lambda: (_ for _ in ()).throw(ValueError("two\nlines")),
        "int8 fp16 256": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "int8 int8 128": lambda: os._exit(7),
        "int8 int8 256": lambda: (print("noise on stdout"), 1 / 0),
    }
    ways.get(point["name"], lambda: None)()
    result = fake(point, settings)
    result["figures"]["answer_kl_mean"] = float("inf")
    return result


def no_space(point, settings):
    raise OSError(28, "No space left on device", "/somewhere")


def crowd(point, settings):
    """How many run at once, by files that each holds while it runs, once as many as should have come."""
    here, deadline = Path(settings["crowd"]), time.monotonic() + 120
    mine = here / f"{os.getpid()}.here"
    mine.touch()
    mine.with_suffix(".came").touch()
    while len(list(here.glob("*.came"))) < settings["should"] and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # in which one too many would come
    result = fake(point, settings)
    result["timings"]["crowd"] = len(list(here.glob("*.here")))
    mine.unlink()
    return result


def sweep_of(work, measure=fake, inputs=None, **settings):
    from quantization.sweep.engine import Sweep

    work.mkdir(parents=True, exist_ok=True)
    return Sweep(measure, {"ran": str(work / "ran"), **settings}, inputs or {}, identity, need, work)


def runs(work):
    """How often each point ran."""
    ran = work / "ran"
    return Counter(ran.read_text().splitlines() if ran.exists() else ())


def finished(work):
    return len(list((work / "points").glob("*.json")))


def main(work, report, jobs, most=0):
    """Sweep and write the report; with `most` it stops when about so many points are finished, until it is killed."""
    from quantization.sweep import engine
    from quantization.sweep import report as sweep_report
    from quantization.sweep.recommend import Constraints

    points = engine.grid(RECIPES, FORMS, RESOLUTIONS)
    outcome = engine.run(sweep_of(Path(work), most=int(most)), points, int(jobs))
    document = sweep_report.document(points, outcome, {}, {}, Constraints())
    Path(report).write_text(json.dumps(document, sort_keys=True))
