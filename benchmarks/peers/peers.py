"""What FastVLM's paper says of other models, recomputed: their shapes (`peers.json`), costs, and measured ratios.

`open_runner` gives `benchmarks ttft --against` a peer to time, `section` puts what was measured beside what the paper
says, and `python -m benchmarks peers` shows what needs no clock: parameters, visual tokens, MACs.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.ttft.report import figures as measured
from benchmarks.ttft.report import ranked
from fastvlm.common.cli import add_common, progress
from fastvlm.common.errors import UserError
from fastvlm.common.terminal import Console

TEXT_TOKENS = 18  # of Qwen2's template and "Describe the image."; with 256 of the picture 274
STAGES = ("encode", "project", "prefill")
DTYPES = ("bfloat16", "float32")
_PREFIX = "peer:"  # of a runner's name
_SPEC = {"kind": "peer", "name": "", "dtype": "bfloat16", "threads": None, "text_tokens": TEXT_TOKENS}
_OF_THE_PROCESS = dict.fromkeys(("python", "keep_buffers", "files", "keep"))  # see ttft_run.py
_OPERATIONS = {
    "linear": ("mm", "addmm"),
    "attention": ("bmm", "baddbmm"),  # torch's attention on the meta device is two batched products
    "convolution": ("convolution",),
}


@cache
def data() -> dict[str, Any]:
    """peers.json: claims, and the models' shapes, each with its source."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def names() -> list[str]:
    """What FastVLM can be held against."""
    return list(data()["claims"])


def against(name: str) -> str:
    """The FastVLM that the paper holds against this peer."""
    return data()["models"][name]["against"]


def open_runner(spec: Mapping[str, Any]) -> Any:
    """The runner that a specification asks for: `name`, `settings`, `stages()` (see `peers_models.Peer`).

    `spec`: {"kind": "peer", "name": one of peers.json's models, with or without "peer:" before it, "dtype", "threads",
    "text_tokens": of the prompt without its picture}, and what concerns its process only. Freed buffers are kept as
    long as the process lives, as the executor keeps them. Raises UserError naming every fault.
    """
    asked, models = {**_SPEC, **spec}, data()["models"]
    name = asked["name"].removeprefix(_PREFIX)
    faults = [f"unknown key {key!r}" for key in asked if key not in {**_SPEC, **_OF_THE_PROCESS}]
    if name not in models:
        faults.append(f"name {asked['name']!r}, expected one of {', '.join(models)}")
    if asked["dtype"] not in DTYPES:
        faults.append(f"dtype {asked['dtype']!r}, expected one of {', '.join(DTYPES)}")
    if not isinstance(asked["text_tokens"], int) or asked["text_tokens"] < 1:
        faults.append(f"text_tokens {asked['text_tokens']!r}, expected a number from 1")
    if faults:
        raise UserError(f"peer: got {'; '.join(faults)}")
    import torch

    from benchmarks.peers import models as peers_models
    from model_export.mil.allocator import kept_buffers

    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    runner = peers_models.open_peer(models[name], asked["text_tokens"], asked["dtype"], "cpu")
    runner.settings |= {"threads": torch.get_num_threads(), "kept_buffers": True}
    runner.held.enter_context(kept_buffers())
    return runner


