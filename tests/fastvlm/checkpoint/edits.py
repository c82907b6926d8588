"""Changes to a copy of a sound checkpoint, and what all who read it say of one."""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from fastvlm.checkpoint.doctor import diagnose
from fastvlm.common.errors import UserError
from fastvlm.model.torch_parts import load_checkpoint
from model_export.config import ExportConfig
from model_export.export import plan

WEIGHTS = "model.safetensors"


def answers(folder: Path) -> tuple[bool, bool]:
    """Whether all agree that the checkpoint is usable, and that it can be exported; only UserError may be raised."""
    report = diagnose(folder, deep=False)
    report.text().encode()
    usable, exportable = not report.faults, report.export.get("export", "no").startswith("yes")
    try:
        plan(ExportConfig(checkpoint=folder, output_dir=folder.parent / "out"))
        exported = True
    except UserError as error:
        exported = False
        str(error).encode()
    try:
        model = load_checkpoint(folder)
        loaded = bool(np.isfinite(model.language.logits(model.language.embed(np.array([[1, 2]])))).all())
    except UserError:
        loaded = False
    assert (usable, exportable) == (loaded, exported), report.faults
    return usable, exportable


def edit_json(path: Path, without: Iterable[str] = (), **changes: Any) -> None:
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if key not in without}))


def edit_config(folder: Path, **changes: Any) -> None:
    edit_json(folder / "config.json", **changes)


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], Any], file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / file)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])
