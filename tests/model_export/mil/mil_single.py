"""One operation run alone, without coremltools: any element type, any shape, any opset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model_export.mil.executor import MILExecutor
from model_export.mil.program import Block, Constant, Function, NamedType, Operation, Program, TensorType
from model_export.mil.types import NUMPY

NAMES = {np.dtype(kind): name for name, kind in NUMPY.items()}
LISTS = {"values", "ref_tensors"}
OPSETS = {"iOS15": "CoreML5", "iOS16": "CoreML6", "iOS17": "CoreML7", "iOS18": "CoreML8"}


def constant(value: Any) -> Constant:
    """A parameter: text, or an array; a Python float as fp32, other numbers as int32 or bool."""
    if isinstance(value, str):
        return Constant(TensorType("string", ()), value)
    array = np.asarray(value)
    if not isinstance(value, (np.ndarray, np.generic)) and array.dtype != np.bool_:
        array = array.astype(np.float32 if array.dtype.kind == "f" and array.size else np.int32)
    return Constant(type_of(array), array.copy())


def type_of(array: np.ndarray, known: bool = True) -> TensorType:
    """The array's type; `known`: with its sizes, not only their number."""
    return TensorType(NAMES[array.dtype], array.shape if known else (None,) * array.ndim)


def single(
    op: str,
    target: str,
    inputs: Mapping[str, np.ndarray],
    parameters: Mapping[str, Any],
    outputs: Sequence[TensorType],
    compute: str = "as-typed",
) -> MILExecutor:
    """A program of one operation; a parameter in a tuple has several values, names of inputs if it is one of LISTS."""
    bound: dict[str, tuple[Any, ...]] = {}
    for key, value in parameters.items():
        items = value if isinstance(value, tuple) else (value,)
        bound[key] = tuple(item if key in LISTS and isinstance(item, str) else constant(item) for item in items)
    listed = {name for key in LISTS & bound.keys() for name in bound[key] if isinstance(name, str)}
    bound.update({name: (name,) for name in inputs if name not in listed})
    names = [f"o{place}" for place in range(len(outputs))]
    operation = Operation(op, op, bound, tuple(map(NamedType, names, outputs)), {})
    given = {name: type_of(array) for name, array in inputs.items()}
    function = Function("main", OPSETS[target], tuple(map(NamedType, given, given.values())),
                        Block((), tuple(names), (operation,)), given, dict(zip(names, outputs)))  # fmt: skip
    return MILExecutor(Program(Path("made.mlpackage"), 8, {"main": function}, "main"), compute)


def run(
    op: str, target: str, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, Any], wanted: Sequence[np.ndarray],
    compute: str = "as-typed", known: bool = True,
) -> list[np.ndarray]:  # fmt: skip
    """What one operation gives; `wanted` has the types that the program declares, with their sizes if `known`."""
    model = single(op, target, inputs, parameters, [type_of(array, known) for array in wanted], compute)
    return list(model.predict(inputs).values())
