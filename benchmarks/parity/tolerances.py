"""The one table of tolerances: what each figure must reach, for which kind of artefact, and why.

An encoder figure depends on the precision its program computes in ("float16", "float32"), or on its weights being
"compressed"; the figures behind it on the artefact's weakest weights (FAMILIES). A bound of None
means reported, not judged: what a compressed encoder costs was the user's choice, and everything behind it inherits it.
A Core AI bundle has bounds of its own: in Apple's interpreter matrix products are summed in float16, which 8 bits and
more of a weight are lost in.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

PRECISIONS = ("float16", "float32", "compressed")
COREAI_PRECISIONS = ("float16", "compressed")
# What rounding to so few bits costs is a property of the model: reported. The worst position's SNR is not, it follows
# from the bits.
COARSE = ("mxfp8", "int6", "int5", "int4", "nvfp4", "mxfp4", "int3", "int2")
FAMILIES = ("fp16", "bf16", "int8", *COARSE)  # from the finest to the coarsest


@dataclass(frozen=True)
class Tolerance:
    """`metric` must be at least / at most `bound` (`sense` ">=" or "<="); None: the figure is only reported."""

    metric: str
    sense: str
    bound: float | None
    unit: str
    reason: str


class _Row(NamedTuple):
    sense: str
    unit: str
    bounds: dict[str, float | None]
    reason: str


# metric -> its row. A bound names the precision or family that it is for.
_ENCODER = {
    "preprocessing": _Row("<=", "", {"float16": 0.0, "float32": 0.0, "compressed": 0.0},
        "both sides make pixels by the same contract: any difference is a wrong crop, padding or normalization"),
    "operation_snr": _Row(">=", "dB", {"float16": 40.0, "float32": 100.0, "compressed": 40.0},
        "a healthy operation adds rounding noise only; 10 dB under the encoder's bound because a difference of two"
        " near values may lose a digit that later layers never see"),
    "layer_snr": _Row(">=", "dB", {"float16": 40.0, "float32": 90.0, "compressed": None},
        "each convolution and linear layer of the saved program against the PyTorch layer that it came from; 10 dB"
        " under the whole encoder's bound, as above"),
    "encoder_snr": _Row(">=", "dB", {"float16": 50.0, "float32": 100.0, "compressed": None},
        "fp16 rounds each value by up to 2^-11 (66 dB), and some 200 roundings in a row leave 50-60 dB; float32 sums in"
        " another order differ by 1e-6 (120 dB); a wrong weight, branch or padding costs far more"),
    "encoder_cosine": _Row(">=", "", {"float16": 0.99999, "float32": 1 - 1e-10, "compressed": None},
        "what 50 dB (100 dB) of noise leaves of the direction, sqrt(1 - 10^(-SNR/10)), with half a digit to spare"),
    "encoder_max_abs": _Row("<=", "of the largest feature", {"float16": 0.02, "float32": 1e-4, "compressed": None},
        "one wrong value among thousands hides in a mean; rounding noise of the SNR above peaks at 5-6 sigma"),
}  # fmt: skip
_REPORTED: dict[str, float | None] = dict.fromkeys(COARSE)
_LANGUAGE = {
    "merged_snr": _Row(">=", "dB", {
            "fp16": 40.0, "bf16": 40.0, "int8": 30.0, "mxfp8": 20.0, "int6": 24.0, "int5": 18.0, "int4": 12.0,
            "nvfp4": 10.0, "mxfp4": 8.0, "int3": 6.0, "int2": 0.0,
        },
        "the worst text or picture position that the decoder reads; alone, because picture positions are far louder and"
        " would hide the text: the encoder's 50 dB less 10 for the worst; 8 bit steps are 1/255 of a group's range"
        " (43 dB), 4 bit 1/15 (18 dB), each bit 6 dB; floats have 3 (E4M3) or 1 (E2M1) bits behind the first"),
    "prefill_kl": _Row("<=", "nats", {**_REPORTED, "fp16": 1e-4, "bf16": 1e-3, "int8": 5e-3},
        "mean over all positions of the prompt, far below the 0.1 nats at which another token becomes likely; what"
        " fewer bits cost is a property of the model, so it is reported"),
    "prefill_top1": _Row(">=", "of positions", {**_REPORTED, "fp16": 0.99, "bf16": 0.98, "int8": 0.97},
        "the most likely next token is the same; only near-ties may turn over"),
    "greedy_tokens": _Row(">=", "of questions", {**_REPORTED, "fp16": 0.99, "bf16": 0.97, "int8": 0.97},
        "the same tokens to the end of the answer; one near-tie changes everything after it, so a few may part"),
    "greedy_answers": _Row(">=", "of questions", {**_REPORTED, "fp16": 0.99, "bf16": 0.97, "int8": 0.97},
        "the text that a user reads; the project promises 99 % in fp16, 97 % in 8 bit, and reports fewer"),
}  # fmt: skip

# Of a Core AI bundle, run by Apple's interpreter: no figures of operations, and image embeddings instead of features.
_COREAI_ENCODER = {
    "preprocessing": _ENCODER["preprocessing"],
    "encoder_snr": _Row(">=", "dB", {"float16": 30.0, "compressed": None},
        "float16 rounds as in Core ML, and Apple's interpreter sums matrix products in float16, too: of 200 of the"
        " demo's pictures the worst has 48 dB, FastViTHD with random weights has 50 at 256 x 256 and 40 at 1024 x 1024,"
        " where attention sums over 256 positions; a wrong weight, scale or picture costs far more"),
    "encoder_cosine": _Row(">=", "", {"float16": 0.999, "compressed": None},
        "what 30 dB of noise leaves of the direction, sqrt(1 - 10^(-SNR/10)), with half a digit to spare"),
    "encoder_max_abs": _Row("<=", "of the largest feature", {"float16": 0.1, "compressed": None},
        "one wrong value among thousands hides in a mean; rounding noise of the SNR above peaks at 5-6 sigma"),
}  # fmt: skip
_COREAI_LANGUAGE = {
    "merged_snr": _Row(">=", "dB", {**_LANGUAGE["merged_snr"].bounds, "fp16": 20.0, "bf16": 20.0, "int8": 20.0},
        "the worst text or picture position that the decoder reads: the image embeddings' 30 dB less 10 for the worst;"
        " 8 bit steps are 1/255 of a group's range (43 dB), 4 bit 1/15 (18 dB), each bit 6 dB"),
    "prefill_snr": _Row(">=", "dB", {**_REPORTED, "fp16": 40.0, "bf16": 40.0, "int8": 20.0},
        "the logits of a whole prompt: the interpreter's float16 sums leave 51 dB and more of the demo's; a scale"
        " that is wrong by 1 % leaves 40. The GPU and the Neural Engine sum otherwise"),
    "prefill_kl": _Row("<=", "nats", {**_REPORTED, "fp16": 1e-3, "bf16": 1e-3, "int8": 5e-3},
        "mean over all positions of the prompt, far below the 0.1 nats at which another token becomes likely; ten times"
        " what it is for PyTorch's sums in float32, because the interpreter's are in float16 (the demo: 3e-5)"),
    "prefill_top1": _Row(">=", "of positions", {**_REPORTED, "fp16": 0.97, "bf16": 0.97, "int8": 0.95},
        "the most likely next token is the same; only near-ties may turn over (the demo: 99.7 %)"),
    "greedy_tokens": _LANGUAGE["greedy_tokens"],
    "greedy_answers": _LANGUAGE["greedy_answers"],
}  # fmt: skip
# Behind the encoder, where the decoder is wider than NARROW.
NARROW = 256
_WIDE_REASON = (
    "float16 sums over thousands of channels, layer after layer: of 0.5B with random weights they leave 25 dB and 0.012"
    " nats, which is Apple's interpreter and no property of the bundle: what is left to prove is that no layer is wrong"
)
_WIDE: dict[str, float | None] = {
    "prefill_snr": 15.0, "prefill_kl": 0.05, "prefill_top1": None, "greedy_tokens": None, "greedy_answers": None,
}  # fmt: skip
# A form of Core AI's (`quantization.coreai.forms`) -> the family whose bits it has.
COREAI_FAMILIES = {
    "fp16": "fp16", "int8": "int8", "int8-b32": "int8", "palette8": "int8", "fp8": "mxfp8", "palette6": "int6",
    "palette6-g16": "int6", "int4-b32": "int4", "palette4": "int4", "palette4-g16": "int4",
}  # fmt: skip


def for_encoder(precision: str, coreai: bool = False) -> dict[str, Tolerance]:
    """Tolerances of an encoder program that computes in `precision`, of a Core AI bundle or not. Raises KeyError for
    one that has no row."""
    if coreai:
        return _column(_COREAI_ENCODER, precision, COREAI_PRECISIONS)
    return _column(_ENCODER, precision, PRECISIONS)


def for_language(family: str, precision: str = "float16", coreai: int | None = None) -> dict[str, Tolerance]:
    """Tolerances behind the encoder for the family of the artefact's weakest weights; `coreai`: the decoder's width in
    a Core AI bundle, None for another artefact. Raises KeyError for another family."""
    tolerances = _column(_LANGUAGE if coreai is None else _COREAI_LANGUAGE, family, FAMILIES)
    if coreai is not None and coreai > NARROW:
        tolerances |= {
            name: replace(tolerances[name], bound=bound, reason=_WIDE_REASON)
            for name, bound in _WIDE.items()
            if tolerances[name].bound is not None
        }
    if precision == "compressed":
        return {name: replace(tolerance, bound=None) for name, tolerance in tolerances.items()}
    return tolerances


def _column(rows: dict[str, _Row], column: str, known: tuple[str, ...]) -> dict[str, Tolerance]:
    if column not in known:
        raise KeyError(f"no tolerances for {column!r}: expected one of {', '.join(known)}")
    return {name: Tolerance(name, row.sense, row.bounds[column], row.unit, row.reason) for name, row in rows.items()}


def judge(tolerance: Tolerance, value: float) -> dict[str, Any]:
    """{value, unit, sense, tolerance, passed, reason}; `passed` is None where nothing is judged. NaN never passes."""
    passed: bool | None = None
    if tolerance.bound is not None:
        passed = value >= tolerance.bound if tolerance.sense == ">=" else value <= tolerance.bound
    elif math.isnan(value) or math.isinf(value):
        passed = False  # a reported figure must at least be one
    return {
        "value": number(value),
        "unit": tolerance.unit,
        "sense": tolerance.sense,
        "tolerance": tolerance.bound,
        "passed": passed,
        "reason": tolerance.reason,
    }


def number(value: float) -> float | str:
    """A figure as JSON can hold it: six digits; "inf", "-inf" and "nan" as text, which `float()` reads back."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(float(value))
