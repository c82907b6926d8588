"""Seconds of work: a roofline for each compute unit, with few parameters (published.json explains each)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.estimate.devices import Device
from benchmarks.estimate.work import HALF, EncoderWork, LanguageModel

TILE = 64  # rows that MLX's matrix products are cut into: 16 tokens take as long as 32 (FastVLM paper, table 10)
STAGES = ("encode", "prefill", "decode")
Parameters = Mapping[str, float]


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
    """The encoder on the GPU: matrix products as in the language model, activations through memory. No point of the
    encoder alone is behind it."""
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
