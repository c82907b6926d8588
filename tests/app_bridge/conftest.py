"""An artefact with the shapes that the demo app hard-codes (1024 pixels, 3072 channels), and an app to bundle into."""

from collections.abc import Callable
from pathlib import Path

import pytest

from app_bridge.app import facts, sources
from app_bridge.validation import validate
from model_export.config import ExportConfig
from tests.app_bridge.models import make_artefact


@pytest.fixture(scope="session")
def app_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Treat it as read-only."""
    return make_checkpoint(shape="app", dtype="float16")


@pytest.fixture(scope="session")
def app_artefact(app_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported without parity, 6 s and 36 MB; treat it as read-only (copy it to change it)."""
    from model_export.export import export, plan

    target = tmp_path_factory.mktemp("app_artefact") / "tiny-app"
    export(plan(ExportConfig(app_checkpoint, target)))
    return target


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the app has its sources; what they say and what is found in artefacts is other tests' matter."""
    monkeypatch.setattr(sources, "read", lambda app: facts.table())
    monkeypatch.setattr(validate, "validate", lambda artefact, wanted: [])
    folder = tmp_path / "app"
    (folder / "FastVLM").mkdir(parents=True)
    (folder / "FastVLM" / "FastVLM.swift").write_text("// sources")
    return folder


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return make_artefact(tmp_path / "new", 1)


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Core AI program is loaded once, however many broken bundles have it."""
    from app_bridge.validation import check_assets
    from tests.app_bridge.validation.remembering import remembering

    monkeypatch.setattr(check_assets, "Runtime", remembering())
