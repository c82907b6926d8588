"""The export of a checkpoint to an artefact: the stages of `fastvlm export`, `export-vision` and `export-llm`."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.staging import held, remove, staged, write_file
from fastvlm.common.units import format_bytes
from fastvlm.data import conversations, default_questions, pictures
from fastvlm.data.records import evenly
from model_export import artefact, contract
from model_export.config import DEFAULT_TARGET, ExportConfig
from model_export.coreai import bundle, packages
from model_export.encoder import compress
from model_export.language import llm, tokenizer
from quantization.calibration import budget
from quantization.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from fastvlm.model.surface import Vision
    from model_export.coreai.contract import Shape
    from model_export.encoder.vision import Pictures
    from quantization.coreai.plan import Plan as FormPlan

PARTS = ("vision", "llm")
# What the folded encoder's weights take for each parameter; biases and constants are noise beside them.
_BYTES_PER_WEIGHT = {"float16": 2, "float32": 4}
CALIBRATION_SAMPLES = 256  # questions at most that something is calibrated on
_UNASKED = 16  # pictures at most of a fine-tune's own that the encoder is measured on
_SPARE_BYTES = 64 << 20  # tokenizer, configurations, manifest
Parity = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Everything that an export needs, resolved: nothing of it can be refused later."""

    config: ExportConfig
    parts: tuple[str, ...]
    checkpoint: Checkpoint
    recipe: Recipe
    calibration: list[conversations.Sample] | None
    sizes: dict[str, int]
    signature: list[tuple[str, int, int, int]]  # of the checkpoint's files, as `_signature` has it
    bundle: "tuple[Shape, FormPlan] | None" = None  # of a Core AI bundle: its sizes, and its weights' forms

    def document(self) -> dict[str, Any]:
        """The files to be written, with estimated sizes in bytes."""
        return {
            "output_dir": str(self.config.output_dir),
            "parts": list(self.parts),
            "config": self.config.document(),
            "layout": self.checkpoint.layout,
            "adapter": self.checkpoint.adapter and self.checkpoint.adapter.kind,
            "image_size": self.checkpoint.image_size,
            "image_strategy": self.checkpoint.image_strategy,
            "recipe": self.recipe.to_json(),
            "estimated_bytes": self.sizes,
            "warnings": list(self.checkpoint.warnings),
        }


def plan(config: ExportConfig, parts: tuple[str, ...] = PARTS) -> Plan:
    """Resolve an export without writing anything. Raises UserError for whatever would stop it, disk space included."""
    recipe = load_recipe(config.quant)
    artefact.check_target(config.output_dir, config.overwrite)
    checkpoint = open_checkpoint(config.checkpoint, adapter=config.adapter)
    if config.image_size:
        preprocessor = replace(checkpoint.preprocessor, image_size=config.image_size)
        checkpoint = replace(checkpoint, preprocessor=preprocessor)
    signature = _signature(checkpoint)
    config = _with_questions(config, recipe, parts)
    calibration = _calibration(config, recipe, parts)
    for why, target in config.newer_target.items():
        if config.deployment_target != DEFAULT_TARGET:
            log(f"deployment target {config.deployment_target}: {why}, new in {target}")
    sizes: dict[str, int] = {}
    if config.format == "coreai":
        from model_export.coreai.compress import bundle_shapes, plan_of

        bundle.check(checkpoint)
        shape = bundle.shape_of(checkpoint, config.max_context_length, config.cache == "growing")
        shapes = bundle_shapes(checkpoint)
        forms = plan_of(recipe, shapes)
        sizes = bundle.planned_bytes(forms, shapes)
        _check_space(config.output_dir, sizes, copies=0)
        return Plan(config, parts, checkpoint, recipe, calibration, sizes, signature, (shape, forms))
    if "vision" in parts:
        weights = sum(info.size for name, info in checkpoint.tensors.items() if name.startswith(naming.VISION))
        sizes[contract.PACKAGE] = weights * _BYTES_PER_WEIGHT[config.compute_precision]
        if config.compression.rules:
            from fastvlm.model.build import folded_skeleton

            shapes = compress.layer_shapes(folded_skeleton(checkpoint))
            sizes[contract.PACKAGE] = compress.size_of(shapes, compress.assign(config.compression, shapes).forms)
    if "llm" in parts:
        recipe = _without_idle_budget(recipe, checkpoint, config.layout)
        sizes[contract.WEIGHTS_GLOB] = llm.planned_bytes(checkpoint, recipe, config.layout)
    _check_space(config.output_dir, sizes, copies=len(config.resolutions))
    return Plan(config, parts, checkpoint, recipe, calibration, sizes, signature)


