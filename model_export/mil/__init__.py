"""Core ML ML programs in PyTorch: `load(path).predict({"images": array})` runs a saved .mlpackage on any machine.

It proves what the saved program computes; it is not the Neural Engine's arithmetic.
"""

from .executor import MILExecutor, load
from .program import Function, MILError, Operation, Program, TensorType
from .reader import read_package

__all__ = ["Function", "MILError", "MILExecutor", "Operation", "Program", "TensorType", "load", "read_package"]
