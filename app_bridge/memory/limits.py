"""How much memory an app may have on a device: what developers have reported, as data with sources."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.estimate.devices import Device, device_key, devices
from fastvlm.common.errors import UserError
from fastvlm.common.units import format_bytes

STATES = ("increased", "default")  # with the increased-memory entitlement and without
FITS, TIGHT, NOT = "fits", "tight", "does not fit"
MIB = 1 << 20
_TABLE = Path(__file__).parent / "memory_limits.json"


@dataclass(frozen=True)
class Limit:
    """Bytes that an app may have, from the least to the most that the sources say."""

    low: int
    high: int
    sources: tuple[str, ...]

    def verdict(self, low: int, high: int) -> str:
        """Return whether a need from `low` to `high` bytes FITS for sure, does NOT for sure, or neither (TIGHT)."""
        return FITS if high <= self.low else NOT if low > self.high else TIGHT


Limits = Mapping[str, Limit]  # state -> limit


@cache
def table() -> dict[str, Any]:
    """Return memory_limits.json."""
    document: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return document


def limits_of(device: Device, memory_gb: float) -> dict[str, Limit]:
    """Return the limits of a device with so much memory, by state; empty where no source gives one.

    A state without an entry, as on a Mac, is like the default.
    """
    of_kind = table()["limits"][device.kind]
    entry = table()["devices"].get(device.key) or of_kind.get(f"{memory_gb:g}") or of_kind.get("other")
    if not entry:
        return {}
    return {state: _limit(entry.get(state, entry["default"]), memory_gb) for state in STATES}


def reported_limits(device: str, memory: str | None) -> tuple[dict[str, Limit], dict[str, Any]]:
    """Return a device's limits by state, and the document's keys about the device.

    Raises UserError for an unknown device or memory size, and where no source gives the limit.
    """
    try:
        device = device_key(device)
    except UserError as error:
        advice = "or give the limit of another: --limit 3.0GB, what os_proc_available_memory() says when the app starts"
        raise UserError(f"--device {error}, {advice}") from None
    model = devices()[device]
    sizes = {f"{size:g}": size for size in model.memory_gb}
    size = sizes.get(memory or next(iter(sizes)))
    if size is None:
        raise UserError(f"--memory {memory}: {model.name} was sold with {' or '.join(sizes)} GB: expected one of them")
    limits = limits_of(model, size)
    if not limits:
        others = [f"--memory {other}" for other, gb in sizes.items() if limits_of(model, gb)]
        raise UserError(
            f"--device {device}: the limit of {model.name} with {size:g} GB is not known: measure"
            " os_proc_available_memory() when the app starts on it, and give --limit 3.0GB"
            + (f" (known: {', '.join(others)})" if others else "")
        )
    about = {"device": device, "name": model.name, "memory_gb": size, "sold_with_gb": list(model.memory_gb)}
    return limits, about | {"kind": model.kind}


def measured_limits(available: int, device: str | None) -> tuple[dict[str, Limit], dict[str, Any]]:
    """Return the limits behind what os_proc_available_memory() gave at the app's start, in bytes; as `reported_limits`.

    That figure leaves out what the app has taken by then, which the plan counts: it is added.
    """
    started = table()["overheads"]["app"]["mib"][0] * MIB
    source = f"{format_bytes(available)} as you measured it, and the app's own {format_bytes(started)} at its start"
    limit = Limit(available + started, available + started, (source,))
    about: dict[str, Any] = {"device": device, "name": device or "the device", "memory_gb": None, "kind": None}
    return dict.fromkeys(STATES, limit), about | {"sold_with_gb": []}


def _limit(entry: Mapping[str, Any], memory_gb: float) -> Limit:
    unit = MIB if "mib" in entry else memory_gb * (MIB << 10)
    low, high = entry.get("mib") or entry["part"]
    return Limit(int(low * unit), int(high * unit), tuple(entry["sources"]))
