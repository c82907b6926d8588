"""Compressed weights: bit for bit as coremltools' materialized_val_inference."""

from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
from coremltools.converters.mil.mil import types

from model_export import mil

RANDOM = np.random.default_rng(0)
FLOAT16 = RANDOM.normal(size=64).astype(np.float16)


def sub_byte(name: str, values: np.ndarray) -> np.ndarray:
    return values.astype(types.nptype_from_builtin(getattr(types, name)))


def integers(low: int, high: int, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return RANDOM.integers(low, high, shape).astype(dtype)


PACKED_MASK = np.packbits(RANDOM.integers(0, 2, 30).astype(np.uint8), bitorder="little")
MASK = integers(0, 2, 6, 5)

CASES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "iOS16",
        "constexpr_affine_dequantize",
        {"quantized_data": integers(-128, 128, 6, 5, dtype=np.int8), "scale": FLOAT16[:6], "axis": np.int32(0)}
        | {"zero_point": integers(-9, 9, 6, dtype=np.int8)},
    ),
    (
        "iOS16",
        "constexpr_affine_dequantize",
        {"quantized_data": integers(0, 256, 6, 5), "scale": FLOAT16[0], "axis": np.int32(1)}
        | {"zero_point": np.uint8(7)},
    ),
    *(
        (
            "iOS16",
            "constexpr_lut_to_dense",
            {"indices": integers(0, 256, -(-30 * bits // 8)), "shape": np.array([6, 5], np.uint32)}
            | {"lut": RANDOM.normal(size=2**bits).astype(np.float16)},
        )
        for bits in (1, 2, 4, 6, 8)
    ),
    (
        "iOS16",
        "constexpr_sparse_to_dense",
        {"mask": PACKED_MASK, "shape": np.array([6, 5], np.uint32)}
        | {"nonzero_data": FLOAT16[: int(np.unpackbits(PACKED_MASK, bitorder="little")[:30].sum())]},
    ),
    (
        "iOS18",
        "constexpr_sparse_to_dense",
        {"mask": sub_byte("uint1", MASK), "nonzero_data": FLOAT16[: int(MASK.sum())]},
    ),
    *(
        (
            "iOS18",
            "constexpr_blockwise_shift_scale",
            {"data": sub_byte(name, integers(low, high, 6, 8, dtype=np.int8 if low else np.uint8))}
            | {"scale": FLOAT16[:12].reshape(3, 4)}
            | ({"offset": sub_byte(name, integers(0, 3, 3, 4))} if offset else {}),
        )
        for name, low, high, offset in (("int4", -8, 8, False), ("uint4", 0, 16, True), ("int8", -128, 128, True))
    ),
    *(
        (
            "iOS18",
            "constexpr_lut_to_dense",
            {"indices": sub_byte(f"uint{bits}", integers(0, 2**bits, 6, 4))}
            | {"lut": RANDOM.normal(size=(2, 1, 2**bits, 1)).astype(np.float16)},
        )
        for bits in (1, 2, 3, 4, 6)
    ),
    *(
        (
            "iOS18",
            "constexpr_lut_to_dense",
            {"indices": sub_byte("uint2", integers(0, 4, 6, 4)), "vector_axis": np.int32(axis)}
            | {"lut": RANDOM.normal(size=(*groups, 4, 3)).astype(np.float16)},
        )
        for axis, groups in ((0, (1, 1)), (1, (3, 1)), (1, (1, 1)))
    ),
]


@pytest.mark.parametrize(
    ("target", "op", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_decompressed_bit_for_bit(target: str, op: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    found: list[np.ndarray] = []

    def build(x: Any) -> Any:
        weight = getattr(packages.mb, op)(**arguments)
        found.append(weight.op.materialized_val_inference())
        return packages.mb.add(x=x, y=weight)

    probe: list[np.ndarray] = []

    @packages.mb.program(input_specs=[], opset_version=packages.TARGETS[target])
    def shape_probe() -> Any:
        probe.append(getattr(packages.mb, op)(**arguments).shape)
        return packages.mb.const(val=np.float32(0))

    zeros = np.zeros(tuple(int(n) for n in probe[0]), np.float16)
    (name,) = packages.save_program(tmp_path / "p.mlpackage", build, {"x": zeros}, target)
    got = mil.load(tmp_path / "p.mlpackage").predict({"x": zeros})[name]
    np.testing.assert_array_equal(got, found[0])
