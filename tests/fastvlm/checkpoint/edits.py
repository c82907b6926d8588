"""Changes to a copy of a sound checkpoint, for tests."""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fastvlm.common.findings import Finding

WEIGHTS = "model.safetensors"


def rules(findings: Iterable[Finding]) -> list[str]:
    return [finding.rule for finding in findings]


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
