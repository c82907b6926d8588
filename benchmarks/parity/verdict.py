"""The verdict of a parity run: each figure against its tolerance, and what the recipe itself changed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import environment
from benchmarks.parity import tolerances
from fastvlm.common.errors import CheckFailed

# Each figure in the order of the pipeline: its name for people, and how the pictures' figures become one.
LABELS = {
    "preprocessing": "pixel values",
    "operation_snr": "worst operation, as typed against float32",
    "layer_snr": "worst layer against PyTorch",
    "encoder_snr": "encoder features, signal to noise",
    "encoder_cosine": "encoder features, cosine",
    "encoder_max_abs": "encoder features, largest error",
    "merged_snr": "merged embeddings, worst position",
    "prefill_snr": "prefill logits, signal to noise",
    "prefill_kl": "prefill logits, KL a position of the prompt",
    "prefill_top1": "prefill logits, same most likely token",
    "greedy_tokens": "greedy decoding, same tokens",
    "greedy_answers": "greedy decoding, same answer",
}
# A Core AI bundle's encoder has the projector inside.
_COREAI_LABELS = {
    "encoder_snr": "image embeddings, signal to noise",
    "encoder_cosine": "image embeddings, cosine",
    "encoder_max_abs": "image embeddings, largest error",
}
_WORST: dict[str, Callable[[list[float]], float]] = {
    "preprocessing": max,
    "encoder_snr": min,
    "encoder_cosine": min,
    "encoder_max_abs": max,
    "merged_snr": min,
    "prefill_snr": min,
}


@dataclass
class Row:
    """One picture: what both sides answered and the figures of each stage, by the names of `LABELS`."""

    name: str
    source: str
    question: str
    truth: str | None
    reference: str
    candidate: str
    divergence: dict[str, Any] | None
    figures: dict[str, float]


def document(rows: list[Row], operations: dict[str, Any], family: str, sides: dict[str, Any]) -> dict[str, Any]:
    """Judge the figures. Keys: passed, verdict, brief, recipe, broken, precision, family, metrics, first_operation,
    exact, pictures, operations, rows, reference, candidate, environment.

    "passed" and "verdict" say whether the export is faithful to its recipe; "recipe" (see `_recipe`) what the recipe
    changed, or None where tolerances decide that, too.

    `operations` is the result of `encoders.compare_operations`, or `encoders.without_operations` of a Core AI bundle:
    then no figures are of operations, and tolerances are the bundle's.

    Raises CheckFailed when there is nothing to judge.
    """
    coreai = "absent" in operations
    if not rows or not (coreai or operations["rounding"]):
        raise CheckFailed("parity: nothing was compared: no picture, or a program without operations")
    precision = operations["precision"]
    limits = tolerances.for_encoder(precision, coreai) | tolerances.for_language(
        family, precision, operations.get("width")
    )
    labels = LABELS | (_COREAI_LABELS if coreai else {})
    figures = _figures(rows, operations)
    judged = {
        name: tolerances.judge(limits[name], figures[name]) | {"label": label}
        for name, label in labels.items()
        if name in limits and (name in figures or "brief" not in operations)
    }
    if operations["fault"]:
        judged["layer_snr"] |= {"value": None, "passed": False, "reason": operations["fault"]}
    for name in [name for name in _WORST if name in judged]:
        values = [row.figures[name] for row in rows]
        judged[name]["worst_row"] = values.index(_WORST[name](values))
    brief = "brief" in operations
    of_recipe = tolerances.for_language(family, precision)
    broken = [name for name, figure in judged.items() if figure["passed"] is False]
    first = _first_operation(operations, limits)
    return {
        "passed": not broken,
        "verdict": _verdict(judged, broken, first) + ("; answers were not compared" if brief else ""),
        "recipe": _recipe(judged, family, rows) if of_recipe["greedy_answers"].bound is None and not brief else None,
        "broken": broken,
        "precision": operations["precision"],
        "family": family,
        "metrics": judged,
        "first_operation": first,
        "brief": brief,
        "exact": None if brief else _exact(rows),
        "pictures": {
            source: sum(row.source == source for row in rows) for source in dict.fromkeys(row.source for row in rows)
        },
        "operations": operations,
        "rows": [
            asdict(row) | {"figures": {name: tolerances.number(value) for name, value in row.figures.items()}}
            for row in rows
        ],
        **sides,
        "environment": environment.describe(),
    }


def _figures(rows: list[Row], operations: dict[str, Any]) -> dict[str, float]:
    """The figures by the names of `LABELS`: the worst picture's for arrays, the mean for logits and answers."""
    figures = {
        name: _lowest(operations[series]) if operations[series] else -math.inf
        for name, series in (("operation_snr", "rounding"), ("layer_snr", "layers"))
    }
    for name in rows[0].figures:
        values = [row.figures[name] for row in rows]
        figures[name] = (
            _WORST[name](values) if name in _WORST and not any(map(math.isnan, values)) else sum(values) / len(values)
        )
    return figures


