"""Compressed weights: bit for bit as coremltools' materialized_val_inference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
from coremltools.converters.mil.mil import types

from model_export import mil
from model_export.mil.ops import constexpr
from model_export.mil.registry import supported

pytestmark = pytest.mark.slow

RANDOM = np.random.default_rng(0)
FLOAT16 = RANDOM.normal(size=64).astype(np.float16)


def sub_byte(name: str, values: np.ndarray) -> np.ndarray:
    return values.astype(types.nptype_from_builtin(getattr(types, name)))


def integers(low: int, high: int, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return RANDOM.integers(low, high, shape).astype(dtype)


PACKED_MASK = np.packbits(RANDOM.integers(0, 2, 30).astype(np.uint8), bitorder="little")
MASK = integers(0, 2, 6, 5)

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((target, "constexpr_cast", {"source_val": FLOAT16, "output_dtype": "fp32"}) for target in ("iOS16", "iOS18")),
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
    *(  # a float offset wider than the data, int8 tables, a table for each of many small groups
        ("iOS18", op, arguments)
        for op, arguments in (
            (
                "constexpr_blockwise_shift_scale",
                {"data": integers(0, 256, 6, 8), "scale": FLOAT16[:3].reshape(3, 1), "offset": FLOAT16[3:6, None]},
            ),
            (
                "constexpr_lut_to_dense",
                {
                    "indices": sub_byte("uint4", integers(0, 16, 6, 4)),
                    "lut": integers(-128, 128, 3, 2, 16, 1, dtype=np.int8),
                },
            ),
            (
                "constexpr_lut_to_dense",
                {
                    "indices": integers(0, 256, 64, 24, 1, 1),
                    "lut": RANDOM.normal(size=(16, 24, 1, 1, 256, 1)).astype(np.float32),
                },
            ),
        )
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


def decompressed(path: Path, build: Callable[[], Any], target: str) -> tuple[np.ndarray, np.ndarray]:
    """The variable that `build()` gives, as the executor and as coremltools decompress it.

    An operand that coremltools evaluates only when it is a constant comes with its values as (variable, values).
    """
    expected: list[np.ndarray] = []

    @packages.mb.program(input_specs=[], opset_version=packages.TARGETS[target])
    def probe() -> Any:
        result = build()
        expected.append(result[1] if isinstance(result, tuple) else result.op.materialized_val_inference())
        return packages.mb.const(val=np.float32(0))

    def program(x: Any) -> Any:
        result = build()
        weight = result[0] if isinstance(result, tuple) else result
        integer = expected[0].dtype.kind in "iu"
        return packages.mb.add(x=x, y=packages.mb.cast(x=weight, dtype="fp16") if integer else weight)

    zeros = np.zeros(expected[0].shape, np.float32 if expected[0].dtype == np.float32 else np.float16)
    (name,) = packages.save_program(path, program, {"x": zeros}, target)
    saved = mil.read_package(path).functions["main"].block.operations
    assert any(operation.type.startswith("constexpr_") for operation in saved)  # not folded by coremltools
    return mil.load(path).predict({"x": zeros})[name], expected[0]


@pytest.mark.parametrize(
    ("target", "op", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_decompressed_bit_for_bit(target: str, op: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    got, wanted = decompressed(tmp_path / "p.mlpackage", lambda: getattr(packages.mb, op)(**arguments), target)
    np.testing.assert_array_equal(got, wanted)
    assert not np.array_equal(got, np.roll(wanted, 1))


# -- operands that are themselves compressed --------------------------------------------------------------------------

SPARSE = integers(0, 2, 6, 4)
COUNT = int(SPARSE.sum())
INT8_TABLES = integers(-128, 128, 3, 1, 16, 1, dtype=np.int8)
SCALE = FLOAT16[:6].reshape(6, 1)
VECTORS = RANDOM.normal(size=(3, 1, 16, 2)).astype(np.float16)


def int8_palette_with_scale() -> Any:
    """A 4-bit palette of int8 entries, a scale for each output channel."""
    indices = sub_byte("uint4", np.arange(24).reshape(6, 4) % 16)
    palette = packages.mb.constexpr_lut_to_dense(indices=indices, lut=INT8_TABLES)
    return packages.mb.constexpr_blockwise_shift_scale(data=palette, scale=SCALE)


def scaled_tables() -> Any:
    """Tables that are quantized themselves, as coremltools writes a palette with a scale per channel."""
    tables = packages.mb.constexpr_blockwise_shift_scale(data=INT8_TABLES, scale=FLOAT16[:3].reshape(3, 1, 1, 1))
    indices = sub_byte("uint4", np.arange(24).reshape(6, 4) % 16)
    palette = packages.mb.constexpr_lut_to_dense(indices=indices, lut=tables)
    return palette, type(palette.op).decompress(indices, tables.op.materialized_val_inference(), None)


def sparse_palette(vector: int) -> Any:
    """Non-zero values from a palette, one or several at a time."""
    nonzero = sub_byte("uint4", np.arange(COUNT) % 16)
    lut = VECTORS[..., :vector]
    axis = {} if vector == 1 else {"vector_axis": np.int32(0)}
    mask, values = packages.mb.constexpr_lut_to_sparse(
        indices_mask=sub_byte("uint1", SPARSE), indices_nonzero_data=nonzero, lut=lut, **axis
    )
    return packages.mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)


def sparse_quantized(offset: bool) -> Any:
    """Non-zero values of int8, a scale and perhaps an offset for each block."""
    more = {"offset": np.arange(-3, 3, dtype=np.int8).reshape(3, 2)} if offset else {}
    mask, values = packages.mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=sub_byte("uint1", SPARSE),
        nonzero_data=(np.arange(COUNT) * 9 - 100).astype(np.int8),
        scale=FLOAT16[:6].reshape(3, 2),
        **more,
    )
    return packages.mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)


def sparse_palette_with_scale() -> Any:
    """Non-zero values from a palette of int8 entries, scaled, made dense: three operations deep."""
    bits, indices = sub_byte("uint1", SPARSE), sub_byte("uint4", np.arange(COUNT) % 16)
    mask, entries = packages.mb.constexpr_lut_to_sparse(
        indices_mask=bits, indices_nonzero_data=indices, lut=INT8_TABLES
    )
    _, looked_up = entries.op.materialized_val_inference()
    scaled_mask, scaled = packages.mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=mask, nonzero_data=entries, scale=SCALE
    )
    _, values = type(scaled.op).decompress(bits, looked_up, SCALE, None)
    dense = packages.mb.constexpr_sparse_to_dense(nonzero_data=scaled, mask=scaled_mask)
    return dense, type(dense.op).decompress(values, bits)


CHAINS: dict[str, Callable[[], Any]] = {
    "int8_palette_with_scale": int8_palette_with_scale,
    "scaled_tables": scaled_tables,
    "sparse_palette": lambda: sparse_palette(1),
    "sparse_palette_of_vectors": lambda: sparse_palette(2),
    "sparse_quantized": lambda: sparse_quantized(False),
    "sparse_quantized_with_offset": lambda: sparse_quantized(True),
    "sparse_palette_with_scale": sparse_palette_with_scale,
}


LOOKUPS = [case for case in CASES if case[:2] == ("iOS18", "constexpr_lut_to_dense")][-6:]


@pytest.mark.parametrize(("target", "op", "arguments"), LOOKUPS, ids=lambda value: "")
def test_a_few_indices_at_a_time(
    target: str, op: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large weights are looked up, in pieces that end inside groups and vectors."""
    monkeypatch.setattr(constexpr, "_CHUNK", 9)
    test_decompressed_bit_for_bit(target, op, arguments, tmp_path)


