"""Time to first token on Apple devices that aren't at hand, as a range.

`work.py` counts what the model computes and moves, `model.py` turns that into seconds with the parameters that `fit.py`
fitted to published measurements. Nothing here is measured on the machine that it runs on.
"""

import math
from typing import TYPE_CHECKING, Any

from benchmarks.estimate import model
from benchmarks.estimate.devices import UNITS, Device, devices, facts
from benchmarks.estimate.model import STAGES
from benchmarks.estimate.work import TEXT_TOKENS, EncoderWork, LanguageModel, encoder_work
from fastvlm.checkpoint.shapes import tower_shapes
from fastvlm.common.errors import UserError
from fastvlm.common.image_tokens import tokens_per_image
from fastvlm.common.units import format_bytes
from model_export import encoder_forms
from model_export.encoder import compress
from quantization.catalogue import weight_shapes
from quantization.recipe import ELSEWHERE, LAYERS, Recipe, load_recipe
from quantization.schemes import nbytes

if TYPE_CHECKING:  # torch behind it
    from fastvlm.synthetic.checkpoint import Shape

# Within the published points: pixels (beyond, tensors leave the Neural Engine's fast path, and the one published point
# of so much attention is twice as slow as predicted), and tokens of a prompt.
PIXELS, TOKENS = 1024, 2048
UNCONFIRMED = math.log(1.25)  # what a device's figure without a source adds to a range: an assumption
GPU_ENCODER = math.log(3)  # the encoder on the GPU: no published point of it alone, an assumption
_STAGE_FIGURES = {
    "encode": ("neural_engine_float16_tops", "neural_engine_gbps"),
    "prefill": ("gpu_tflops", "memory_gbps"),
    "decode": ("memory_gbps",),
}


def estimate(
    shape: str, device: str, recipe: str = "fp16", resolution: int = 1024, prompt: int = TEXT_TOKENS,
    units: str = UNITS[0],
) -> dict[str, Any]:  # fmt: skip
    """Seconds of each stage as {"low", "high"}, decode in tokens/s, and what they rest on.

    Args:
        shape: one of `quantization.catalogue.SIZES`. device: a key of `devices`. recipe: how the weights are stored.
        resolution: the picture's side in pixels. prompt: tokens of text around the picture's.
        units: of `UNITS`, what runs the encoder.

    Raises UserError for an unknown recipe, and for sizes that FastViTHD can't take.
    """
    from fastvlm.synthetic.checkpoint import SHAPES  # torch behind it

    chosen, sizes, on_gpu = devices()[device], SHAPES[shape], units == "CPU_AND_GPU"
    language, work = language_model(sizes), encoder_work("fastvithd", resolution)
    stored = stored_bytes(load_recipe(recipe), sizes) | {"encoder": encoder_bytes(recipe, work)}
    p, picture = facts("calibration.json")["parameters"], tokens_per_image(resolution)
    tokens = picture + prompt
    projector = [(sizes.hidden, sizes.vision_width), (sizes.hidden, sizes.hidden)]
    encode = model.gpu_encode_time(p, chosen, work) if on_gpu else model.encode_time(p, chosen, work, stored["encoder"])
    times = {
        "encode": encode,
        "project": model.project_time(p, chosen, projector, picture, stored["projector"]),
        "prefill": model.prefill_time(p, chosen, language, tokens, stored["layers"], stored["output"]),
        "decode": model.decode_time(p, chosen, sizes.layers, stored["layers"] + stored["output"]),
    }
    behind, beyond = _behind(chosen), {"encode": resolution > PIXELS, "prefill": tokens > TOKENS}
    stages: dict[str, Any] = {}
    warnings, widths = [], {}
    for stage in STAGES:
        widths[stage], reasons = _width(stage, chosen, behind[stage], beyond.get(stage, False), on_gpu)
        warnings += [f"{stage}: {reason}" for reason in reasons]
    for name, time in times.items():
        width = math.exp(widths["prefill" if name == "project" else name])
        faster = chosen.matrix_speedup if name in ("project", "prefill") or (name == "encode" and on_gpu) else 1.0
        total = sum(time.parts.values())
        stages[name] = {
            "low": time.seconds / width / faster, "high": time.seconds * width, "unit": "s", "dominant": time.dominant,
            "shares": {part: seconds / total for part, seconds in time.parts.items()},
        }  # fmt: skip
    if chosen.matrix_speedup > 1:
        warnings.append(
            f"prefill: the {chosen.chip}'s GPU has matrix units without a published peak: the low end counts them in"
            f" ({chosen.matrix_speedup:g} times as fast, what Apple says of the M5 at most), the high end doesn't"
        )
    size, most = stored["encoder"] + stored["language"], max(chosen.memory_gb)
    if size > 0.7e9 * most:
        warnings.append(f"memory: the weights take {format_bytes(size)} of at most {most:g} GB: they don't fit")
    decode = stages.pop("decode")
    return {
        "label": "estimate", "shape": shape, "recipe": recipe, "device": device, "name": chosen.name,
        "chip": chosen.chip, "resolution": resolution, "tokens": {"picture": picture, "prompt": prompt}, "units": units,
        "macs": {"encode": work.macs, "prefill": language.matrices * tokens + language.output},
        "bytes": {name: round(size) for name, size in stored.items()},
        "stages": stages,
        "total": {
            "low": sum(stage["low"] for stage in stages.values()),
            "high": sum(stage["high"] for stage in stages.values()),
            "unit": "s", "dominant": max(stages, key=lambda name: stages[name]["high"]),
        },
        "decode": {**decode, "low": 1 / decode["high"], "high": 1 / decode["low"], "unit": "tokens/s"},
        "warnings": warnings, "calibrated_on": behind, "held_out": facts("calibration.json")["held_out"],
    }  # fmt: skip


