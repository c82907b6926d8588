"""Fixtures shared by all tests: tiny synthetic checkpoints, written once a session. Treat them as read-only."""

import fcntl
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from fastvlm.synthetic.checkpoint import write_checkpoint

# Hypothesis draws the same examples every time (`--hypothesis-profile default` draws others), and each may take any
# time: a busy machine isn't a failure.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

for name in [*os.environ]:  # the caller's terminal and network have no part in the tests
    if name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE") or name.lower().endswith("_proxy"):
        del os.environ[name]


@dataclass(frozen=True)
class Answer:
    """The answer of one command: its exit code, and all that it wrote."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout, as `--json` promises."""
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`cli(*words) -> Answer`: the command `fastvlm`, in this process."""
    from fastvlm.__main__ import build_parser
    from fastvlm.common.cli import run

    def call(*words: object) -> Answer:
        capsys.readouterr()  # what the test printed before is not the command's
        try:
            code = run(build_parser, [*map(str, words)])
        except SystemExit as stopped:  # argparse ends --help and --version itself
            code = int(str(stopped.code or 0))
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`shared(name, make) -> Path`: the folder that `make(path)` writes, once for all of pytest-xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    base = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, unfinished = base / "shared" / name, base / "unfinished" / name
        for parent in (folder.parent, unfinished.parent):
            parent.mkdir(exist_ok=True)
        with unfinished.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint(**write_checkpoint's arguments) -> Path`; the same arguments give the same folder."""

    @functools.cache
    def make(**arguments: object) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", **arguments)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def tiny_fast_vlm(make_checkpoint: Callable[..., Path]) -> Path:
    """Transformers layout, folded, float32, 128 x 128 pixels -> 4 image tokens."""
    return make_checkpoint(layout="fast_vlm", form="folded")


@pytest.fixture(scope="session")
def tiny_fast_vlm_training(make_checkpoint: Callable[..., Path]) -> Path:
    """Transformers layout, training form."""
    return make_checkpoint(layout="fast_vlm", form="training")


@pytest.fixture(scope="session")
def tiny_llava(make_checkpoint: Callable[..., Path]) -> Path:
    """LLaVA layout, folded: numerically the same model as `tiny_fast_vlm`."""
    return make_checkpoint(layout="llava_qwen2", form="folded")


@pytest.fixture(scope="session")
def tiny_llava_training(make_checkpoint: Callable[..., Path]) -> Path:
    """LLaVA layout, training form: numerically the same model as `tiny_fast_vlm_training`."""
    return make_checkpoint(layout="llava_qwen2", form="training")


@pytest.fixture(scope="session")
def demo_artefact(shared: Callable[..., Path]) -> Path:
    """The demo checkpoint's export with the flags' defaults, but for parity."""
    from fastvlm.data import scenes
    from model_export.config import ExportConfig
    from model_export.export import export, plan

    return shared("demo", lambda target: export(plan(ExportConfig(scenes.CHECKPOINT, target))))


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """The demo checkpoint as a `fastvlm.model.surface.FastVLM`."""
    import fastvlm
    from fastvlm.data import scenes

    return fastvlm.load(scenes.CHECKPOINT)


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model: Any) -> Any:
    """The demo checkpoint's tokenizer."""
    return demo_model.tokenizer


@pytest.fixture(scope="session")
def demo_bundle(shared: Callable[..., Path]) -> Path:
    """The demo checkpoint's Core AI bundle with the flags' defaults, but for parity."""
    pytest.importorskip("coreai", reason="Core AI's packages: make setup EXTRAS=coreai")
    from fastvlm.data import scenes
    from model_export.config import ExportConfig
    from model_export.export import export, plan

    return shared("bundle", lambda target: export(plan(ExportConfig(scenes.CHECKPOINT, target, format="coreai"))))
