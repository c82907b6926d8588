"""The vision encoder: folded, made channel-first and range-safe, exported by torch.export, saved as a Core ML package.

The same input gives the same bytes.
"""

import gc
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common.cli import log, progress
from fastvlm.common.units import format_bytes
from fastvlm.data.pictures import noise
from fastvlm.model.fold import FOLD_TOLERANCE
from model_export import contract
from model_export.config import ExportConfig
from model_export.encoder import compress, fp16, ranges, sensitivity
from model_export.encoder.channel_first import Encoder, channel_first
from model_export.encoder.coreml import coremltools, quick_conversion, quiet_conversion
from model_export.encoder.graph import folded_encoder, graph, kind_of, module_of
from model_export.encoder.package import METADATA, check_package, finish_package
from model_export.encoder.scaled import SCALED
from model_export.mil import read_package
from model_export.mil.allocator import kept_buffers
from model_export.mil.costs import Graph, cost_of
from quantization.coreml.compression import Compressed, Compression

# Of coremltools' default passes those that change this graph at any target (measured), and those that any graph needs.
# Each of the others costs a walk through, and a validation of, the whole program: together a quarter of the time.
_PASSES = {
    "common::dead_code_elimination",
    "common::cast_optimization",
    "common::const_elimination",
    "common::const_deduplication",
    "common::noop_elimination",
    "common::fuse_layernorm_or_instancenorm",
    "common::fuse_transpose_matmul",
    "common::remove_redundant_ops",
    "common::update_output_dtypes",
    "common::sanitize_input_output_names",
    "common::dedup_op_and_var_names",
    "common::add_fp16_cast",
    "common::topological_reorder",
}
Pictures = Callable[[int], Iterable[np.ndarray]]  # pixels (1, 3, S, S) float32 for a side of S pixels


def export_vision(
    checkpoint: Checkpoint,
    config: ExportConfig,
    target: Path,
    pictures: Pictures,
    source: str = "",
) -> dict[str, Any]:
    """Write the checkpoint's encoder as the .mlpackage `target`, which must not exist; return facts for the manifest.

    The fold is proved in float64 on the way; float16's powers of two are chosen on `pictures`; the saved program is
    read back and held to the contract. Temporary files stay in the folder of `target`. `source` is a sha256 over the
    checkpoint's files, for the package's description.

    Raises CheckFailed when the fold or the saved program is not what it should be; UserError for unusable weights.
    """
    native = config.image_size or checkpoint.image_size
    sizes = contract.functions(native, config.resolutions)
    notes = {"image_strategy": checkpoint.image_strategy, "source_sha256": source}
    fastvit, errors = folded_encoder(checkpoint)
    facts: dict[str, Any] = {}
    if config.compute_precision == "float16":
        encoder, facts["fp16"] = range_safe(fastvit, measured_on(config, sizes.values(), pictures))
    else:
        encoder = Encoder(channel_first(fastvit))
    shapes = compress.layer_shapes(encoder.fastvit)
    assignment = compress.assign(config.compression, shapes)

    def write_native(forms: Mapping[str, Compression], package: Path) -> None:
        _write(encoder, config, contract.functions(native), forms, package, notes)

    with _temporary_folder(target.parent) as folder:
        if config.min_snr is not None:
            assignment, facts["sensitivity"] = sensitivity.search(encoder, config, pictures, write_native, folder)
        written = _write(encoder, config, sizes, assignment.forms, folder / target.name, notes)
        (folder / target.name).rename(target)
    if assignment.forms or assignment.uncompressed:
        facts["compression"] = _compression(shapes, assignment)
    worst = max(errors.values())
    return {
        "package": target.name,
        "image_size": native,
        "resolutions": sorted(set(sizes.values())),
        "tokens_per_image": contract.tokens_per_image(native),
        # The exact figure depends on the number of threads; the power of ten above it does not.
        "fold": {
            "compared_outputs": len(errors),
            "relative_error_below": _power_of_ten_above(worst),
            "tolerance": FOLD_TOLERANCE,
        },
        **facts,
        **written,
    }


def measured_on(config: ExportConfig, sizes: Iterable[int], pictures: Pictures) -> Iterator[np.ndarray]:
    """The pictures at every size, and noise: a user's need not be the harshest, the built-in ones have it already."""
    for size in sorted(set(sizes)):
        yield from pictures(size)
        if config.calibration_data is not None:
            yield noise(size)


