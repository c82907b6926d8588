"""The tiny checkpoint's encoder and its artefact, made once a session without parity. Treat them as read-only."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_export.config import ExportConfig


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Training form, float16: what a fine-tune looks like, and what is exported to `tiny_artefact`."""
    return make_checkpoint(form="training", dtype="float16")


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """A picture of the tiny checkpoint's size."""
    return np.random.default_rng(3).random((1, 3, 128, 128), dtype=np.float32)


@pytest.fixture(scope="session")
def tiny_encoder(tiny_checkpoint: Path) -> Any:
    """Its encoder as an export has it, but for powers of two: folded, channel-first, float32."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from model_export.encoder.channel_first import channel_first
    from model_export.encoder.graph import folded_encoder

    return channel_first(folded_encoder(open_checkpoint(tiny_checkpoint))[0])


@pytest.fixture(scope="session")
def plain_package(tiny_checkpoint: Path, shared: Callable[..., Path]) -> Path:
    """The negative control of the package: the same encoder as timm has it, saved without `channel_first`."""
    from encoders import save_encoder

    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from model_export.encoder.graph import folded_encoder

    fastvit = folded_encoder(open_checkpoint(tiny_checkpoint))[0]
    return shared("plain.mlpackage", partial(save_encoder, fastvit, 128))


@pytest.fixture(scope="session")
def tiny_artefact(tiny_checkpoint: Path, shared: Callable[..., Path]) -> Path:
    from model_export.export import export, plan

    return shared("tiny", lambda target: export(plan(ExportConfig(tiny_checkpoint, target))))