@pytest.mark.parametrize("name", CHAINS)
def test_chains_bit_for_bit(name: str, tmp_path: Path) -> None:
    got, wanted = decompressed(tmp_path / "p.mlpackage", CHAINS[name], "iOS18")
    np.testing.assert_array_equal(got, wanted)
    assert not np.array_equal(got, np.roll(wanted, 1))


def test_a_weight_that_is_used_twice_and_returned(tmp_path: Path) -> None:
    """Decompressed weights are let go after their last use, not the first."""
    values: list[np.ndarray] = []

    def build(x: Any) -> Any:
        weight = int8_palette_with_scale()
        values.append(weight.op.materialized_val_inference())
        first = packages.mb.add(x=x, y=weight)
        return (
            packages.mb.add(x=first, y=weight, name="twice"),
            packages.mb.add(x=weight, y=first, name="again"),
            weight,
        )

    zeros = np.zeros((6, 4), np.float16)
    names = packages.save_program(tmp_path / "p.mlpackage", build, {"x": zeros}, "iOS18")
    got = mil.load(tmp_path / "p.mlpackage").predict({"x": zeros})
    for name in names:
        np.testing.assert_array_equal(got[name], values[0] * np.float16(2 if name in ("twice", "again") else 1))


def test_every_form_is_tested() -> None:
    sparse = {"constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale"}  # in the chains
    assert {op for op in supported() if op.startswith("constexpr_")} == {op for _, op, _ in CASES} | sparse
