"""Models in an app's folder: an artefact in form, a download; what a folder holds."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from model_export.artefact import write_manifest

Snapshot = dict[str, tuple[Any, ...]]


def make_artefact(folder: Path, seed: int) -> Path:
    """An artefact in form; what is in its files decides nothing here."""
    for name in ("model.safetensors", "fastvithd.mlpackage/Data/model.mlmodel"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes((seed + 7 * index) % 251 for index in range(3000)))
    (folder / "config.json").write_text(json.dumps({"hidden_size": 896, "num_hidden_layers": 24, "seed": seed}))
    write_manifest(folder, {"config": {"vision_quant": "fp16"}, "llm": {"recipe": {"name": f"r{seed}"}}})
    return folder


def make_foreign(folder: Path) -> Path:
    """A model as a user put it there: Apple's download has no manifest; odd permissions and times."""
    (folder / "fastvithd.mlpackage" / "Data").mkdir(parents=True)
    (folder / "fastvithd.mlpackage" / "Data" / "model.mlmodel").write_bytes(b"apple's program")
    (folder / "model.safetensors").write_bytes(b"apple's weights" * 100)
    (folder / "config.json").write_text('{"hidden_size": 1536, "num_hidden_layers": 28, "quantization": {"bits": 8}}')
    (folder / "model.safetensors").chmod(0o640)
    for name in ("config.json", "fastvithd.mlpackage/Data", "."):
        os.utime(folder / name, ns=(10**18, 10**18 + 12345))
    return folder


def snapshot(folder: Path) -> Snapshot | None:
    """Every file and folder with its permissions, time and bytes; by nothing of the project's."""
    if not folder.exists():
        return None
    found = {}
    for path in (folder, *folder.rglob("*")):
        stat, body = path.lstat(), b"" if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(folder))] = (stat.st_mode, stat.st_mtime_ns, hashlib.sha256(body).hexdigest())
    return found


def model(app: Path) -> Path:
    return app / "FastVLM" / "model"


def previous(app: Path) -> Path:
    return app / ".fastvlm-bundle" / "previous"
