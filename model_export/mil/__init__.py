"""Core ML ML programs in PyTorch: `load(path).predict({"images": array})` runs a saved .mlpackage on any machine.

`install()` gives coremltools' own `MLModel` that. It proves what the saved program computes; it is not the Neural
Engine's arithmetic.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .program import Function, InputNameError, InputTypeError, MILError, Operation, Program, TensorType
from .reader import read_package

if TYPE_CHECKING:
    from .dropin import install
    from .executor import MILExecutor, load
    from .features import State

_LATER = {"MILExecutor": "executor", "load": "executor", "State": "features", "install": "dropin"}
__all__ = [
    "Function", "InputNameError", "InputTypeError", "MILError", "MILExecutor", "Operation", "Program", "State",
    "TensorType", "install", "load", "read_package",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The executor, with which PyTorch comes; reading a package needs neither."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
