"""weight.bin, memory-mapped: coremltools' MILBlob storage (`mlmodel/src/MILBlob/Blob/StorageFormat.hpp`).

A 64-byte header (uint32 count, uint32 version = 2), then for each blob 64 bytes of metadata (uint32 sentinel, uint32
type, uint64 size in bytes, uint64 data offset, uint64 unused bits at the end) and its data, both 64-byte aligned.
Little-endian throughout.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .program import BlobRef, Block, Constant, MILError, Program, TensorType
from .types import HELD, SUB_BYTE

if TYPE_CHECKING:
    import torch

SENTINEL = 0xDEADBEEF
VERSION = 2
ALIGNMENT = 64
RESIDENT = 16 << 20  # bytes of a file that stay mapped in memory while it is read through

# BlobDataType.hpp
_TYPES = {
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 5: "bf16", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1",
    10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32", 16: "fp8e4m3fn", 17: "fp8e5m2",
}  # fmt: skip


def unpack(packed: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """`count` values narrower than a byte, packed from the least significant bit, as one int8/uint8 each.

    Raises ValueError unless `packed` has exactly the bytes that these take.
    """
    bits = SUB_BYTE[dtype]
    if packed.size != -(-count * bits // 8):
        raise ValueError(f"{packed.size} bytes for {count} values of {bits} bits")
    # The pattern of values in bytes repeats: a column of the result is a shift of one or two columns of the bytes.
    period = math.lcm(bits, 8)
    rows = -(-count * bits // period)
    columns = packed
    if packed.size != rows * period // 8:
        columns = np.zeros(rows * period // 8, np.uint8)
        columns[: packed.size] = packed
    columns = columns.reshape(rows, period // 8)
    values = np.empty((rows, period // bits), np.uint8)
    for place in range(period // bits):
        byte, shift = divmod(place * bits, 8)
        value = columns[:, byte] >> np.uint8(shift)
        if shift + bits > 8:
            value |= columns[:, byte + 1] << np.uint8(8 - shift)
        np.bitwise_and(value, np.uint8(2**bits - 1), out=values[:, place])
    unpacked = values.reshape(-1)[:count]
    if dtype != "int4":
        return unpacked
    unpacked ^= 8  # two's complement: the sign bit counts minus, not plus, its value
    signed = unpacked.view(np.int8)
    signed -= 8
    return signed


def stored_tensors(program: Program) -> Iterator[tuple[str, Constant, np.ndarray]]:
    """Yield every tensor that the program refers to in a weight file: its operation's name, the reference, its bytes.

    Raises MILError for one that isn't there, or isn't whole.
    """
    files: dict[Path, WeightFile] = {}
    for function in program.functions.values():
        for name, constant in _constants(function.block):
            if isinstance(constant.data, BlobRef):
                path = constant.data.file
                file = files[path] = files.get(path) or WeightFile(path)
                yield name, constant, file.raw(constant.data.offset, constant.type)


def _constants(block: Block) -> Iterator[tuple[str, Constant]]:
    """Yield each constant with the name of its operation."""
    for operation in block.operations:
        given = (*operation.attributes.values(), *(item for items in operation.inputs.values() for item in items))
        yield from ((operation.name, item) for item in given if isinstance(item, Constant))
        for inner in operation.blocks:
            yield from _constants(inner)


class WeightFile:
    """One weight file. Nothing is read before `read`, and byte-sized types are views of the mapping."""

    def __init__(self, path: Path) -> None:
        """Map the file and check its header; MILError if it is missing, truncated or another format."""
        self.path = path
        try:
            size = path.stat().st_size
            if size < ALIGNMENT:
                raise MILError(f"{path}: truncated weight file: {size} bytes, expected a header of {ALIGNMENT}")
            with path.open("rb") as file:
                # Copy-on-write, so that torch gets a writable buffer and the file stays as it is.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise MILError(f"{path}: cannot read the weight file: {error.strerror or error}") from None
        self._read = 0
        _, version = struct.unpack_from("<II", self._map)
        if version != VERSION:
            raise MILError(f"{path}: weight file version {version}, expected {VERSION}; the file is corrupted")

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.frombuffer(self._map, dtype=np.uint8)

    def read(self, offset: int, type: TensorType) -> torch.Tensor:
        """The blob whose metadata is at `offset`, in its storage type (sub-byte values one byte each); see `raw`."""
        raw, shape = self.raw(offset, type), static_shape(type, str(self.path))
        if type.dtype in SUB_BYTE:
            return _tensor(unpack(raw, type.dtype, math.prod(shape)), type).reshape(shape)
        return _tensor(raw.view(HELD[type.dtype]), type).reshape(shape)

    def raw(self, offset: int, type: TensorType) -> np.ndarray:
        """The bytes of the blob whose metadata is at `offset`.

        Raises MILError when the metadata or the data is out of range or contradicts `type`.
        """
        where = f"{self.path}: blob at offset {offset}"
        if offset % ALIGNMENT or offset < ALIGNMENT or offset + ALIGNMENT > len(self._map):
            raise MILError(f"{where}: out of range or not {ALIGNMENT}-byte aligned (the file has {len(self._map)})")
        sentinel, code, size, start, padding = struct.unpack_from("<IIQQQ", self._map, offset)
        if sentinel != SENTINEL:
            raise MILError(f"{where}: metadata sentinel {sentinel:#x}, expected {SENTINEL:#x}; the file is corrupted")
        if _TYPES.get(code) != type.dtype:
            raise MILError(f"{where}: stored as {_TYPES.get(code, f'type {code}')}, the program says {type.dtype}")
        if start % ALIGNMENT or start < offset + ALIGNMENT or start + size > len(self._map):
            raise MILError(f"{where}: {size} bytes at {start} are not in the file of {len(self._map)} bytes")
        shape = static_shape(type, where)
        count = math.prod(shape)
        bits = SUB_BYTE.get(type.dtype)
        if bits is None:
            expected = count * np.dtype(HELD[type.dtype]).itemsize
        else:
            expected = -(-count * bits // 8)
            # Writers before iOS 18 left this field uninitialized, but had no sub-byte types.
            if padding != expected * 8 - count * bits:
                raise MILError(f"{where}: {padding} unused bits, expected {expected * 8 - count * bits} for {type}")
        if size != expected:
            raise MILError(f"{where}: {size} bytes, expected {expected} for {type}")
        self._let_go(size)
        return self._bytes[start : start + size]

    def _let_go(self, size: int) -> None:
        """Before more is read, have Linux take back the memory of what was, which is still on the disk: weights that
        are converted would be held twice. Nothing is ever written to the mapping, which would be lost."""
        self._read += size
        if self._read > RESIDENT and sys.platform == "linux":
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0


def immediate(constant: Constant) -> torch.Tensor | str | tuple[str, ...]:
    """The value of a constant that is in the program itself."""
    assert not isinstance(constant.data, BlobRef)
    return _tensor(constant.data, constant.type) if isinstance(constant.data, np.ndarray) else constant.data


def _tensor(array: np.ndarray, type: TensorType) -> torch.Tensor:
    """The array as a tensor of its MIL type, of the same memory."""
    import torch

    from .dtypes import STORAGE

    return torch.from_numpy(array).view(STORAGE[type.dtype])


def static_shape(type: TensorType, where: str) -> tuple[int, ...]:
    """The shape of a constant, which has no unknown size."""
    if None in type.shape:
        raise MILError(f"{where}: a constant of unknown shape {type}")
    return tuple(size for size in type.shape if size is not None)
