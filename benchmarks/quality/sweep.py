"""`sweep`: recipes x encoder forms x resolutions, each exported and held against the checkpoint; which one to ship.

`quantization.sweep.engine` runs the points, `benchmarks.quality.sweep_point` is what is done for each,
`quantization.sweep.report` tells of them.
"""

import argparse
import hashlib
import json
import re
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
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.common.page import data_url
from fastvlm.common.terminal import print_table
from fastvlm.data import conversations
from fastvlm.data.scenes import knows_demo
from model_export.config import size_faults
from quantization.recipe import recipe_from_json
from quantization.sweep import engine, report
from quantization.sweep.columns import AGREEMENT, KL, column, label, shown
from quantization.sweep.recommend import Constraints

RECIPES = (
    "fp16", "int8", "int6", "int5", "int4", "int4-gptq", "int4-dwq", "int3", "int3-mixed", "mixed-4-8", "mxfp4",
    "fit:5bpw",
)  # fmt: skip
_PRINTED = ("bytes", "bits_per_weight", KL, AGREEMENT, "ttft_s", "peak_bytes")
_THUMBNAIL = 168  # pixels
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(MB|GB)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?(%?)")
# A point's memory: PyTorch holds its weights in float32 and works on float32 copies of some; libraries, of the point's
# process and of the export that it starts; and the encoder's activations, about so many bytes a pixel.
_BYTES_PER_WEIGHT, _LIBRARIES, _BYTES_PER_PIXEL = 5, 1500 << 20, 1500


def add_sweep(verbs: Any) -> None:
    """Add the verb to a command line's subparsers (which add the common flags)."""
    text = "export and measure recipes x encoder forms x resolutions, and say which to ship"
    parser = verbs.add_parser("sweep", description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FOLDER", help="what goes in (read-only)")
    parser.add_argument(
        "--quant",
        nargs="+",
        default=list(RECIPES),
        metavar="RECIPE",
        help=f"names or files (default: {', '.join(RECIPES)})",
    )
    parser.add_argument(
        "--vision-quant", nargs="+", default=[engine.WIDE], metavar="FORM", help="of the encoder (default: fp16)"
    )
    parser.add_argument(
        "--resolutions", nargs="+", type=int, metavar="PIXELS", help="of pictures (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--samples", metavar="SOURCE", help="what is asked, as `evaluate` takes it (default: demo or drawn)"
    )
    parser.add_argument("--count", type=int, metavar="N", help="questions at most")
    parser.add_argument("--text", type=Path, metavar="FILE", help="scored for the perplexity (default: the answers)")
    parser.add_argument("--calibration-data", type=Path, metavar="PATH", help="for the recipes that calibrate")
    parser.add_argument(
        "--work-dir", type=Output(), default=Path("build/sweep-work"), metavar="FOLDER",
        help="finished points, for resuming (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--report",
        type=Output(files=report.FILES),
        default=Path("build/sweep"),
        metavar="FOLDER",
        help="(default: %(default)s)",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="points at a time (default: one a core)")
    parser.add_argument("--memory", type=float, metavar="GB", help="for all of them (default: 80 %% of what is free)")
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="a Dask cluster that does the work; it must see the same files"
    )
    parser.add_argument("--max-size", metavar="SIZE", help="recommend within this: 500MB, 1.2GB")
    parser.add_argument("--min-agreement", metavar="SHARE", help="recommend what keeps this of the answers: 0.99, 99%%")
    parser.set_defaults(run=run_sweep)


