"""`python -m benchmarks estimate`: time to first token on Apple devices that aren't at hand, as a range.

`estimate_work` counts what the model computes and moves, `estimate_model` turns that into seconds with parameters
calibrated on published measurements (published.json). Facts about devices are in devices.json, each with its source.
Nothing here is measured on the machine that it runs on.
"""

import argparse
import difflib
import json
import math
import re
import statistics
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastvlm
from benchmarks.estimate import model
from benchmarks.estimate.model import Device, Point, Time
from benchmarks.estimate.work import SPILL, EncoderWork, LanguageModel, encoder_work
from benchmarks.peers.shapes import TEXT_TOKENS
from fastvlm.common.cli import add_common
from fastvlm.common.errors import UserError
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
GPU_ENCODER = math.log(3)  # the encoder on the GPU: no published point, an assumption
_STAGE_FIGURES = {
    "encode": ("neural_engine_float16_tops", "neural_engine_gbps"),
    "prefill": ("gpu_tflops", "memory_gbps"),
    "decode": ("memory_gbps",),
}


def add_parser(subparsers: Any) -> None:
    """Add the verb `estimate`."""
    parser = subparsers.add_parser(
        "estimate",
        help="time to first token on an Apple device that isn't at hand",
        description="Estimate, from the model's arithmetic and published measurements, the time to first token of an"
        " exported model on an Apple device: always a range, with what it rests on.",
    )
    parser.add_argument("--shape", metavar="|".join(SHAPE_NAMES), help="the published model whose sizes count")
    parser.add_argument("--device", metavar="D", help="one that --list knows, as m1-max or iphone-15-pro")
    parser.add_argument(
        "--recipe", default="fp16", metavar="R", help="how the weights are stored, as --quant (default: %(default)s)"
    )
    parser.add_argument(
        "--resolution", type=int, default=1024, metavar="PIXELS", help="the picture's side (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-length", type=int, default=TEXT_TOKENS, metavar="T",
        help="tokens of text around the picture's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--units", choices=UNITS, default=UNITS[0],
        help="what runs the encoder; the language model runs on the GPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the devices and their figures")
    parser.add_argument(
        "--calibrate", action="store_true", help="fit the parameters to the published points again and print them"
    )
    add_common(parser)
    parser.set_defaults(run=run_estimate)


def run_estimate(args: argparse.Namespace) -> dict[str, Any]:
    """List, calibrate or estimate; the document is the `--json` output. UserError with every fault of the request."""
    from benchmarks.estimate import report

    if args.list or args.calibrate:
        if args.list and args.calibrate:
            raise UserError("--list and --calibrate: expected one of them")
        document = {"devices": known_devices()} if args.list else calibration_now() | {"points": fits()}
        if not args.json:
            (report.print_devices if args.list else report.print_calibration)(document)
        return document
    result = estimate(args.shape, args.device, args.recipe, args.resolution, args.prompt_length, args.units)
    if not args.json:
        report.print_estimate(result)
    return result


@cache
def facts(name: str) -> dict[str, Any]:
    """devices.json or published.json."""
    document: dict[str, Any] = json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return document


@cache
def devices() -> dict[str, Device]:
    """All devices of devices.json."""
    return {key: _device(key, entry) for key, entry in facts("devices.json")["devices"].items()}


def device_key(name: str) -> str:
    """The key of the device that is meant by its key, an alias or as people write it: "iPhone 15 Pro Max", "M4PRO".

    UserError that names the nearest for a device that isn't there.
    """
    keys = {_squashed(said): key for key, entry in facts("devices.json")["devices"].items()
            for said in (key, *entry.get("aliases", ()))}  # fmt: skip
    said = _squashed(name)
    if said in keys:
        return keys[said]
    nearest = dict.fromkeys(keys[one] for one in difflib.get_close_matches(said, keys, 3))
    meant = f" (is {' or '.join(nearest)} meant?)" if nearest else ""
    raise UserError(f"--device {name}: unknown{meant}; expected one of {', '.join(devices())}")


def _squashed(name: str) -> str:
    """A device's name by what tells it from others: letters and digits; of a Mac, its chip."""
    plain = re.sub(r"[^a-z0-9]+", "", name.lower())
    return re.sub(r"^(?:apple|imac|mac(?:book)?(?:air|mini|pro|studio)?(?:with)?)*(?=m\d)", "", plain)


def _device(key: str, entry: Mapping[str, Any]) -> Device:
    chip = facts("devices.json")["chips"][entry["chip"]]

    def value(name: str) -> Any:
        return chip[name]["value"] if name in chip else None

    unconfirmed = tuple(
        name for name, figure in chip.items() if isinstance(figure, dict) and figure["source"] == "not-confirmed"
    )
    return Device(
        key, entry["name"], entry["chip"], entry["kind"], tuple(entry["memory_gb"]),
        ne_tops=value("neural_engine_float16_tops"), ne_gbps=value("neural_engine_gbps"),
        gpu_tflops=value("gpu_tflops"), memory_gbps=value("memory_gbps"), cache_mb=value("system_cache_mb") or 0.0,
        matrix_speedup=value("gpu_matrix_speedup") or 1.0, unconfirmed=unconfirmed,
    )  # fmt: skip