def _write(
    encoder: Encoder,
    config: ExportConfig,
    sizes: Mapping[str, int],
    forms: Mapping[str, Compression],
    target: Path,
    notes: Mapping[str, str],
) -> dict[str, Any]:
    """Convert a prepared encoder at every size, weights in these forms, and check what was written."""
    stored = compress.compressed(encoder.fastvit, forms)
    parts = {size: target.with_name(f"{size}.mlpackage") for size in sorted(set(sizes.values()))}
    with quick_conversion():
        for size, part in parts.items():
            program = graph(encoder, size)
            output = next(node for node in program.graph.nodes if node.op == "output").args[0][0]
            channels, added = int(output.meta["val"].shape[-1]), _added(program, output)
            float32 = {output.name} if encoder.exponent and not encoder.fits_float16 else set()
            _convert(program, config, size, part, float32, stored)
            del program
    if len(sizes) > 1:
        _merge({name: parts[size] for name, size in sizes.items()}, target)
        for part in parts.values():
            shutil.rmtree(part)
    else:
        parts[sizes[contract.MAIN]].rename(target)
    finish_package(target, _description(config, sizes, channels, notes))
    facts = check_package(target, sizes, channels, None if config.compute_precision == "float32" else float32)
    return {"channels": channels, **facts, **({"scaling": _cost_of(added, target)} if added else {})}


def _compression(shapes: Mapping[str, tuple[int, ...]], assignment: compress.Assignment) -> dict[str, Any]:
    """The manifest's facts about compressed weights; logged in a line, too."""
    stored_bytes, float16_bytes = compress.size_of(shapes, assignment.forms), compress.size_of(shapes, {})
    log(
        f"compressed: {len(assignment.forms)} of {len(shapes)} layers, weights {format_bytes(stored_bytes)} instead of"
        f" {format_bytes(float16_bytes)}; {len(assignment.uncompressed)} stay float16, export.json says why"
    )
    return {
        "forms": {name: form.name for name, form in assignment.forms.items()},
        "wide": dict(assignment.uncompressed),
        "weight_bytes": stored_bytes,
        "float16_weight_bytes": float16_bytes,
    }


def _added(program: torch.export.ExportedProgram, output: torch.fx.Node) -> set[str]:
    """Names of the operations of scaled activations, Gains and of the features' own factor, but for the activations
    themselves, which the unscaled encoder has, too."""
    owners = {kind.__name__ for kind in (*SCALED.values(), fp16.Gain)}
    added = {
        node.name
        for node in program.graph.nodes
        if node.op == "call_function"
        and module_of(node)[1].rpartition(".")[2] in owners
        and kind_of(node) not in ("gelu", "sigmoid", "softmax")
    }
    return added | ({output.name} if kind_of(output) == "mul" else set())


def _cost_of(added: Collection[str], package: Path) -> dict[str, Any]:
    """The cost of powers of two beside weights, for the default function; logged in a line, too.

    {operations: how many were added, byte_share: of all bytes that operations read and write}. They have no
    multiply-accumulates.
    """
    program = read_package(package)
    saved = Graph(program.functions[program.default_function])
    new, moved = [], 0
    for operation in saved.operations:
        size = cost_of(saved, operation).bytes
        moved += size
        # coremltools has a name of its own for what a clamp becomes; FastViT has no other
        if operation.type == "clip" or operation.name.removesuffix("_cast_fp16") in added:
            new.append(size)
    share = sum(new) / max(moved, 1)
    log(f"range-safe: {len(new)} operations added, {share:.1%} of the bytes moved, no multiply-accumulates")
    return {"operations": len(new), "byte_share": float(f"{share:.3g}")}


@progress("measure activations, choose powers of two")
def range_safe(fastvit: nn.Module, pixels: Iterable[np.ndarray]) -> tuple[Encoder, dict[str, Any]]:
    """Make a folded encoder channel-first and carry powers of two so that float16 holds it, in place (see
    `model_export.encoder.fp16`); and the manifest's entry for it.

    pixels: arrays (1, 3, S, S) float32 that its values are measured on.
    """
    with kept_buffers():
        measured = ranges.measure_modules(fastvit, pixels)
    gc.collect()  # the hooks' closures: they hold activations
    channel_first(fastvit)
    flow = fp16.choose(fastvit, measured)
    before, after = fp16.flow(fastvit).headroom(measured), flow.headroom(measured)
    layers, activations = flow.layer_exponents(), flow.activation_exponents()
    fp16.rescale(fastvit, flow)
    largest = max((value.exponent for value in flow.values), default=0)
    if largest > 0:
        log(
            f"float16: {sum(value.exponent > 0 for value in flow.values)} values carry x / 2^k, k up to {largest}:"
            f" minimum headroom {before.least:.3g}x -> {after.least:.3g}x"
        )
    holds = measured["final_conv"].largest * fp16.HEADROOM <= fp16.LARGEST
    return Encoder(fastvit, flow.features.exponent, holds), {
        "layer_exponents": layers,
        "activation_exponents": activations,
        "features_exponent": flow.features.exponent,
        "headroom": {
            moment: {"least": _rounded(headroom.least), "at": headroom.name, "squares": _rounded(headroom.squares)}
            for moment, headroom in (("before", before), ("after", after))
        },
    }


