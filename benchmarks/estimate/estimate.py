"""Time to first token on Apple devices that aren't at hand, as a range.

`work.py` counts what the model computes and moves, `model.py` turns that into seconds with the parameters that `fit.py`
fitted to published measurements. Nothing here is measured on the machine that it runs on.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastvlm
from benchmarks.estimate import model
from benchmarks.estimate.devices import Device, device_key, devices, facts
from benchmarks.estimate.model import STAGES, Time
from benchmarks.estimate.work import SPILL, EncoderWork, LanguageModel, encoder_work
from benchmarks.peers.shapes import TEXT_TOKENS
from fastvlm.common.errors import UserError
from model_export import encoder_forms
from model_export.encoder import compress
from quantization.catalogue import SIZES

if TYPE_CHECKING:  # torch behind it
    from fastvlm.synthetic.checkpoint import Shape
    from quantization.recipe import Recipe

SHAPE_NAMES = tuple(SIZES)
UNITS = ("CPU_AND_NE", "CPU_AND_GPU")  # nobody published a rate for the CPU alone
PATCH, LARGEST, LONGEST = 64, 2048, 2048  # a token's side in pixels; sides and tokens that are still answered
LONGEST_ATTENTION = 1024  # tokens in the encoder: beyond, the one published point is twice as slow as predicted
UNCONFIRMED = math.log(1.25)  # what a device's figure without a source adds to a range: an assumption
GPU_ENCODER = math.log(3)  # the encoder on the GPU: no published point of it alone, an assumption
_STAGE_FIGURES = {
    "encode": ("neural_engine_float16_tops", "neural_engine_gbps"),
    "prefill": ("gpu_tflops", "memory_gbps"),
    "decode": ("memory_gbps",),
}


def estimate(
    shape: str | None, device: str | None, recipe: str = "fp16", resolution: int = 1024, prompt: int = TEXT_TOKENS,
    units: str = UNITS[0],
) -> dict[str, Any]:  # fmt: skip
    """Seconds of each stage as {"low", "high"}, decode in tokens/s, and what they rest on.

    Raises UserError for an unknown shape, device or recipe, and for sizes that FastViTHD can't take.
    """
    key = _check(shape, device, resolution, prompt)
    from fastvlm.synthetic.checkpoint import SHAPES  # torch behind it
    from quantization.recipe import load_recipe

    found, sizes = devices()[key], SHAPES[str(shape)]
    language = language_model(sizes)
    stored, picture = stored_bytes(load_recipe(recipe), sizes), (resolution // PATCH) ** 2
    work = encoder_work(facts("published.json")["encoders"]["fastvithd"], resolution)
    stored["encoder"] = encoder_bytes(recipe, work)
    p, tokens = facts("calibration.json")["parameters"], picture + prompt
    projector = [(sizes.hidden, sizes.vision_width), (sizes.hidden, sizes.hidden)]
    times = {
        "encode": model.encode_time(p, found, work, stored["encoder"])
        if units == "CPU_AND_NE"
        else model.gpu_encode_time(p, found, work),
        "project": model.project_time(p, found, projector, picture, stored["projector"]),
        "prefill": model.prefill_time(p, found, language, tokens, stored["layers"], stored["output"]),
        "decode": model.decode_time(p, found, sizes.layers, stored["layers"] + stored["output"]),
    }
    stages = {name: _range(name, time, found, units, work, tokens) for name, time in times.items()}
    decode = stages.pop("decode")
    return {
        "label": "estimate", "shape": shape, "recipe": recipe, "device": found.key, "name": found.name,
        "chip": found.chip, "resolution": resolution, "tokens": {"picture": picture, "prompt": prompt}, "units": units,
        "macs": {"encode": work.macs, "prefill": language.matrices * tokens + language.output},
        "bytes": {name: round(size) for name, size in stored.items()},
        "stages": stages,
        "total": {
            "low": sum(stage["low"] for stage in stages.values()),
            "high": sum(stage["high"] for stage in stages.values()),
            "unit": "s", "dominant": max(stages, key=lambda name: stages[name]["high"]),
        },
        "decode": {**decode, "low": 1 / decode["high"], "high": 1 / decode["low"], "unit": "tokens/s"},
        "warnings": warnings(found, units, work, tokens, stored["encoder"] + stored["language"]),
        "calibrated_on": _behind(found), "held_out": facts("calibration.json")["held_out"],
    }  # fmt: skip


def _check(shape: str | None, device: str | None, resolution: int, prompt: int) -> str:
    """The device's key; UserError with every fault."""
    faults, key = [], ""
    if shape not in SHAPE_NAMES:
        faults.append(f"--shape {shape}: expected one of {', '.join(SHAPE_NAMES)}" if shape else "--shape is missing")
    try:
        if not device:
            raise UserError(f"--device is missing; expected one of {', '.join(devices())}")
        key = device_key(device)
    except UserError as error:
        faults.append(f"{error} (see --list)")
    if resolution % PATCH or not PATCH <= resolution <= LARGEST:
        faults.append(f"--resolution {resolution}: expected a multiple of {PATCH} from {PATCH} to {LARGEST}")
    if not 0 <= prompt <= LONGEST:
        faults.append(f"--prompt-length {prompt}: expected 0 to {LONGEST}")
    if faults:
        raise UserError("; ".join(faults))
    return key


