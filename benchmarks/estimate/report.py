"""The tables of `estimate`: ranges and devices."""

from collections.abc import Mapping
from typing import Any

from fastvlm.common.terminal import print_table
from fastvlm.common.units import format_seconds


def print_devices(document: dict[str, Any]) -> None:
    """The table of `--list`."""
    rows = []
    for key, device in document["devices"].items():
        figures = (
            ("ne_tops", "neural_engine_float16_tops", "TOPS"), ("ne_gbps", "neural_engine_gbps", "GB/s"),
            ("gpu_tflops", "gpu_tflops", "TFLOPS"), ("memory_gbps", "memory_gbps", "GB/s"),
        )  # fmt: skip
        cells = [
            f"{device[field]:g} {unit}{'*' if name in device['unconfirmed'] else ''}" if device[field] else "fitted"
            for field, name, unit in figures
        ]
        sizes = "/".join(f"{size:g}" for size in device["memory_gb"])
        rows.append((key, _named(device), *cells, f"{sizes} GB", str(device["points"] or "")))
    columns = ("device", "name", "Neural Engine, float16", "weights", "GPU, float32", "memory", "sizes", "points")
    print_table("devices", columns, rows)
    print("* not confirmed by a source; all sources are in benchmarks/estimate/devices.json. points: published ones.")


def print_estimate(result: dict[str, Any]) -> None:
    """The ranges, the warnings and what they rest on."""
    tokens = result["tokens"]
    title = (
        f"estimate: {result['shape']} {result['recipe']} on {_named(result)}, {result['resolution']}"
        f" pixels, {tokens['picture']} + {tokens['prompt']} tokens, encoder on {result['units']}"
    )
    rows = []
    for name, stage in result["stages"].items():
        shares = ", ".join(f"{100 * share:.0f} %" for share in stage["shares"].values())
        rows.append(
            (name, f"{format_seconds(stage['low'])} … {format_seconds(stage['high'])}", stage["dominant"], shares)
        )
    total, decode = result["total"], result["decode"]
    rows.append(
        (
            "total (first token)",
            f"{format_seconds(total['low'])} … {format_seconds(total['high'])}",
            total["dominant"],
            "",
        )
    )
    rows.append(("decode", f"{decode['low']:.0f} … {decode['high']:.0f} tokens/s", decode["dominant"], ""))
    print_table(title, ("stage", "estimate", "dominated by", "compute, bandwidth, dispatch"), rows)
    for warning in result["warnings"]:
        print(f"! {warning}")
    counts = ", ".join(
        f"{stage} {len(behind['points'])} points ({behind['of_this_chip']} in all of this chip)"
        for stage, behind in result["calibrated_on"].items()
    )
    print(f"calibrated on: {counts}; `python -m benchmarks.estimate.fit` lists them")
    errors = ", ".join(
        f"{stage} {100 * error['median']:.0f} % (median of {error['points']}), {100 * error['worst']:+.0f} % (worst)"
        for stage, error in result["held_out"].items()
    )
    print(f"error on points held out: {errors}")
    print(
        "An estimate, not a measurement: the model's arithmetic and others' published times"
        " (benchmarks/estimate/published.json); prefill and decode are for MLX of 2025 or later."
    )


def _named(device: Mapping[str, Any]) -> str:
    """The device's name, with the chip where the name lacks it."""
    return str(device["name"]) if device["chip"] in device["name"] else f"{device['name']} ({device['chip']})"
