"""Loops over values that numba compiles at their first call, in one to five seconds, and keeps for later processes.

numba makes the code of a kernel anew only when the kernel's own file has changed: all that it calls has to be there.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

# A function that kernels call becomes part of them. Division by zero gives infinity, as everywhere in floating point.
part = njit(nogil=True, error_model="numpy")


def kernel(function: Callable[..., Any]) -> Any:
    """A kernel, its code kept beside its file, else in the user's cache, else (no folder can be written) nowhere."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        return part(function)
