"""`pip install .` into a fresh environment, and the command from another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from model_export.artefact import read_manifest
from model_export.contract import MANIFEST
from tests.helpers import contents

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ROOMS = ("fastvlm", "quantization", "model_export", "benchmarks", "app_bridge")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment with this project, installed from a copy of its sources; its dependencies are this one's."""
    folder = tmp_path_factory.mktemp("install")
    source, target = folder / "source", folder / "venv"
    source.mkdir()
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(target, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(target), "platbase": str(target)}))
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here))  # their own .pth files stay unread
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(target / "bin/python"), *install], check=True)
    shutil.rmtree(source)
    return target


def test_every_data_file_is_installed(environment):
    packages = next(environment.glob("lib/python*/site-packages"))
    data = {
        path.relative_to(ROOT)
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }
    assert len(data) > 40 and [str(path) for path in data if not (packages / path).is_file()] == []


def test_the_command_from_another_folder(environment, demo_artefact, tmp_path):
    """The sources are gone: all that is read is the installed package's, and the demo checkpoint is read-only. The
    export has the bytes of one in another process, with another hash seed, and nothing of coremltools' noise."""
    packages = next(environment.glob("lib/python*/site-packages"))

    def run(program: Path, *words: str) -> "subprocess.CompletedProcess[str]":
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, cwd=tmp_path, env=variables | {"PYTHONHASHSEED": "1"}
        )
        assert done.returncode == 0, done.stderr
        return done

    def call(*words: str) -> str:
        done = run(environment / "bin/fastvlm", *words)
        assert "coremltools" not in done.stderr and "Warning" not in done.stderr
        return done.stdout

    assert call("--version").startswith("fastvlm ") and "export" in call("--help")
    assert call("export", "--help").startswith("usage: fastvlm export ")
    demo = packages / "fastvlm/demo_checkpoint"
    for path in (*demo.iterdir(), demo):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(demo)
    words = ("--output-dir", "model", "--parity-limit", "1", "--parity-report", "page.html", "--json")
    document = json.loads(call("export", str(demo), *words))
    demo.chmod(0o755)
    assert contents(demo) == before and "<html" in (tmp_path / "page.html").read_text()
    ours, theirs = contents(tmp_path / "model"), contents(demo_artefact)
    assert ours.pop(MANIFEST) != theirs.pop(MANIFEST) and ours == theirs
    manifest, other = read_manifest(tmp_path / "model"), read_manifest(demo_artefact)
    assert manifest.keys() - other.keys() == {"parity"} and manifest["parity"]["passed"] is True
    assert {key for key in other if manifest[key] != other[key]} == {"manifest_sha256"}
    assert document["files"] == manifest["files"]
    control = run(Path(sys.executable), "-c", "import coremltools").stderr
    assert sys.platform == "darwin" or "coremltools" in control
    assert json.loads(call("verify", "model", "--json"))["passed"]
    assert json.loads(call("audit", "model", "--json"))["passed"] is not None
    assert len(json.loads(call("recipes", "--json"))["recipes"]) > 10
    assert call("demo", "--count", "1") and (tmp_path / "build/demo/index.html").is_file()
