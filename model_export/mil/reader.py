"""A saved .mlpackage to a Program: its manifest, its specification (protobuf) and the paths of its weight files.

Of coremltools only the generated protobuf classes are used, and they are imported without the package around them
(importing coremltools takes seconds and prints about the libraries it lacks off macOS).
"""

import errno
import importlib
import importlib.util
import json
import math
import os
import stat
import sys
import types
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .blob import static_shape, unpack
from .program import (
    Binding,
    BlobRef,
    Block,
    Constant,
    Function,
    MILError,
    NamedType,
    Operation,
    Program,
    TensorType,
    reason,
)
from .types import HELD, NAMES, SUB_BYTE

_PROTO_PACKAGE = "_model_export_mil_proto"
_MODEL_PATH = "@model_path/"
_LARGEST_MANIFEST, LARGEST_SPECIFICATION = 1 << 20, 256 << 20  # bytes; ours have 1 kB and 1 MB
# FeatureTypes.proto, ArrayFeatureType.ArrayDataType
_ARRAY_TYPES = {65552: "fp16", 65568: "fp32", 65600: "fp64", 131104: "int32", 131080: "int8"}


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
    specification_path = _specification_path(path)
    try:
        content = _plain_bytes(specification_path, LARGEST_SPECIFICATION)
    except OSError as error:
        raise MILError(f"{specification_path}: cannot read the model specification: {error.strerror}") from None
    specification = _message_class()()
    try:
        specification.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError; its module differs between protobuf versions
        raise MILError(f"{specification_path}: not a Core ML specification, or truncated ({error})") from None
    kind = specification.WhichOneof("Type")
    if kind != "mlProgram":
        raise MILError(f"{path}: the model is a {kind or 'model of no known type'}, expected an mlProgram")
    try:
        return _Reader(path, specification_path.parent).program(specification)
    except (MILError, MemoryError):
        raise
    except Exception as error:  # fields that contradict each other, sizes beyond any tensor, blocks in blocks in blocks
        raise MILError(f"{specification_path}: malformed ({reason(error)})") from error


def _specification_path(path: Path) -> Path:
    if path.suffix == ".mlmodelc" or (path / "coremldata.bin").exists():
        raise MILError(f"{path}: a compiled model (.mlmodelc); give the .mlpackage that it was compiled from")
    if not path.exists():
        raise MILError(f"{path}: no such package")
    if not path.is_dir():
        raise MILError(f"{path}: not a folder; an .mlpackage is a folder with a Manifest.json")
    manifest_path = path / "Manifest.json"
    try:
        manifest = json.loads(_plain_bytes(manifest_path, _LARGEST_MANIFEST))
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        if not isinstance(root, str):
            raise TypeError("path is not text")
    except FileNotFoundError:
        raise MILError(f"{path}: no Manifest.json; not an .mlpackage") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MILError(f"{manifest_path}: unusable manifest ({type(error).__name__}: {error})") from None
    return _inside(path, path / "Data", root, "Manifest.json")


def _plain_bytes(path: Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes; OSError for another, at once: a pipe would wait."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise OSError(errno.EINVAL, f"expected a plain file of at most {limit} bytes", str(path))
        return file.read(limit)


def _inside(package: Path, base: Path, name: str, source: str) -> Path:
    """`name` under `base`, refused when it leads out of the package (also by a symbolic link)."""
    relative = PurePosixPath(name)
    target = base / relative
    plain = not relative.is_absolute() and ".." not in relative.parts and "\0" not in name
    if not plain or not target.resolve().is_relative_to(package.resolve()):
        raise MILError(f"{package}: {source} names a file outside the package: {name!r}")
    return target


def _message_class() -> Any:
    """coremltools' Model message, from coremltools if something else has loaded it, else from its files alone."""
    if "coremltools.proto.Model_pb2" in sys.modules:
        return sys.modules["coremltools.proto.Model_pb2"].Model
    if _PROTO_PACKAGE not in sys.modules:
        spec = importlib.util.find_spec("coremltools")
        if spec is None or spec.origin is None:
            raise MILError("coremltools is not installed; its protobuf classes are needed to read an .mlpackage")
        package = types.ModuleType(_PROTO_PACKAGE)
        package.__path__ = [str(Path(spec.origin).parent / "proto")]
        sys.modules[_PROTO_PACKAGE] = package
    return importlib.import_module(f"{_PROTO_PACKAGE}.Model_pb2").Model


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
        return Function(
            name=name,
            opset=message.opset,
            inputs=tuple(self.named_type(item) for item in message.inputs),
            block=self.block(message.block_specializations[message.opset]),
            described_inputs={item.name: self.feature(item) for item in description.input if _is_array(item)},
            described_outputs={item.name: self.feature(item) for item in description.output if _is_array(item)},
            other_features={
                item.name: item.type.WhichOneof("Type") or "no known type"
                for item in (*description.input, *description.output)
                if not _is_array(item)
            },
        )

    def feature(self, feature: Any) -> TensorType:
        array = feature.type.multiArrayType
        if array.dataType not in _ARRAY_TYPES:
            raise MILError(f"{self.package}: {feature.name!r} is a multi-array of unknown type {array.dataType}")
        flexible = array.WhichOneof("ShapeFlexibility") is not None
        shape = (None,) * len(array.shape) if flexible else tuple(array.shape)
        return TensorType(_ARRAY_TYPES[array.dataType], shape)

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
        kind = message.type.WhichOneof("type")
        return NamedType(message.name, self.tensor_type(message.type.tensorType) if kind == "tensorType" else None)

    def tensor_type(self, message: Any) -> TensorType:
        if message.dataType not in NAMES:
            raise MILError(f"{self.package}: unknown MIL data type {message.dataType}")
        shape = tuple(
            item.constant.size if item.WhichOneof("dimension") == "constant" else None for item in message.dimensions
        )
        return TensorType(NAMES[message.dataType], shape)

    def constant(self, message: Any) -> Constant:
        type = self.tensor_type(message.type.tensorType)
        if message.WhichOneof("value") != "blobFileValue":
            return Constant(type, self.immediate(type, message.immediateValue.tensor))
        name = message.blobFileValue.fileName
        if not name.startswith(_MODEL_PATH):
            raise MILError(f"{self.package}: weight file {name!r} is not under {_MODEL_PATH}")
        file = _inside(self.package, self.model_folder, name.removeprefix(_MODEL_PATH), "the program")
        return Constant(type, BlobRef(file, message.blobFileValue.offset))

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


def _is_array(feature: Any) -> bool:
    return feature.type.WhichOneof("Type") == "multiArrayType"
