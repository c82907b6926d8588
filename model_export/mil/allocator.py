"""Keeping freed buffers for the next operation instead of giving them back to the system.

glibc returns every large buffer to the kernel when it is freed, so each operation's output is faulted in page by page
again: a third of the encoder's time at 1024 x 1024. While a program runs, large blocks come from the heap and the heap
is not trimmed. The thresholds are of the whole process; on exit they get the values that glibc's own adjustment
converges to (mmap 32 MiB, trim 64 MiB; malloc's `M_MMAP_THRESHOLD` in mallopt(3)).
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_DEFAULTS = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}


@cache
def _libc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextmanager
def kept_buffers() -> Iterator[None]:
    """On glibc, keep freed memory for reuse inside the block; elsewhere do nothing."""
    with _settings({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}):
        yield


@contextmanager
def returned_buffers(least: int = 1 << 18) -> Iterator[None]:
    """On glibc, give freed buffers of at least so many bytes back at once inside the block, so that what weights are
    made from doesn't stay beside them, and small ones that last don't split what large ones were in; elsewhere do
    nothing."""
    with _settings({_M_MMAP_THRESHOLD: least}):
        give_back()
        yield


def give_back() -> None:
    """On glibc, return freed memory to the system; elsewhere do nothing."""
    if libc := _libc():
        libc.malloc_trim(0)


@contextmanager
def _settings(values: dict[int, int]) -> Iterator[None]:
    libc = _libc()
    if libc is None:
        yield
        return
    for parameter, value in values.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _DEFAULTS.items():
            libc.mallopt(parameter, value)
        give_back()
