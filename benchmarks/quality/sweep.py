"""`sweep`: recipes x encoder forms x resolutions, each exported and held against the checkpoint; which one to ship.

`quantization.sweep.engine` runs the points, `benchmarks.quality.sweep_point` is what is done for each,
`quantization.sweep.report` reports them.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import environment, shared_exports
from benchmarks.quality import job, sweep_point
from fastvlm.checkpoint.adapter_flag import add_adapter, titled
from fastvlm.checkpoint.folder_kind import checkpoint_folder
from fastvlm.common.arguments import positive, share, size, whole_number
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output, present
from fastvlm.common.page import data_url
from fastvlm.common.terminal import print_table
from fastvlm.data import conversations, default_questions
from model_export.config import FORMATS, image_size
from model_export.coreai.packages import check_installed
from quantization.coreml.compression import COMPRESSIONS
from quantization.recipe import recipe_from_json, usable_recipe
from quantization.sweep import engine, report
from quantization.sweep.columns import AGREEMENT, KL, column, label, shown
from quantization.sweep.recommend import Constraints

RECIPES = (
    "fp16", "int8", "int6", "int5", "int4", "int4-gptq", "int4-dwq", "int3", "int3-mixed", "mixed-4-8", "mxfp4",
    "fit:5bpw",
)  # fmt: skip
COREAI_RECIPES = ("fp16", "int8", "palette8", "int6", "palette4", "int4", "mixed-4-8")
_PRINTED = ("bytes", "bits_per_weight", KL, AGREEMENT, "ttft_s", "peak_bytes")
_THUMBNAIL = 168  # pixels
# A point's memory: PyTorch holds its weights in float32 and works on float32 copies of some; libraries, of the point's
# process and of the export that it starts; and the encoder's activations, about so many bytes a pixel.
_BYTES_PER_WEIGHT, _LIBRARIES, _BYTES_PER_PIXEL = 5, 1500 << 20, 1500


def add_sweep(verbs: Any) -> None:
    """Add the verb to a command line's subparsers (which add the common flags)."""
    text = "Export and measure recipes x encoder forms x resolutions, and say which to ship."
    parser = verbs.add_parser("sweep", description=text)
    add = parser.add_argument
    add("--checkpoint", required=True, type=checkpoint_folder, metavar="FOLDER", help="what goes in (read-only)")
    add_adapter(parser)
    text = "what is exported: coreml (Core ML and MLX) or coreai (a bundle, in Apple's interpreter; default: coreml)"
    add("--format", choices=FORMATS, default="coreml", metavar="NAME", help=text)
    names = f"names or files (default: {', '.join(RECIPES)}; of Core AI: {', '.join(COREAI_RECIPES)})"
    add("--quant", nargs="+", type=usable_recipe, metavar="RECIPE", help=names)
    add(
        "--vision-quant",
        nargs="+",
        choices=(engine.UNCOMPRESSED, *COMPRESSIONS),
        default=[engine.UNCOMPRESSED],
        metavar="FORM",
        help="of the encoder: %(choices)s (default: fp16)",
    )
    text = "of pictures (default: the checkpoint's own)"
    add("--resolutions", nargs="+", type=image_size, metavar="PIXELS", help=text)
    add("--samples", metavar="SOURCE", help="the questions, as `evaluate` takes them and has them by default")
    add("--count", type=whole_number(), metavar="N", help="questions at most")
    add("--text", type=present, metavar="FILE", help="scored for the perplexity (default: the answers)")
    add("--calibration-data", type=present, metavar="PATH", help="as `export` takes it and has it by default")
    add(
        "--work-dir",
        type=Output(),
        default=Path("build/sweep-work"),
        metavar="FOLDER",
        help="finished points, for resuming (default: %(default)s)",
    )
    add(
        "--report",
        type=Output(files=report.FILES),
        default=Path("build/sweep"),
        metavar="FOLDER",
        help="(default: %(default)s)",
    )
    add("--jobs", type=whole_number(), metavar="N", help="points at a time (default: one a core)")
    add("--memory", type=positive, metavar="GB", help="for all of them (default: 80 %% of what is free)")
    add("--scheduler", metavar="ADDRESS", help="a Dask cluster that does the work; it must see the same files")
    add("--max-size", type=size, metavar="SIZE", help="recommend only points within this size: 500MB, 1.2GB")
    add(
        "--min-agreement",
        type=share,
        metavar="SHARE",
        help="recommend only points that keep this share of the answers: 0.99, 99%%",
    )
    parser.set_defaults(run=run_sweep)


