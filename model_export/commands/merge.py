"""`fastvlm merge`: a checkpoint and an adapter as one checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from fastvlm.checkpoint.folder_kind import checkpoint_folder
from fastvlm.common.cli import log, progress
from fastvlm.common.dtypes import DTYPES
from fastvlm.common.files import Output
from fastvlm.common.units import counted, format_bytes


def add_merge(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("merge", description="Write a checkpoint and an adapter as one checkpoint.")
    parser.add_place("--checkpoint", type=checkpoint_folder, metavar="CHECKPOINT", help="the base; it is only read")
    text = "the adapter's folder: PEFT's, LLaVA's, MLX's, or one with mm_projector.bin"
    parser.add_argument("--adapter", required=True, type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--output-dir", required=True, type=Output(whole=True), metavar="FOLDER", help="the result")
    text = "of every tensor: %(choices)s (default: as the base has them)"
    parser.add_argument("--dtype", choices=DTYPES, metavar="NAME", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing merged checkpoint by a new one")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, write nothing")
    parser.set_defaults(run=run_merge)


def run_merge(args: argparse.Namespace) -> dict[str, Any]:
    """Open both, check that they fit, write the result; with `--dry-run` only say what would be written."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from model_export import merged

    merged.check_target(args.output_dir, args.overwrite)
    with progress(f"open {args.checkpoint}"):
        merge = merged.plan(open_checkpoint(args.checkpoint, adapter=args.adapter), args.dtype)
    for warning in merge.checkpoint.warnings:
        log(f"warning: {warning}")
    document = merge.document()
    what = f"{document['adapter']['kind']}, {document['changed_tensors']} of {document['tensors']} tensors changed"
    size = f"{counted(len(merge.files), 'file')} of weights, {format_bytes(merge.nbytes)}"
    if args.dry_run:
        print(f"would write {args.output_dir}: {what}; {size}")
        return document
    with progress(f"merge {args.adapter}", merge.nbytes, sized=True) as advance:
        merged.write(merge, args.output_dir, args.overwrite, advance)
    print(f"{args.output_dir}: {what}; {size}")
    return document | {"output_dir": str(args.output_dir)}
