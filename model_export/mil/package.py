"""The files of an .mlpackage: its manifest, and its specification (protobuf).

Of coremltools only the generated protobuf classes are used, and they are imported without the package around them
(importing coremltools takes seconds and prints about the libraries it lacks off macOS).
"""

import errno
import importlib
import importlib.util
import json
import os
import stat
import sys
import types
from pathlib import Path, PurePosixPath
from typing import Any

from .program import MILError

_PROTO_PACKAGE = "_model_export_mil_proto"
_LARGEST_MANIFEST, LARGEST_SPECIFICATION = 1 << 20, 256 << 20  # bytes; ours have 1 kB and 1 MB


def read_specification(path: Path | str) -> tuple[Path, Any]:
    """The specification of an .mlpackage: its file, and the protobuf message. Raises MILError as `read_package`."""
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
        old = ", which coremltools can't turn into one: convert its source again" if kind and "neural" in kind else ""
        raise MILError(f"{path}: the model is a {kind or 'model of no known type'}, expected an mlProgram{old}")
    return specification_path, specification


def _specification_path(path: Path) -> Path:
    if path.suffix == ".mlmodelc" or (path / "coremldata.bin").exists():
        raise MILError(f"{path}: a compiled model (.mlmodelc); give the .mlpackage that it was compiled from")
    if not path.exists():
        raise MILError(f"{path}: no such package")
    if path.suffix == ".mlmodel":
        raise MILError(f"{path}: an .mlmodel holds a neural network or another older model; expected an .mlpackage")
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
    return inside(path, path / "Data", root, "Manifest.json")


def _plain_bytes(path: Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes; OSError for another, at once: a pipe would wait."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise OSError(errno.EINVAL, f"expected a plain file of at most {limit} bytes", str(path))
        return file.read(limit)


def inside(package: Path, base: Path, name: str, source: str) -> Path:
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