def _rounded(value: float | None) -> float | None:
    """Three digits: the rest depends on the number of threads, and the manifest must not."""
    return None if value is None else float(f"{value:.3g}")


@progress("convert to Core ML")
def _convert(
    program: torch.export.ExportedProgram,
    config: ExportConfig,
    image_size: int,
    target: Path,
    float32: set[str],
    stored: Mapping[str, Compressed],
) -> None:
    ct = coremltools()
    ct.converters.mil.Builder.name_count.clear()  # or names would depend on what else this process has built
    passes = ct.PassPipeline()
    # Equal weights of two layers would become one constant, which neither layer's form could find.
    needed = _PASSES - {"common::const_deduplication"} if stored else _PASSES
    passes.remove_passes(set(passes.passes) - needed)
    precision = ct.precision.FLOAT32
    if config.compute_precision != "float32":
        precision = ct.transform.FP16ComputePrecision(op_selector=lambda operation: operation.name not in float32)
    common = {
        "minimum_deployment_target": getattr(ct.target, config.deployment_target),
        "compute_units": getattr(ct.ComputeUnit, config.compute_units),
        "skip_model_load": True,  # on a Mac it would compile the model here, for nothing
    }
    with torch.no_grad(), quiet_conversion():
        converted = ct.convert(
            program,
            inputs=[ct.TensorType(name=contract.INPUT, shape=contract.input_shape(image_size), dtype=np.float32)],
            outputs=[ct.TensorType(name=contract.OUTPUT, dtype=np.float32)],
            convert_to="milinternal",
            compute_precision=precision,
            pass_pipeline=passes,
            **common,
        )
        compress.store(converted, stored, config.deployment_target)
        ct.convert(
            converted,
            source="milinternal",
            convert_to="mlprogram",
            pass_pipeline=ct.PassPipeline.EMPTY,
            package_dir=str(target),
            **common,
        )


def _merge(parts: Mapping[str, Path], target: Path) -> None:
    """One package of several functions from packages of one; equal weights are stored once."""
    ct = coremltools()
    description = ct.utils.MultiFunctionDescriptor()
    for function, part in parts.items():
        description.add_function(str(part), "main", function)
    description.default_function_name = contract.MAIN
    with quiet_conversion():
        ct.utils.save_multifunction(description, str(target))


def _description(
    config: ExportConfig, sizes: Mapping[str, int], channels: int, notes: Mapping[str, str]
) -> dict[str, str]:
    native = sizes[contract.MAIN]
    texts = {}
    for function, size in sizes.items():
        at = f"{function}." if len(sizes) > 1 else ""
        texts[at + contract.INPUT] = (
            f"RGB picture, (1, 3, {size}, {size}), planes first, values in [0, 1], prepared by"
            f" image_strategy {notes['image_strategy']}"
        )
        tokens = contract.tokens_per_image(size)
        texts[at + contract.OUTPUT] = f"Image features before the projector, (1, {tokens}, {channels}), row by row"
    return {
        "short_description": f"FastVLM vision encoder: {native} x {native} pixels to"
        f" {contract.tokens_per_image(native)} image tokens",
        "author": "Exported by the FastVLM on-device toolchain",
        "licence": "See LICENSE_MODEL and NOTICE",
        "version": "1",
        **texts,
        **{METADATA + key: text for key, text in notes.items()},
        METADATA + "image_size": str(native),
        METADATA + "compute_units": config.compute_units,
    }


def _power_of_ten_above(error: float) -> float:
    """1e-13 for 2.3e-14; 0.0 for an exact fold."""
    return float(f"1e{math.ceil(math.log10(error))}") if error else 0.0


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder for parts, in `parent`; coremltools' temporary files go there too: a killed run is cleaned up there."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".parts.", dir=parent) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
            gc.collect()  # coremltools' TemporaryDirectory goes with the last reference
        finally:
            tempfile.tempdir = before
