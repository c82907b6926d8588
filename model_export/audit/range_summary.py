"""The figures of `ranges`: which operations leave float16 the least headroom, and whether any overflows."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_export.encoder.ranges import Range

# Operations that only hand values on: what they hold has been counted where it was computed.
_MOVES = {
    "cast", "clone", "concat", "expand_dims", "permute", "reshape", "slice_by_index", "split", "split_with_sizes",
    "squeeze", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


def summary(ranges: list["Range"]) -> dict[str, Any]:
    """The figures of the verdict, and the verdict. They count the operations that the program holds in float16; in a
    float32 program all of them, as float16 would have to hold them."""
    from model_export.encoder.fp16 import HEADROOM, LARGEST

    every = computing(ranges)
    held = [pair for pair in every if pair[0].dtype == "fp16"]
    judged, place = [found for found, _ in held or every], {found.name: place for found, place in every}
    tightest = min(judged, key=lambda found: found.headroom)
    square = min(judged, key=lambda found: found.square_headroom)
    weights = max(judged, key=lambda found: found.weight_subnormal)

    def at(found: "Range") -> str:
        return f"{place[found.name]} ({found.type} {found.name})".lstrip()

    over = sum(found.headroom < 1 for found in judged)
    under = sum(found.headroom < HEADROOM for found in judged)
    parts = [
        f"smallest headroom {times(tightest.headroom)} at {at(tightest)}, which reaches {tightest.largest:.4g}",
        f"{under} of {len(judged)} operations under {HEADROOM:g}x, {over} overflow",
    ]
    if square.square:
        fits = "overflows" if square.square_headroom < 1 else "has headroom"
        parts.append(
            f"largest square in a LayerNorm {square.square:.4g} at {at(square)} {fits}, {times(square.square_headroom)}"
        )
    if weights.weight_subnormal:
        parts.append(f"most subnormal weights at {at(weights)}, {weights.weight_subnormal:.1%}")
    scaled = [found for found in judged if found.exponent]
    if scaled:
        near = min(judged, key=lambda found: found.exported_headroom)
        parts.append(
            f"an export lets {len(scaled)} operations carry x / 2^k, k up to {max(one.exponent for one in scaled)}:"
            f" smallest headroom then {times(near.exported_headroom)} at {at(near)}"
        )
    condition = "" if held else "in a float32 program, were it float16: "
    return {
        "limit": LARGEST,
        "recommended_headroom": HEADROOM,
        "judged": len(judged),
        "smallest_headroom": _finite(tightest.headroom),
        "smallest_headroom_at": tightest.name,
        "under_recommended_headroom": under,
        "overflows": over,
        "largest_square": square.square,
        "largest_square_at": square.name if square.square else None,
        "scaled_operations": len(scaled),
        "smallest_exported_headroom": _finite(min(found.exported_headroom for found in judged)),
        "square_overflows": sum(found.square_headroom < 1 for found in judged),
        "verdict": condition + "; ".join(parts),
    }


def computing(ranges: list["Range"]) -> list[tuple["Range", str]]:
    """The operations that do more than hand values on (all, if none does), each with the place it is at: its layer, or
    "after LAYER" where a package's operation has no weight that names one."""
    found, last = [], ""
    for one in ranges:
        last = one.layer or last
        found.append((one, one.layer or (f"after {last}" if last else "")))
    return [(one, place) for one, place in found if one.type not in _MOVES] or found


def times(headroom: float) -> str:
    """12.3x; three digits where it matters, thousands in full."""
    if headroom < 0.01 or math.isinf(headroom):
        return f"{headroom:.2g}x"
    digits = 2 if headroom < 10 else 1 if headroom < 100 else 0
    return f"{headroom:,.{digits}f}x"


def row(found: "Range") -> dict[str, Any]:
    """An operation in the document; what is infinite (no values, no LayerNorm) is null."""
    return {
        **asdict(found),
        "headroom": _finite(found.headroom),
        "square_headroom": _finite(found.square_headroom),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