def _lowest(errors: list[dict[str, Any]]) -> float:
    return min(float(error["snr_db"]) for error in errors)


def _first_operation(operations: dict[str, Any], limits: dict[str, tolerances.Tolerance]) -> dict[str, Any] | None:
    """The earliest output that leaves its tolerance, of a layer against PyTorch or of an operation by its rounding."""
    failures = []
    for series, metric in (("layers", "layer_snr"), ("rounding", "operation_snr")):
        bound = limits[metric].bound if metric in limits else None
        bad = (error for error in operations[series] if bound is not None and not float(error["snr_db"]) >= bound)
        failures += [{**error, "series": series, "tolerance": bound} for error in bad][:1]
    return min(failures, key=lambda error: error["index"], default=None)


def _exact(rows: list[Row]) -> dict[str, int] | None:
    known = [row for row in rows if row.truth is not None]
    if not known:
        return None
    sides = {side: sum(getattr(row, side).strip() == row.truth for row in known) for side in ("reference", "candidate")}
    return {"questions": len(known), **sides}


def _verdict(judged: dict[str, Any], broken: list[str], first: dict[str, Any] | None) -> str:
    if not broken:
        reported = sum(figure["passed"] is None for figure in judged.values())
        if not reported:
            return f"The artefact is the model it came from: {len(judged)} figures within tolerance"
        within = f"{len(judged) - reported} figures within tolerance"
        return f"The export is faithful to its recipe: {within}; {reported} more are reported, not judged"
    layer = f" ({first['layer']})" if first and first["layer"] else ""
    where = f"; first at {first['type']} {first['name']}{layer}, {first['snr_db']} dB" if first else ""
    names = "; ".join(judged[name]["label"] for name in broken[:2]) + (" …" if len(broken) > 2 else "")
    return f"Not the model it came from: {len(broken)} of {len(judged)} figures out of tolerance ({names}){where}"


def _recipe(judged: dict[str, Any], family: str, rows: list[Row]) -> dict[str, Any]:
    """The changes by a recipe of few bits: "questions", how many answers are "changed", "kl" (nats, mean over the
    prompts' positions), "top1" (share of positions), "unchanged" (within the tolerances of 8 bits), and "sentence"."""
    changed = sum(row.reference != row.candidate for row in rows)
    kl, top1 = judged["prefill_kl"]["value"], judged["prefill_top1"]["value"]
    fine = tolerances.for_language("int8")
    names = ("prefill_kl", "prefill_top1", "greedy_tokens", "greedy_answers")
    unchanged = all(tolerances.judge(fine[name], float(judged[name]["value"]))["passed"] for name in names)
    share = float(top1)
    sentence = (
        f"The recipe ({family}) changed {changed or 'none'} of {len(rows)} answers: KL {float(kl):.3g} nats a position"
        f" of the prompt, the same most likely token at {100 * share:.3g} % of the positions"
    )
    return {
        "questions": len(rows), "changed": changed, "kl": kl, "top1": top1, "unchanged": unchanged,
        "sentence": sentence,
    }  # fmt: skip


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The figures without pictures, answers and operations, for a manifest."""
    keys = ("passed", "verdict", "recipe", "broken", "precision", "family", "first_operation", "exact", "pictures")
    figures = {
        name: {key: figure[key] for key in ("value", "unit", "sense", "tolerance", "passed")}
        for name, figure in result["metrics"].items()
    }
    runners = {side: result[side]["runners"] for side in ("reference", "candidate")}
    return {key: result[key] for key in keys} | {"metrics": figures, "runners": runners}


def broken_lines(result: dict[str, Any]) -> Iterator[str]:
    """One line for each broken tolerance."""
    for name in result["broken"]:
        figure = result["metrics"][name]
        yield f"{name}: {figure['value']} {figure['unit']}, expected {figure['sense']} {figure['tolerance']}"
