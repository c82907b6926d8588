"""From work to seconds: a roofline for each compute unit with few parameters, and their calibration.

A parameter means something by itself (`MEANINGS`). They are fitted to the published points that aren't held out, by
least squares of the logarithms; what is left over says how wide an estimate is (`Spread`).
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.estimate.work import HALF, EncoderWork, LanguageModel, encoder_work

TILE = 64  # rows that MLX's matrix products are cut into: 16 tokens take as long as 32 (FastVLM paper, table 10)
STAGES = ("encode", "prefill", "decode")
Parameters = Mapping[str, float]

# name -> (first guess, least, most, meaning)
MEANINGS: dict[str, tuple[float, float, float, str]] = {
    "ne_rate": (0.4, 0.05, 1.0, "part of the Neural Engine's float16 peak that convolutions and linear layers reach"),
    "ne_attention": (0.1, 0.01, 1.0, "products of two activations, with their softmax: rate beside the others'"),
    "ne_phone_gbps": (30.0, 5.0, 60.0, "GB/s of weights that an iPhone's Neural Engine reads"),
    "ne_phone_rate": (0.9, 0.5, 1.2, "rate of a phone's Neural Engine beside a Mac's with the same peak"),
    "ne_phone_request": (5e-4, 1e-6, 2e-3, "seconds that a prediction on a phone takes besides"),
    "ne_spill_gbps": (4.5, 1.0, 50.0, "GB/s of activations where a tensor is larger than 64 MiB"),
    "gpu_rate": (0.65, 0.1, 1.0, "part of the GPU's float32 peak that MLX's float16 matrix products reach"),
    "gpu_scores": (500.0, 50.0, 40000.0, "floating-point operations' worth of time that one attention score takes"),
    "gpu_scores_unfused": (4000.0, 50.0, 40000.0, "the same before MLX computed attention in one kernel (2024)"),
    "gpu_layer": (7e-4, 1e-5, 5e-3, "seconds that a decoder layer takes besides, at prefill"),
    "gpu_quantized": (0.9, 0.5, 1.1, "rate of the matrix products over quantized weights beside float16's"),
    "decode_bandwidth": (0.75, 0.3, 1.0, "part of the memory's bandwidth at which weights are read for a token"),
    "decode_layer": (4e-5, 1e-6, 5e-4, "seconds that a decoder layer takes besides, for a token"),
}
OF_STAGE = {
    "encode": [name for name in MEANINGS if name.startswith("ne_")],
    "prefill": [name for name in MEANINGS if name.startswith("gpu_")],
    "decode": [name for name in MEANINGS if name.startswith("decode_")],
}


@dataclass(frozen=True)
class Device:
    """A device's figures, as `estimate` uses them (devices.json). `unconfirmed`: those no source was found for."""

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


