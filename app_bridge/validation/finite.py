"""Whether stored numbers are finite, told from their bits: without PyTorch, whose import takes seconds."""

import numpy as np

from fastvlm.common.dtypes import Array

_CHUNK = 1 << 22  # bytes at a time
# safetensors' and MIL's names -> bytes of a value, and the bits that are all set in what isn't finite (E4M3 has a NaN,
# which is all ones, and nothing infinite).
_EXPONENTS = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F800000),
    "F64": (8, 0x7FF0000000000000),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
    "fp16": (2, 0x7C00),
    "bf16": (2, 0x7F80),
    "fp32": (4, 0x7F800000),
    "fp64": (8, 0x7FF0000000000000),
    "fp8e5m2": (1, 0x7C),
    "fp8e4m3fn": (1, 0x7F),
}


def is_finite(raw: Array, dtype: str) -> bool:
    """Whether all values are finite.

    Args:
        raw: the values' bytes (uint8).
        dtype: their type; values of one that is no float are always finite.
    """
    if dtype not in _EXPONENTS:
        return True
    size, exponent = _EXPONENTS[dtype]
    mask = np.dtype(f"u{size}").type(exponent)
    pieces = (raw[start : start + _CHUNK].view(mask.dtype) for start in range(0, raw.size, _CHUNK))
    return not any(((piece & mask) == mask).any() for piece in pieces)
