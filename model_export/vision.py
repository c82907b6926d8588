"""The vision encoder: folded, exported by torch.export, and saved as a Core ML package whose bytes repeat."""

import gc
import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvlm import naming
from fastvlm.checkpoint import Checkpoint
from fastvlm.dtypes import DTYPES
from fastvlm.errors import CheckFailed, UserError
from fastvlm.model import encoder
from fastvlm.reparam import FOLD_TOLERANCE, fold_and_prove
from model_export import contract
from model_export.config import ExportConfig
from model_export.coreml import coremltools, quiet_conversion

# Where an .mlpackage keeps its program and its weights; as coremltools writes them and Xcode reads them.
_ITEMS = {
    "model.mlmodel": ("com.apple.CoreML/model.mlmodel", "CoreML Model Specification"),
    "weights": ("com.apple.CoreML/weights", "CoreML Model Weights"),
}
SPECIFICATION = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/apple/ml-fastvlm#mlpackage")
_PRECISION_OF = {"float16": "FLOAT16", "float32": "FLOAT32"}
_METADATA = "fastvlm."
# Of coremltools' default passes those that change this graph at any target (measured), and those that any graph needs.
# Each of the other 70 costs a walk through, and a validation of, the whole program: together a quarter of the time.
_PASSES = {
    "common::dead_code_elimination",
    "common::cast_optimization",
    "common::const_elimination",
    "common::const_deduplication",
    "common::noop_elimination",
    "common::remove_redundant_ops",
    "common::update_output_dtypes",
    "common::sanitize_input_output_names",
    "common::dedup_op_and_var_names",
    "common::add_fp16_cast",
    "common::topological_reorder",
}


@dataclass(frozen=True)
class PackageNotes:
    """What the package says about itself. `source` is a sha256 over the checkpoint's files; `licence` one line."""

    image_strategy: str
    source: str = ""
    licence: str = "See LICENSE_MODEL and NOTICE"
    version: str = "1"


class _Encoder(nn.Module):
    """FastViT's feature map (1, C, S/64, S/64) as the contract has it: (1, N, C), rows first."""

    def __init__(self, fastvit: nn.Module) -> None:
        super().__init__()
        self.fastvit = fastvit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.fastvit.forward_features(images)  # type: ignore[operator]
        return features.flatten(2).transpose(1, 2)


def export_vision(
    checkpoint: Checkpoint, config: ExportConfig, target: Path, notes: PackageNotes | None = None
) -> dict[str, Any]:
    """Write the checkpoint's encoder as the .mlpackage `target`, which must not exist; return facts for the manifest.

    The fold is proved in float64 on the way, and the saved program is read back and held to the contract. Temporary
    files stay in the folder of `target`. The same input gives the same bytes.

    Raises CheckFailed when the fold or the saved program is not what it should be, UserError for unusable weights.
    """
    image_size = config.image_size or checkpoint.image_size
    notes = notes or PackageNotes(checkpoint.image_strategy)
    folded, errors = _folded_encoder(checkpoint)
    program = _graph(folded, image_size)
    channels = _output_channels(program)
    del folded
    with _temporary_files_in(target.parent):
        _convert(program, config, image_size, target)
    del program
    finish_package(target, _description(config, image_size, channels, notes))
    facts = check_package(target, image_size, channels, config.compute_precision)
    worst = max(errors.values())
    return {
        "package": target.name,
        "image_size": image_size,
        "tokens_per_image": contract.tokens_per_image(image_size),
        "channels": channels,
        # The exact figure depends on the number of threads; the power of ten above it does not.
        "fold": {
            "compared_outputs": len(errors),
            "relative_error_below": _power_of_ten_above(worst),
            "tolerance": FOLD_TOLERANCE,
        },
        **facts,
    }


