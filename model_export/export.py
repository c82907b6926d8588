"""From a checkpoint to an artefact: the stages of `python -m model_export all`, `vision` and `llm`."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvlm import naming, pictures
from fastvlm.checkpoint import Checkpoint, open_checkpoint
from fastvlm.cli import log, progress
from fastvlm.errors import CheckFailed, UserError
from fastvlm.model import folded_skeleton
from fastvlm.preprocessing import Preprocessor, read_preprocessor
from fastvlm.staging import staged
from model_export import artefact, compress, contract, llm, tokenizer
from model_export.config import DEFAULT_TARGET, ExportConfig
from model_export.vision import PackageNotes, export_vision
from quantization.recipe import Recipe, load_recipe

PARTS = ("vision", "llm")
# What the folded encoder's weights take for each parameter; biases and constants are noise beside them.
_BYTES_PER_WEIGHT = {"float16": 2, "mixed": 4, "float32": 4}
_SPARE_BYTES = 64 << 20  # tokenizer, configurations, manifest
Parity = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Everything that an export needs, resolved: nothing of it can be refused later."""

    config: ExportConfig
    parts: tuple[str, ...]
    checkpoint: Checkpoint
    recipe: Recipe
    preprocessor: Preprocessor
    calibration: list[Path] | None
    sizes: dict[str, int]

    def document(self) -> dict[str, Any]:
        """What would be written, with estimated sizes in bytes."""
        return {
            "output_dir": str(self.config.output_dir),
            "parts": list(self.parts),
            "config": self.config.document(),
            "layout": self.checkpoint.layout,
            "image_size": self.checkpoint.image_size,
            "image_strategy": self.preprocessor.image_strategy,
            "recipe": self.recipe.to_json(),
            "estimated_bytes": self.sizes,
            "warnings": list(self.checkpoint.warnings),
        }


def plan(config: ExportConfig, parts: tuple[str, ...] = PARTS) -> Plan:
    """Resolve an export without writing anything. Raises UserError for whatever would stop it, disk space included."""
    recipe = load_recipe(config.quant)
    artefact.check_target(config.output_dir, config.overwrite)
    checkpoint = open_checkpoint(config.checkpoint)
    preprocessor = read_preprocessor(checkpoint.path)
    if config.image_size:
        checkpoint = replace(checkpoint, image_size=config.image_size)
        preprocessor = replace(preprocessor, image_size=config.image_size)
    calibration = config.calibration_images and pictures.files(config.calibration_images, "--calibration-images")
    for why, target in config.newer_target.items():
        if config.deployment_target != DEFAULT_TARGET:
            log(f"deployment target {config.deployment_target}: {why}, new in {target}")
    sizes: dict[str, int] = {}
    if "vision" in parts:
        weights = sum(info.size for name, info in checkpoint.tensors.items() if name.startswith(naming.VISION))
        sizes[contract.PACKAGE] = weights * _BYTES_PER_WEIGHT[config.compute_precision]
        if config.vision_quant != compress.NONE:
            shapes = compress.layer_shapes(folded_skeleton(checkpoint))
            sizes[contract.PACKAGE] = compress.size_of(shapes, compress.assign(config.compression, shapes).forms)
    if "llm" in parts:
        sizes[contract.WEIGHTS_GLOB] = llm.planned_bytes(checkpoint, recipe, config.layout)
    _check_space(config.output_dir, sizes, copies=len(config.resolutions))
    return Plan(config, parts, checkpoint, recipe, preprocessor, calibration or None, sizes)