@cache
def figures(name: str, text_tokens: int = TEXT_TOKENS) -> dict[str, Any]:
    """What one model costs, counted over its modules on the meta device: no weights, no time.

    `encoder_parameters` as they run and `encoder_parameters_whole` as published, `pictures` encoded, `visual_tokens`,
    `prompt_tokens`, `macs` {stage: {"linear", "attention", "convolution"}}: of the decoder's attention what the causal
    mask leaves.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.peers import models as peers_models

    shape = data()["models"][name]
    runner = peers_models.open_peer(shape, text_tokens, "bfloat16", "meta")
    state: dict[str, Any] = {}
    macs: dict[str, dict[str, int]] = {}
    for stage, run in runner.stages():
        with FlopCounterMode(display=False) as counter:
            run(state)
        macs[stage] = _by_operation(counter.get_flop_counts()["Global"])
    visual = state["projected"].shape[0]
    length, text = visual + text_tokens, runner.language.config.get_text_config()
    masked = text.num_hidden_layers * text.hidden_size * length * (length - 1)  # half of 2 T² H, but for the diagonal
    macs["prefill"]["attention"] -= masked
    with torch.device("meta"):
        encoders = [
            {
                "name": encoder["name"],
                "parameters": _parameters(peers_models.tower(encoder)),
                "parameters_whole": _parameters(peers_models.tower(encoder, whole=True)),
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


def _by_operation(flops: Mapping[Any, int]) -> dict[str, int]:
    """FLOPs by torch operation -> MACs by kind of work. Raises KeyError for an operation that has no kind."""
    kinds = {operation: kind for kind, operations in _OPERATIONS.items() for operation in operations}
    found = dict.fromkeys(_OPERATIONS, 0)
    for operation, count in flops.items():
        found[kinds[str(operation).split(".")[1]]] += count // 2
    return found


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def total_macs(model: Mapping[str, Any], stage: str | None = None) -> int:
    """MACs of `figures`, of one stage or of all."""
    return sum(sum(kinds.values()) for name, kinds in model["macs"].items() if stage in (None, name))


def section(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run of `benchmarks ttft` -> a comparison for each peer that it timed (see `compare`), with the "error" of a
    runner that failed. The FastVLM beside a peer is the one in its shape under the same conditions; where the run's own
    checkpoint has that shape, its fastest runner at the same resolution is a row of its own.
    """
    comparisons = []
    for name in names():
        for point in document["points"]:
            runners = {one["name"]: one for one in point["runners"]}
            pair = [runners.get(_PREFIX + one) for one in (against(name), name)]
            if None in pair:
                continue
            faults = [f"{one['name']}: {one['error']}" for one in pair if one and "error" in one]
            tokens = document["tokens"]
            timed = None if faults else [_medians(one, tokens) for one in pair if one]
            found = compare(name, point["text_tokens"] or TEXT_TOKENS, timed)
            if timed and (fastest := _fastest(document, point, name)):
                label = f"TTFT, FastVLM as {fastest['name']}, s"
                totals = (_medians(fastest, tokens)["ttft_paper"], timed[1]["ttft_paper"])
                found["rows"].append(_row("ttft_fastest", label, *totals))
            comparisons.append({**found, "error": "; ".join(faults) or None})
            break
    return comparisons


def _medians(runner: Mapping[str, Any], tokens: int) -> dict[str, float]:
    """Median seconds of each stage and total over all rounds of a runner."""
    return {name: value["median"] for name, value in measured(runner, tokens).items()}


def _fastest(document: Mapping[str, Any], point: Mapping[str, Any], name: str) -> Any:
    """The fastest runner of the run's own checkpoint, if that is the FastVLM that the peer is held against."""
    shape = against(name).removeprefix("fastvlm-")
    if shape not in document["checkpoint"]["name"].lower() or point["resolution"] != 1024:
        return None
    own = [one for one in point["runners"] if not one["name"].startswith(_PREFIX) and "error" not in one]
    return next((one for one in ranked({"runners": own}, document["tokens"])), None)


def compare(
    name: str, text_tokens: int = TEXT_TOKENS, timed: Sequence[Mapping[str, float]] | None = None
) -> dict[str, Any]:
    """What a peer costs beside FastVLM, what the paper claims, and why they differ; `timed`: seconds of each stage and
    "ttft_paper" of FastVLM and of the peer.

    {"name", "title", "fastvlm": `figures`, "peer": `figures`, "rows", "explanation": sentences}. A row: "figure",
    "label" with its unit, "fastvlm", "peer", "ratio" (peer / FastVLM; all None where not measured), "claimed" (the
    paper's ratio, or None), "source".
    """
    both = [figures(one, text_tokens) for one in (against(name), name)]
    rows = [
        _row(
            "encoder_parameters_whole", "encoder parameters, as published, M", *_each(both, "encoder_parameters_whole")
        ),
        _row("encoder_parameters", "encoder parameters that run, M", *_each(both, "encoder_parameters")),
        _row("visual_tokens", "visual tokens", *(one["visual_tokens"] for one in both)),
        *(
            _row(f"macs_{stage}", f"MACs to {stage}, G", *(total_macs(one, stage) / 1e9 for one in both))
            for stage in STAGES
        ),
        _row("macs", "MACs in all, G", *(total_macs(one) / 1e9 for one in both)),
    ]
    if timed:
        rows += [_row(stage, f"{stage}, s", *(one[stage] for one in timed)) for stage in STAGES]
    totals = [one["ttft_paper"] for one in timed] if timed else [None, None]
    rows.append(_row("ttft_paper", "TTFT (the paper's: encode, project, prefill), s", *totals))
    claims = {claim["figure"]: claim for claim in data()["claims"][name]}
    for row in rows:
        claim = claims.get(row["figure"], {})
        row |= {"claimed": claim.get("ratio"), "source": claim.get("source")}
    title = f"{both[0]['title']} against {both[1]['title']}"
    found = {"name": name, "title": title, "fastvlm": both[0], "peer": both[1], "rows": rows}
    return found | {"explanation": _explain(found)}


