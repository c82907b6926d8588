"""Devices and their figures, from devices.json; each figure there names its source."""

import difflib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastvlm.common.errors import UserError

UNITS = ("CPU_AND_NE", "CPU_AND_GPU")  # of the encoder; nobody published a rate for the CPU alone


@dataclass(frozen=True)
class Device:
    """A device's figures: float16 TOPS and GB/s of weights of the Neural Engine (None: fitted), float32 TFLOPS of the
    GPU, GB/s of memory. `unconfirmed` names those without a source."""

    key: str
    name: str
    chip: str
    kind: str
    memory_gb: tuple[float, ...]
    ne_tops: float
    ne_gbps: float | None
    gpu_tflops: float
    memory_gbps: float
    cache_mb: float = 0.0
    matrix_speedup: float = 1.0  # of products on the GPU's matrix units, where it has some: at most
    unconfirmed: tuple[str, ...] = ()


@cache
def facts(name: str) -> dict[str, Any]:
    """One of this folder's data files: devices.json, published.json or calibration.json."""
    document: dict[str, Any] = json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return document


@cache
def devices() -> dict[str, Device]:
    """All devices of devices.json."""
    return {key: _device(key, entry) for key, entry in facts("devices.json")["devices"].items()}


def _device(key: str, entry: dict[str, Any]) -> Device:
    chip = facts("devices.json")["chips"][entry["chip"]]
    value = {name: figure["value"] for name, figure in chip.items() if isinstance(figure, dict)}
    unconfirmed = [name for name in value if chip[name]["source"] == "not-confirmed"]
    return Device(
        key, entry["name"], entry["chip"], entry["kind"], tuple(entry["memory_gb"]),
        value["neural_engine_float16_tops"], value.get("neural_engine_gbps"), value["gpu_tflops"], value["memory_gbps"],
        value.get("system_cache_mb", 0.0), value.get("gpu_matrix_speedup", 1.0), tuple(unconfirmed),
    )  # fmt: skip


def device_key(name: str) -> str:
    """The key of the device that is meant by its key, an alias or as people write it: "iPhone 15 Pro Max", "M4PRO".

    Raises UserError that names the nearest for a device that isn't there.
    """
    keys: dict[str, str] = {}
    for key, entry in facts("devices.json")["devices"].items():
        keys |= {_normalized(alias): key for alias in (key, *entry.get("aliases", ()))}
    wanted = _normalized(name)
    if wanted in keys:
        return keys[wanted]
    nearest = dict.fromkeys(keys[match] for match in difflib.get_close_matches(wanted, keys, 3))
    hint = f" (is {' or '.join(nearest)} meant?)" if nearest else ""
    raise UserError(f"{name}: unknown{hint}; expected one of {', '.join(devices())}")


def _normalized(name: str) -> str:
    """The distinctive part of a device's name: letters and digits; of a Mac, its chip."""
    plain = re.sub(r"[^a-z0-9]+", "", name.lower())
    return re.sub(r"^(?:apple|imac|mac(?:book)?(?:air|mini|pro|studio)?(?:with)?)*(?=m\d)", "", plain)
