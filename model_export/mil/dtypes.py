"""MIL element types in torch, and the compute policies.

A policy is the dtype that the executor computes in, and its treatment of a value whose MIL type is fp16:

- "as-typed": every operation's result is rounded to fp16 (storage fp16, accumulation fp32). The value is held as a
  float32 tensor that contains only fp16 numbers, so that no kernel has to convert its operands.
- "strict-fp16": besides, an operation that a simple engine has to compose from others (layer_norm, softmax, ...) is
  computed as that chain, each intermediate rounded; a square above 65504 is infinite. Sums are still in float32.
- "float32": never rounded; what the graph means.
- "bfloat16": held and computed in bfloat16 (sums in float32), with activations inside the operation before them: for
  speed where the processor has bfloat16 instructions, proving nothing.
- "int8": the same with 8-bit operands in 1 x 1 convolutions, which are nine tenths of FastViTHD. "int8-float32": the
  rest in float32, where the processor has no bfloat16 instructions.

An operation whose MIL type is fp32 is computed in float32, undivided, in all of them.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from .types import FLOATS


@dataclass(frozen=True)
class Policy:
    """The treatment of values of MIL type fp16 in a run.

    rounds: results are rounded to it. decomposes: so are the intermediates of composite operations.
    half: the torch type that holds it. fuses: an operation may take in the activation that follows it.
    int8: 1 x 1 convolutions have 8-bit operands (`int8.py`).
    """

    name: str
    rounds: bool
    decomposes: bool = False
    half: torch.dtype = torch.float32
    fuses: bool = False
    int8: bool = False

    def holds(self, dtype: str) -> torch.dtype:
        """The torch type in which values of this MIL type are held while running."""
        return self._held.get(dtype, torch.int32)

    @cached_property
    def _held(self) -> dict[str, torch.dtype]:
        whole = {"bool": torch.bool} | dict.fromkeys(("int64", "uint32", "uint64"), torch.int64)
        floats = dict.fromkeys(FLOATS, torch.float32) | {"fp16": self.half, "fp64": torch.float64}
        return whole | floats


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("as-typed", rounds=True),
        Policy("strict-fp16", rounds=True, decomposes=True),
        Policy("float32", rounds=False),
        Policy("bfloat16", rounds=False, half=torch.bfloat16, fuses=True),
        Policy("int8", rounds=False, half=torch.bfloat16, fuses=True, int8=True),
        Policy("int8-float32", rounds=False, fuses=True, int8=True),
    )
}

STORAGE = {
    "bool": torch.bool, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16,
    "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "int4": torch.int8,
    "uint8": torch.uint8, "uint16": torch.uint16, "uint32": torch.uint32, "uint64": torch.uint64,
    "uint1": torch.uint8, "uint2": torch.uint8, "uint3": torch.uint8, "uint4": torch.uint8, "uint6": torch.uint8,
    "fp8e4m3fn": torch.float8_e4m3fn, "fp8e5m2": torch.float8_e5m2,
}  # fmt: skip