@cache
def points() -> tuple[Point, ...]:
    """The published points."""
    return tuple(model.points(facts("published.json"), devices()))


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
    p, tokens = calibration()["parameters"], picture + prompt
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
        "calibrated_on": _behind(found), "held_out": held_out_errors(p),
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
    quant = compress.of_recipe(recipe)
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


def calibration() -> dict[str, Any]:
    """The parameters and spreads stored in published.json; `calibration_now` computes the same."""
    stored: dict[str, Any] = facts("published.json")["calibration"]
    return stored


def calibration_now() -> dict[str, Any]:
    """Fit the parameters to the points that aren't held out, and the spreads by leaving out points and devices.

    spread: the largest |log(predicted / published)| of a stage, for a device with points (`seen`), for one without
    (`unseen`), and beyond what is modelled (`outside`, never less than `unseen`).
    """
    p = model.calibrate([point for point in points() if point.use == "calibrates"])
    one_out = model.leave_out(points(), lambda point: point.id)
    device_out = model.leave_out(points(), lambda point: point.device.key)
    spread = {}
    for stage in model.STAGES:
        inside = [point.id for point in points() if point.stage == stage and point.outside is None]
        outside = [point.residual(p) for point in points() if point.stage == stage and point.outside is not None]
        unseen = max(abs(device_out[name]) for name in inside)
        spread[stage] = {
            "seen": max(abs(one_out[name]) for name in inside),
            "unseen": unseen,
            "outside": max(map(abs, [unseen, *outside])),
        }
    return {"parameters": p, "spread": spread, "held_out": held_out_errors(p)}


def fits() -> list[dict[str, Any]]:
    """Each published point beside what the stored parameters say, seconds, and its use."""
    p = calibration()["parameters"]
    return [
        {
            "id": point.id, "device": point.device.key, "stage": point.stage, "published": point.seconds,
            "predicted": point.predict(p), "use": point.use,
        }
        for point in points()
    ]  # fmt: skip


def held_out_errors(p: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """For each stage, and the totals: how many points were held out, and how far the prediction is off, as parts."""
    errors = {}
    for stage in (*model.STAGES, "ttft"):
        held = [point for point in points() if (point.stage, point.use) == (stage, "held out")]
        off = {point.id: math.expm1(point.residual(p)) for point in held}
        worst = max(off, key=lambda name: abs(off[name]))
        median = statistics.median(map(abs, off.values()))
        errors[stage] = {"points": len(off), "median": median, "worst": off[worst], "worst_point": worst}
    return errors


def _range(name: str, time: Time, device: Device, units: str, work: EncoderWork, tokens: int) -> dict[str, Any]:
    """The range of a stage: its central time, divided and multiplied by what the spreads say."""
    stage = "prefill" if name == "project" else name
    spread, behind = calibration()["spread"][stage], _behind(device)[stage]
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
    for stage in model.STAGES:
        inside = [point for point in points() if point.stage == stage and point.outside is None]
        behind[stage] = {
            "points": [point.id for point in inside if not point.held_out],
            "of_this_chip": sum(
                (point.device.chip, point.device.kind) == (device.chip, device.kind) for point in inside
            ),
            "devices": sorted({point.device.key for point in inside}),
            "kinds": sorted({point.device.kind for point in inside}),
        }
    return behind


def warnings(device: Device, units: str, work: EncoderWork, tokens: int, size: float) -> list[str]:
    """What makes this estimate weaker than the calibration's error, in words."""
    said, on_gpu = [], units == "CPU_AND_GPU"
    for stage, behind in _behind(device).items():
        if stage == "encode" and on_gpu:
            said.append("encode: no published point of an encoder on the GPU: the factor of 3 each way is a guess")
        elif not behind["of_this_chip"]:
            kind = device.kind.replace("mac", "Mac")
            what = f"a {kind} with this chip" if device.kind in behind["kinds"] else f"any {kind}"
            known = ", ".join(behind["devices"])
            said.append(f"{stage}: extrapolated: no usable published point of {what}, only of {known}: range widened")
        if missing := _missing(device, "prefill" if stage == "encode" and on_gpu else stage):
            said.append(f"{stage}: {', '.join(missing)} of the {device.chip} not confirmed by a source: range widened")
        if _beyond(stage, work, tokens):
            said.append(
                f"{stage}: extrapolated: larger than the published points ({SPILL >> 20} MiB a tensor and"
                f" {LONGEST_ATTENTION} tokens of attention in the encoder, {LONGEST} tokens of prompt): range widened"
            )
    if device.matrix_speedup > 1:
        said.append(
            f"prefill: the {device.chip}'s GPU has matrix units without a published peak: the low end counts them in"
            f" ({device.matrix_speedup:g} times as fast, what Apple says of the M5 at most), the high end doesn't"
        )
    if size > 0.7e9 * max(device.memory_gb):
        most = max(device.memory_gb)
        said.append(f"memory: the weights take {size / 1e9:.1f} GB of at most {most:g} GB: they don't fit")
    return said


def known_devices() -> dict[str, dict[str, Any]]:
    """Every device with its figures; a figure that no source confirms is named in `unconfirmed`."""
    return {
        key: {
            **{name: value for name, value in vars(device).items() if name != "key"},
            "points": sum(point.device.key == key and point.outside is None for point in points()),
        }
        for key, device in devices().items()
    }
