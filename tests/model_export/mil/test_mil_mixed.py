"""Packages that coremltools wrote with operations of both float types."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch

from model_export import mil
from tests.helpers import snr_db

IMAGE = {"images": np.random.default_rng(64).random((1, 3, 64, 64), np.float32)}


class Hot(torch.nn.Module):
    """The first convolution and its activation leave fp16's range; what comes after is in it again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.head = torch.nn.Conv2d(3, 32, 4, 4), torch.nn.Conv2d(32, 16, 1)
        self.convolution.weight.data *= 1e5

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.gelu(self.convolution(images)) * 1e-5)


def stays_wide(operation: Any) -> bool:
    return operation.op_type in ("gelu", "mul") or (operation.op_type == "conv" and operation.outputs[0].shape[1] == 32)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """`mixed(wide)`: the hot network, its hot operations in float32 (wide) or all of it in fp16."""

    @functools.cache
    def save(wide: bool) -> Path:
        model = Hot().eval().requires_grad_(False)
        traced = torch.jit.trace(model, torch.from_numpy(IMAGE["images"]), check_trace=False)
        selected = ct.transform.FP16ComputePrecision(op_selector=lambda operation: not stays_wide(operation))
        path = tmp_path_factory.mktemp("mixed") / "mixed.mlpackage"
        ct.convert(
            traced,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=selected if wide else ct.precision.FLOAT16,
            inputs=[ct.TensorType("images", shape=(1, 3, 64, 64), dtype=np.float32)],
            outputs=[ct.TensorType("features", dtype=np.float32)],
            skip_model_load=True,
        ).save(str(path))
        return path

    return save


@pytest.mark.parametrize("compute", ["as-typed", "strict-fp16", "float32"])
def test_mixed_precision(mixed: Callable[[bool], Path], compute: str) -> None:
    """What is typed fp32 keeps its range in every policy; the same network all in fp16 overflows in two of them."""
    executor = mil.load(mixed(True), compute=compute)
    types = [(op.type, op.outputs[0].type.dtype) for op in executor.operations if op.outputs[0].type is not None]
    assert {("conv", "fp32"), ("gelu", "fp32"), ("conv", "fp16")} <= set(types)
    wide: Any = mil.load(mixed(True), compute="float32").predict(IMAGE)["features"]
    assert snr_db(wide, executor.predict(IMAGE)["features"]) > 55
    narrow = mil.load(mixed(False), compute=compute).predict(IMAGE)["features"]
    assert np.isfinite(narrow).all() == (compute == "float32")
