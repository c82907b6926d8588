"""Compressed weights: bit for bit as coremltools' materialized_val_inference."""

import functools
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

SHAPE = np.array([6, 5], np.uint32)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float16)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((target, "constexpr_cast", {"source_val": FLOAT16, "output_dtype": "fp32"}) for target in ("iOS16", "iOS18")),
    ("iOS16", "constexpr_affine_dequantize",
     {"quantized_data": integers(-128, 128, 6, 5, dtype=np.int8), "scale": FLOAT16[:6], "axis": np.int32(0),
      "zero_point": integers(-9, 9, 6, dtype=np.int8)}),
    ("iOS16", "constexpr_affine_dequantize",
     {"quantized_data": integers(0, 256, 6, 5), "scale": FLOAT16[0], "axis": np.int32(1), "zero_point": np.uint8(7)}),
    *(("iOS16", "constexpr_lut_to_dense",
       {"indices": integers(0, 256, -(-30 * bits // 8)), "shape": SHAPE, "lut": normal(2**bits)})
      for bits in (1, 2, 4, 6, 8)),
    ("iOS16", "constexpr_sparse_to_dense",
     {"mask": PACKED_MASK, "shape": SHAPE,
      "nonzero_data": FLOAT16[: int(np.unpackbits(PACKED_MASK, bitorder="little")[:30].sum())]}),
    ("iOS18", "constexpr_sparse_to_dense",
     {"mask": sub_byte("uint1", MASK), "nonzero_data": FLOAT16[: int(MASK.sum())]}),
    *(("iOS18", "constexpr_sparse_to_dense",
       {"mask": sub_byte("uint1", MASK), "nonzero_data": integers(low, 128, int(MASK.sum()), dtype=dtype)})
      for low, dtype in ((-128, np.int8), (0, np.uint8), (-9, np.float32))),
    ("iOS18", "constexpr_blockwise_shift_scale",  # floats, scaled again
     {"data": normal(6, 8), "scale": FLOAT16[None, :4].astype(np.float32), "offset": FLOAT16[None, 4:8]}),
    ("iOS16", "constexpr_affine_dequantize",
     {"quantized_data": integers(0, 256, 6, 5), "scale": FLOAT16[:5].astype(np.float32), "axis": np.int32(-1),
      "zero_point": FLOAT16[:5].astype(np.float32)}),
    *(("iOS18", "constexpr_blockwise_shift_scale",
       {"data": sub_byte(name, integers(low, high, 6, 8, dtype=np.int8 if low else np.uint8)),
        "scale": FLOAT16[:12].reshape(3, 4)} | ({"offset": sub_byte(name, integers(0, 3, 3, 4))} if offset else {}))
      for name, low, high, offset in (("int4", -8, 8, False), ("uint4", 0, 16, True), ("int8", -128, 128, True))),
    ("iOS18", "constexpr_blockwise_shift_scale",  # a float offset wider than the data
     {"data": integers(0, 256, 6, 8), "scale": FLOAT16[:3].reshape(3, 1), "offset": FLOAT16[3:6, None]}),
    *(("iOS18", "constexpr_lut_to_dense",
       {"indices": sub_byte(f"uint{bits}", integers(0, 2**bits, 6, 4)), "lut": normal(2, 1, 2**bits, 1)})
      for bits in (1, 2, 3, 4, 6)),
    ("iOS18", "constexpr_lut_to_dense",  # int8 tables
     {"indices": sub_byte("uint4", integers(0, 16, 6, 4)), "lut": integers(-128, 128, 3, 2, 16, 1, dtype=np.int8)}),
    ("iOS18", "constexpr_lut_to_dense",  # a table for each of many small groups
     {"indices": integers(0, 256, 64, 24, 1, 1), "lut": normal(16, 24, 1, 1, 256, 1).astype(np.float32)}),
    *(("iOS18", "constexpr_lut_to_dense",
       {"indices": sub_byte("uint2", integers(0, 4, 6, 4)), "vector_axis": np.int32(axis),
        "lut": normal(*groups, 4, 3)})
      for axis, groups in ((0, (1, 1)), (1, (3, 1)), (1, (1, 1)), (-2, (3, 2)))),
]  # fmt: skip


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


def sparse_palette(vector: int, bits: int = 4) -> Any:
    """Non-zero values from a palette, one or several at a time."""
    nonzero = sub_byte(f"uint{bits}", np.arange(COUNT) * 7 % 2**bits)
    lut = np.resize(VECTORS, (3, 1, 2**bits, 2))[..., :vector]
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
    **{f"sparse_palette_{bits}": functools.partial(sparse_palette, 1 + bits % 2, bits) for bits in (1, 2, 3, 6, 8)},
    "sparse_quantized": lambda: sparse_quantized(False),
    "sparse_quantized_with_offset": lambda: sparse_quantized(True),
    "sparse_palette_with_scale": sparse_palette_with_scale,
}


def built(case: tuple[str, str, dict[str, Any]] | str) -> tuple[Any, np.ndarray]:
    """A case's variable, and its values as coremltools decompresses them. An operand that it evaluates only when it is
    a constant comes with its values as (variable, values)."""
    result = CHAINS[case]() if isinstance(case, str) else getattr(packages.mb, case[1])(**case[2])
    return result if isinstance(result, tuple) else (result, result.op.materialized_val_inference())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[np.ndarray]]]:
    """`saved(target)`: all cases and chains of a target in one package, and what coremltools decompresses them to."""

    @functools.cache
    def save(target: str) -> tuple[Path, list[np.ndarray]]:
        expected: list[np.ndarray] = []

        def program(x: Any) -> Any:
            outputs = [packages.mb.relu(x=x)]
            for case in OF_TARGET[target]:
                variable, values = built(case)
                if values.dtype.kind in "iu":
                    variable = packages.mb.cast(x=variable, dtype="fp16")
                outputs.append(packages.mb.identity(x=variable, name=f"o{len(expected)}"))
                expected.append(values)
            return tuple(outputs)

        path = tmp_path_factory.mktemp("constexpr") / "p.mlpackage"
        packages.save_program(path, program, {"x": np.zeros(1, np.float16)}, target)
        return path, expected

    return save


OF_TARGET: dict[str, list[Any]] = {
    target: [case for case in CASES if case[0] == target] + [*CHAINS] * (target == "iOS18")
    for target in ("iOS16", "iOS18")
}


@pytest.mark.parametrize("chunk", [1 << 20, 9])
@pytest.mark.parametrize("target", OF_TARGET)
def test_decompressed_bit_for_bit(
    target: str, chunk: int, saved: Callable[[str], tuple[Path, list[np.ndarray]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once and, as large weights are looked up, in pieces that end inside groups and vectors."""
    monkeypatch.setattr(constexpr, "_CHUNK", chunk)
    path, expected = saved(target)
    outputs = mil.load(path).predict({"x": np.zeros(1, np.float16)})
    made = [operation.type for operation in mil.read_package(path).functions["main"].block.operations]
    assert sum(type.startswith("constexpr_") for type in made) >= len(expected)  # not folded by coremltools
    for number, (case, values) in enumerate(zip(OF_TARGET[target], expected, strict=True)):
        np.testing.assert_array_equal(outputs[f"o{number}"], values, err_msg=str(case))
        assert not np.array_equal(outputs[f"o{number}"], np.roll(values, 1)), case


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
