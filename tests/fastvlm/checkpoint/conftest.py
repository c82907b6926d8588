"""A sound checkpoint in LLaVA's layout, in two shards."""

import shutil
from pathlib import Path

import pytest

from fastvlm.synthetic.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("doctor") / "model", layout="llava_qwen2", shards=2)


@pytest.fixture
def sharded(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))