def language_model(shape: "Shape") -> LanguageModel:
    """The decoder of a model of this shape."""
    head = shape.hidden // shape.heads
    return LanguageModel(
        shape.layers, shape.hidden, shape.heads, shape.kv_heads, head, shape.intermediate, shape.vocab
    )  # fmt: skip


def stored_bytes(recipe: Recipe, shape: "Shape") -> dict[str, float]:
    """Bytes by the recipe: of the decoder `layers`' matrices, the `output` matrix, `projector`, and all: `language`.

    With a budget each weight lies between its smallest and its largest choice, all at the same part of the way.
    """
    shapes = weight_shapes(shape)
    schemes = recipe.options(shapes, ELSEWHERE) if recipe.budget else {
        name: (scheme,) for name, scheme in recipe.plan(shapes, ELSEWHERE).items()
    }  # fmt: skip
    sizes = {name: sorted(nbytes(scheme, shapes[name]) for scheme in choices) for name, choices in schemes.items()}
    part, least, most = 1.0, sum(each[0] for each in sizes.values()), sum(each[-1] for each in sizes.values())
    if recipe.budget:
        limit = recipe.budget.limit(sum(map(math.prod, shapes.values())))
        if limit < least:
            raise UserError(
                f"recipe {recipe.name}: does not fit: at least {format_bytes(least)}, got {format_bytes(limit)}"
            )
        part = min(1.0, (limit - least) / (most - least)) if most > least else 1.0
    final = {name: each[0] + part * (each[-1] - each[0]) for name, each in sizes.items()}
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
    shapes = {
        name.removesuffix(".weight"): (*size, *[1] * (4 - len(size)))
        for name, size in tower_shapes("folded").items()
        if name.endswith(".weight") and len(size) > 1
    }
    return compress.size_of(shapes, compress.assign(quant, shapes).forms)


def _width(
    stage: str, device: Device, behind: dict[str, Any], beyond: bool, encoder_on_gpu: bool
) -> tuple[float, list[str]]:
    """The logarithm of the factor by which a stage's range goes each way, and each reason why it is wider than the
    calibration's error. `beyond`: the picture or prompt is larger than the published points."""
    spread, reasons = facts("calibration.json")["spread"][stage], []
    on_gpu, known_kind = stage == "encode" and encoder_on_gpu, device.kind in behind["kinds"]
    width: float = spread["outside" if beyond or not known_kind else "seen" if behind["of_this_chip"] else "unseen"]
    if on_gpu:
        width = GPU_ENCODER
        reasons.append("no published point of the encoder alone on the GPU: the factor of 3 each way is a guess")
    elif not behind["of_this_chip"]:
        kind = device.kind.replace("mac", "Mac")
        what = f"a {kind} with this chip" if known_kind else f"any {kind}"
        known = ", ".join(behind["devices"])
        reasons.append(f"extrapolated: no usable published point of {what}, only of {known}: range widened")
    figures = _STAGE_FIGURES["prefill" if on_gpu else stage]
    if missing := [name for name in figures if name in device.unconfirmed]:
        width += UNCONFIRMED
        reasons.append(f"{', '.join(missing)} of the {device.chip} not confirmed by a source: range widened")
    if beyond:
        limits = f"{PIXELS} pixels, {TOKENS} tokens of prompt"
        reasons.append(f"extrapolated: larger than the published points ({limits}): range widened")
    return width, reasons


def _behind(device: Device) -> dict[str, dict[str, Any]]:
    """The calibration behind each stage: its points, the number of them from such a device, and all their devices."""
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
