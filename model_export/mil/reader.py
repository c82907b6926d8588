"""A saved .mlpackage to a Program: its specification, translated, and the paths of its weight files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .blob import static_shape, unpack
from .package import inside, read_specification
from .program import (
    Binding,
    BlobRef,
    Block,
    Constant,
    DictionaryType,
    Feature,
    Function,
    ListType,
    MILError,
    NamedType,
    Operation,
    OtherType,
    Program,
    StateType,
    TensorType,
    reason,
)
from .types import HELD, NAMES, SUB_BYTE

_MODEL_PATH = "@model_path/"
# FeatureTypes.proto, ArrayFeatureType.ArrayDataType
_ARRAY_TYPES = {65552: "fp16", 65568: "fp32", 65600: "fp64", 131104: "int32", 131080: "int8"}
# FeatureTypes.proto, ImageFeatureType.ColorSpace: name, element type and channels
_COLORS = {
    10: ("GRAYSCALE", "uint8", 1), 20: ("RGB", "uint8", 3), 30: ("BGR", "uint8", 3),
    40: ("GRAYSCALE_FLOAT16", "fp16", 1),
}  # fmt: skip


def read_package(path: Path | str) -> Program:
    """Read an .mlpackage without preparing it to run.

    Args:
        path: the package's folder.

    Returns:
        The program; its weights stay in the package's files until they are read.

    Raises:
        MILError: the folder is no readable ML program package.
    """
    path = Path(path)
    specification_path, specification = read_specification(path)
    try:
        return _Reader(path, specification_path.parent).program(specification)
    except (MILError, MemoryError):
        raise
    except Exception as error:  # fields that contradict each other, sizes beyond any tensor, blocks in blocks in blocks
        raise MILError(f"{specification_path}: malformed ({reason(error)})") from error


class _Reader:
    """Translates protobuf messages; holds what file names are resolved against."""

    def __init__(self, package: Path, model_folder: Path) -> None:
        self.package = package
        self.model_folder = model_folder

    def program(self, specification: Any) -> Program:
        description = specification.description
        described = {function.name: function for function in description.functions}
        functions = {
            name: self.function(name, message, described.get(name, description))
            for name, message in specification.mlProgram.functions.items()
        }
        if absent := sorted(described.keys() - functions.keys()):
            raise MILError(f"{self.package}: the description has functions {', '.join(absent)}, the program has not")
        default = description.defaultFunctionName or "main"
        metadata = dict(description.metadata.userDefined)
        return Program(self.package, specification.specificationVersion, functions, default, metadata)

    def function(self, name: str, message: Any, description: Any) -> Function:
        if message.opset not in message.block_specializations:
            raise MILError(f"{self.package}: function {name!r} selects opset {message.opset!r}, which it does not hold")
        inputs, outputs, states = (
            {item.name: self.feature(item) for item in items}
            for items in (description.input, description.output, description.state)
        )
        return Function(
            name=name,
            opset=message.opset,
            inputs=tuple(self.named_type(item) for item in message.inputs),
            block=self.block(message.block_specializations[message.opset]),
            described_inputs=_arrays(inputs),
            described_outputs=_arrays(outputs),
            other_features={
                item.name: item.kind for item in (*inputs.values(), *outputs.values()) if item.kind != "multiArrayType"
            },
            input_features=inputs,
            output_features=outputs,
            state_features=states,
            predicted=(description.predictedFeatureName, description.predictedProbabilitiesName),
        )

    def feature(self, message: Any) -> Feature:
        """An input, an output or a state of the model description."""
        kind = message.type.WhichOneof("Type") or "no known type"
        common = {"name": message.name, "kind": kind, "description": message.shortDescription}
        if kind == "imageType":
            return self.image(message.type.imageType, common | {"optional": message.type.isOptional})
        if kind not in ("multiArrayType", "stateType"):
            return Feature(**common)
        array = message.type.multiArrayType if kind == "multiArrayType" else message.type.stateType.arrayType
        if array.dataType not in _ARRAY_TYPES:
            raise MILError(f"{self.package}: {message.name!r} is a multi-array of unknown type {array.dataType}")
        shapes = tuple(tuple(item.shape) for item in array.enumeratedShapes.shapes)
        ranges = tuple(map(_range, array.shapeRange.sizeRanges))
        sizes: tuple[int | None, ...] = tuple(array.shape)
        if shapes or ranges:
            sizes = (None,) * len(array.shape)
        default = array.WhichOneof("defaultOptionalValue")
        return Feature(
            **common,
            type=TensorType(_ARRAY_TYPES[array.dataType], sizes),
            shape=tuple(array.shape),
            ranges=ranges,
            shapes=shapes,
            optional=message.type.isOptional,
            default=getattr(array, default) if default else None,
        )

    def image(self, message: Any, common: dict[str, Any]) -> Feature:
        if message.colorSpace not in _COLORS:
            raise MILError(f"{self.package}: {common['name']!r} is a picture of unknown colours {message.colorSpace}")
        color, dtype, channels = _COLORS[message.colorSpace]
        shapes = tuple((1, channels, item.height, item.width) for item in message.enumeratedSizes.sizes)
        ranges: tuple[tuple[int, int | None], ...] = ()
        if message.WhichOneof("SizeFlexibility") == "imageSizeRange":
            sides = (message.imageSizeRange.heightRange, message.imageSizeRange.widthRange)
            ranges = ((1, 1), (channels, channels), *map(_range, sides))
        side = (None, None) if shapes or ranges else (message.height, message.width)
        shape = (1, channels, message.height, message.width)
        type = TensorType(dtype, (1, channels, *side))
        return Feature(**common, type=type, shape=shape, ranges=ranges, shapes=shapes, color=color)

    def block(self, message: Any) -> Block:
        return Block(
            inputs=tuple(self.named_type(item) for item in message.inputs),
            outputs=tuple(message.outputs),
            operations=tuple(self.operation(item) for item in message.operations),
        )

    def operation(self, message: Any) -> Operation:
        attributes = {
            key: self.constant(value)
            for key, value in message.attributes.items()
            if value.type.WhichOneof("type") == "tensorType"
        }
        name = attributes["name"].data if "name" in attributes else ""
        outputs = tuple(self.named_type(item) for item in message.outputs)
        return Operation(
            type=message.type,
            name=name if isinstance(name, str) and name else (outputs[0].name if outputs else message.type),
            inputs={key: tuple(map(self.binding, value.arguments)) for key, value in message.inputs.items()},
            outputs=outputs,
            attributes=attributes,
            blocks=tuple(self.block(item) for item in message.blocks),
        )

    def binding(self, message: Any) -> Binding:
        return message.name if message.WhichOneof("binding") == "name" else self.constant(message.value)

    def named_type(self, message: Any) -> NamedType:
        return NamedType(message.name, *self.value_type(message.type))

    def value_type(self, message: Any) -> tuple[TensorType | None, OtherType | None]:
        """A value's type as a tensor, or else as something else (nothing for what no operation of an opset makes)."""
        kind = message.WhichOneof("type")
        if kind == "tensorType":
            return self.tensor_type(message.tensorType), None
        if kind == "listType":
            element, _ = self.value_type(message.listType.type)
            return None, ListType(element, _size(message.listType.length)) if element is not None else None
        if kind == "stateType":
            tensor, _ = self.value_type(message.stateType.wrappedType)
            return None, StateType(tensor) if tensor is not None else None
        if kind == "dictionaryType":
            key, _ = self.value_type(message.dictionaryType.keyType)
            value, _ = self.value_type(message.dictionaryType.valueType)
            return None, DictionaryType(key.dtype, value.dtype) if key is not None and value is not None else None
        return None, None

    def tensor_type(self, message: Any) -> TensorType:
        if message.dataType not in NAMES:
            raise MILError(f"{self.package}: unknown MIL data type {message.dataType}")
        dtype = NAMES[message.dataType]
        if message.rank < 0 or any(dimension.unknown.variadic for dimension in message.dimensions):
            return TensorType(dtype, (None,), variadic=True)
        return TensorType(dtype, tuple(map(_size, message.dimensions)))

    def constant(self, message: Any) -> Constant:
        kind = message.type.WhichOneof("type")
        if kind == "listType":
            return self.constant_list(message)
        if kind != "tensorType":
            raise MILError(f"{self.package}: a constant of kind {kind}, expected a tensor or a list")
        type = self.tensor_type(message.type.tensorType)
        if message.WhichOneof("value") != "blobFileValue":
            return Constant(type, self.immediate(type, message.immediateValue.tensor))
        name = message.blobFileValue.fileName
        if not name.startswith(_MODEL_PATH):
            raise MILError(f"{self.package}: weight file {name!r} is not under {_MODEL_PATH}")
        file = inside(self.package, self.model_folder, name.removeprefix(_MODEL_PATH), "the program")
        return Constant(type, BlobRef(file, message.blobFileValue.offset))

    def constant_list(self, message: Any) -> Constant:
        """A list of scalars, such as a classifier's classes, as a vector."""
        items = [self.constant(item) for item in message.immediateValue.list.values]
        dtypes = {item.type.dtype for item in items}
        if len(dtypes) != 1 or any(item.type.shape or isinstance(item.data, BlobRef) for item in items):
            raise MILError(f"{self.package}: a constant list, expected scalars of one type")
        type = TensorType(dtypes.pop(), (len(items),))
        values = [item.data for item in items]
        return Constant(type, tuple(map(str, values)) if type.dtype == "string" else np.array(values, HELD[type.dtype]))

    def immediate(self, type: TensorType, message: Any) -> np.ndarray | str | tuple[str, ...]:
        kind = message.WhichOneof("value")
        values: Any = getattr(message, kind).values if kind else ()
        if type.dtype == "string":
            return str(values[0]) if not type.shape and len(values) == 1 else tuple(values)
        shape = static_shape(type, str(self.package))
        count = math.prod(shape)
        held = np.dtype(HELD[type.dtype])
        if kind == "bytes":  # types without a protobuf field of their own
            expected = -(-count * SUB_BYTE.get(type.dtype, 8 * held.itemsize) // 8)
            if len(values) != expected:
                raise MILError(f"{self.package}: an immediate value of {len(values)} bytes, expected {type}")
            content = np.frombuffer(bytearray(values), np.uint8)
            sub_byte = type.dtype in SUB_BYTE
            return (unpack(content, type.dtype, count) if sub_byte else content.view(held)).reshape(shape)
        try:
            array = np.array(list(values), held)
        except (ValueError, OverflowError, TypeError):
            raise MILError(f"{self.package}: an immediate value is not of type {type}") from None
        if array.size != count:
            raise MILError(f"{self.package}: an immediate value holds {array.size} elements, expected {type}")
        return array.reshape(shape)


def _size(dimension: Any) -> int | None:
    return dimension.constant.size if dimension.WhichOneof("dimension") == "constant" else None


def _range(message: Any) -> tuple[int, int | None]:
    """Least and most of a size; a negative upper bound is none."""
    return message.lowerBound, None if message.upperBound < 0 else message.upperBound


def _arrays(features: Mapping[str, Feature]) -> dict[str, TensorType]:
    return {
        name: item.type for name, item in features.items() if item.kind == "multiArrayType" and item.type is not None
    }