def _without_idle_budget(recipe: Recipe, checkpoint: Checkpoint, layout: str) -> Recipe:
    """The recipe with its choices made where its budget holds the largest of all: calibration would decide nothing."""
    if recipe.budget is None:
        return recipe
    shapes = llm.weight_shapes(checkpoint, layout)
    settled = budget.within_reach(recipe, shapes, llm.ELSEWHERE_OF[layout])
    if settled is not None:
        widths = [getattr(scheme, "bits", 16) for rule in recipe.rules for scheme in rule.choices]
        largest = f"{max(widths)} bit, the largest that {recipe.name.partition(':')[0]} chooses among"
        log(f"recipe {recipe.name}: every weight fits at {largest}: nothing to calibrate")
    return settled or recipe


def export(plan: Plan, parity: Parity | None = None, vision: "Vision | None" = None) -> dict[str, Any]:
    """Write the artefact and return its manifest, with `output_dir` and `seconds` by stage added. `vision` is what the
    language model is calibrated on where no encoder is exported with it (None: the checkpoint's own).

    `parity(folder)` compares the staged artefact with the checkpoint before it is published and returns a document with
    "passed"; what it returns goes into the manifest. When it did not pass, nothing is published. Raises CheckFailed for
    that, and for whatever a stage finds wrong with its own result.
    """
    config, checkpoint = plan.config, plan.checkpoint
    seconds: dict[str, float] = {}
    for warning in checkpoint.warnings:
        log(f"warning: {warning}")
    target = config.output_dir.expanduser().resolve()
    with (
        _hashed(checkpoint) as sources,
        staged(target, replace=config.overwrite) as folder,
        _kept(target) if config.format == "coreai" else nullcontext(target) as kept,
    ):
        document = _write_parts(plan, folder, sources.result, seconds, vision, kept)
        with _stage("hash the artefact", seconds):
            document = artefact.write_manifest(folder, document)
        if parity is not None:
            with _timed("parity", seconds):  # it shows its own progress
                result = _rounded(dict(parity(folder)))
            document = artefact.write_manifest(folder, document | {"parity": result})
            if result.get("passed") is not True:
                raise CheckFailed(f"parity: {result.get('verdict', 'a tolerance is broken')}; nothing was written")
        if _signature(checkpoint) != plan.signature:
            what = f"{checkpoint.path}" + ("" if config.adapter is None else f" or {config.adapter}")
            raise UserError(f"{what}: changed while it was exported: nothing was written; export again")
    return {**document, "output_dir": str(config.output_dir), "seconds": seconds}


@contextmanager
def _hashed(checkpoint: Checkpoint) -> Iterator[Future[dict[str, Any]]]:
    """The result of `artefact.sources`, made beside the other work until the block ends."""
    ended = threading.Event()

    def advance(count: int) -> None:
        if ended.is_set():
            raise InterruptedError("the export has ended")

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(artefact.sources, checkpoint, advance)
        finally:
            ended.set()


def _write_parts(
    plan: Plan,
    folder: Path,
    sources: Callable[[], dict[str, Any]],
    seconds: dict[str, float],
    sees: "Vision | None",
    kept: Path,
) -> dict[str, Any]:
    """Write all files of the artefact but its manifest; returns the manifest's entries about them. Finished assets of a
    bundle stay in `kept`."""
    config, checkpoint, preprocessor = plan.config, plan.checkpoint, plan.checkpoint.preprocessor
    strategy = preprocessor.image_strategy
    document: dict[str, Any] = {
        "parts": list(plan.parts),
        "versions": artefact.versions(packages.PACKAGES if config.format == "coreai" else ()),
        "config": config.document(),
        "image": {
            "image_size": checkpoint.image_size,
            "image_strategy": strategy,
            "tokens_per_image": contract.tokens_per_image(checkpoint.image_size),
        },
    }
    if config.format == "coreai":
        return document | _write_bundle(plan, folder, sources(), seconds, kept)
    changes = {}
    calibrated = plan.recipe.calibrates
    if "llm" in plan.parts and not calibrated:
        document["llm"], changes["llm"] = _write_language(plan, folder, seconds, None)
    if "vision" in plan.parts:
        from model_export.encoder import vision  # noqa: F401  imported beside the hashing, not after it
    with _stage("hash the checkpoint", seconds):  # what is left of it
        document["sources"] = sources()
    if "vision" in plan.parts:
        document["vision"], changes["vision"] = _write_encoder(plan, folder, document["sources"]["sha256"], seconds)
    if "llm" in plan.parts and calibrated:  # on what the exported encoder gives
        if "vision" in plan.parts:
            from model_export.runtime import ExecutorVision

            sees = ExecutorVision(folder)
        document["llm"], changes["llm"] = _write_language(plan, folder, seconds, sees)
    if config.layout != "mlx-lm":
        tokenizer.write_processors(folder, checkpoint.image_size, strategy, preprocessor.mean, preprocessor.std)
    told = [*_merged(document["sources"]), *(changes[part] for part in sorted(changes))]
    document["licences"] = artefact.carry_licences(checkpoint.path, folder, told, config.adapter)
    return document


