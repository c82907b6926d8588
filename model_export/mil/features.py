"""Between a caller's values and a program's: arrays, pictures, states and a classifier's outputs, as Core ML has them.

A picture is what `coremltools.models.MLModel` takes and returns, a PIL image; its scale and bias are operations of the
program, which sees numbers from 0 to 255 in the order of colours that the description says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .dtypes import STORAGE, Policy
from .program import (
    DictionaryType,
    Feature,
    Function,
    InputNameError,
    InputTypeError,
    MILError,
    NamedType,
    StateType,
    TensorType,
)
from .registry import StateCell
from .types import FLOATS, NUMPY

if TYPE_CHECKING:
    from PIL.Image import Image

# PIL's modes.
_MODES = {"RGB": "RGB", "BGR": "RGB", "GRAYSCALE": "L", "GRAYSCALE_FLOAT16": "F"}
_LABELS = {"stringType": "string", "int64Type": "int64"}


class State:
    """The states of one sequence of predictions, as `make_state` returns them; all zero at first."""

    def __init__(self, types: Mapping[str, TensorType], policy: Policy) -> None:
        self.types, self._policy = dict(types), policy
        self.cells = {
            name: StateCell(torch.zeros([size or 0 for size in type.shape], dtype=policy.holds(type.dtype)))
            for name, type in types.items()
        }

    def read_state(self, name: str) -> np.ndarray:
        """A state's value, of its declared type. Raises MILError for one that there isn't."""
        return as_array(self._cell(name).tensor, self.types[name])

    def write_state(self, name: str, value: np.ndarray) -> None:
        """Set a state to an array of its shape. Raises MILError for another shape, or a state that there isn't."""
        cell, type = self._cell(name), self.types[name]
        array = _numbers(f"state {name!r}", value, type)
        if not type.accepts(array.shape):
            raise MILError(f"state {name!r}: shape {list(array.shape)}, expected {type}")
        cell.tensor, cell.owned = _tensor(array).to(self._policy.holds(type.dtype)), True

    def _cell(self, name: str) -> StateCell:
        if name not in self.cells:
            raise MILError(f"no state {name!r}, expected one of {sorted(self.cells)}")
        return self.cells[name]


