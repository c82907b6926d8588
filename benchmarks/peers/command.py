"""`fastvlm peers`: the paper's comparisons with other models, as far as they need no clock."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.estimate.devices import facts
from benchmarks.estimate.work import TEXT_TOKENS, LanguageModel
from fastvlm.common.arguments import whole_number
from fastvlm.common.terminal import print_table

DATA = json.loads(Path(__file__).with_name("peers.json").read_text(encoding="utf-8"))
STAGES = ("encode", "project", "prefill")
_LABELS = {
    "encoder_parameters_whole": "encoder parameters, as published, M",
    "encoder_parameters": "encoder parameters that run, M",
    "visual_tokens": "visual tokens",
    **{f"macs_{stage}": f"MACs to {stage}, G" for stage in STAGES},
    "macs": "MACs in all, G",
    "ttft_paper": "TTFT (the paper's: encode, project, prefill), s",
}


def add_parser(subparsers: Any) -> None:
    """Add `peers`."""
    names = tuple(DATA["comparisons"])
    parser = subparsers.add_parser(
        "peers",
        description="Parameters, visual tokens and multiply-accumulates of FastVLM and of the models that its paper"
        " compares it with, counted without weights.",
    )
    parser.add_argument("name", nargs="*", metavar="PEER", help=f"{' or '.join(names)} (default: both)")
    parser.add_argument(
        "--prompt-length",
        type=whole_number(),
        default=TEXT_TOKENS,
        metavar="N",
        help="tokens of the prompt without its picture (default: %(default)s)",
    )
    expected = f"expected one of {', '.join(names)}"
    parser.check(lambda args: (f"PEER: got {name}, {expected}" for name in args.name if name not in names))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare, and print a table for each peer."""
    comparisons = [compare(name, args.prompt_length) for name in dict.fromkeys(args.name or DATA["comparisons"])]
    for index, comparison in enumerate(() if args.json else comparisons):
        if index:
            print()
        columns = ("figure", "FastVLM", "peer", "ratio", "the paper's")
        print_table(comparison["title"], columns, map(_cells, comparison["rows"]), columns[1:])
        for sentence in comparison["explanation"]:
            print(f"- {sentence}")
    return {"comparisons": comparisons}


def figures(name: str, text_tokens: int = TEXT_TOKENS) -> dict[str, Any]:
    """The cost of one model.

    Returns:
        The model's entry of peers.json; `encoder_parameters` as they run and `encoder_parameters_whole` as published,
        `prompt_tokens`, and `macs` as {stage: {"linear", "attention", "convolution"}}; of the decoder's attention only
        the part that the causal mask leaves.
    """
    model = DATA["models"][name]
    language = LanguageModel(**facts("published.json")["languages"][model["language"]])
    tokens, inside = model["visual_tokens"] + text_tokens, model["macs"]["inside_decoder"]
    attention = language.layers * language.heads * language.head * tokens * (tokens + 1)
    prefill = {
        "linear": language.matrices * tokens + language.output + inside["linear"],
        "attention": attention + inside["attention"],
        "convolution": 0,
    }
    totals = {
        f"encoder_{key}": sum(encoder[key] for encoder in model["encoders"])
        for key in ("parameters", "parameters_whole")
    }
    macs = {"encode": model["macs"]["encode"], "project": model["macs"]["project"], "prefill": prefill}
    return {"name": name, **model, **totals, "prompt_tokens": tokens, "macs": macs}


def compare(name: str, text_tokens: int = TEXT_TOKENS) -> dict[str, Any]:
    """Compare the cost of a peer and of its FastVLM with what the paper claims.

    Returns:
        {"name", "title", "fastvlm": `figures`, "peer": `figures`, "rows", "explanation": sentences}. A row: "figure",
        "label" with its unit, "fastvlm", "peer", "ratio" (peer / FastVLM; None where a clock would be needed),
        "claimed" (the paper's ratio, or None), "source".
    """
    entry = DATA["comparisons"][name]
    ours, theirs = models = [figures(model, text_tokens) for model in (entry["fastvlm"], name)]
    mine, other = map(_counts, models)
    rows = [
        {
            "figure": figure, "label": label, "fastvlm": mine.get(figure), "peer": other.get(figure),
            "ratio": other[figure] / mine[figure] if figure in mine else None,
            **entry["claims"].get(figure, {"claimed": None, "source": None}),
        }
        for figure, label in _LABELS.items()
    ]  # fmt: skip
    claimed, work = entry["claims"]["ttft_paper"]["claimed"], other["macs"] / mine["macs"]
    values = {
        "ours": ours["title"], "theirs": theirs["title"], "claimed": claimed, "work": work, "speed": work / claimed,
        "our_work": mine["macs"] / 1e3, "their_work": other["macs"] / 1e3,
        "our_prompt": ours["prompt_tokens"], "their_prompt": theirs["prompt_tokens"],
    }  # fmt: skip
    for side, model in (("our", ours), ("their", theirs)):
        values[f"{side}_attention"] = model["macs"]["prefill"]["attention"] / sum(model["macs"]["prefill"].values())
    sources = "; ".join(claim["source"] for claim in entry["claims"].values())
    explanation = [sentence.format(**values) for sentence in (*DATA["explanations"], *entry["explanations"])]
    return {
        "name": name, "title": f"{ours['title']} against {theirs['title']}", "fastvlm": ours, "peer": theirs,
        "rows": rows, "explanation": [*explanation, f"The paper's ratios: {sources}."],
    }  # fmt: skip


def _counts(model: Mapping[str, Any]) -> dict[str, float]:
    """The rows of `compare`, by figure."""
    parameters = {key: model[key] / 1e6 for key in ("encoder_parameters_whole", "encoder_parameters")}
    macs = {f"macs_{stage}": sum(model["macs"][stage].values()) / 1e9 for stage in STAGES}
    return {**parameters, "visual_tokens": model["visual_tokens"], **macs, "macs": sum(macs.values())}


def _cells(row: Mapping[str, Any]) -> list[str]:
    sides = (row[side] for side in ("fastvlm", "peer"))
    counts = ("–" if count is None else f"{count:,.0f}" if count >= 1000 else f"{count:.3g}" for count in sides)
    return [row["label"], *counts, *(f"{row[key]:.3g} ×" if row[key] else "–" for key in ("ratio", "claimed"))]