def run_sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything, measure, write the report; "passed" is False when a point failed or none keeps the limits."""
    with progress("check, and hash the checkpoint"):
        known = _check(args)
    points, checkpoint, inputs, samples = (known[name] for name in ("points", "checkpoint", "inputs", "samples"))
    work = args.work_dir.resolve()
    settings = {
        "checkpoint": str(checkpoint.path.resolve()),
        "adapter": args.adapter and str(args.adapter.resolve()),
        "work": str(work),
        "samples": known["source"],
        "count": args.count,
        "text": args.text and str(args.text.resolve()),
        "calibration_data": args.calibration_data and str(args.calibration_data.resolve()),
        "common": shared_exports.digest(inputs, shared_exports.identity()),
    }
    weights = sum(info.size for info in checkpoint.tensors.values())
    plan = engine.Sweep(
        sweep_point.measure, settings, inputs, shared_exports.identity, partial(_need, weights), work,
        sweep_point.LIBRARIES, partial(_tidy, work),
    )  # fmt: skip
    outcome = engine.run(plan, points, args.jobs, args.memory and args.memory * 1e9, args.scheduler)
    log(f"{len(outcome.results)} of {len(points)} points, {outcome.reused} of them were there already")
    about = {
        "checkpoint": titled(checkpoint.path, args.adapter),
        "questions": f"{len(samples)} questions ({job.told(known['source'])})",
        "inputs": inputs,
        "notes": {
            "Quality": "held against the checkpoint in PyTorch, float32, at its own resolution: KL in nats and the same"
            " likeliest token over the reference's own answers, fed to both; answers are greedy.",
            "Calibration": f"recipes that calibrate: on {known['calibration']}.",
            "Sizes": "all files of the artefact; bits a weight: of the language model and the projector.",
        },
    }
    document = report.document(
        points, outcome, about, _machine(outcome), Constraints(args.max_size, args.min_agreement)
    )
    page = report.write(args.report, document, _thumbnails(document, samples))
    if not args.json:
        _print(document)
    log(f"page: {page}")
    limited = args.max_size is not None or args.min_agreement is not None
    passed = not outcome.errors and not (limited and document["recommendation"]["point"] is None)
    return {"passed": passed, "page": str(page), **document}


def _machine(outcome: engine.Outcome) -> dict[str, Any]:
    """The machine and the runners of the timings."""
    runners = {name for result in outcome.results.values() for name in result["timings"]["runners"].values()}
    ran = ", ".join(sorted(runners)) or "nothing"
    return {
        "notes": {
            "TTFT": f"encode, project and prefill, measured on this machine with {ran}, not on a device: medians of"
            f" {sweep_point.TIMED} or more, with other points running beside it unless --jobs is 1.",
            "Machine": environment.machine_line(),
            "Versions": ", ".join(f"{name} {version}" for name, version in environment.versions().items()),
            "Command": shlex.join(["fastvlm", *sys.argv[1:]]),
        }
    }


def _need(weights: int, point: engine.Point) -> int:
    copies = 2 if recipe_from_json(point["recipe"]).calibrates else 1  # of a calibrated export
    return copies * _BYTES_PER_WEIGHT * weights + _LIBRARIES + _BYTES_PER_PIXEL * point["resolution"] ** 2


def _tidy(work: Path) -> None:
    """Remove what only a running sweep needs: the exported halves and their features, and what killed points left."""
    for pattern in ("artefact.*", "shared/llm-*", "shared/vision-*", "shared/features-*"):
        for path in work.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _check(args: argparse.Namespace) -> dict[str, Any]:
    """Refuse, all at once, whatever can be known to be wrong before any work. Returns "points", "checkpoint", "inputs"
    (hashes of all that the settings name), "samples" and "source" (where they come from, see `job.choose`)."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from model_export import artefact
    from model_export.coreai import bundle, compress
    from model_export.language import llm

    faults: list[str] = []
    inputs: dict[str, Any] = {}
    coreai = args.format == "coreai"
    known: dict[str, Any] = {"inputs": inputs, "points": [], "checkpoint": None, "calibration": "built-in questions"}

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            faults.append(str(error))

    with noted():
        known["checkpoint"] = checkpoint = open_checkpoint(args.checkpoint, adapter=args.adapter)
        inputs["checkpoint"] = artefact.sources(checkpoint)["sha256"]
    if coreai:
        with noted():
            bundle.check(checkpoint) if known["checkpoint"] else check_installed()
        if args.vision_quant != [engine.UNCOMPRESSED]:
            faults.append("--vision-quant with --format coreai: a recipe names the forms of all three programs")
    with noted():
        sizes = args.resolutions or [checkpoint.image_size if known["checkpoint"] else 0]
        recipes = args.quant or [*(COREAI_RECIPES if coreai else RECIPES)]
        points = engine.grid(recipes, args.vision_quant, sizes)
        known["points"] = [{**point, "format": args.format} for point in points] if coreai else points
    needed = 0
    for document in {point["recipe"]["name"]: point["recipe"] for point in known["points"]}.values():
        recipe = recipe_from_json(document)
        if recipe.vision and args.vision_quant != [engine.UNCOMPRESSED]:
            faults.append(
                f"--vision-quant with recipe {recipe.name}, which names the encoder's forms itself: leave out one"
            )
        with noted():
            if known["checkpoint"] and coreai:
                shapes = compress.bundle_shapes(checkpoint)
                needed += sum(bundle.planned_bytes(compress.plan_of(recipe, shapes), shapes).values())
            elif known["checkpoint"]:
                needed += llm.planned_bytes(checkpoint, recipe)
    work = args.work_dir.resolve()
    free = shutil.disk_usage(next(folder for folder in (work, *work.parents) if folder.is_dir())).free
    if needed > free:
        faults.append(
            f"--work-dir {args.work_dir}: the exported language models need {shown(needed, 'MB')},"
            f" {shown(free, 'MB')} are free: free some, or sweep fewer"
        )
    with noted():
        known["source"] = job.source(args.samples, args.checkpoint, args.adapter)
        known["samples"] = job.choose(known["source"], args.count)
        inputs["samples"] = samples_sha256(known["samples"])
    with noted():
        if args.text:
            from benchmarks.quality.quality import read_text, windows  # torch comes with it

            text = read_text(args.text)
            inputs["text"] = hashlib.sha256(text.content.encode()).hexdigest()
            if known["checkpoint"]:
                windows(checkpoint.tokenizer(), text)  # refuses one that is too short
    with noted():
        own = default_questions.own(args.checkpoint, args.adapter, default_questions.TRAINING)
        if calibration := args.calibration_data or own:
            known["calibration"] = calibration.name
            inputs["calibration"] = samples_sha256(conversations.load(calibration))
        if own and not args.calibration_data:
            log(f"calibration on {own}, which the fine-tune left: --calibration-data names other questions")
    if faults:
        raise UserError("; ".join(faults))
    return known


