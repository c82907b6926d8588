"""An artefact with the shapes that the demo app hard-codes (1024 pixels, 3072 channels) and a tiny language model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from model_export.config import ExportConfig


@pytest.fixture(scope="session")
def app_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Treat it as read-only."""
    return make_checkpoint(shape="app", dtype="float16")


@pytest.fixture(scope="session")
def app_artefact(app_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported without parity, 6 s and 18 MB; treat it as read-only (copy it to change it)."""
    from model_export.export import export, plan

    target = tmp_path_factory.mktemp("app_artefact") / "tiny-app"
    export(plan(ExportConfig(app_checkpoint, target)))
    return target