class Interface:
    """A function's inputs and outputs as a caller sees them, checked against the program."""

    def __init__(self, path: Path, function: Function, outputs: Mapping[str, NamedType]) -> None:
        """Raises MILError for a description that contradicts the program; `outputs`: what the program returns."""
        self.path = path
        self.inputs = {item.name: item.type for item in function.inputs if item.type is not None}
        self.states = {item.name: item.other.tensor for item in function.inputs if isinstance(item.other, StateType)}
        self.outputs = {name: item.type for name, item in outputs.items() if item.type is not None}
        self.input_features = _all(function.described_inputs, function.input_features)
        self.output_features = _all(function.described_outputs, function.output_features)
        if other := [item.name for item in function.inputs if item.name not in {*self.inputs, *self.states}]:
            raise MILError(
                f"{path}: function {function.name!r} has inputs that are neither tensors nor states: {other}"
            )
        for name, type in self.states.items():
            if None in type.shape or type.dtype not in NUMPY:
                raise MILError(f"{path}: state {name!r} is {type}, expected a type of NumPy and known sizes")
        states = {name: item for name, item in function.state_features.items() if item.type is not None}
        given = {item.name: item for item in function.inputs}
        _compare(path, "state", states, {name: given[name] for name in self.states})
        _compare(path, "input", self.input_features, {name: given[name] for name in self.inputs})
        _compare(path, "output", self.output_features, outputs)

    def tensors(self, data: Mapping[str, Any], policy: Policy) -> dict[str, torch.Tensor]:
        """What the program's inputs hold for a caller's values; MILError for other names, kinds, types or shapes."""
        unknown = set(data) - set(self.inputs)
        if unknown or any(name not in data and self.input_features[name].default is None for name in self.inputs):
            kind = InputNameError if unknown else MILError
            raise kind(f"inputs named {sorted(map(str, data))}, expected {sorted(self.inputs)}")
        tensors = {}
        array: np.ndarray
        for name, type in self.inputs.items():
            feature = self.input_features[name]
            if name not in data:
                array = np.full(feature.shape, feature.default, NUMPY[type.dtype])
            elif feature.kind == "imageType":
                array = _pixels(feature, data[name], type)
            else:
                array = _numbers(f"input {name!r}", data[name], type)
            if not type.accepts(array.shape) or not feature.accepts(array.shape):
                got, expected = ", ".join(map(str, array.shape)), feature.shown_shape if feature.type else type
                raise MILError(f"input {name!r}: {array.dtype}[{got}], expected {type.dtype}{expected}")
            tensors[name] = _tensor(array).to(policy.holds(type.dtype))
        return tensors

    def cells(self, state: State | None) -> dict[str, StateCell]:
        """The states for a prediction; MILError for none, or another function's."""
        if state is None and self.states:  # Core ML's words
            raise MILError(f"The input feature for {next(iter(self.states))} must be an MLState, but it was not found.")
        if state is not None and (not isinstance(state, State) or state.types != self.states):
            raise MILError(f"state: not one that this function's make_state() returned, expected {sorted(self.states)}")
        return state.cells if state else {}

    def results(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The caller's values of the program's outputs."""
        results: dict[str, Any] = {}
        for name, feature in self.output_features.items():
            value, type = values[name], self.outputs.get(name)
            if feature.kind == "imageType":
                results[name] = _picture(value, feature)
            elif feature.kind == "int64Type":
                results[name] = int(value)
            else:
                results[name] = as_array(value, type) if type and isinstance(value, torch.Tensor) else value
        return results


def as_array(tensor: torch.Tensor, type: TensorType) -> np.ndarray:
    """An array of its own: the tensor may be a constant, an input or part of a larger one."""
    array: np.ndarray = tensor.to(STORAGE[type.dtype]).contiguous().numpy().copy()
    return array


def _all(arrays: Mapping[str, TensorType], features: Mapping[str, Feature]) -> dict[str, Feature]:
    """The features by name: the arrays as described, with what else is known of them, and the rest."""
    found = {name: features.get(name) or Feature(name, "multiArrayType", type) for name, type in arrays.items()}
    rest = {name: item for name, item in features.items() if item.kind != "multiArrayType"}
    return {name: _with_type(item, arrays.get(name)) for name, item in (found | rest).items()}


def _with_type(feature: Feature, type: TensorType | None) -> Feature:
    return replace(feature, type=type) if type is not None else feature


def _compare(path: Path, kind: str, described: Mapping[str, Feature], actual: Mapping[str, NamedType]) -> None:
    """The model description and the program must agree on names, kinds, element types and, where both know them,
    shapes."""
    if set(described) != set(actual):
        raise MILError(f"{path}: the description has {kind}s {sorted(described)}, the program {sorted(actual)}")
    for name, item in actual.items():
        feature = described[name]
        type = item.other.tensor if isinstance(item.other, StateType) else item.type
        if not _agree(feature, type, item):
            promised = feature.type if feature.type is not None else feature.kind
            raise MILError(f"{path}: {kind} {name!r} is described as {promised}, the program has {type or item.other}")
        if feature.kind == "multiArrayType" and type is not None and type.dtype not in NUMPY:
            raise MILError(f"{path}: {kind} {name!r} has type {type}, which NumPy does not have")


def _agree(feature: Feature, type: TensorType | None, item: NamedType) -> bool:
    if feature.kind == "dictionaryType":
        return isinstance(item.other, DictionaryType)
    if type is None or feature.kind in _LABELS:
        return type is not None and type.dtype == _LABELS.get(feature.kind)
    if feature.type is None:
        return False
    promised = feature.type.shape
    sizes = len(promised) == len(type.shape) and all(a == b for a, b in zip(promised, type.shape) if None not in (a, b))
    if feature.kind == "imageType":
        return sizes and type.dtype in ("fp16", "fp32")
    known = None not in type.shape and None not in promised and promised
    return feature.type.dtype == type.dtype and (sizes or not known)


def _numbers(where: str, given: Any, type: TensorType) -> np.ndarray:
    """An array of the type's, from whatever holds numbers; as in Core ML, any numbers that it can hold."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    try:
        array = np.asarray(given)
    except ValueError as error:  # lists of different lengths
        raise InputTypeError(f"{where}: {given.__class__.__name__} is no array ({error})") from None
    wanted = np.dtype(NUMPY[type.dtype])
    if array.dtype.kind not in "biuf":
        raise InputTypeError(f"{where}: {given.__class__.__name__} of {array.dtype}, expected numbers ({wanted})")
    if array.dtype == wanted or type.dtype in FLOATS or wanted.kind == "b":
        with np.errstate(over="ignore"):  # infinite, as in the program
            return array.astype(wanted)
    limits: Any = np.iinfo(wanted)
    whole = array.dtype.kind != "f" or bool(np.all(array == np.trunc(array)))
    if not whole or (array.size and not (limits.min <= array.min() and array.max() <= limits.max)):
        raise MILError(f"{where}: {array.dtype} with numbers that {wanted} does not have")
    return array.astype(wanted)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, order="C"))  # a copy: negative strides and read-only arrays are unknown


def _pixels(feature: Feature, given: Any, type: TensorType) -> np.ndarray:
    """A PIL image as [1, channels, height, width]."""
    from PIL import Image

    mode = _MODES[feature.color]
    if not isinstance(given, Image.Image) or given.mode != mode:
        got = f"a picture of mode {given.mode!r}" if isinstance(given, Image.Image) else given.__class__.__name__
        raise InputTypeError(f"input {feature.name!r}: {got}, expected a PIL.Image.Image with mode=={mode!r}")
    array = np.asarray(given)
    array = array.transpose(2, 0, 1)[None] if array.ndim == 3 else array[None, None]
    if feature.color == "GRAYSCALE_FLOAT16":
        with np.errstate(over="ignore"):
            array = array.astype(np.float16)
    return (array[:, ::-1] if feature.color == "BGR" else array).astype(NUMPY[type.dtype])


def _picture(tensor: torch.Tensor, feature: Feature) -> Image:
    """A PIL image of a tensor [1, channels, height, width]: bytes are the nearest ones, from 0 to 255; in colour it is
    RGBA and opaque, which is what coremltools makes of Core ML's pixels."""
    from PIL import Image

    values = tensor[0].float().numpy()
    if feature.color == "GRAYSCALE_FLOAT16":
        return Image.fromarray(values[0].astype(np.float16).astype(np.float32))
    content = np.rint(np.clip(np.nan_to_num(values, nan=0.0), 0, 255)).astype(np.uint8)
    if len(content) == 1:
        return Image.fromarray(content[0])
    colors = content[::-1] if feature.color == "BGR" else content
    opaque = np.full_like(content[:1], 255)
    return Image.fromarray(np.ascontiguousarray(np.concatenate([colors, opaque]).transpose(1, 2, 0)))