def samples_sha256(samples: Sequence[conversations.Sample]) -> str:
    """The hash of questions, answers and pictures. UserError naming every file that is no picture."""
    conversations.check(samples)
    digest = hashlib.sha256()
    for sample in samples:
        image = sample.image() if sample.image is not None else None
        pixels = hashlib.sha256(image.tobytes()).hexdigest() if image else ""
        digest.update(json.dumps([sample.name, sample.question, sample.answer, image and image.size, pixels]).encode())
    return digest.hexdigest()


def _thumbnails(document: Mapping[str, Any], samples: Sequence[conversations.Sample]) -> dict[str, str]:
    names = {row["name"] for row in report.examples(document)["rows"]}
    pictures = {}
    for sample in samples:
        if sample.name in names and sample.image is not None:
            image = sample.image()
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            pictures[sample.name] = data_url(image)
    return pictures


def _print(document: Mapping[str, Any]) -> None:
    """The points as a table, what failed, the recommendation."""
    points, columns = document["points"], [column(key) for key in _PRINTED]
    rows = []
    for row in points:
        figures = row["figures"] | document["timings"]["points"][row["name"]]
        rows.append((label(row, points), *(shown(figures.get(column.key), column.unit) for column in columns)))
    numbers = [column.label for column in columns]
    if rows:
        print_table("sweep", ("point", *numbers), rows, numbers)
    for row in document["failed"]:
        print(f"failed: {row['name']}: {row['error']}")
    print(document["recommendation"]["sentence"])
