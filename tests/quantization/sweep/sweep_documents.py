"""A sweep made up: three recipes, two forms of the encoder, answers that part where one has too few bits."""

import itertools

from quantization.sweep import report
from quantization.sweep.engine import Outcome
from quantization.sweep.recommend import Constraints


def sweep_of(recipes=("fp16", "int4", "int2"), forms=("fp16", "int8"), name=lambda text: text):
    points, outcome = [], Outcome({})
    for n, (recipe, form) in enumerate(itertools.product(recipes, forms)):
        point = {"name": name(f"{recipe} {form} 256"), "recipe": {"name": name(recipe)}, "vision_quant": form,
                 "resolution": 256}  # fmt: skip
        points.append(point)
        outcome.keys[point["name"]] = f"{n:064x}"
        answers = [
            {"name": name(f"q{q}"), "question": name(f"What is {q}?"), "reference": name(f"It is a red thing, {q}."),
             "candidate": name(f"It is a {'blue' if recipe == 'int2' and q % 2 else 'red'} thing, {q}."),
             "expected": name("A red thing."), "same": True, "kl": 0.0}
            for q in range(12)
        ]  # fmt: skip
        figures = {"bytes": 1000 - 100 * n, "bytes_vision": 300, "bytes_language": 600 - 100 * n,
                   "bits_per_weight": 4.5, "answer_kl_mean": 0.01 * n, "same_answers": 1 - n / 10,
                   "questions": 12}  # fmt: skip
        timings = {"ttft_s": 0.1 + n / 100, "peak_bytes": 2e9, "seconds": 3.0}
        outcome.results[point["name"]] = {"figures": figures, "timings": timings, "answers": answers}
    return points, outcome


def document_of(points, outcome, constraints=None, name=lambda text: text):
    about = {"checkpoint": name("demo"), "questions": "12", "notes": {"Quality": name("KL")}}
    return report.document(points, outcome, about, {"notes": {"TTFT": name("here")}}, constraints or Constraints())
