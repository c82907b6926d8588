"""The FastVLM paper's claims about other models, recomputed from their shapes (`peers.json`).

Counts need no weights: parameters, visual tokens and MACs come from the modules on PyTorch's meta device. Measured
times are the caller's (`benchmarks ttft --against`).
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from benchmarks.peers.shapes import TEXT_TOKENS, against, data

STAGES = ("encode", "project", "prefill")
_OPERATIONS = {
    "linear": ("mm", "addmm"),
    "attention": ("bmm", "baddbmm"),  # torch's attention on the meta device is two batched products
    "convolution": ("convolution",),
}
_LABELS = {
    "encoder_parameters_whole": "encoder parameters, as published, M",
    "encoder_parameters": "encoder parameters that run, M",
    "visual_tokens": "visual tokens",
    **{f"macs_{stage}": f"MACs to {stage}, G" for stage in STAGES},
    "macs": "MACs in all, G",
    **{stage: f"{stage}, s" for stage in STAGES},
    "ttft_paper": "TTFT (the paper's: encode, project, prefill), s",
    "ttft_fastest": "TTFT, FastVLM as {fastest}, s",
}


@cache
def figures(name: str, text_tokens: int = TEXT_TOKENS) -> dict[str, Any]:
    """The cost of one model, counted over its modules on the meta device.

    Returns:
        `encoder_parameters` as they run and `encoder_parameters_whole` as published, `pictures` encoded,
        `visual_tokens`, `prompt_tokens`, and `macs` as {stage: {"linear", "attention", "convolution"}}; of the
        decoder's attention only the part that the causal mask leaves.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.peers import models

    shape = data()["models"][name]
    runner = models.open_peer(shape, text_tokens, "bfloat16", "meta")
    state: dict[str, Any] = {}
    macs: dict[str, dict[str, int]] = {}
    for stage in STAGES:
        with FlopCounterMode(display=False) as counter:
            getattr(runner, stage)(state)
        macs[stage] = by_operation(counter.get_flop_counts()["Global"])
    visual = state["projected"].shape[0]
    length, text = visual + text_tokens, runner.language.config.get_text_config()
    masked = text.num_hidden_layers * text.hidden_size * length * (length - 1)  # half of 2 T² H, but for the diagonal
    macs["prefill"]["attention"] -= masked
    with torch.device("meta"):
        encoders = [
            {
                "name": encoder["name"],
                "parameters": _parameters(models.tower(encoder)),
                "parameters_whole": _parameters(models.tower(encoder, whole=True)),
            }
            for encoder in shape["encoders"]
        ]
    return {
        "name": name,
        "title": shape["title"],
        "encoders": encoders,
        "encoder_parameters": sum(one["parameters"] for one in encoders),
        "encoder_parameters_whole": sum(one["parameters_whole"] for one in encoders),
        "pictures": sum(len(pixels) for pixels in runner.pixels),
        "visual_tokens": visual,
        "prompt_tokens": length,
        "macs": macs,
    }


def by_operation(flops: Mapping[Any, int]) -> dict[str, int]:
    """FLOPs by torch operation -> MACs by kind of work. Raises KeyError for an operation that has no kind."""
    kinds = {operation: kind for kind, operations in _OPERATIONS.items() for operation in operations}
    macs = dict.fromkeys(_OPERATIONS, 0)
    for operation, count in flops.items():
        macs[kinds[str(operation).split(".")[1]]] += count // 2
    return macs


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def total_macs(model: Mapping[str, Any], stage: str | None = None) -> int:
    """MACs of `figures`, of one stage or of all."""
    return sum(sum(kinds.values()) for name, kinds in model["macs"].items() if stage in (None, name))


