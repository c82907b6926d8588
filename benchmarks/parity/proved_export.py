"""`fastvlm export`: an export that is compared with its checkpoint before it is published."""

import argparse
from pathlib import Path
from typing import Any

from fastvlm.common.cli import log
from model_export.commands import export


def add_all(verbs: Any) -> None:
    """Add the export of both halves."""
    export.add_all(verbs, prove)


def add_coreai(verbs: Any) -> None:
    """Add the export of a Core AI bundle."""
    export.add_coreai(verbs, prove)


def prove(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """benchmarks.parity.compare over the staged artefact; what the manifest keeps of it."""
    from benchmarks.parity import compare, verdict  # PyTorch is behind the first

    options = {} if args.parity_limit is None else {"limit": args.parity_limit}
    result = compare.compare(
        args.checkpoint,
        folder,
        report=args.parity_report,
        command="fastvlm export",
        name=args.output_dir.name,
        adapter=args.adapter,
        **options,
    )
    for line in verdict.broken_lines(result):
        log(f"parity: {line}")
    return verdict.summary(result)