def _folded_encoder(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, float]]:
    """The folded float32 encoder and the fold's errors. Loaded as it is stored: half the memory, nothing rounded."""
    stored = {info.dtype for name, info in checkpoint.tensors.items() if name.startswith(naming.VISION)} & DTYPES.keys()
    original = encoder(checkpoint, dtype=stored.pop() if len(stored) == 1 else "float32")
    folded, errors = fold_and_prove(original, dtype=torch.float32)
    return folded.requires_grad_(False), errors


def _graph(folded: nn.Module, image_size: int) -> torch.export.ExportedProgram:
    """The core-ATen graph. Gradients off: with them the conversion peaks at 7 GB instead of 2 (1024 x 1024)."""
    example = (torch.zeros(contract.input_shape(image_size)),)
    with torch.no_grad(), quiet_conversion():
        return torch.export.export(_Encoder(folded).eval(), example).run_decompositions({})


def _output_channels(program: torch.export.ExportedProgram) -> int:
    (output,) = next(node for node in program.graph.nodes if node.op == "output").args[0]
    return int(output.meta["val"].shape[-1])


def _convert(program: torch.export.ExportedProgram, config: ExportConfig, image_size: int, target: Path) -> None:
    ct = coremltools()
    import numpy as np

    passes = ct.PassPipeline()
    passes.remove_passes(set(passes.passes) - _PASSES)
    with torch.no_grad(), quiet_conversion():
        ct.convert(
            program,
            inputs=[ct.TensorType(name=contract.INPUT, shape=contract.input_shape(image_size), dtype=np.float32)],
            outputs=[ct.TensorType(name=contract.OUTPUT, dtype=np.float32)],
            convert_to="mlprogram",
            compute_precision=getattr(ct.precision, _PRECISION_OF[config.compute_precision]),
            compute_units=getattr(ct.ComputeUnit, config.compute_units),
            minimum_deployment_target=getattr(ct.target, config.minimum_deployment_target),
            pass_pipeline=passes,
            package_dir=str(target),
            skip_model_load=True,  # on a Mac it would compile the model here, for nothing
        )


def _description(config: ExportConfig, image_size: int, channels: int, notes: PackageNotes) -> dict[str, str]:
    tokens = contract.tokens_per_image(image_size)
    return {
        "short_description": f"FastVLM vision encoder: {image_size} x {image_size} pixels to {tokens} image tokens",
        "author": "Exported by the FastVLM on-device toolchain",
        "licence": notes.licence,
        "version": notes.version,
        contract.INPUT: f"RGB picture, (1, 3, {image_size}, {image_size}), planes first, values in [0, 1], prepared by"
        f" image_strategy {notes.image_strategy}",
        contract.OUTPUT: f"Image features before the projector, (1, {tokens}, {channels}), row by row",
        _METADATA + "source_sha256": notes.source,
        _METADATA + "image_size": str(image_size),
        _METADATA + "image_strategy": notes.image_strategy,
        _METADATA + "compute_units": config.compute_units,
    }


