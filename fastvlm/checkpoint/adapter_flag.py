"""The flag `--adapter` of every verb that takes a checkpoint, and what both together are called in a report."""

from pathlib import Path
from typing import Any

from fastvlm.checkpoint.adapter_folder import missing
from fastvlm.common.errors import UserError
from fastvlm.common.files import some_path


def add_adapter(parser: Any, required: bool = False) -> None:
    """Add the flag to a verb's parser."""
    text = "an adapter's folder (PEFT, LLaVA, MLX, or a projector alone), merged into the checkpoint as it is read"
    parser.add_argument("--adapter", type=adapter, required=required, metavar="FOLDER", help=text)


def adapter(text: str) -> Path:
    """The argparse type: refuses what is no adapter by its names alone."""
    path = some_path(text)
    if (finding := missing(path)) is not None:
        raise UserError(finding)
    return path


def titled(checkpoint: Path, folder: Path | None) -> str:
    """The name of a checkpoint with an adapter, or without one, for a report."""
    names = [checkpoint.resolve().name] + ([] if folder is None else [folder.resolve().name])
    return " + ".join(names)
