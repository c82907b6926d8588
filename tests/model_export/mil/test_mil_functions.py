"""Packages that coremltools wrote with several functions, and with operations of both float types."""

import functools
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import mil_packages as packages
import numpy as np
import pytest
import torch

from model_export import mil
from model_export.mil.program import BlobRef

SIZES = (64, 128)


def image(size: int) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(size).random((1, 3, size, size), np.float32)}


class Tiny(torch.nn.Module):
    """Weights that all resolutions share, and a table for each, as position embeddings are."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, 32, 4, 4)
        self.head = torch.nn.Conv2d(32, 16, 1)
        self.table = torch.nn.Parameter(torch.randn(1, 16, size // 4, size // 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.gelu(self.convolution(images))) + self.table


@functools.cache
def tiny(size: int) -> Tiny:
    return Tiny(size).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """encode_64, encode_128 (the default) of one network; read-only."""
    folder = tmp_path_factory.mktemp("functions")
    descriptor = ct.utils.MultiFunctionDescriptor()
    for size in SIZES:
        traced = torch.jit.trace(tiny(size), torch.from_numpy(image(size)["images"]), check_trace=False)
        model = ct.convert(
            traced,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            inputs=[ct.TensorType("images", shape=(1, 3, size, size), dtype=np.float32)],
            outputs=[ct.TensorType("features", dtype=np.float32)],
            skip_model_load=True,
        )
        model.save(str(folder / f"{size}.mlpackage"))
        descriptor.add_function(str(folder / f"{size}.mlpackage"), "main", f"encode_{size}")
    descriptor.default_function_name = "encode_128"
    ct.utils.save_multifunction(descriptor, str(folder / "all.mlpackage"))
    return folder / "all.mlpackage"


@pytest.mark.parametrize("size", SIZES)
def test_each_function_at_its_resolution(package: Path, size: int) -> None:
    executor = mil.load(package, function_name=f"encode_{size}")
    assert executor.inputs["images"].shape == (1, 3, size, size)
    got = executor.predict(image(size))["features"]
    wanted = tiny(size)(torch.from_numpy(image(size)["images"])).numpy()
    assert packages.snr(wanted, got) > 55
    assert packages.snr(np.roll(wanted, 1, -1), got) < 10
    with pytest.raises(mil.MILError, match="expected fp32"):
        executor.predict(image(192 - size))


def test_functions_are_listed_and_the_default_is_theirs(package: Path) -> None:
    program = mil.read_package(package)
    assert sorted(program.functions) == ["encode_128", "encode_64"]
    assert program.default_function == "encode_128"
    default, named = mil.load(package), mil.load(package, function_name="encode_128")
    assert default.function.name == "encode_128"
    np.testing.assert_array_equal(*(each.predict(image(128))["features"] for each in (default, named)))


def test_an_unknown_function_is_refused_with_the_list(package: Path) -> None:
    with pytest.raises(mil.MILError, match=r"no function 'main', it has \['encode_128', 'encode_64'\]") as caught:
        mil.load(package, function_name="main")
    assert "\n" not in str(caught.value)


def blobs(package: Path, function: str) -> set[int]:
    operations = mil.read_package(package).functions[function].block.operations
    constants = (operation.attributes.get("val") for operation in operations)
    return {c.data.offset for c in constants if c is not None and isinstance(c.data, BlobRef)}


def test_another_functions_weights_are_not_read(package: Path, tmp_path: Path) -> None:
    """Damage a blob that only encode_128 has: encode_64 still runs, encode_128 is refused."""
    own = blobs(package, "encode_128") - blobs(package, "encode_64")
    assert own and blobs(package, "encode_128") & blobs(package, "encode_64")
    broken = Path(shutil.copytree(package, tmp_path / "broken.mlpackage"))
    weights = broken / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(weights.read_bytes())
    for offset in own:
        struct.pack_into("<I", content, offset, 0)
    weights.write_bytes(content)
    got = mil.load(broken, function_name="encode_64").predict(image(64))["features"]
    np.testing.assert_array_equal(got, mil.load(package, function_name="encode_64").predict(image(64))["features"])
    with pytest.raises(mil.MILError, match="sentinel"):
        mil.load(broken, function_name="encode_128")


# -- both float types -------------------------------------------------------------------------------------------------


class Hot(Tiny):
    """The first convolution and its activation leave fp16's range; what comes after is in it again."""

    def __init__(self) -> None:
        super().__init__(64)
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
        traced = torch.jit.trace(model, torch.from_numpy(image(64)["images"]), check_trace=False)
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
    executor = mil.load(mixed(True), compute)
    types = [(op.type, op.outputs[0].type.dtype) for op in executor.operations if op.outputs[0].type is not None]
    assert {("conv", "fp32"), ("gelu", "fp32"), ("conv", "fp16")} <= set(types)
    wide: Any = mil.load(mixed(True), "float32").predict(image(64))["features"]
    assert packages.snr(wide, executor.predict(image(64))["features"]) > 55
    narrow = mil.load(mixed(False), compute).predict(image(64))["features"]
    assert np.isfinite(narrow).all() == (compute == "float32")
