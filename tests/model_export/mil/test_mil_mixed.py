"""Packages that coremltools wrote with operations of both float types."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
import torch
from mil_packages import mb

from model_export import mil
from tests.helpers import snr_db

import coremltools as ct  # isort: skip

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


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("first", [True, False])
def test_integers_times_a_constant_of_floats(tmp_path: Path, dtype: type, first: bool) -> None:
    """The result has the type of what is not constant; constants that an int32 has are unambiguous, others aren't."""
    x, constant = np.arange(-5, 5, dtype=np.int32).reshape(2, 5), np.arange(10, dtype=dtype).reshape(5, 2) - 4

    def save(constant: np.ndarray) -> Path:
        def build(x: Any) -> Any:
            return mb.matmul(x=constant, y=x) if first else mb.matmul(x=x, y=constant)

        packages.save_program(tmp_path / "p.mlpackage", build, {"x": x}, "iOS17")
        return tmp_path / "p.mlpackage"

    whole = constant.astype(np.int32)
    for compute in ("as-typed", "strict-fp16", "float32", "bfloat16"):
        (found,) = mil.load(save(constant), compute=compute).predict({"x": x}).values()
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, whole @ x if first else x @ whole)
    for other in (dtype(0.5), dtype(np.nan), dtype(np.inf)):
        with pytest.raises(mil.MILError, match=r"\(matmul, CoreML7\): operands "):
            mil.load(save(np.where(constant == 1, other, constant)))
