"""The figures of `ranges`: which operations leave float16 the least headroom, and whether any overflows."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_export.encoder.ranges import Range

# Operations that only hand values on: what they hold has been counted where it was computed.
_MOVES = {
    "cast", "concat", "container", "expand_dims", "reshape", "slice_by_index", "split", "squeeze", "transpose",
}  # fmt: skip


def summary(ranges: list["Range"]) -> dict[str, Any]:
    """The figures of the verdict, and the verdict. They count the operations that the program holds in float16; in a
    float32 program all of them, as float16 would have to hold them."""
    from model_export.encoder.fp16 import HEADROOM, LARGEST

    every = computing(ranges)
    held = [pair for pair in every if pair[0].dtype == "fp16"]
    judged, place = [operation for operation, _ in held or every], {operation.name: place for operation, place in every}
    tightest = min(judged, key=lambda operation: operation.headroom)
    square = min(judged, key=lambda operation: operation.square_headroom)
    weights = max(judged, key=lambda operation: operation.weight_subnormal)

    def at(operation: "Range") -> str:
        return f"{place[operation.name]} ({operation.type} {operation.name})".lstrip()

    over = sum(operation.headroom < 1 for operation in judged)
    under = sum(operation.headroom < HEADROOM for operation in judged)
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
    scaled = [operation for operation in judged if operation.exponent]
    if scaled:
        near = min(judged, key=lambda operation: operation.exported_headroom)
        largest = max(operation.exponent for operation in scaled)
        parts.append(
            f"an export lets {len(scaled)} operations carry x / 2^k, k up to {largest}:"
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
        "smallest_exported_headroom": _finite(min(operation.exported_headroom for operation in judged)),
        "square_overflows": sum(operation.square_headroom < 1 for operation in judged),
        "verdict": condition + "; ".join(parts),
    }


def computing(ranges: list["Range"]) -> list[tuple["Range", str]]:
    """The operations that do more than hand values on (all, if none does), each with the place it is at: its layer, or
    "after LAYER" where a package's operation has no weight that names one."""
    placed, last = [], ""
    for operation in ranges:
        last = operation.layer or last
        placed.append((operation, operation.layer or (f"after {last}" if last else "")))
    return [(operation, place) for operation, place in placed if operation.type not in _MOVES] or placed


def times(headroom: float) -> str:
    """12.3x; three digits where it matters, thousands in full."""
    if headroom < 0.01 or math.isinf(headroom):
        return f"{headroom:.2g}x"
    digits = 2 if headroom < 10 else 1 if headroom < 100 else 0
    return f"{headroom:,.{digits}f}x"


def row(operation: "Range") -> dict[str, Any]:
    """An operation in the document; what is infinite (no values, no LayerNorm) is null."""
    return {
        **asdict(operation),
        "headroom": _finite(operation.headroom),
        "square_headroom": _finite(operation.square_headroom),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
