"""Exports that several measurements share, made in processes of their own; encoders that see each picture once."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import environment
from fastvlm.common.staging import write_file
from model_export import contract
from model_export.config import ExportConfig
from model_export.coreai import contract as coreai
from quantization.sweep import engine
from quantization.sweep.point import apart

if TYPE_CHECKING:
    from fastvlm.model.surface import Vision


class Remembered:
    """An encoder that several points share (`manifest`: of an artefact that has it): it sees each picture once."""

    def __init__(self, vision: "Vision", work: Path, manifest: Mapping[str, Any]) -> None:
        self.vision, self.name, self.remedy = vision, vision.name, vision.remedy
        encoders = (contract.PACKAGE, coreai.ASSETS["vision"])
        package = {name: file for name, file in manifest["files"].items() if name.startswith(encoders)}
        self.shared, self.encoder = work / "shared", digest(package, vision.name)

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """Encode as the encoder itself does, or read the features of an earlier run."""
        from torch import get_num_threads  # which decides the last bits

        folder = self.shared / f"features-{self.encoder}-{get_num_threads()}"
        file = folder / f"{hashlib.sha256(pixel_values.tobytes()).hexdigest()}.npy"
        if not file.exists():
            content = BytesIO()
            np.save(content, self.vision.encode(pixel_values))
            write_file(file, content.getvalue())
        features: np.ndarray = np.load(file)
        return features


def identity() -> dict[str, Any]:
    """The code and the packages that decide a result."""
    return {"sources": engine.sources_sha256(), "packages": environment.versions()}


def export_here(
    settings: Mapping[str, Any],
    parts: Sequence[str],
    options: dict[str, Any],
    target: Path,
    encoder: Path | None = None,
) -> None:
    """Export `parts` with these options of `ExportConfig` ("quant" a recipe's document); what calibrates sees through
    the encoder of the artefact `encoder`."""
    from model_export import artefact, export, runtime

    options, sees = dict(options), None
    if encoder is not None:
        sees = Remembered(runtime.ExecutorVision(encoder), Path(settings["work"]), artefact.read_manifest(encoder))
    with tempfile.TemporaryDirectory() as folder:
        if "quant" in options:
            path = Path(folder, "recipe.json")
            path.write_text(json.dumps(options["quant"]))
            options["quant"] = str(path)
        if settings["calibration_data"] and (encoder or "vision" in parts):
            options["calibration_data"] = Path(settings["calibration_data"])
        options["adapter"] = Path(settings["adapter"]) if settings.get("adapter") else None
        config = ExportConfig(checkpoint=Path(settings["checkpoint"]), output_dir=target, **options)
        export.export(export.plan(config, tuple(parts)), vision=sees)


export_apart = partial(apart, export_here)  # a process of its own: its memory is not the caller's


def digest(*parts: Any) -> str:
    """Sixteen letters that stand for JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
