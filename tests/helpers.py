"""Figures and folders for all tests; with nothing of this project, so that an oracle shares no code with what it
tests."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_tensors(
    source: Path, target: Path, change: Callable[[dict[str, Any]], object], file: str = "model.safetensors"
) -> Path:
    """A copy of a model's folder; `change` edits the dict of this file's tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / file)
    change(tensors)
    save_file(tensors, target / file, metadata={"format": "pt"})
    return target


def relative(actual: Any, expected: Any) -> float:
    """max |a - b| / max |b| of two arrays or tensors; 0 for two of zeros, infinite where `actual` isn't finite."""
    a, b = (np.asarray(value, np.float64) for value in (actual, expected))
    assert a.shape == b.shape
    if not np.isfinite(a).all():
        return np.inf
    error = float(np.abs(a - b).max())
    return error / float(np.abs(b).max()) if error else 0.0


def snr_db(expected: Any, actual: Any) -> float:
    """10 log10(sum of b^2 / sum of (b - a)^2) in dB; -inf where `actual` isn't finite."""
    b, a = (np.asarray(value, np.float64) for value in (expected, actual))
    assert a.shape == b.shape
    if not np.isfinite(a).all():
        return -np.inf
    noise = float(((b - a) ** 2).sum())
    return float(10 * np.log10((b**2).sum() / noise)) if noise else np.inf
