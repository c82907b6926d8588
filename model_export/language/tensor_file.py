"""Write a safetensors file in place: header first, then any rows of any tensor, in any order.

The format: 8 bytes of header length, a JSON header, the data (huggingface.co/docs/safetensors). The bytes depend on the
tensors alone, and the memory on the rows handed over, not on the file.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastvlm.common.dtypes import ARRAYS, ITEMSIZE, SAFETENSORS_NAMES, Array, bits_of
from quantization.schemes import Spec, spec_bytes

RowReader = Callable[[int, int], Array]  # (start, stop) -> those rows of a tensor
_NAMES = SAFETENSORS_NAMES | {"uint32": "U32"}


class TensorFile:
    """A context manager over a new file with room for `tensors` (name -> dtype, shape); `made_for`: its "format".

    Raises OSError (disk full, no permission) with the file's name, on entry where the platform can reserve the space,
    else on writing.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Spec], made_for: str = "mlx") -> None:
        self.path, self._specs = path, dict(tensors)
        header: dict[str, object] = {"__metadata__": {"format": made_for}}
        self._starts: dict[str, int] = {}
        position = 0
        # widest type first, so that every tensor is aligned to its own size
        for name in sorted(tensors, key=lambda n: (-ITEMSIZE[tensors[n][0]], n)):
            dtype, shape = tensors[name]
            end = position + spec_bytes(tensors[name])
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            self._starts[name] = position
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._head = len(encoded).to_bytes(8, "little") + encoded
        self.size = len(self._head) + position

    def __enter__(self) -> "TensorFile":
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with self._named_error():
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._fd, 0, self.size)
                else:
                    os.ftruncate(self._fd, self.size)
            self._write(self._head, 0)
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def write(self, name: str, rows: Array, first_row: int = 0) -> None:
        """Write `rows`, which start at `first_row` of the tensor's first dimension. ValueError if they don't belong."""
        dtype, shape = self._specs[name]
        if rows.dtype != ARRAYS.get(dtype, dtype) or rows.shape[1:] != shape[1:] or first_row + len(rows) > shape[0]:
            raise ValueError(f"{name}: rows {rows.dtype} {rows.shape} at {first_row} are not of {dtype} {shape}")
        offset = len(self._head) + self._starts[name] + first_row * math.prod(shape[1:]) * rows.itemsize
        self._write(bits_of(np.ascontiguousarray(rows), np.uint8).data, offset)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        with self._named_error():
            while view:  # a single write may be short, and takes at most 2 GiB
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written

    @contextmanager
    def _named_error(self) -> Iterator[None]:
        """Calls on a descriptor leave the file's name out."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