def _merged(sources: Mapping[str, Any]) -> list[str]:
    """A sentence for the NOTICE about an adapter."""
    adapter = artefact.fine_tuned(sources)
    return [] if adapter is None else [f"Fine-tuned: the weights are merged in float32 with an adapter ({adapter})."]


@contextmanager
def _kept(target: Path) -> Iterator[Path]:
    """A folder beside the output that outlives an export that is stopped; one that ends well removes it."""
    folder = target.with_name(f".{target.name}.assets")
    with held(folder, f"--output-dir {target}: another export is writing it: wait until that ends"):
        yield folder
        remove(folder)


def _write_bundle(
    plan: Plan, folder: Path, sources: dict[str, Any], seconds: dict[str, float], kept: Path
) -> dict[str, Any]:
    """All files of a Core AI bundle but its manifest; returns the manifest's entries about them.

    An export that was stopped is taken up behind its last finished asset, if checkpoint, settings and versions are the
    same; with pictures of the user's, whose content nobody has hashed, it begins anew.
    """
    from model_export.coreai.programs import Programs
    from model_export.encoder.vision import measured_on

    assert plan.bundle is not None
    config, checkpoint, (shape, forms) = plan.config, plan.checkpoint, plan.bundle
    programs = Programs(checkpoint, shape, plan=forms)
    settings = [sources["sha256"], config.document(), plan.recipe.to_json(), artefact.versions(packages.PACKAGES)]
    same = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    assets = kept / same
    for other in kept.iterdir():
        if other.is_dir() and (other != assets or config.calibration_data is not None):
            shutil.rmtree(other)
    assets.mkdir(exist_ok=True)

    def asset(role: str, write: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any]:
        """Write an asset whole, or take the finished one, into the bundle; returns the facts about it."""
        done, name = assets / f"{role}.json", bundle.ASSETS[role]
        if done.exists():
            log(f"{name}: finished by the export before, which was stopped")
        else:
            unfinished = assets / f"unfinished{bundle.SUFFIX}"
            for leftover in (unfinished, assets / name):
                shutil.rmtree(leftover, ignore_errors=True)
            with _timed(role, seconds):
                facts = write(unfinished) or {}
            unfinished.rename(assets / name)
            write_file(done, json.dumps(facts).encode())
        shutil.copytree(assets / name, folder / name, copy_function=_link)
        document: dict[str, Any] = json.loads(done.read_bytes())
        return document

    asset("embedding", programs.write_embedding)
    asset("main", programs.write_decoder)
    measured = partial(measured_on, config, [shape.image_size], _pictures(plan))
    facts = asset("vision", lambda target: programs.write_vision(target, measured))
    bundle.write_files(checkpoint, shape, folder)
    changes = [
        *_merged(sources),
        "The vision encoder's branches and normalizations are folded into convolutions.",
        f"All weights are stored in Core AI programs, which compute in float16, by recipe {plan.recipe.name}.",
    ]
    return {
        "sources": sources,
        "vision": {
            "image_size": shape.image_size,
            "channels": shape.hidden,
            "resolutions": [shape.image_size],
            **facts,
        },
        "llm": bundle.language_facts(checkpoint, shape, plan.recipe.to_json(), forms, folder),
        "licences": artefact.carry_licences(checkpoint.path, folder, changes, config.adapter),
    }


