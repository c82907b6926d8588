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


@pytest.mark.slow
def test_the_command_from_another_folder(environment, tmp_path):
    """The sources are gone: all that is read is the installed package's."""
    packages = next(environment.glob("lib/python*/site-packages"))

    def call(*words: str) -> str:
        done = subprocess.run(
            [environment / "bin/fastvlm", *words], capture_output=True, text=True, check=False, cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert call("--version").startswith("fastvlm ") and "export" in call("--help")
    assert call("export", "--help").startswith("usage: fastvlm export ")
    demo = str(packages / "fastvlm/demo_checkpoint")
    words = ("--output-dir", "model", "--parity-limit", "1", "--parity-report", "page.html", "--json")
    document = json.loads(call("export", demo, *words))
    assert document["parity"]["passed"] and "<html" in (tmp_path / "page.html").read_text()
    assert json.loads(call("verify", "model", "--json"))["passed"]
    assert json.loads(call("audit", "model", "--json"))["passed"] is not None
    assert len(json.loads(call("recipes", "--json"))["recipes"]) > 10
    assert call("demo", "--count", "1") and (tmp_path / "build/demo/index.html").is_file()