def language_model(shape: "Shape") -> LanguageModel:
    """The decoder of a model of this shape."""
    head = shape.hidden // shape.heads
    return LanguageModel(
        shape.layers, shape.hidden, shape.heads, shape.kv_heads, head, shape.intermediate, shape.vocab
    )  # fmt: skip


def stored_bytes(recipe: "Recipe", shape: "Shape") -> dict[str, float]:
    """Bytes by the recipe: of the decoder `layers`' matrices, the `output` matrix, `projector`, and all: `language`.

    With a budget each weight lies between its smallest and its largest choice, all at the same part of the way.
    """
    from quantization.catalogue import weight_shapes
    from quantization.recipe import ELSEWHERE, LAYERS
    from quantization.schemes import nbytes

    shapes = weight_shapes(shape)
    schemes = recipe.options(shapes, ELSEWHERE) if recipe.budget else {
        name: (scheme,) for name, scheme in recipe.plan(shapes, ELSEWHERE).items()
    }  # fmt: skip
    sizes = {name: [nbytes(one, shapes[name]) for one in choices] for name, choices in schemes.items()}
    low, high = {name: min(each) for name, each in sizes.items()}, {name: max(each) for name, each in sizes.items()}
    part, least, most = 1.0, sum(low.values()), sum(high.values())
    if recipe.budget:
        limit = recipe.budget.limit(sum(map(math.prod, shapes.values())))
        if limit < least:
            raise UserError(f"recipe {recipe.name}: does not fit: at least {least / 1e6:.0f} MB, got {limit / 1e6:.0f}")
        part = min(1.0, (limit - least) / (most - least)) if most > least else 1.0
    final = {name: low[name] + part * (high[name] - low[name]) for name in sizes}
    output = "language_model.lm_head.weight" if not shape.tied else "language_model.model.embed_tokens.weight"
    return {
        "layers": sum(final[name] for name in final if name.startswith(LAYERS) and name.endswith("_proj.weight")),
        "output": final[output],
        "projector": sum(final[name] for name in final if name.startswith("multi_modal_projector.")),
        "language": sum(final.values()),
    }  # fmt: skip


def encoder_bytes(recipe: str, work: EncoderWork) -> float:
    """Bytes of the encoder's weights: float16 but where the recipe has rules about them."""
    quant = encoder_forms.of_recipe(recipe)
    if not quant.rules:
        return work.weights
    table = json.loads((Path(fastvlm.__file__).parent / "checkpoint/fastvithd.json").read_text(encoding="utf-8"))[
        "folded"
    ]
    shapes = {
        name.removesuffix(".weight"): (*size, *[1] * (4 - len(size)))
        for name, size in table.items()
        if name.endswith(".weight") and len(size) > 1
    }
    return compress.size_of(shapes, compress.assign(quant, shapes).forms)


