"""MIL's element types, without PyTorch."""

import numpy as np

# MIL.proto's DataType numbers.
NAMES = {
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 12: "fp64", 13: "bf16",
    21: "int8", 22: "int16", 23: "int32", 24: "int64", 25: "int4",
    31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1", 38: "uint6",
    39: "uint3", 40: "fp8e4m3fn", 41: "fp8e5m2",
}  # fmt: skip

# Types narrower than a byte: width in bits; values are unpacked to one byte each.
SUB_BYTE = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}

FLOATS = ("fp16", "fp32", "fp64", "bf16", "fp8e4m3fn", "fp8e5m2")

NUMPY = {
    "bool": np.bool_, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64, "int8": np.int8, "int16": np.int16,
    "int32": np.int32, "int64": np.int64, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64,
}  # fmt: skip

# What an array of each type has: bits, where NumPy has no such type; a byte for each value that is narrower.
HELD = {
    **NUMPY, **dict.fromkeys(SUB_BYTE, np.uint8), "int4": np.int8, "bf16": np.uint16,
    "fp8e4m3fn": np.uint8, "fp8e5m2": np.uint8,
}  # fmt: skip
