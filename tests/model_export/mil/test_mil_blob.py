"""weight.bin: what coremltools' own writer wrote comes back bit for bit, and nothing damaged does."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coremltools.libmilstoragepython import _BlobStorageWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from model_export.mil.blob import WeightFile, unpack
from model_export.mil.program import MILError, TensorType

# MIL name -> (the writer's method, the NumPy type it takes, smallest and largest value)
WRITERS: dict[str, tuple[str, Any, int, int]] = {
    "fp32": ("float", np.float32, -1000, 1000),
    "fp16": ("fp16", np.uint16, 0, 0x7BFF),
    "int8": ("int8", np.int8, -128, 127),
    "uint8": ("uint8", np.uint8, 0, 255),
    "int16": ("int16", np.int16, -(2**15), 2**15 - 1),
    "uint16": ("uint16", np.uint16, 0, 2**16 - 1),
    "int32": ("int32", np.int32, -(2**31), 2**31 - 1),
    "uint32": ("uint32", np.uint32, 0, 2**32 - 1),
    "int4": ("int4", np.int8, -8, 7),
    "uint1": ("uint1", np.uint8, 0, 1),
    "uint2": ("uint2", np.uint8, 0, 3),
    "uint3": ("uint3", np.uint8, 0, 7),
    "uint4": ("uint4", np.uint8, 0, 15),
    "uint6": ("uint6", np.uint8, 0, 63),
}


def write(path: Path, blobs: list[tuple[str, np.ndarray]]) -> list[int]:
    writer = _BlobStorageWriter(str(path))
    return [getattr(writer, f"write_{WRITERS[dtype][0]}_data")(values) for dtype, values in blobs]


@st.composite
def blob_lists(draw: st.DrawFn) -> list[tuple[str, np.ndarray]]:
    blobs = []
    for _ in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from(sorted(WRITERS)))
        _, numpy_type, low, high = WRITERS[dtype]
        size, seed = draw(st.integers(1, 300)), draw(st.integers(0, 2**32 - 1))
        values = np.random.default_rng(seed).integers(low, high, size, dtype=np.int64, endpoint=True)
        blobs.append((dtype, values.astype(numpy_type)))
    return blobs


@settings(max_examples=60)
@given(blob_lists())
def test_reads_what_coremltools_writes(tmp_path_factory: pytest.TempPathFactory, blobs: list) -> None:
    path = tmp_path_factory.mktemp("blob") / "weight.bin"
    offsets = write(path, blobs)
    file = WeightFile(path)
    for offset, (dtype, values) in zip(offsets, blobs):
        got = file.read(offset, TensorType(dtype, (len(values),))).numpy()
        np.testing.assert_array_equal(got.view(np.uint16) if dtype == "fp16" else got, values)
        with pytest.raises(MILError, match="expected"):
            file.read(offset, TensorType(dtype, (len(values) + 9,)))
        with pytest.raises(MILError, match="the program says"):
            file.read(offset, TensorType("bf16", (len(values),)))


@pytest.fixture
def weight_file(tmp_path: Path) -> Path:
    path = tmp_path / "weight.bin"
    assert write(path, [("fp32", np.arange(40, dtype=np.float32)), ("uint3", np.arange(5, dtype=np.uint8))]) == [
        64,
        320,
    ]
    return path


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (4, struct.pack("<I", 1), "version 1"),
        (64, b"\0", "sentinel 0xdeadbe00, expected 0xdeadbeef"),
        (68, struct.pack("<I", 99), "stored as type 99"),
        (72, struct.pack("<Q", 156), "156 bytes, expected 160"),
        (72, struct.pack("<Q", 2**40), "not in the file"),
        (80, struct.pack("<Q", 2**40), "not in the file"),
        (80, struct.pack("<Q", 129), "not in the file"),
        (80, struct.pack("<Q", 0), "not in the file"),
    ],
)
def test_damaged_metadata_is_refused(weight_file: Path, position: int, value: bytes, message: str) -> None:
    content = bytearray(weight_file.read_bytes())
    content[position : position + len(value)] = value
    weight_file.write_bytes(content)
    with pytest.raises(MILError, match=message) as caught:
        WeightFile(weight_file).read(64, TensorType("fp32", (40,)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offset", [0, 65, 128, 384, 2**40])
def test_an_offset_that_is_no_blob_is_refused(weight_file: Path, offset: int) -> None:
    with pytest.raises(MILError, match=r"out of range|sentinel"):
        WeightFile(weight_file).read(offset, TensorType("fp32", (40,)))


def test_wrong_padding_and_a_truncated_header_are_refused(weight_file: Path) -> None:
    content = bytearray(weight_file.read_bytes())
    assert WeightFile(weight_file).read(320, TensorType("uint3", (5,))).tolist() == [0, 1, 2, 3, 4]
    content[320 + 24] = 7
    weight_file.write_bytes(content)
    with pytest.raises(MILError, match="7 unused bits, expected 1"):
        WeightFile(weight_file).read(320, TensorType("uint3", (5,)))
    for size in (63, 0):
        weight_file.write_bytes(content[:size])
        with pytest.raises(MILError, match="truncated"):
            WeightFile(weight_file)


def test_the_file_is_never_written(weight_file: Path) -> None:
    before = weight_file.read_bytes()
    tensor = WeightFile(weight_file).read(64, TensorType("fp32", (40,)))
    tensor.zero_()
    assert weight_file.read_bytes() == before


@pytest.mark.parametrize("count", [4, 9, 17])
def test_packed_values_of_another_count_are_refused(count: int) -> None:
    packed = np.arange(6, dtype=np.uint8)
    assert len(unpack(packed, "uint3", 16)) == 16
    with pytest.raises(ValueError, match="6 bytes for"):
        unpack(packed, "uint3", count)