def _range(name: str, time: Time, device: Device, units: str, work: EncoderWork, tokens: int) -> dict[str, Any]:
    """The range of a stage: its central time, divided and multiplied by what the spreads say."""
    stage = "prefill" if name == "project" else name
    spread, behind = facts("calibration.json")["spread"][stage], _behind(device)[stage]
    beyond = _beyond(stage, work, tokens) or device.kind not in behind["kinds"]
    width: float = spread["outside" if beyond else "seen" if behind["of_this_chip"] else "unseen"]
    if name == "encode" and units == "CPU_AND_GPU":
        width, stage = GPU_ENCODER, "prefill"
    if _missing(device, stage):
        width += UNCONFIRMED
    faster = device.matrix_speedup if stage == "prefill" else 1.0
    total = sum(time.parts.values())
    return {
        "low": time.seconds * math.exp(-width) / faster, "high": time.seconds * math.exp(width), "unit": "s",
        "dominant": time.dominant, "shares": {part: seconds / total for part, seconds in time.parts.items()},
    }  # fmt: skip


def _beyond(stage: str, work: EncoderWork, tokens: int) -> bool:
    """Whether the picture or the prompt is larger than what the points inside the calibration say anything about."""
    if stage == "encode":
        return bool(work.spilled) or work.longest_attention > LONGEST_ATTENTION
    return stage == "prefill" and tokens > LONGEST


def _missing(device: Device, stage: str) -> list[str]:
    return [name for name in _STAGE_FIGURES[stage] if name in device.unconfirmed]


def _behind(device: Device) -> dict[str, dict[str, Any]]:
    """For each stage: the points that calibrate it, how many are of such a device, and the devices there are."""
    behind = {}
    for stage in STAGES:
        stored = facts("calibration.json")["behind"][stage]
        known = {devices()[key]: count for key, count in stored["devices"].items()}
        behind[stage] = {
            "points": stored["points"],
            "of_this_chip": sum(
                count for other, count in known.items() if (other.chip, other.kind) == (device.chip, device.kind)
            ),
            "devices": list(stored["devices"]),
            "kinds": sorted({other.kind for other in known}),
        }
    return behind


def warnings(device: Device, units: str, work: EncoderWork, tokens: int, size: float) -> list[str]:
    """What makes this estimate weaker than the calibration's error, in words."""
    texts, on_gpu = [], units == "CPU_AND_GPU"
    for stage, behind in _behind(device).items():
        if stage == "encode" and on_gpu:
            texts.append(
                "encode: no published point of the encoder alone on the GPU: the factor of 3 each way is a guess"
            )
        elif not behind["of_this_chip"]:
            kind = device.kind.replace("mac", "Mac")
            what = f"a {kind} with this chip" if device.kind in behind["kinds"] else f"any {kind}"
            known = ", ".join(behind["devices"])
            texts.append(f"{stage}: extrapolated: no usable published point of {what}, only of {known}: range widened")
        if missing := _missing(device, "prefill" if stage == "encode" and on_gpu else stage):
            texts.append(f"{stage}: {', '.join(missing)} of the {device.chip} not confirmed by a source: range widened")
        if _beyond(stage, work, tokens):
            texts.append(
                f"{stage}: extrapolated: larger than the published points ({SPILL >> 20} MiB a tensor and"
                f" {LONGEST_ATTENTION} tokens of attention in the encoder, {LONGEST} tokens of prompt): range widened"
            )
    if device.matrix_speedup > 1:
        texts.append(
            f"prefill: the {device.chip}'s GPU has matrix units without a published peak: the low end counts them in"
            f" ({device.matrix_speedup:g} times as fast, what Apple says of the M5 at most), the high end doesn't"
        )
    if size > 0.7e9 * max(device.memory_gb):
        most = max(device.memory_gb)
        texts.append(f"memory: the weights take {size / 1e9:.1f} GB of at most {most:g} GB: they don't fit")
    return texts


def known_devices() -> dict[str, dict[str, Any]]:
    """Every device with its figures; a figure that no source confirms is named in `unconfirmed`."""
    behind = facts("calibration.json")["behind"].values()
    return {
        key: {
            **{name: value for name, value in vars(device).items() if name != "key"},
            "points": sum(stage["devices"].get(key, 0) for stage in behind),
        }
        for key, device in devices().items()
    }
