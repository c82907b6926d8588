"""The forms in which a Core AI program stores a weight: their table, their arithmetic, their sizes.

Integers and floats are symmetric, under a float16 scale for each output channel or each block along the input
(`coreai.blockwise_shift_scale`); palettes are indices into small tables (`coreai.lut_to_dense`). Scales and tables are
found as for Core ML (`quantization.coreml`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastvlm.common.arguments import nearest
from fastvlm.common.dtypes import Array
from quantization.coreml.compression import linear, stretched
from quantization.coreml.palettes import palettize

PLAIN = "fp16"  # the name of leaving a weight as it is
_FP16 = 2  # bytes
_LARGEST_E4M3 = 448.0
_LARGEST_SCALE = 146.125  # the largest float16 whose product with that is one, too
# A smaller weight stays float16, as coremltools' `weight_threshold` has it: it saves nothing, and stems and depthwise
# kernels are what costs most.
_WORTHWHILE = 2048

Parts = dict[str, Array]


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        kind: of the stored values; "float" is E4M3, which has a sign, 4 bits of exponent and 3 of fraction.
        bits: of a stored value.
        block: input channels that share a scale (None: all), of an integer form.
        group: output channels that share a palette (None: all).
        refused: who reported that the Neural Engine's compiler refuses it, "" if nobody did. Nobody here has tried.
    """

    name: str
    kind: Literal["integer", "palette", "float"]
    bits: int
    block: int | None = None
    group: int | None = None
    refused: str = ""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core.core_schema import no_info_plain_validator_function

        return no_info_plain_validator_function(by_name)

    def __str__(self) -> str:
        return self.name


FORMS = {
    form.name: form
    for form in (
        Form(PLAIN, "float", 16),
        Form("int8", "integer", 8),
        Form("int8-b32", "integer", 8, block=32),
        Form("int4-b32", "integer", 4, block=32, refused="apple/coreai-models issues 205 and 55"),
        Form("fp8", "float", 8),
        Form("palette4", "palette", 4),
        Form("palette6", "palette", 6),
        Form("palette8", "palette", 8),
        Form("palette4-g16", "palette", 4, group=16),
        Form("palette6-g16", "palette", 6, group=16),
    )
}


def by_name(name: Any) -> Form:
    """The form of that name. Raises ValueError with all names for any other."""
    if not isinstance(name, str) or name not in FORMS:
        raise ValueError(f"no such form; expected {', '.join(FORMS)}{nearest(str(name), FORMS)}")
    return FORMS[name]


def fault(shape: tuple[int, ...], form: Form) -> str | None:
    """The reason why a weight (O, I, ...) stays float16 under a form, or None where it takes the form."""
    if form.name == PLAIN:
        return "a rule says so"
    if len(shape) < 2:
        return f"shape {list(shape)}: expected output channels, input channels, a kernel"
    if math.prod(shape) < _WORTHWHILE:
        return f"{math.prod(shape)} values, fewer than {_WORTHWHILE}: nothing to save"
    if form.group and shape[0] % form.group:
        return f"{shape[0]} output channels do not divide into groups of {form.group}"
    if form.block and shape[1] % form.block:
        return f"{shape[1]} input channels do not divide into blocks of {form.block}"
    stored, plain = nbytes(shape, form), nbytes(shape, FORMS[PLAIN])
    return None if stored < plain else f"{stored} bytes are not fewer than the {plain} of float16"


def nbytes(shape: tuple[int, ...], form: Form) -> int:
    """Bytes of a weight of this shape that takes the form: packed values, scales, tables."""
    values = (math.prod(shape) * form.bits + 7) // 8
    if form.name == PLAIN:
        return values
    if form.kind == "palette":
        return values + ((shape[0] // form.group if form.group else 1) << form.bits) * _FP16
    return values + shape[0] * (shape[1] // form.block if form.block else 1) * _FP16


def store(weight: Array, form: Form) -> Parts:
    """The parts of a weight (O, I, ...) float16, finite, that takes the form (`fault`).

    Returns:
        For palettes "indices" uint8 in the weight's shape, and "lut" float16 (tables, 1, ..., 2**bits, 1) with the
        tables in order of the output channels. Otherwise "data" in the weight's shape, int8, or uint8 for the bits of
        E4M3 floats, and "scale" float16 (O, 1 or I / block, 1, ...).

    Raises:
        ValueError: the weight isn't as said.
    """
    if weight.dtype != np.float16 or not np.isfinite(weight).all() or fault(weight.shape, form):
        raise ValueError(f"cannot store {weight.dtype} {list(weight.shape)} as {form}: expected finite float16 values")
    ones = [1] * (weight.ndim - 1)
    if form.kind == "palette":
        palette = palettize(weight, form.bits, form.group)
        return {"indices": palette.indices, "lut": palette.lut.reshape(-1, *ones, 1 << form.bits, 1)}
    if form.kind == "float":
        data, scale = _e4m3(weight.reshape(len(weight), -1))
        return {"data": data.reshape(weight.shape), "scale": scale.reshape(-1, *ones)}
    stored = linear(weight, form.bits, form.block)
    return {"data": stored.data, "scale": stored.scale.reshape(len(weight), -1, *ones[1:])}


def decode(parts: Mapping[str, Array], form: Form) -> Array:
    """The float32 weight that a program in float32 computes with. One in float16 rounds it once."""
    if form.kind == "palette":
        lut = parts["lut"].reshape(len(parts["lut"]), -1).astype(np.float32)
        indices = parts["indices"].reshape(len(lut), -1)
        return np.take_along_axis(lut, indices.astype(np.intp), 1).reshape(parts["indices"].shape)
    data = e4m3_values()[parts["data"]] if form.kind == "float" else parts["data"].astype(np.float32)
    return stretched(data, parts["scale"].astype(np.float32))


def e4m3_values() -> Array:
    """The float32 values of the 256 E4M3 floats (OCP 8-bit floating point: no infinity, NaN at 127 and 255)."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def _e4m3(rows: Array) -> tuple[Array, Array]:
    """E4M3's bits (O, I) uint8 of rows, nearest, and the float16 scale (O,) under which the largest is 448."""
    import torch

    reach = np.abs(rows).max(1).astype(np.float32)
    scale = np.clip(reach / _LARGEST_E4M3, np.finfo(np.float16).smallest_subnormal, _LARGEST_SCALE).astype(np.float16)
    data = np.empty(rows.shape, np.uint8)
    for row, values in enumerate(rows):
        scaled = np.clip(values.astype(np.float32) / np.float32(scale[row]), -_LARGEST_E4M3, _LARGEST_E4M3)
        data[row] = torch.from_numpy(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return data, scale
