"""`export`, `export-vision` and `export-llm`: a checkpoint into an artefact."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastvlm.checkpoint.folder_kind import checkpoint_folder
from fastvlm.common.arguments import Parser, number, whole_number
from fastvlm.common.cli import progress
from fastvlm.common.files import Output, present
from fastvlm.common.units import counted, format_bytes
from model_export import config as configuration
from model_export import contract, encoder_forms
from model_export.commands.inspect import parity_lines
from quantization.recipe import usable_recipe

# From the staged artefact's folder to what the manifest keeps of its comparison with the checkpoint
Prove = Callable[[argparse.Namespace, Path], dict[str, Any]]


def add_vision(verbs: Any) -> None:
    """Add the export of the encoder alone."""
    _add_export(verbs.add_parser("vision", description="Export the vision encoder alone."), ("vision",))


def add_llm(verbs: Any) -> None:
    """Add the export of the language model and the projector alone."""
    text = "Export the language model and the projector alone."
    _add_export(verbs.add_parser("llm", description=text), ("llm",))


def add_all(verbs: Any, prove: Prove) -> None:
    """Add the export of both halves, which `prove` compares with the checkpoint before they are published."""
    text = "Export both halves, prove them against the checkpoint, publish the artefact."
    parser = verbs.add_parser("all", description=text)
    _add_export(parser, ("vision", "llm"), prove, configuration.FORMATS)
    text = "coreml: Core ML and MLX; coreai: a bundle for macOS 27 and iOS 27 (default: %(default)s)"
    parser.add_argument("--format", choices=configuration.FORMATS, default="coreml", metavar="NAME", help=text)
    _add_proof(parser)


def add_coreai(verbs: Any, prove: Prove) -> None:
    """Add the export of a Core AI bundle: as `all` with `--format coreai`."""
    text = "Export a Core AI bundle for macOS 27 and iOS 27, prove it in Apple's runtime, publish it."
    parser = verbs.add_parser("coreai", description=text)
    _add_export(parser, ("vision", "llm"), prove, ("coreai",))
    parser.set_defaults(format="coreai")
    _add_proof(parser)


def _add_proof(parser: Parser) -> None:
    parser.add_argument("--parity-limit", type=whole_number(), metavar="N", help="compare on N demo questions")
    parser.add_argument("--parity-report", type=Output(), metavar="FILE", help="write parity's HTML page, too")


def _add_context(parser: Parser) -> None:
    text = "Core AI: positions of the KV cache (default: 4096, or all that the model has)"
    parser.add_argument("--max-context-length", type=whole_number(), metavar="N", help=text)
    text = "Core AI: the KV cache has its full length from the start, or grows: %(choices)s (default: %(default)s)"
    parser.add_argument("--cache", choices=configuration.CACHES, default="fixed", metavar="NAME", help=text)


def _add_export(
    parser: Parser, parts: tuple[str, ...], prove: Prove | None = None, formats: tuple[str, ...] = ("coreml",)
) -> None:
    default = configuration.ExportConfig
    text = "a checkpoint's folder; it is only read"
    parser.add_place("--checkpoint", type=checkpoint_folder, metavar="CHECKPOINT", help=text)
    parser.add_argument("--output-dir", required=True, type=Output(whole=True), metavar="FOLDER", help="the artefact")
    if "llm" in parts:
        parser.add_argument(
            "--quant",
            type=usable_recipe,
            default=default.quant,
            metavar="RECIPE",
            help="a recipe: name, name with a size, .json (default: %(default)s)",
        )
    if parts == ("llm",):
        parser.add_argument(
            "--layout",
            choices=contract.LAYOUTS,
            default=default.layout,
            metavar="NAME",
            help="%(choices)s (default: %(default)s)",
        )
    if "coreai" in formats:
        _add_context(parser)
    if "vision" in parts and "coreml" in formats:
        for flag, values, initial in (
            ("--compute-precision", configuration.PRECISIONS, default.compute_precision),
            ("--compute-units", configuration.COMPUTE_UNITS, default.compute_units),
            ("--minimum-deployment-target", configuration.DEPLOYMENT_TARGETS, default.minimum_deployment_target),
        ):
            shown = initial or f"{configuration.DEFAULT_TARGET}, or what the rest needs"
            text = f"%(choices)s (default: {shown})"
            parser.add_argument(flag, choices=values, default=initial, metavar="NAME", help=text)
        parser.add_argument(
            "--resolutions",
            type=configuration.image_size,
            nargs="+",
            default=(),
            metavar="PIXELS",
            help="further picture sizes, each a function encode_PIXELS of the one package, weights stored once (iOS18)",
        )
        parser.add_argument(
            "--vision-quant",
            type=encoder_forms.usable,
            default=default.vision_quant,
            metavar="FORM",
            help="compressed encoder weights: palette4, palette6-g16, int8, ..., or a recipe's .json with rules for"
            " vision_encoder.* (default: what --quant says, or %(default)s)",
        )
        parser.add_argument(
            "--min-snr",
            type=number(0, 100),
            metavar="DB",
            help="the smallest encoder that keeps this signal-to-noise ratio",
        )
    parser.add_argument(
        "--calibration-data",
        type=present,
        metavar="PATH",
        help="a folder of pictures, or a file of records (LLaVA, messages, captions): for float16's powers of two, and"
        " for recipes that calibrate (default: drawn pictures)",
    )
    text = "per side (default: the checkpoint's own)"
    parser.add_argument("--image-size", type=configuration.image_size, metavar="PIXELS", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing artefact by a whole new one")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, write nothing")
    parser.set_defaults(run=partial(run_export, parts, prove))


def run_export(parts: tuple[str, ...], prove: Prove | None, args: argparse.Namespace) -> dict[str, Any]:
    """Plan, export, prove and publish; with `--dry-run` only say what would be written."""
    with progress("import PyTorch"):
        fields = configuration.ExportConfig.__dataclass_fields__
        config = configuration.ExportConfig(**{key: value for key, value in vars(args).items() if key in fields})
        from model_export import export as exporting

    with progress(f"open {config.checkpoint}"):
        plan = exporting.plan(config, parts)
    if args.dry_run:
        document = plan.document()
        size = plan.checkpoint.image_size
        print(f"would write {config.output_dir}: {', '.join(parts)}, recipe {plan.recipe.name}, {size} x {size} pixels")
        for name, size in plan.sizes.items():
            print(f"  {name:<24} about {format_bytes(size)}")
        return document
    parity = partial(prove, args) if prove is not None else None
    document = exporting.export(plan, parity)
    size = sum(entry["size"] for entry in document["files"].values())
    print(f"{config.output_dir}: {', '.join(parts)}, {counted(len(document['files']), 'file')}, {format_bytes(size)}")
    if parity is not None:
        for line in parity_lines(document["parity"]):
            print(f"parity: {line}")
        if args.parity_report is not None:
            print(f"page: {args.parity_report}")
    return document