def _row(figure: str, label: str, ours: float | None, theirs: float | None) -> dict[str, Any]:
    ratio = theirs / ours if ours and theirs else None
    row = {"figure": figure, "label": label, "fastvlm": ours, "peer": theirs, "ratio": ratio}
    return {**row, "claimed": None, "source": None}


def _each(both: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [one[key] / 1e6 for one in both]


# Why the ratios differ


def _explain(found: Mapping[str, Any]) -> list[str]:
    """Sentences, their figures computed."""
    ours, theirs = found["fastvlm"], found["peer"]
    rows = {row["figure"]: row for row in found["rows"]}
    claimed, work, time = rows["ttft_paper"]["claimed"], rows["macs"], rows["ttft_paper"]
    said = [
        f"{theirs['title']} does {work['ratio']:.1f} times the multiply-accumulates of {ours['title']}"
        f" ({work['peer'] / 1e3:.2f} T against {work['fastvlm'] / 1e3:.2f} T): where each takes the same time, TTFT is"
        f" {work['ratio']:.1f} times as long. The paper's {claimed:g} times means that on its machine one in"
        f" {ours['title']} took {work['ratio'] / claimed:.2f} of the time of one in {theirs['title']}."
    ]
    if time["ratio"]:
        rates = [work[side] / time[side] for side in ("fastvlm", "peer")]
        said.append(
            f"Measured here: {time['ratio']:.1f} times, at {rates[0]:.0f} GMAC/s for {ours['title']} and"
            f" {rates[1]:.0f} for {theirs['title']}. The measured ratio is that of the work divided by that of the"
            f" rates, {rates[1] / rates[0]:.2f}. A CPU does convolutions, products and attention in the same units; the"
            " paper's encoder ran on the Neural Engine, which is made for convolutions of fixed shapes, its language"
            " model on the GPU."
        )
    shares = [one["macs"]["prefill"]["attention"] / total_macs(one, "prefill") for one in (ours, theirs)]
    said.append(
        f"Attention grows with the square of the prompt: it is {shares[1]:.1%} of the peer's prefill at"
        f" {theirs['prompt_tokens']} tokens, {shares[0]:.1%} of FastVLM's at {ours['prompt_tokens']} (the causal half"
        " alone; twice the work where a kernel doesn't skip what is masked)."
    )
    said += _tiles(ours, theirs, claimed) if theirs["pictures"] > len(theirs["encoders"]) else _ensemble(theirs)
    sources = dict.fromkeys(row["source"] for row in found["rows"] if row["source"])
    return [*said, f"The paper's ratios: {'; '.join(sources)}."]


def _tiles(ours: Mapping[str, Any], theirs: Mapping[str, Any], claimed: float) -> list[str]:
    """What the paper's plot says of one tile."""
    plot, tiles = data()["plot"], theirs["pictures"]
    whole, one = claimed * plot["fastvlm_1024_ms"] / 1e3, plot["siglip_384_ms"] / 1e3
    text = theirs["prompt_tokens"] - theirs["visual_tokens"]
    work = total_macs(theirs, "encode") / tiles
    work += theirs["macs"]["prefill"]["linear"] * (theirs["visual_tokens"] // tiles + text) / theirs["prompt_tokens"]
    rates = [total_macs(ours) / plot["fastvlm_1024_ms"] / 1e9, work / one / 1e12, total_macs(theirs) / whole / 1e12]
    return [
        f"On the paper's machine ({plot['device']}) FastVLM took {plot['fastvlm_1024_ms']} ms; {claimed:g} times that"
        f" is {whole:.1f} s. SigLIP with one tile and the same language model took {plot['siglip_384_ms']} ms there:"
        f" {tiles} tiles one after another are at most {tiles * one:.1f} s of it, and at least"
        f" {whole - tiles * one:.1f} s are left for prefilling {theirs['visual_tokens']} visual tokens. In TMAC/s:"
        f" FastVLM {rates[0]:.1f}, one SigLIP tile {rates[1]:.1f}, {theirs['title']} {rates[2]:.2f}. So of the"
        f" {rates[0] / rates[2]:.1f} times between the work's ratio and the paper's, {rates[0] / rates[1]:.1f} are the"
        f" encoder's speed there and {rates[1] / rates[2]:.1f} the slowness of the long prompt. ({plot['source']}.)",
        f"{theirs['visual_tokens']} visual tokens are 729 for each of {tiles} pictures (the whole one and {tiles - 1}"
        " tiles of 384 x 384 pixels) and an end-of-line token for each of 81 rows; 729 x (9 + 1) = 7290 is how its own"
        " documentation counts.",
        "The encoder's published size has the pooling head and a last layer that LLaVA-OneVision doesn't run.",
    ]


def _ensemble(theirs: Mapping[str, Any]) -> list[str]:
    each = ", ".join(f"{one['name']} {one['parameters'] / 1e6:.0f} M" for one in theirs["encoders"])
    return [
        f"The encoders are those that the released checkpoint names ({each}); its DINOv2 is the giant one. The"
        " connector's cross-attention counts as project, and where it comes back inside the decoder as prefill. Visual"
        " tokens are 576 and an end-of-line token for each of 24 rows. Both sides get the same number of text tokens,"
        " though the released template alone puts 91 before Cambrian's picture.",
        "The decoders' layers share one layer's weights in memory: 7B and 8B models in 16 bit don't fit beside each"
        " other here. A layer (0.4 GB) is far larger than the caches, so each is read from memory again, as it would be"
        " with weights of its own.",
    ]


# The command


def add_parser(subparsers: Any) -> None:
    """Add `peers`."""
    parser = subparsers.add_parser(
        "peers",
        help="what the paper compares FastVLM with: parameters, visual tokens, MACs",
        description="Parameters, visual tokens and multiply-accumulates of FastVLM and of the models that its paper"
        " compares it with, counted without weights. `ttft --against` also times them.",
    )
    parser.add_argument("name", nargs="*", metavar="PEER", help=f"{' or '.join(names())} (default: both)")
    parser.add_argument(
        "--prompt-length",
        type=int,
        default=TEXT_TOKENS,
        metavar="N",
        help="tokens of the prompt without its picture (default: %(default)s)",
    )
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Count, and print a table for each peer."""
    faults = []
    if unknown := [name for name in args.name if name not in names()]:
        faults.append(f"peers: got {', '.join(unknown)}, expected some of {', '.join(names())}")
    if args.prompt_length < 1:
        faults.append(f"--prompt-length: got {args.prompt_length}, expected a number from 1")
    if faults:
        raise UserError("; ".join(faults))
    comparisons, asked = [], dict.fromkeys(args.name or names())
    with progress("count parameters and MACs (peers)", len(asked)) as advance:
        for name in asked:
            comparisons.append(compare(name, args.prompt_length))
            advance()
    if not args.json:
        for found in comparisons:
            print_comparison(found)
    return {"comparisons": comparisons}


def print_comparison(found: Mapping[str, Any]) -> None:
    """A comparison as a table on stdout, with what explains it."""
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=found["title"], title_justify="left")
    for column in ("figure", "FastVLM", "peer", "ratio", "the paper's"):
        table.add_column(column, justify="left" if column == "figure" else "right", overflow="fold")
    for row in found["rows"]:
        ratios = (f"{row[key]:.3g} ×" if row[key] else "–" for key in ("ratio", "claimed"))
        table.add_row(row["label"], *(shown(row[side]) for side in ("fastvlm", "peer")), *ratios)
    console.print(table)
    for line in filter(None, (found.get("error"), *found["explanation"])):
        console.print(f"- {line}", markup=False)


def shown(value: float | None) -> str:
    """A figure with three digits at least, "–" for what was not measured."""
    return "–" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
