"""`python -m benchmarks.estimate.fit`: fit the model's parameters to published.json, and write calibration.json.

The parameters are fitted to the points that aren't held out, by least squares of the logarithms; what is left over says
how wide an estimate has to be. Run it after a change of the points, the devices or the model.
"""

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimate import model
from benchmarks.estimate.devices import Device, devices, facts
from benchmarks.estimate.model import STAGES, Parameters
from benchmarks.estimate.work import HALF, LanguageModel, encoder_work
from fastvlm.common.staging import write_file

OUTPUT = Path(__file__).with_name("calibration.json")
# Each stage's parameters by their prefix; decode first, since prefill uses its bandwidth.
_PREFIXES = {"decode": "decode_", "prefill": "gpu_", "encode": "ne_"}


@dataclass(frozen=True)
class Point:
    """A published measurement and what predicts it: seconds, of a pass or of a token."""

    id: str
    stage: str
    device: Device
    seconds: float
    predict: Callable[[Parameters], float]
    outside: str | None = None

    @property
    def use(self) -> str:
        """ "outside" the model; "held out", decided by the id alone, about one in three, and every total; or
        "calibrates"."""
        held_out = self.stage == "ttft" or int(hashlib.sha256(self.id.encode()).hexdigest(), 16) % 3 == 0
        return "outside" if self.outside else "held out" if held_out else "calibrates"

    def residual(self, p: Parameters) -> float:
        """log(predicted / published)."""
        return math.log(self.predict(p) / self.seconds)


@cache
def points() -> tuple[Point, ...]:
    """The points of published.json but for those that contradict their own source."""
    return tuple(_point(entry) for entry in facts("published.json")["points"] if "unusable" not in entry)


def _point(entry: Mapping[str, Any]) -> Point:
    stage = entry["stage"]
    device = devices()[entry["device"]]
    device = replace(device, gpu_tflops=device.gpu_tflops * entry.get("gpu_part", 1))
    tokens, bytes_per_value = entry.get("tokens", 1), entry.get("bits", 8 * HALF) / 8
    seconds = entry["ms"] / 1e3 if "ms" in entry else tokens / entry["tokens_per_s"]
    work = language = None
    if stage in ("encode", "ttft"):
        work = encoder_work(entry["model"], entry.get("resolution"))
    if stage != "encode":
        language = LanguageModel(**facts("published.json")["languages"][entry.get("language", entry["model"])])

    def predict(p: Parameters) -> float:
        if language and stage == "decode":
            weights = bytes_per_value * (language.matrices + language.output)
            return model.decode_time(p, device, language.layers, weights).seconds
        encode = model.gpu_encode_time if entry.get("encoder_on_gpu") else model.encode_time
        total = encode(p, device, work).seconds if work else 0.0
        if language:
            weights, fused = bytes_per_value * language.matrices, not entry.get("unfused", False)
            total += model.prefill_time(p, device, language, tokens, weights, fused=fused).seconds
        return total

    return Point(entry["id"], stage, device, seconds, predict, entry.get("outside"))


def fit(chosen: Sequence[Point], start: Parameters | None = None) -> dict[str, float]:
    """The parameters that fit these points best; those of a stage without points stay as in `start`."""
    table = facts("published.json")["parameters"]
    p = dict(start or {name: row["first"] for name, row in table.items()})
    for stage, prefix in _PREFIXES.items():
        used = [point for point in chosen if point.stage == stage]
        if used:
            p |= _fit_stage(used, p, {name: row for name, row in table.items() if name.startswith(prefix)})
    return p


def _fit_stage(used: Sequence[Point], p: Parameters, table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The parameters of `table`, fitted within their bounds; one that no point depends on stays at its first guess."""
    from scipy.optimize import least_squares

    first, least, most = ([math.log(row[key]) for row in table.values()] for key in ("first", "least", "most"))

    def named(x: np.ndarray) -> dict[str, float]:
        return dict(zip(table, np.exp(x).tolist(), strict=True))

    def residuals(x: np.ndarray) -> np.ndarray:
        weak = 1e-4 * (x - first)
        return np.concatenate([[point.residual({**p, **named(x)}) for point in used], weak])

    return named(least_squares(residuals, first, bounds=(least, most)).x)


def leave_out(chosen: Sequence[Point], same: Callable[[Point], Any]) -> dict[str, float]:
    """Residual of each point when those with the same key (its id, its device) aren't fitted: id -> residual."""
    left: dict[str, float] = {}
    inside = [point for point in chosen if point.outside is None]
    for stage in STAGES:
        of_stage = [point for point in inside if point.stage == stage]
        others = fit([point for point in inside if point.stage != stage])
        for key in dict.fromkeys(map(same, of_stage)):
            p = fit([point for point in of_stage if same(point) != key], others)
            left |= {point.id: point.residual(p) for point in of_stage if same(point) == key}
    return left


def calibrate() -> dict[str, Any]:
    """Everything that calibration.json holds: parameters, spreads, the points behind each stage, held-out errors.

    spread: the largest |log(predicted / published)| of a stage, for a device with points (`seen`), for one without
    (`unseen`), and beyond what is modelled (`outside`, never less than `unseen`).
    """
    p = fit([point for point in points() if point.use == "calibrates"])
    one_out = leave_out(points(), lambda point: point.id)
    device_out = leave_out(points(), lambda point: point.device.key)
    spread, behind = {}, {}
    for stage in STAGES:
        of_stage = [point for point in points() if point.stage == stage]
        inside = [point for point in of_stage if point.outside is None]
        outside = [abs(point.residual(p)) for point in of_stage if point.outside is not None]
        unseen = max(abs(device_out[point.id]) for point in inside)
        spread[stage] = {
            "seen": max(abs(one_out[point.id]) for point in inside), "unseen": unseen,
            "outside": max([unseen, *outside]),
        }  # fmt: skip
        behind[stage] = {
            "points": [point.id for point in inside if point.use == "calibrates"],
            "devices": dict(sorted(Counter(point.device.key for point in inside).items())),
        }
    return {"parameters": p, "spread": spread, "behind": behind, "held_out": held_out_errors(p)}


def held_out_errors(p: Parameters) -> dict[str, dict[str, Any]]:
    """Held-out points of each stage and of the totals: their number, and the prediction's relative errors."""
    errors = {}
    for stage in (*STAGES, "ttft"):
        off = {point.id: math.expm1(point.residual(p)) for point in points()
               if (point.stage, point.use) == (stage, "held out")}  # fmt: skip
        worst = max(off, key=lambda name: abs(off[name]))
        median = statistics.median(map(abs, off.values()))
        errors[stage] = {"points": len(off), "median": median, "worst": off[worst], "worst_point": worst}
    return errors


def main() -> None:
    """Fit, write calibration.json, and print every point beside its prediction."""
    calibration = calibrate()
    # six digits of every number: what differs beyond is the machine's
    rounded = json.loads(json.dumps(calibration), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_file(OUTPUT, (json.dumps(rounded, indent=1) + "\n").encode())
    for point in points():
        off = math.expm1(point.residual(calibration["parameters"]))
        print(f"{point.id:44} {point.device.key:14} {1e3 * point.seconds:10.2f} ms {off:+7.0%}  {point.use}")
    for stage, error in calibration["held_out"].items():
        print(f"{stage}: {error['points']} held out, median {error['median']:.0%}, worst {error['worst']:+.0%}")


if __name__ == "__main__":
    main()
