"""Core ML ML programs in PyTorch: `load(path).predict({"images": array})` runs a saved .mlpackage on any machine.

It proves what the saved program computes; it is not the Neural Engine's arithmetic.
"""

from typing import TYPE_CHECKING, Any

from .program import Function, MILError, Operation, Program, TensorType
from .reader import read_package

if TYPE_CHECKING:
    from .executor import MILExecutor, load

__all__ = ["Function", "MILError", "MILExecutor", "Operation", "Program", "TensorType", "load", "read_package"]


def __getattr__(name: str) -> Any:
    """The executor, with which PyTorch comes; reading a package needs neither."""
    if name not in ("MILExecutor", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import executor

    return getattr(executor, name)
