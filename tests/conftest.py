"""Fixtures shared by all tests: tiny synthetic checkpoints, written once a session. Treat them as read-only."""

import functools
import os
from collections.abc import Callable
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
def demo_model() -> Any:
    """The demo checkpoint as a `fastvlm.model.surface.FastVLM`."""
    import fastvlm
    from fastvlm.data import scenes

    return fastvlm.load(scenes.CHECKPOINT)


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model: Any) -> Any:
    """The demo checkpoint's tokenizer."""
    return demo_model.tokenizer
