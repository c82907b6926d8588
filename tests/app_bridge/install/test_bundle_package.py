"""`bundle` of a Core AI bundle: whole or not at all into a Swift package, with the code that loads it; what the verbs
for the demo app say of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coreai", reason="Core AI's packages: make setup EXTRAS=coreai")

from app_bridge.validation import check_assets
from tests.app_bridge import broken
from tests.app_bridge.models import snapshot
from tests.app_bridge.validation.remembering import remembering
from tests.helpers import contents

pytestmark = pytest.mark.slow

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_assets, "Runtime", remembering())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """In a package's target."""
    (tmp_path / "package/Sources/Viewer").mkdir(parents=True)
    (tmp_path / "package/Package.swift").write_text("// a package")
    return tmp_path / "package/Sources/Viewer/Models/Seeing"


def test_it_goes_into_a_package_with_the_code_that_loads_it(demo_bundle: Path, target: Path, cli: Cli) -> None:
    answer = cli("bundle", demo_bundle, "--output-dir", target)
    assert answer.code == 0 and contents(target) == contents(demo_bundle)
    for line in (
        'url: "https://github.com/apple/coreai-models", revision: "86b363dca67cf276c1a5c96eea5e4b57e3a0643c"),',
        'name: "Viewer",',
        'resources: [.copy("Models/Seeing")]',
        'Bundle.module.url(forResource: "Seeing", withExtension: nil)',
        "try await CoreAIVisionLanguageModel(resourcesAt: folder)",
    ):
        assert line in answer.out
    before = snapshot(target)
    assert cli("bundle", demo_bundle, "--output-dir", target).code == 2 and snapshot(target) == before
    assert cli("bundle", demo_bundle, "--output-dir", target, "--overwrite", "--json").document["passed"]


def test_nothing_is_written_where_the_engine_could_not_run_it(demo_bundle: Path, target: Path, cli: Cli) -> None:
    folder = broken.linked(demo_bundle, target.parents[4] / "broken")
    broken.in_json("metadata.json", lambda document: document["vision"].update(rescale_factor=0.5))(folder)
    assert cli("bundle", folder, "--output-dir", target).code == 1 and not target.exists()
    assert cli("bundle", demo_bundle, "--output-dir", target, "--dry-run").code == 0 and not target.exists()


def test_outside_of_a_package_the_targets_name_is_left_to_the_reader(
    demo_bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    broken.gone("export.json")(folder := broken.linked(demo_bundle, tmp_path / "elsewhere"))
    answer = cli("bundle", folder, "--output-dir", tmp_path / "Seeing", "--json")
    assert answer.code == 0 and 'name: "App"' in answer.document["swift"]
    assert contents(tmp_path / "Seeing") == contents(folder)


@pytest.mark.parametrize(
    "words",
    [
        ("bundle", "--app"), ("bundle", "--output-dir", "x.aimodel"), ("card",), ("publish", "--repo", "a/b"),
    ],
)  # fmt: skip
def test_what_is_for_the_demo_app_says_so_in_a_line(
    words: tuple[str, ...], demo_bundle: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = cli(words[0], demo_bundle, *words[1:], *([tmp_path] if words[-1] == "--app" else []))
    assert (answer.code, answer.err.count("\n")) == (2, 1) and not any(tmp_path.iterdir())