def finish_package(package: Path, description: Mapping[str, str]) -> None:
    """Describe the package that coremltools wrote, and make its bytes a function of its content.

    coremltools writes today's date, random identifiers in Manifest.json, and protobuf maps in hash order. Here the date
    goes, identifiers become UUIDs of the items' names, and the program is serialized with ordered maps.
    """
    spec = _read_specification(package)
    metadata = spec.description.metadata
    metadata.shortDescription = description["short_description"]
    metadata.author, metadata.license = description["author"], description["licence"]
    metadata.versionString = description["version"]
    for feature in (*spec.description.input, *spec.description.output):
        feature.shortDescription = description.get(feature.name, "")
    metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    metadata.userDefined.update({key: text for key, text in description.items() if key.startswith(_METADATA) and text})
    (package / SPECIFICATION).write_bytes(spec.SerializeToString(deterministic=True))

    author = "com.apple.CoreML"
    entries = {
        str(uuid.uuid5(_NAMESPACE, path)): {"author": author, "description": text, "name": name, "path": path}
        for name, (path, text) in _ITEMS.items()
    }
    root = str(uuid.uuid5(_NAMESPACE, _ITEMS["model.mlmodel"][0]))
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def describe_package(package: Path) -> dict[str, Any]:
    """What is in an .mlpackage, from its bytes: interface, opset, histogram of operations, dtypes of values, metadata.

    Raises UserError when it is not an ML program.
    """
    spec = _read_specification(package)
    if spec.WhichOneof("Type") != "mlProgram" or "main" not in spec.mlProgram.functions:
        raise UserError(f"{package}: is not an ML program with a function `main`: nothing that this project wrote")
    function = spec.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    computed = [operation for operation in operations if operation.type != "const"]
    return {
        "inputs": {feature.name: _feature(feature) for feature in spec.description.input},
        "outputs": {feature.name: _feature(feature) for feature in spec.description.output},
        "specification_version": spec.specificationVersion,
        "opset": function.opset,
        "operations": dict(sorted(Counter(operation.type for operation in computed).items())),
        "value_dtypes": dict(sorted(Counter(_dtype(operation.outputs[0]) for operation in computed).items())),
        "metadata": dict(sorted(spec.description.metadata.userDefined.items())),
    }


def check_package(package: Path, image_size: int, channels: int, precision: str) -> dict[str, Any]:
    """Hold a saved package to the contract and return the facts about it. Raises CheckFailed with every difference.

    In a float16 program only the cast that makes the output is float32: coremltools silently leaves an operation whose
    weights do not fit float16 in float32, which takes it off the Neural Engine.
    """
    facts = describe_package(package)
    shapes = {"inputs": contract.input_shape(image_size), "outputs": contract.output_shape(image_size, channels)}
    names = {"inputs": contract.INPUT, "outputs": contract.OUTPUT}
    expected = {side: {names[side]: (contract.IO_DTYPE, shape)} for side, shape in shapes.items()}
    faults = [
        f"{side}: got {facts[side]}, expected {wanted}" for side, wanted in expected.items() if facts[side] != wanted
    ]
    wide = facts["value_dtypes"].get("float32", 0)
    if precision == "float16" and wide > 1:
        faults.append(f"{wide - 1} operations are float32 in a float16 program: their weights do not fit float16")
    if precision == "float32" and facts["value_dtypes"].get("float16"):
        faults.append(f"{facts['value_dtypes']['float16']} operations are float16 in a float32 program")
    if faults:
        raise CheckFailed(f"{package.name} is not what the app expects: {'; '.join(faults)}")
    return {key: facts[key] for key in ("specification_version", "opset", "operations", "value_dtypes")}


def _read_specification(package: Path) -> Any:
    """The Model protobuf of a package; its weights stay where they are."""
    path = package / SPECIFICATION
    spec = coremltools().proto.Model_pb2.Model()
    try:
        spec.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): not a whole .mlpackage") from error
    except Exception as error:  # protobuf's DecodeError, which differs between its backends
        raise UserError(f"{path}: is not a Core ML specification ({error}): export again") from error
    return spec


def _feature(feature: Any) -> tuple[str, tuple[int, ...]]:
    array = feature.type.multiArrayType
    return array.ArrayDataType.Name(array.dataType).lower(), tuple(array.shape)


def _dtype(value: Any) -> str:
    tensor = value.type.tensorType
    return str(tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number[tensor.dataType].name.lower())


def _power_of_ten_above(error: float) -> float:
    """1e-13 for 2.3e-14; 0.0 for an exact fold."""
    exponent = -20
    while error > 10.0**exponent:
        exponent += 1
    return float(f"1e{exponent}") if error else 0.0


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """coremltools writes the weights to a temporary folder first: keep that where a killed run is cleaned up."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
        gc.collect()  # its TemporaryDirectory goes with the last reference
    finally:
        tempfile.tempdir = before
