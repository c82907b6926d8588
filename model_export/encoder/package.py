"""An .mlpackage on disk: its description, its deterministic bytes, what is in it, and whether the app can read it."""

import json
import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.files import read_small
from model_export import contract
from model_export.encoder.coreml import coremltools
from model_export.mil import MILError, Program, TensorType, read_package
from model_export.mil.package import LARGEST_SPECIFICATION

# Where an .mlpackage keeps its program and its weights; as coremltools writes them and Xcode reads them.
_ITEMS = {
    "model.mlmodel": ("com.apple.CoreML/model.mlmodel", "CoreML Model Specification"),
    "weights": ("com.apple.CoreML/weights", "CoreML Model Weights"),
}
SPECIFICATION = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
METADATA = "fastvlm."  # in front of our keys of the user-defined metadata
_WORDS = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}  # MIL's types by the names that NumPy has
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/apple/ml-fastvlm#mlpackage")


def finish_package(package: Path, description: Mapping[str, str]) -> None:
    """Describe the package that coremltools wrote, and make its bytes a function of its content.

    `description` has short_description, author, licence, version, texts by input and output name (or, in a package of
    several functions, by "FUNCTION.NAME"), and user-defined metadata under keys that begin with METADATA.

    coremltools writes today's date, random identifiers in Manifest.json, and protobuf maps in hash order. Here the date
    goes, identifiers become UUIDs of the items' names, and the program is serialized with ordered maps.
    """
    spec = read_specification(package)
    metadata = spec.description.metadata
    metadata.shortDescription = description["short_description"]
    metadata.author, metadata.license = description["author"], description["licence"]
    metadata.versionString = description["version"]
    for name, interface in _interfaces(spec).items():
        for feature in (*interface.input, *interface.output):
            own = description.get(f"{name}.{feature.name}")
            feature.shortDescription = own or description.get(feature.name, "")
    metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    metadata.userDefined.update({key: text for key, text in description.items() if key.startswith(METADATA) and text})
    (package / SPECIFICATION).write_bytes(spec.SerializeToString(deterministic=True))

    author = "com.apple.CoreML"
    entries = {
        str(uuid.uuid5(_NAMESPACE, path)): {"author": author, "description": text, "name": name, "path": path}
        for name, (path, text) in _ITEMS.items()
    }
    root = str(uuid.uuid5(_NAMESPACE, _ITEMS["model.mlmodel"][0]))
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def describe_package(package: Path, function: str | None = None) -> dict[str, Any]:
    """The content of an .mlpackage, from its bytes: functions, and of one of them (default: the one that runs when none
    is named) the interface, opset, histogram of operations and dtypes of values, what computes in float32; metadata.

    Raises UserError when it is not an ML program, or has no such function.
    """
    program = _read(package)
    name = function or program.default_function
    if name not in program.functions:
        raise UserError(
            f"{package}: has no function `{name}`: its functions are {', '.join(sorted(program.functions))}"
        )
    return _described(program, name)


def _read(package: Path) -> Program:
    try:
        return read_package(package)
    except MILError as error:
        raise UserError(f"{package}: {error}" if str(package) not in str(error) else str(error)) from error


def _described(program: Program, name: str) -> dict[str, Any]:
    function = program.functions[name]
    computed = [operation for operation in function.block.operations if operation.type != "const"]
    values = [
        (operation, _WORDS.get(output.type.dtype, output.type.dtype))
        for operation in computed
        for output in operation.outputs[:1]
        if output.type and not operation.type.startswith("constexpr_")
    ]
    in_float32 = [operation.name for operation, dtype in values if dtype == "float32" and operation.type != "cast"]
    return {
        "functions": sorted(program.functions),
        "inputs": _features(function.described_inputs),
        "outputs": _features(function.described_outputs),
        "specification_version": program.specification_version,
        "opset": function.opset,
        "operations": dict(sorted(Counter(operation.type for operation in computed).items())),
        "value_dtypes": dict(sorted(Counter(dtype for _, dtype in values).items())),
        # by the program's names, without what the conversion to float16 appends
        "float32_operations": [name.removesuffix("_cast_fp16") for name in in_float32],
        "metadata": dict(sorted(program.metadata.items())),
    }


def _features(types: Mapping[str, TensorType]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    return {name: (_WORDS.get(type.dtype, type.dtype), type.shape) for name, type in types.items()}


def check_package(
    package: Path, sizes: Mapping[str, int], channels: int, float32: Collection[str] | None = ()
) -> dict[str, Any]:
    """Hold a saved package to the contract and return the facts about its default function. `sizes` has the picture's
    side in pixels for each function. Raises CheckFailed with every difference.

    `float32` has the names of the operations that compute in float32, none but where features don't fit float16; None
    is a program in float32. coremltools silently leaves an operation whose weights do not fit float16 in float32,
    which takes it off the Neural Engine.
    """
    faults = []
    program = _read(package)
    described = _described(program, program.default_function)
    if described["functions"] != sorted(sizes):
        faults.append(f"functions: got {described['functions']}, expected {sorted(sizes)}")
    for function in sorted(set(sizes) & set(described["functions"])):
        facts = _described(program, function)
        at = "" if len(sizes) == 1 else f"{function}: "
        shapes = {
            "inputs": (contract.INPUT, contract.input_shape(sizes[function])),
            "outputs": (contract.OUTPUT, contract.output_shape(sizes[function], channels)),
        }
        for side, (name, shape) in shapes.items():
            wanted = {name: (contract.IO_DTYPE, shape)}
            if facts[side] != wanted:
                faults.append(f"{at}{side}: got {facts[side]}, expected {wanted}")
        if float32 is None:
            if half := facts["value_dtypes"].get("float16", 0):
                faults.append(f"{at}{half} operations are float16 in a float32 program")
        elif unexpected := [name for name in facts["float32_operations"] if name not in float32]:
            faults.append(
                f"{at}{len(unexpected)} operations are float32 in a float16 program, their weights do not fit float16:"
                f" {', '.join(unexpected[:3])}"
            )
    if faults:
        raise CheckFailed(f"{package.name} is not what the app expects: {'; '.join(faults)}")
    keys = ("functions", "specification_version", "opset", "operations", "value_dtypes")
    return {key: described[key] for key in (*keys, *(["float32_operations"] if float32 else []))}


def read_specification(package: Path) -> Any:
    """The Model protobuf of a package; its weights stay where they are. Raises UserError when it can't be read."""
    path = package / SPECIFICATION
    spec = coremltools().proto.Model_pb2.Model()
    try:
        spec.ParseFromString(read_small(path, LARGEST_SPECIFICATION))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): not a whole .mlpackage") from error
    except Exception as error:  # protobuf's DecodeError, which differs between its backends
        raise UserError(f"{path}: is not a Core ML specification ({error}): export again") from error
    return spec


def _interfaces(spec: Any) -> dict[str, Any]:
    """Each function's description: one of several functions has its own, a single one the model's."""
    return {item.name: item for item in spec.description.functions} or {"main": spec.description}
