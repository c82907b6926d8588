"""The figures of a run of `fastvlm ttft`: medians and spreads, the order of the runners, ratios."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.ttft.runner import totals

Document = Mapping[str, Any]


def figures(runner: Document, tokens: int) -> dict[str, dict[str, float]]:
    """Stage, total, "next_question", "decode_rate", "load", "load_cold", "answer_cold" or "peak_bytes" -> {"median",
    "p10", "p90", "rounds"} over all rounds of all processes; {} of a runner that failed.

    Seconds; "decode_rate" in tokens/s; "peak_bytes" the largest of all processes. Loads are without the libraries'
    import. `tokens`: decoded in a round.
    """
    if "error" in runner:
        return {}
    columns: dict[str, list[float]] = {}
    for stages in (record["stages"] for launch in runner["launches"] for record in launch["rounds"]):
        rate = {"decode_rate": tokens / stages["decode"]} if stages.get("decode") else {}
        for name, value in {**stages, **totals(stages), **rate}.items():
            columns.setdefault(name, []).append(value)
    columns["load"] = [launch["load_s"] for launch in runner["launches"] if launch["load_s"] is not None]
    cold = runner["cold"]
    if cold["dropped"]:
        columns["load_cold"] = [cold["load_s"]]
        answer = totals(cold["round"]["stages"]).get("ttft_app")
        columns["answer_cold"] = [] if answer is None else [cold["load_s"] + answer]
    columns["peak_bytes"] = [runner["peak_bytes"]]
    return {name: _spread(values) for name, values in columns.items() if values}


def _spread(values: Sequence[float]) -> dict[str, float]:
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1], "rounds": len(values)}


def title(document: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """The checkpoint, resolution and prompt of a point."""
    text = f"{point['text_tokens']} text tokens" if point["text_tokens"] else f"“{point['prompt']}”"
    return f"{document['checkpoint']['name']}, {point['resolution']} × {point['resolution']} pixels, {text}"


def medians(runner: Document, tokens: int) -> dict[str, float]:
    """The medians of `figures`."""
    return {name: value["median"] for name, value in figures(runner, tokens).items()}


def ranked(point: Document, tokens: int) -> list[Document]:
    """The point's runners: the fastest first, then those without a total, those that failed last."""

    def place(runner: Document) -> tuple[bool, float]:
        return "error" in runner, medians(runner, tokens).get("ttft_paper", float("inf"))

    return sorted(point["runners"], key=place)


def fastest(document: Document, kind: str) -> tuple[str, dict[str, float]] | None:
    """The name and medians of the first point's fastest runner of a kind; None where none finished."""
    for runner in ranked(document["points"][0], document["tokens"]):
        times = medians(runner, document["tokens"])
        if runner["kind"] == kind and "ttft_paper" in times:
            return runner["name"], times
    return None


def ratios(document: Document) -> dict[str, float]:
    """Time and memory of the first point's fastest artefact as parts of others', and of a second question as a part of
    the first one's; three digits."""
    result = {}
    if artefact := fastest(document, "artefact"):
        ours = artefact[1]
        for label, kind in (("Transformers' fastest", "checkpoint"), ("mlx-vlm", "mlx-vlm")):
            if other := fastest(document, kind):
                for key, what in (("ttft_paper", "TTFT"), ("peak_bytes", "peak memory")):
                    result[f"{what} / {label}"] = ours[key] / other[1][key]
        if "next_question" in ours:
            result["next question / TTFT"] = ours["next_question"] / ours["ttft_paper"]
    return {label: float(f"{value:.3g}") for label, value in result.items()}