def run_sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything, measure, write the report; "passed" is False when a point failed."""
    with progress("check, and hash the checkpoint"):
        known = _check(args)
    points, checkpoint, inputs = known["points"], known["checkpoint"], known["inputs"]
    work = args.work_dir.resolve()
    settings = {
        "checkpoint": str(checkpoint.path.resolve()),
        "work": str(work),
        "samples": known["source"],
        "count": args.count,
        "text": _resolved(args.text),
        "calibration_data": _resolved(args.calibration_data),
        "common": shared_exports.digest(inputs, shared_exports.identity()),
    }
    weights = sum(info.size for info in checkpoint.tensors.values())
    plan = engine.Sweep(
        sweep_point.measure,
        settings,
        inputs,
        shared_exports.identity,
        partial(_need, weights),
        work,
        partial(_tidy, work),
    )
    outcome = engine.run(plan, points, args.jobs, args.memory and args.memory * 1e9, args.scheduler)
    log(f"{len(outcome.results)} of {len(points)} points, {outcome.found} of them were there already")
    found = report.document(points, outcome, _about(known), _machine(outcome), known["constraints"])
    page = report.write(args.report, found, _thumbnails(found, known["samples"]))
    if not args.json:
        _print(found)
    log(f"page: {page}")
    return {"passed": not outcome.errors, "page": str(page), **found}


def _about(known: Mapping[str, Any]) -> dict[str, Any]:
    """What was swept."""
    return {
        "checkpoint": known["checkpoint"].path.resolve().name,
        "questions": f"{len(known['samples'])} questions ({known['source_name']})",
        "inputs": known["inputs"],
        "notes": {
            "Quality": "held against the checkpoint in PyTorch, float32, at its own resolution: KL in nats and the same"
            " likeliest token over the reference's own answers, fed to both; answers are greedy.",
            "Sizes": "all files of the artefact; bits a weight: of the language model and the projector.",
        },
    }


def _machine(outcome: engine.Outcome) -> dict[str, Any]:
    """Where and with what it was timed."""
    runners = {name for one in outcome.results.values() for name in one["timings"]["runners"].values()}
    ran = ", ".join(sorted(runners)) or "nothing"
    return {
        "notes": {
            "TTFT": f"encode, project and prefill, measured on this machine with {ran}, not on a device: medians of"
            f" {sweep_point.TIMED} or more, with other points running beside it unless --jobs is 1.",
            "Machine": environment.machine_line(),
            "Versions": ", ".join(f"{name} {version}" for name, version in environment.versions().items()),
            "Command": shlex.join(["python", "-m", "quantization", *sys.argv[1:]]),
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


def _resolved(path: Path | None) -> str | None:
    return str(path.resolve()) if path else None


def _check(args: argparse.Namespace) -> dict[str, Any]:
    """Refuse, all at once, whatever can be known to be wrong; returns what was found on the way."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from model_export import artefact
    from model_export.language import llm

    faults: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            faults.append(str(error))

    found: dict[str, Any] = {"constraints": _constraints(args, faults), "samples": [], "points": []}
    for flag, value in (("--jobs", args.jobs), ("--count", args.count), ("--memory", args.memory)):
        if value is not None and not value > 0:
            faults.append(f"{flag}: got {value:g}, expected more than 0")
    for size in args.resolutions or ():
        faults += size_faults("--resolutions", size)
    inputs: dict[str, Any] = {}
    with noted():
        found["checkpoint"] = checkpoint = open_checkpoint(args.checkpoint)
        args.resolutions = args.resolutions or [checkpoint.image_size]
        inputs["checkpoint"] = artefact.sources(checkpoint)["sha256"]
    with noted():
        found["points"] = engine.grid(args.quant, args.vision_quant, args.resolutions or [0])
    sizes: list[int] = []
    recipes = {point["recipe"]["name"]: recipe_from_json(point["recipe"]) for point in found["points"]}
    for recipe in recipes.values() if "checkpoint" in found else ():
        if recipe.vision and args.vision_quant != [engine.WIDE]:
            faults.append(
                f"--vision-quant with recipe {recipe.name}, which says the encoder's forms itself: leave out one"
            )
        with noted():
            sizes.append(llm.planned_bytes(checkpoint, recipe))
    work = args.work_dir.resolve()
    free = shutil.disk_usage(next(folder for folder in (work, *work.parents) if folder.is_dir())).free
    if sum(sizes) > free:
        needed = f"{shown(sum(sizes), 'MB')}, {shown(free, 'MB')} are free"
        faults.append(
            f"--work-dir {args.work_dir}: the exported language models need {needed}: free some, or sweep fewer"
        )
    with noted():
        source = args.samples or ("demo" if knows_demo(args.checkpoint) else "drawn")
        found["source_name"] = Path(source).name
        found["source"] = source if source in (job.DEMO, job.DRAWN) else str(Path(source).resolve())
        found["samples"] = job.choose(found["source"], args.count)
        inputs["samples"] = samples_sha256(found["samples"])
    with noted():
        if args.text:
            from benchmarks.quality.quality import read_text, windows

            text = read_text(args.text)
            inputs["text"] = hashlib.sha256(text.content.encode()).hexdigest()
            if "checkpoint" in found:
                windows(checkpoint.tokenizer(), text)  # refuses one that is too short
    with noted():
        if args.calibration_data:
            inputs["calibration"] = samples_sha256(conversations.load(args.calibration_data))
    if faults:
        raise UserError("; ".join(faults))
    return found | {"inputs": inputs}


def _constraints(args: argparse.Namespace, faults: list[str]) -> Constraints:
    size = share = None
    if args.max_size is not None:
        read = _SIZE.fullmatch(args.max_size)
        if read is None:
            faults.append(f"--max-size {args.max_size}: expected a size such as 500MB or 1.2GB")
        else:
            size = float(read[1]) * {"MB": 1e6, "GB": 1e9}[read[2]]
    if args.min_agreement is not None:
        read = _SHARE.fullmatch(args.min_agreement)
        share = float(read[1]) / (100 if read[2] else 1) if read else 2.0
        if share > 1:
            faults.append(f"--min-agreement {args.min_agreement}: expected a share such as 0.99 or 99%")
    return Constraints(size, share)


def samples_sha256(samples: Sequence[conversations.Sample]) -> str:
    """Of questions, answers and pictures. UserError naming all pictures that are none."""
    conversations.check(samples)
    digest = hashlib.sha256()
    for one in samples:
        image = one.image() if one.image is not None else None
        pixels = hashlib.sha256(image.tobytes()).hexdigest() if image else ""
        digest.update(json.dumps([one.name, one.question, one.answer, image and image.size, pixels]).encode())
    return digest.hexdigest()


def _thumbnails(found: Mapping[str, Any], samples: Sequence[conversations.Sample]) -> dict[str, str]:
    names = {row["name"] for row in report.examples(found)["rows"]}
    pictures = {}
    for sample in samples:
        if sample.name in names and sample.image is not None:
            image = sample.image()
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            pictures[sample.name] = data_url(image)
    return pictures


def _print(found: Mapping[str, Any]) -> None:
    """The points as a table, what failed, the recommendation."""
    points, columns = found["points"], [column(key) for key in _PRINTED]
    rows = []
    for row in points:
        figures = row["figures"] | found["timings"]["points"][row["name"]]
        rows.append((label(row, points), *(shown(figures.get(one.key), one.unit) for one in columns)))
    numbers = [one.label for one in columns]
    if rows:
        print_table("sweep", ("point", *numbers), rows, numbers)
    for row in found["failed"]:
        print(f"failed: {row['name']}: {row['error']}")
    print(found["recommendation"]["sentence"])
