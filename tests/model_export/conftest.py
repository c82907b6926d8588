"""An artefact of the tiny checkpoint, exported once a session without parity. Treat it as read-only."""

from collections.abc import Callable
from pathlib import Path

import pytest

from model_export.config import ExportConfig


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Training form, float16: what a fine-tune looks like, and what is exported to `tiny_artefact`."""
    return make_checkpoint(form="training", dtype="float16")


@pytest.fixture(scope="session")
def tiny_artefact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from model_export.export import export, plan

    target = tmp_path_factory.mktemp("artefact") / "tiny"
    export(plan(ExportConfig(tiny_checkpoint, target)))
    return target
