"""What an .mlpackage asks for and holds, and which operations of Core ML the executor runs."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.common.errors import UserError
from fastvlm.common.terminal import print_table
from fastvlm.common.units import format_bytes

if TYPE_CHECKING:
    from model_export.mil import Program
    from model_export.mil.program import Block, Feature, Operation

SYSTEMS = {"CoreML5": "iOS 15", "CoreML6": "iOS 16", "CoreML7": "iOS 17", "CoreML8": "iOS 18"}
# Of coremltools' table: a test's own const, whose value is a symbol.
_NOT_SAVED = {"_const_symbolic"}


def describe_program(package: Path) -> dict[str, Any]:
    """Each function of a package: its interface, opset, operations, and what the executor can't run; the weights.

    Raises UserError when it is no ML program that can be read.
    """
    from model_export import mil

    try:
        program = mil.read_package(package)
        return {
            "default": program.default_function,
            "functions": {name: _function(program, name) for name in sorted(program.functions)},
            "weights": _weights(program),
        }
    except mil.MILError as error:
        raise UserError(str(error)) from error


def _function(program: "Program", name: str) -> dict[str, Any]:
    from model_export import mil

    function = program.functions[name]
    operations = [operation for operation in _all(function.block) if operation.type != "const"]
    try:
        mil.MILExecutor(program, function_name=name)
        refused = None
    except mil.MILError as error:
        refused = str(error)
    return {
        "opset": function.opset,
        "inputs": _interface(function.input_features),
        "outputs": _interface(function.output_features),
        "states": _interface(function.state_features),
        "operations": dict(Counter(operation.type for operation in operations).most_common()),
        "refused": refused,
    }


def _all(block: "Block") -> Iterator["Operation"]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _all(inner)


def _interface(features: Mapping[str, "Feature"]) -> dict[str, str]:
    return {name: feature_text(feature) for name, feature in features.items()}


def feature_text(feature: "Feature") -> str:
    """An input, an output or a state in words."""
    kind = {"multiArrayType": "", "stateType": "", "imageType": f"picture in {feature.color} "}.get(
        feature.kind, feature.kind.removesuffix("Type")
    )
    shape = f"{feature.type.dtype}{feature.shown_shape}" if feature.type is not None else ""
    default = f", default {feature.default:g}" if feature.default is not None else ""
    return f"{kind}{shape}{default}"


def _weights(program: "Program") -> dict[str, dict[str, int]]:
    """By element type: how many different tensors in weight files, and their bytes."""
    from model_export.mil.blob import stored_tensors

    sizes = {constant.data: (constant.type.dtype, raw.size) for _, constant, raw in stored_tensors(program)}
    found: dict[str, dict[str, int]] = {}
    for dtype, size in sizes.values():
        entry = found.setdefault(dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += size
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def print_program(document: Mapping[str, Any]) -> None:
    """Print what `describe_program` found."""
    for name, function in document["functions"].items():
        default = " (default)" if name == document["default"] and len(document["functions"]) > 1 else ""
        print(f"function {name}{default}: {SYSTEMS.get(function['opset'], function['opset'])} ({function['opset']})")
        for part in ("inputs", "outputs", "states"):
            for feature, text in function[part].items():
                print(f"  {part.removesuffix('s')} {feature}: {text}")
        counts = ", ".join(f"{count} {type}" for type, count in function["operations"].items())
        print(f"  {sum(function['operations'].values())} operations: {counts or 'none'}")
        print(f"  the executor runs it: {'yes' if function['refused'] is None else 'no: ' + function['refused']}")
    for dtype, entry in document["weights"].items():
        print(f"weights {dtype}: {entry['tensors']} tensors, {format_bytes(entry['bytes'])}")


def supported() -> dict[str, dict[str, bool]]:
    """Every operation of Core ML's opsets of iOS 15 to 18, as coremltools has them: {name: {opset: runs}}."""
    import model_export.mil.ops  # noqa: F401 (registers what `table` has)
    from model_export.encoder.coreml import coremltools
    from model_export.mil.registry import table

    coremltools()
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    known = table() | {"const": [*SYSTEMS]}
    versions = {f"iOS{system.removeprefix('iOS ')}": opset for opset, system in SYSTEMS.items()}
    every = {
        name: sorted(versions[version.name] for version in classes if version.name in versions)
        for name, classes in SSAOpRegistry.core_ops.items()
        if name not in _NOT_SAVED
    }
    return {
        name: {opset: opset in known.get(name, ()) for opset in opsets}
        for name, opsets in sorted(every.items())
        if opsets
    }


def print_supported(rows: Mapping[str, Mapping[str, bool]]) -> None:
    """Print the table of operations and opsets."""
    words = {True: "yes", False: "NO", None: ""}
    cells = [[name, *(words[row.get(opset)] for opset in SYSTEMS)] for name, row in rows.items()]
    print_table("operations that the executor runs", ["operation", *SYSTEMS.values()], cells)
    for opset, system in SYSTEMS.items():
        runs = [row[opset] for row in rows.values() if opset in row]
        print(f"{system}: {sum(runs)} of {len(runs)} operations ({sum(runs) / len(runs):.1%})")