@dataclass(frozen=True)
class Time:
    """Seconds of a stage, and what they go to: `parts` "compute", "bandwidth", "dispatch"."""

    seconds: float
    parts: dict[str, float]

    @property
    def dominant(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def encode_time(p: Parameters, device: Device, work: EncoderWork, weights: float | None = None) -> Time:
    """One pass on the Neural Engine: the slower of computing and reading the weights (`weights`: bytes as stored),
    which it does meanwhile; then what tensors too large for it cost, and a phone's request."""
    phone = device.kind != "mac"
    rate = p["ne_rate"] * device.ne_tops * 1e12 / 2 * (p["ne_phone_rate"] if phone else 1)
    compute = (work.macs - work.attention_macs + work.attention_macs / p["ne_attention"]) / rate
    gbps = device.ne_gbps or p["ne_phone_gbps"]
    streamed = max(0.0, (work.weights if weights is None else weights) - device.cache_mb * 1e6)
    reading = streamed / (gbps * 1e9)
    spilling = work.spilled / (p["ne_spill_gbps"] * 1e9)
    request = p["ne_phone_request"] if phone else 0.0
    parts = {"compute": compute, "bandwidth": max(reading, spilling), "dispatch": request}
    return Time(max(compute, reading) + spilling + request, parts)


def prefill_time(
    p: Parameters, device: Device, model: LanguageModel, tokens: int, weights: float, head: float = 0.0,
    fused: bool = True,
) -> Time:  # fmt: skip
    """MLX on the GPU: matrix products over whole tiles, attention's scores, each layer's small operations.

    `weights`: bytes of the layers' matrices as stored; `head`: bytes of the output matrix, read for the last position.
    """
    flops = device.gpu_tflops * 1e12
    matrices = 2 * model.matrices * _tiles(tokens) / (flops * _product_rate(p, weights, model.matrices))
    scores = model.scores(tokens) * p["gpu_scores" if fused else "gpu_scores_unfused"] / flops
    bandwidth = p["decode_bandwidth"] * device.memory_gbps * 1e9
    dispatch = p["gpu_layer"] * model.layers
    parts = {"compute": matrices + scores, "bandwidth": (weights + head) / bandwidth, "dispatch": dispatch}
    return Time(max(matrices, weights / bandwidth) + scores + dispatch + head / bandwidth, parts)


def project_time(p: Parameters, device: Device, shapes: Sequence[tuple[int, int]], tokens: int, weights: float) -> Time:
    """The projector's matrices (out, in) on the GPU; each costs what one of a decoder layer's seven does."""
    values = sum(rows * columns for rows, columns in shapes)
    compute = 2 * values * _tiles(tokens) / (device.gpu_tflops * 1e12 * _product_rate(p, weights, values))
    reading = weights / (p["decode_bandwidth"] * device.memory_gbps * 1e9)
    dispatch = p["gpu_layer"] * len(shapes) / 7
    return Time(max(compute, reading) + dispatch, {"compute": compute, "bandwidth": reading, "dispatch": dispatch})


def decode_time(p: Parameters, device: Device, layers: int, weights: float) -> Time:
    """A token: every weight is read once; `weights` are the bytes of layers and output matrix as stored."""
    reading = weights / (p["decode_bandwidth"] * device.memory_gbps * 1e9)
    dispatch = p["decode_layer"] * layers
    return Time(reading + dispatch, {"compute": 0.0, "bandwidth": reading, "dispatch": dispatch})


def gpu_encode_time(p: Parameters, device: Device, work: EncoderWork) -> Time:
    """The encoder on the GPU: matrix products as in the language model, activations through memory. No published point
    is behind it."""
    bandwidth = p["decode_bandwidth"] * device.memory_gbps * 1e9
    compute = 2 * work.macs / (p["gpu_rate"] * device.gpu_tflops * 1e12)
    moving = (work.activations + work.weights) / bandwidth
    dispatch = p["gpu_layer"] / 7 * work.operations
    parts = {"compute": compute, "bandwidth": moving, "dispatch": dispatch}
    return Time(max(compute, moving) + dispatch, parts)


def _tiles(tokens: int) -> int:
    return -(-tokens // TILE) * TILE


def _product_rate(p: Parameters, weights: float, values: int) -> float:
    return p["gpu_rate"] * (p["gpu_quantized"] if weights < HALF * values else 1)


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
    def held_out(self) -> bool:
        """Decided by the id alone, about one in three; a total is never calibrated on."""
        return self.stage == "ttft" or int(hashlib.sha256(self.id.encode()).hexdigest(), 16) % 3 == 0

    @property
    def use(self) -> str:
        """What becomes of it."""
        return "outside" if self.outside else "held out" if self.held_out else "calibrates"

    def residual(self, p: Parameters) -> float:
        """log(predicted / published)."""
        return math.log(self.predict(p) / self.seconds)


def points(document: Mapping[str, Any], devices: Mapping[str, Device]) -> list[Point]:
    """The points of published.json but for those that contradict their own source."""
    languages = {name: _language(sizes) for name, sizes in document["languages"].items()}
    return [
        _point(entry, document["encoders"], languages, devices)
        for entry in document["points"]
        if "unusable" not in entry
    ]


def _language(sizes: Mapping[str, Any]) -> LanguageModel:
    return LanguageModel(**{name: value for name, value in sizes.items() if name != "source"})


def _point(
    entry: Mapping[str, Any],
    encoders: Mapping[str, Any],
    languages: Mapping[str, LanguageModel],
    devices: Mapping[str, Device],
) -> Point:
    device, stage = devices[entry["device"]], entry["stage"]
    if "gpu_part" in entry:
        device = Device(**{**vars(device), "gpu_tflops": device.gpu_tflops * entry["gpu_part"]})
    tokens = entry.get("tokens", 1)
    bytes_per_value = entry.get("bits", 8 * HALF) / 8
    seconds = entry["ms"] / 1e3 if "ms" in entry else tokens / entry["tokens_per_s"]
    work = encoder_work(encoders[entry["model"]], entry.get("resolution")) if stage in ("encode", "ttft") else None
    model = languages[entry.get("language", entry["model"])] if stage != "encode" else None

    def predict(p: Parameters) -> float:
        total = encode_time(p, device, work).seconds if work else 0.0
        if model and stage == "decode":
            weights = bytes_per_value * (model.matrices + model.output)
            return decode_time(p, device, model.layers, weights).seconds
        if model:
            weights, fused = bytes_per_value * model.matrices, not entry.get("unfused", False)
            total += prefill_time(p, device, model, tokens, weights, fused=fused).seconds
        return total

    return Point(entry["id"], stage, device, seconds, predict, entry.get("outside"))


def calibrate(found: Sequence[Point]) -> dict[str, float]:
    """The parameters that fit these points best; decode first, since prefill uses its bandwidth."""
    p = {name: guess for name, (guess, *_) in MEANINGS.items()}
    for stage in ("decode", "prefill", "encode"):
        used = [point for point in found if point.stage == stage]
        if used:
            p |= _fit(used, p, OF_STAGE[stage])
    return p


def _fit(used: Sequence[Point], start: Parameters, names: list[str], steps: int = 60) -> dict[str, float]:
    """Least squares of the residuals over the parameters' logarithms: Levenberg and Marquardt's method in bounds."""
    low, high = (np.log([MEANINGS[name][edge] for name in names]) for edge in (1, 2))

    def residuals(x: np.ndarray) -> np.ndarray:
        p = {**start, **dict(zip(names, np.exp(x).tolist(), strict=True))}
        return np.array([point.residual(p) for point in used])

    x, damping, width = np.log([start[name] for name in names]), 1e-2, 1e-5
    r = residuals(x)
    for _ in range(steps):
        jacobian = np.array([(residuals(x + width * axis) - r) / width for axis in np.eye(len(x))]).T
        normal = jacobian.T @ jacobian + damping * np.eye(len(x))
        step = np.clip(x - np.linalg.solve(normal, jacobian.T @ r), low, high)
        better = residuals(step)
        gain = r @ r - better @ better
        if gain > 0:
            x, r, damping = step, better, damping / 3
        else:
            damping *= 4
        if 0 <= gain < 1e-12 or damping > 1e12:
            break
    return dict(zip(names, np.exp(x).tolist(), strict=True))


def leave_out(found: Sequence[Point], same: Callable[[Point], Any]) -> dict[str, float]:
    """Residual of each point when those with the same key (its id, its device) aren't calibrated on: id -> residual."""
    inside = [point for point in found if point.outside is None and point.stage in STAGES]
    left: dict[str, float] = {}
    for stage in STAGES:
        of_stage = [point for point in inside if point.stage == stage]
        others = calibrate([point for point in inside if point.stage != stage])
        for key in dict.fromkeys(same(point) for point in of_stage):
            rest = [point for point in of_stage if same(point) != key]
            p = {**others, **_fit(rest, others, OF_STAGE[stage])} if rest else others
            left |= {point.id: point.residual(p) for point in of_stage if same(point) == key}
    return left