def _link(source: str, target: str) -> None:
    """The same file under another name; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _pictures(plan: Plan) -> "Pictures":
    """The pictures that the encoder is measured on: those of --calibration-data, else a drawn one and noise."""
    given = _given(plan)
    return lambda size: pictures.pixels(plan.checkpoint.preprocessor, size, given or None)


def _given(plan: Plan) -> list[Callable[[], Any]]:
    """The pictures of --calibration-data; some of those that nobody asked for, since each takes an encoder's time."""
    given = [sample.image for sample in plan.calibration or () if sample.image is not None]
    return given if _whose(plan.config) == "given" else given[:: -(-len(given) // _UNASKED) or 1]


def _whose(config: ExportConfig) -> str:
    """Where the questions for calibration come from, in a word or two."""
    if config.calibration_data is None:
        return "built-in"
    own = default_questions.own(config.checkpoint, config.adapter, default_questions.TRAINING)
    return "the fine-tune's" if config.calibration_data == own else "given"


def _write_language(
    plan: Plan, folder: Path, seconds: dict[str, float], sees: "Vision | None"
) -> tuple[dict[str, Any], str]:
    """The language model's files, calibrated on what `sees` gives; returns the manifest's facts and a sentence for the
    NOTICE."""
    config, checkpoint, recipe = plan.config, plan.checkpoint, plan.recipe
    ready: Mapping[str, Mapping[str, Any]] = {}
    facts: dict[str, Any] = {}
    if recipe.calibrates:
        from model_export.language.calibrate import calibrate

        with _stage("calibration", seconds):
            recipe, ready, facts["calibration"] = calibrate(
                checkpoint, recipe, checkpoint.preprocessor, plan.calibration, sees, config.layout
            )
        facts["calibration"]["questions"] = _whose(config)
    size = llm.bytes_to_read(checkpoint, recipe, config.layout)
    with _stage("language model", seconds, size) as advance:
        facts |= llm.export_llm(checkpoint, recipe, folder, advance, config.layout, ready)
    tokenizer.write_tokenizer(checkpoint, folder)
    what = "The language model is" if config.layout == "mlx-lm" else "The language model and the projector are"
    return facts, f"{what} stored for MLX by recipe {recipe.name}."


def _write_encoder(plan: Plan, folder: Path, source: str, seconds: dict[str, float]) -> tuple[dict[str, Any], str]:
    """The encoder's package; returns the manifest's facts and a sentence for the NOTICE."""
    from model_export.encoder.vision import export_vision

    config = plan.config
    with _stage("vision encoder", seconds):
        facts = export_vision(
            plan.checkpoint,
            config,
            folder / contract.PACKAGE,
            _pictures(plan),
            source,
        )
    given = len(_given(plan))
    if "fp16" in facts:
        facts["fp16"]["pictures"] = f"{given} {_whose(config)} and noise" if given else "a drawn one and noise"
    compressed = ", its weights compressed." if facts.get("compression", {}).get("forms") else "."
    sizes = " and ".join(f"{size} x {size}" for size in facts["resolutions"])
    return facts, (
        "The vision encoder's branches and normalizations are folded into convolutions; it is stored as a Core ML"
        f" program in {config.compute_precision} for {sizes} pixels{compressed}"
    )


def _with_questions(config: ExportConfig, recipe: Recipe, parts: tuple[str, ...]) -> ExportConfig:
    """The settings with the questions that a fine-tune left, where none are given and the export looks at any."""
    if config.calibration_data is not None or ("vision" not in parts and not recipe.calibrates):
        return config
    own = default_questions.own(config.checkpoint, config.adapter, default_questions.TRAINING)
    if own is not None:
        log(f"calibration on {own}, which the fine-tune left: --calibration-data names other questions")
    return replace(config, calibration_data=own)


def _calibration(config: ExportConfig, recipe: Recipe, parts: tuple[str, ...]) -> list[conversations.Sample] | None:
    """The questions of --calibration-data, some of them evenly spaced if there are many."""
    if config.calibration_data is None:
        return None
    if "vision" not in parts and not recipe.calibrates:
        raise UserError(f"--calibration-data: recipe {recipe.name} has nothing to calibrate: leave it out")
    try:
        samples = conversations.load(config.calibration_data)
    except UserError as error:
        raise UserError(f"--calibration-data: {error}") from None
    used = evenly(samples, CALIBRATION_SAMPLES)
    if len(used) < len(samples):
        log(f"--calibration-data: {len(used)} of {len(samples)} questions are used")
    return used


def _rounded(value: Any) -> Any:
    """Measured floats to three significant digits: the rest depends on the threads, and the manifest must not."""
    if isinstance(value, dict):
        return {key: item if key == "tolerance" else _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


@contextmanager
def _stage(name: str, seconds: dict[str, float], size: float | None = None) -> Iterator[Callable[[float], None]]:
    """Time a stage and show its progress: of `size` bytes, if that is what advances."""
    with _timed(name, seconds), progress(name, size, sized=size is not None) as advance:
        yield advance


def _signature(checkpoint: Checkpoint) -> list[tuple[str, int, int, int]]:
    """Paths, sizes and times (of the content, and of any change) of the files of checkpoint and adapter: enough to see
    that someone writes to them, or has since."""
    folders = [checkpoint.path] if checkpoint.adapter is None else [checkpoint.path, checkpoint.adapter.path]
    paths = {path for folder in folders for path in folder.iterdir() if path.is_file()} | {*checkpoint.files}
    statuses = ((str(path), path.stat()) for path in sorted(paths))
    return [(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for name, status in statuses]


def _check_space(target: Path, sizes: Mapping[str, int], copies: int) -> None:
    """coremltools writes the encoder's weights twice before one copy goes, and once for each of several functions."""
    needed = sum(sizes.values()) + (1 + copies) * sizes.get(contract.PACKAGE, 0) + _SPARE_BYTES
    parent = next(folder for folder in target.expanduser().resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"--output-dir {target}: {format_bytes(free)} free, the export needs {format_bytes(needed)}: free some"
        )