def compare(
    name: str,
    text_tokens: int = TEXT_TOKENS,
    medians: Sequence[Mapping[str, float]] | None = None,
    fastest: tuple[str, float] | None = None,
) -> dict[str, Any]:
    """Compare the cost of a peer and of its FastVLM with what the paper claims.

    Args:
        medians: seconds of each stage and "ttft_paper", of FastVLM and of the peer, where they were measured.
        fastest: name and "ttft_paper" of a faster runner of the same FastVLM.

    Returns:
        {"name", "title", "fastvlm": `figures`, "peer": `figures`, "rows", "explanation": sentences}. A row: "figure",
        "label" with its unit, "fastvlm", "peer", "ratio" (peer / FastVLM; None where not measured), "claimed" (the
        paper's ratio, or None), "source".
    """
    models = [figures(one, text_tokens) for one in (against(name), name)]
    ours, theirs = (
        {**_counts(model), **{stage: times[stage] for stage in (*STAGES, "ttft_paper") if stage in times}}
        for model, times in zip(models, medians or ({}, {}))
    )
    if fastest and "ttft_paper" in theirs:
        ours["ttft_fastest"], theirs["ttft_fastest"] = fastest[1], theirs["ttft_paper"]
    claims = {claim["figure"]: claim for claim in data()["claims"][name]}
    rows = []
    for figure, label in _LABELS.items():
        if figure in ours or figure in claims:
            mine, other, claim = ours.get(figure), theirs.get(figure), claims.get(figure, {})
            rows.append({
                "figure": figure, "label": label.format(fastest=fastest and fastest[0]),
                "fastvlm": mine, "peer": other, "ratio": other / mine if mine and other else None,
                "claimed": claim.get("ratio"), "source": claim.get("source"),
            })  # fmt: skip
    title = f"{models[0]['title']} against {models[1]['title']}"
    document = {"name": name, "title": title, "fastvlm": models[0], "peer": models[1], "rows": rows}
    return document | {"explanation": _explain(document)}


def _counts(model: Mapping[str, Any]) -> dict[str, float]:
    """The rows of `compare` that are counted, by figure."""
    parameters = {key: model[key] / 1e6 for key in ("encoder_parameters_whole", "encoder_parameters")}
    macs = {f"macs_{stage}": total_macs(model, stage) / 1e9 for stage in STAGES}
    return {**parameters, "visual_tokens": model["visual_tokens"], **macs, "macs": total_macs(model) / 1e9}


def _explain(comparison: Mapping[str, Any]) -> list[str]:
    """The sentences of peers.json that explain why the ratios differ, with the figures computed here."""
    ours, theirs = comparison["fastvlm"], comparison["peer"]
    rows = {row["figure"]: row for row in comparison["rows"]}
    claimed, work, time = rows["ttft_paper"]["claimed"], rows["macs"], rows["ttft_paper"]
    values = {
        "ours": ours["title"], "theirs": theirs["title"], "claimed": claimed, "work": work["ratio"],
        "our_work": work["fastvlm"] / 1e3, "their_work": work["peer"] / 1e3, "speed": work["ratio"] / claimed,
        "our_prompt": ours["prompt_tokens"], "their_prompt": theirs["prompt_tokens"], "visual": theirs["visual_tokens"],
        "encoders": ", ".join(f"{one['name']} {one['parameters'] / 1e6:.0f} M" for one in theirs["encoders"]),
    }  # fmt: skip
    for side, model in (("our", ours), ("their", theirs)):
        values[f"{side}_attention"] = model["macs"]["prefill"]["attention"] / total_macs(model, "prefill")
    if time["ratio"]:
        mine, other = (work[side] / time[side] for side in ("fastvlm", "peer"))
        values |= {"time": time["ratio"], "our_rate": mine, "their_rate": other, "rates": other / mine}
    if theirs["pictures"] > len(theirs["encoders"]):
        values |= _tiles(ours, theirs, claimed)
    sentences = data()["explanations"]
    chosen = [sentences[key] for key in ("work", "measured", "attention") if key != "measured" or time["ratio"]]
    sources = "; ".join(dict.fromkeys(row["source"] for row in comparison["rows"] if row["source"]))
    filled = [sentence.format(**values) for sentence in (*chosen, *sentences[comparison["name"]])]
    return [*filled, f"The paper's ratios: {sources}."]


def _tiles(ours: Mapping[str, Any], theirs: Mapping[str, Any], claimed: float) -> dict[str, Any]:
    """The speeds (TMAC/s) and times (s) that the paper's plot implies for one tile and for the whole picture."""
    plot, tiles = data()["plot"], theirs["pictures"]
    whole, one = claimed * plot["fastvlm_1024_ms"] / 1e3, plot["siglip_384_ms"] / 1e3
    text = theirs["prompt_tokens"] - theirs["visual_tokens"]
    work = total_macs(theirs, "encode") / tiles
    work += theirs["macs"]["prefill"]["linear"] * (theirs["visual_tokens"] // tiles + text) / theirs["prompt_tokens"]
    our, tile = total_macs(ours) / plot["fastvlm_1024_ms"] / 1e9, work / one / 1e12
    their = total_macs(theirs) / whole / 1e12
    return {
        **plot, "tiles": tiles, "parts": tiles - 1,
        "whole": whole, "encoding": tiles * one, "rest": whole - tiles * one,
        "our_pace": our, "tile_pace": tile, "their_pace": their,
        "gap": our / their, "encoder_gap": our / tile, "prompt_gap": tile / their,
    }  # fmt: skip