def export(plan: Plan, parity: Parity | None = None) -> dict[str, Any]:
    """Write the artefact and return its manifest, with `output_dir` and `seconds` by stage added.

    `parity(folder)` compares the staged artefact with the checkpoint before it is published and returns a document with
    "passed"; what it returns goes into the manifest. When it did not pass, nothing is published. Raises CheckFailed for
    that, and for whatever a stage finds wrong with its own result.
    """
    config, checkpoint = plan.config, plan.checkpoint
    seconds: dict[str, float] = {}
    for warning in checkpoint.warnings:
        log(f"warning: {warning}")
    before = _signature(checkpoint)
    with (
        _stage("hash the checkpoint", seconds),
        progress("hash the checkpoint (MB)", _total_bytes(checkpoint) / 1e6) as advance,
    ):
        sources = artefact.sources(checkpoint, lambda n: advance(n / 1e6))
    with staged(config.output_dir, replace=config.overwrite) as folder:
        document = _write_parts(plan, folder, sources, seconds)
        with _stage("hash the artefact", seconds):
            document = artefact.write_manifest(folder, document)
        if parity is not None:
            with _stage("parity", seconds):
                result = _rounded(dict(parity(folder)))
            document = artefact.write_manifest(folder, document | {"parity": result})
            if result.get("passed") is not True:
                raise CheckFailed(f"parity: {result.get('verdict', 'a tolerance is broken')}; nothing was written")
        if _signature(checkpoint) != before:
            raise UserError(f"{checkpoint.path}: changed while it was exported: nothing was written; export again")
    return {**document, "output_dir": str(config.output_dir), "seconds": seconds}


def _write_parts(plan: Plan, folder: Path, sources: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """All files of the artefact but its manifest; returns what the manifest says about them."""
    config, checkpoint, preprocessor = plan.config, plan.checkpoint, plan.preprocessor
    strategy = preprocessor.image_strategy
    document: dict[str, Any] = {
        "parts": list(plan.parts),
        "sources": sources,
        "versions": artefact.versions(),
        "config": config.document(),
        "image": {
            "image_size": checkpoint.image_size,
            "image_strategy": strategy,
            "tokens_per_image": contract.tokens_per_image(checkpoint.image_size),
        },
    }
    changes = []
    if "llm" in plan.parts:
        with (
            _stage("language model", seconds),
            progress("language model (million weights)", llm.language_parameters(checkpoint) / 1e6) as advance,
        ):
            document["llm"] = llm.export_llm(checkpoint, plan.recipe, folder, lambda n: advance(n / 1e6), config.layout)
        tokenizer.write_tokenizer(checkpoint, folder)
        changes.append(f"The language model and the projector are stored for MLX by recipe {plan.recipe.name}.")
    if "vision" in plan.parts:
        with _stage("vision encoder", seconds), progress("vision encoder: fold, trace, convert"):
            notes = PackageNotes(strategy, sources["sha256"])
            document["vision"] = export_vision(
                checkpoint,
                config,
                folder / contract.PACKAGE,
                lambda size: pictures.pixels(preprocessor, size, plan.calibration),
                notes,
            )
            if "fp16" in document["vision"]:
                found = plan.calibration
                document["vision"]["fp16"]["pictures"] = f"{len(found)} given" if found else "a drawn one and noise"
        changes.append(
            "The vision encoder's branches and normalizations are folded into convolutions; it is stored as a Core ML"
            f" program in {config.compute_precision} for {_listed(document['vision']['resolutions'])} pixels"
            + (", its weights compressed." if document["vision"].get("compression", {}).get("forms") else ".")
        )
    tokenizer.write_processors(folder, checkpoint.image_size, strategy, preprocessor.mean, preprocessor.std)
    document["licences"] = artefact.carry_licences(checkpoint.path, folder, changes)
    return document


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(f"{size} x {size}" for size in sizes)


def _rounded(value: Any) -> Any:
    """Floats to three significant digits: the rest depends on the number of threads, and the manifest must not."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time a stage, and say so in a line when it is done."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)
    log(f"{name}: {seconds[name]:.1f} s")


def _signature(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the folder's files: enough to see that someone writes to it."""
    found = ((path.name, path.stat()) for path in sorted(checkpoint.path.iterdir()) if path.is_file())
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


def _total_bytes(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for path in checkpoint.files)


def _check_space(target: Path, sizes: Mapping[str, int], copies: int) -> None:
    """coremltools writes the encoder's weights twice before one copy goes, and once for each of several functions."""
    needed = sum(sizes.values()) + (1 + copies) * sizes.get(contract.PACKAGE, 0) + _SPARE_BYTES
    parent = next(folder for folder in target.expanduser().resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"--output-dir {target}: {free / 1e9:.1f} GB free, the export needs {needed / 1e9:.1f} GB: free some"
        )
