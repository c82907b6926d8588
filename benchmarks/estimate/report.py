"""What `estimate` prints: ranges, the devices, the calibration."""

import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from benchmarks.estimate.model import MEANINGS
from fastvlm.common.cli import wide_console
from fastvlm.common.terminal import Console


def print_devices(document: dict[str, Any]) -> None:
    """The table of `--list`."""
    console = wide_console(140)
    table = Table(title="devices", title_justify="left")
    for column in ("device", "name", "Neural Engine, float16", "weights", "GPU, float32", "memory", "sizes", "points"):
        table.add_column(column, justify="left" if column in ("device", "name") else "right", overflow="fold")
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
        table.add_row(key, _named(device), *cells, f"{sizes} GB", str(device["points"] or ""))
    console.print(table)
    console.print("* not confirmed by a source; all sources are in benchmarks/devices.json. points: published ones.")


def print_calibration(document: dict[str, Any]) -> None:
    """The parameters, every point beside its prediction, and the JSON that published.json holds."""
    console = wide_console(140)
    table = Table(title="parameters", title_justify="left")
    for column in ("parameter", "value", "meaning"):
        table.add_column(column, overflow="fold")
    for name, value in document["parameters"].items():
        table.add_row(name, f"{value:.4g}", MEANINGS[name][3])
    console.print(table)
    table = Table(title="\npublished points", title_justify="left")
    for column in ("point", "device", "published", "predicted", "off", "use"):
        table.add_column(
            column, overflow="fold", justify="right" if column in ("published", "predicted", "off") else "left"
        )
    for fit in document["points"]:
        off = f"{100 * (fit['predicted'] / fit['published'] - 1):+.0f} %"
        table.add_row(fit["id"], fit["device"], _ms(fit["published"]), _ms(fit["predicted"]), off, fit["use"])
    console.print(table)
    _print_errors(console, document["held_out"])
    console.print(json.dumps({key: document[key] for key in ("parameters", "spread")}), soft_wrap=True, markup=False)


def print_estimate(result: dict[str, Any]) -> None:
    """The ranges, the warnings and what they rest on."""
    console = wide_console(140)
    tokens = result["tokens"]
    title = (
        f"estimate: {result['shape']} {result['recipe']} on {_named(result)}, {result['resolution']}"
        f" pixels, {tokens['picture']} + {tokens['prompt']} tokens, encoder on {result['units']}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("stage", "estimate", "dominated by", "compute, bandwidth, dispatch"):
        table.add_column(column)
    for name, stage in result["stages"].items():
        shares = ", ".join(f"{100 * share:.0f} %" for share in stage["shares"].values())
        table.add_row(name, f"{_ms(stage['low'])} ... {_ms(stage['high'])}", stage["dominant"], shares)
    total, decode = result["total"], result["decode"]
    table.add_row("total (first token)", f"{_ms(total['low'])} ... {_ms(total['high'])}", total["dominant"], "")
    table.add_row("decode", f"{decode['low']:.0f} ... {decode['high']:.0f} tokens/s", decode["dominant"], "")
    console.print(table)
    for warning in result["warnings"]:
        console.print(f"! {warning}", markup=False, style="yellow")
    counts = ", ".join(
        f"{stage} {len(behind['points'])} points ({behind['of_this_chip']} in all of this chip)"
        for stage, behind in result["calibrated_on"].items()
    )
    console.print(f"calibrated on: {counts}; `estimate --calibrate` lists them", markup=False)
    _print_errors(console, result["held_out"])
    console.print(
        "An estimate, not a measurement: the model's arithmetic and others' published times"
        " (benchmarks/published.json); prefill and decode are for MLX of 2025 or later."
    )


def _print_errors(console: Console, errors: Mapping[str, Mapping[str, Any]]) -> None:
    said = ", ".join(
        f"{stage} {100 * error['median']:.0f} % (median of {error['points']}), {100 * error['worst']:+.0f} % (worst)"
        for stage, error in errors.items()
    )
    console.print(f"error on points held out: {said}", markup=False)


def _ms(seconds: float) -> str:
    """Milliseconds, or seconds from ten on, with two or three digits."""
    ms = 1e3 * seconds
    return f"{ms:.2g} ms" if ms < 10 else f"{ms:.0f} ms" if ms < 1e4 else f"{seconds:.1f} s"


def _named(device: Mapping[str, Any]) -> str:
    """Its name, with the chip where that doesn't say it."""
    return str(device["name"]) if device["chip"] in device["name"] else f"{device['name']} ({device['chip']})"
