"""Image, windowed and recurrent operations where a table of cases can't go: published numbers, sizes known only at run
time, torch modules that a program was converted from, and forms that are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
import torch

from model_export import mil
from model_export.mil.costs import Graph, macs_of
from model_export.mil.reader import read_package

mb, ct, F32 = packages.mb, packages.ct, np.float32


def run(path: Path, build: Callable[..., Any], target: str = "iOS17", compute: str = "float32", **inputs: Any) -> Any:
    """The outputs of the operation that `build` adds, which has one input at least."""
    names = packages.save_program(path / "p.mlpackage", build, inputs, target)
    outputs = mil.load(path / "p.mlpackage", compute=compute).predict(inputs)
    return [outputs[name] for name in names]


SQUARE = np.arange(1, 17, dtype=F32).reshape(1, 1, 4, 4)
PAIR = np.array([[[0, 1]]], F32)
FOUR = np.array([11, 22, 33, 44], F32).reshape(1, 1, 2, 2)
PLACES = np.array([-1, -2, -3.7, -1, 0, 0, 3.5, 1.2], F32).reshape(1, 2, 2, 2)
BOXES = np.array([[0.1, 0.3, 1.3, 1], [0.5, 1.8, 1, 0.3], [0, 0.4, 0.6, 0.7]], F32)


def sampled(sampling: str, padding: str, value: float, kind: str, corners: bool) -> Callable[..., Any]:
    return lambda x: mb.resample(
        x=x, coordinates=PLACES, sampling_mode=sampling, padding_mode=padding, padding_value=float(value),
        coordinates_mode=kind, align_corners=corners,
    )  # fmt: skip


# Numbers that coremltools' documentation and tests state, and devices give.
@pytest.mark.parametrize(
    ("build", "x", "wanted"),
    [
        *[
            (lambda x, m=mode: mb.resize_bilinear(x=x, target_size_width=5, sampling_mode=m), PAIR, wanted)
            for mode, wanted in {
                "STRICT_ALIGN_CORNERS": [0, 0.25, 0.5, 0.75, 1],
                "DEFAULT": [0, 0.4, 0.8, 1, 1],
                "OFFSET_CORNERS": [0.1, 0.3, 0.5, 0.7, 0.9],
                "UNALIGN_CORNERS": [0, 0.1, 0.5, 0.9, 1],
            }.items()
        ],
        (lambda x: mb.upsample_bilinear(x=x, scale_factor_width=2.6, align_corners=False), PAIR, [0, 0.1, 0.5, 0.9, 1]),
        (
            lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=3.17, scale_factor_width=0.67),
            np.array([[[1.5, -2.5, 3.5]]], F32),
            [1.5, -2.5] * 3,
        ),
        (
            lambda x: mb.resize(x=x, shape=[3], resized_dims=np.uint32(1), interpolation_mode="NEAREST_NEIGHBOR"),
            PAIR,
            [0, 1, 1],
        ),
        (
            lambda x: mb.crop_resize(
                x=x, boxes=BOXES, box_indices=np.zeros(3, np.int32), target_height=2, target_width=2, pad_value=10.0,
                normalized_coordinates=True, sampling_mode="ALIGN_CORNERS",
            ),
            SQUARE,
            [3.1, 5.2, 10, 10, 10, 7.9, 10, 13.9, 2.2, 3.1, 9.4, 10.3],
        ),
        (sampled("bilinear", "constant", 6.17, "normalized_minus_one_to_one", True), FOUR, [8.585, 6.17, 27.5, 6.17]),
        (sampled("nearest", "border", -1, "unnormalized", False), FOUR, [11, 11, 11, 44]),
        (sampled("bilinear", "reflection", -1, "normalized_zero_to_one", True), FOUR, [22, 36.3, 11, 34.1]),
        (sampled("nearest", "symmetric", -1, "normalized_zero_to_one", False), FOUR, [22, 33, 11, 33]),
        (
            lambda x: mb.affine(
                x=x, transform_matrix=np.array([[-1, -2, -3.7, -1, 3.5, 1.2]], F32), output_height=2, output_width=5,
                sampling_mode="bilinear", padding_mode="constant", padding_value=0.0,
                coordinates_mode="normalized_minus_one_to_one", align_corners=True,
            ),
            FOUR,
            [10.7525, 5.94, 2.5025, 0.44, 0, 0, 0, 0, 0, 0],
        ),
        (
            lambda x: mb.l2_pool(x=x, kernel_sizes=[2, 2], pad_type="same_lower"),
            SQUARE[..., :1, :1] * np.array([[1, 2], [3, 4]], F32),
            [1, 2.236068, 3.162278, 5.477226],
        ),
    ],
)  # fmt: skip
def test_published_numbers(build: Callable[..., Any], x: np.ndarray, wanted: Any, tmp_path: Path) -> None:
    (got,) = run(tmp_path, build, x=x)
    np.testing.assert_allclose(got.ravel(), wanted, rtol=1e-5, atol=1e-5)


# -- sizes that another operand decides ------------------------------------------------------------------------------

WEIGHT = np.random.default_rng(1).normal(size=(2, 2, 3, 2)).astype(F32)


@pytest.mark.parametrize(
    "build",
    [
        lambda x: mb.conv(x=x, weight=WEIGHT, strides=[2, 1], pad_type="same"),
        lambda x: mb.conv(x=x, weight=WEIGHT, strides=[2, 1], pad_type="custom", pad=[1, 0, 0, 1]),
        lambda x: mb.avg_pool(x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="same"),
        lambda x: mb.max_pool(x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="valid", ceil_mode=True),
        lambda x: mb.l2_pool(x=x, kernel_sizes=[2, 3], pad_type="same_lower"),
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2.5, scale_factor_width=1.3),
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=3.0, scale_factor_width=0.7),
        lambda x: mb.crop(x=x, crop_height=[1, 1], crop_width=[0, 2]),
        lambda x: mb.instance_norm(x=x),
        lambda x: mb.layer_norm(x=x, axes=[1, 3]),
        lambda x: mb.local_response_norm(x=x, size=3),
    ],
)
def test_sizes_known_at_run_time(build: Callable[..., Any], tmp_path: Path) -> None:
    """As the same operation of a picture whose size is declared."""
    picture = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(F32)
    size = np.array([6, 7], np.int32)

    def open_ended(x: Any, size: Any) -> Any:
        return build(mb.resize(x=x, shape=size, resized_dims=np.uint32(2)))

    (got,) = run(tmp_path, open_ended, x=picture, size=size)
    (same,) = run(tmp_path, lambda x: build(mb.resize(x=x, shape=[6, 7], resized_dims=np.uint32(2))), x=picture)
    np.testing.assert_allclose(got, same, rtol=1e-6, atol=1e-6)


def test_a_size_that_is_too_large(tmp_path: Path) -> None:
    build = lambda x, size: mb.resize(x=x, shape=size, resized_dims=np.uint32(2))  # noqa: E731
    with pytest.raises(mil.MILError, match="too large"):
        run(tmp_path, build, x=SQUARE, size=np.array([1 << 20, 1 << 20], np.int32))


# -- torch modules ---------------------------------------------------------------------------------------------------


class Recurrent(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(x)[0])


class Sampled(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.stack([x[:, 0], x[:, 1]], -1)
        return torch.nn.functional.grid_sample(x, grid, **self.options)


N = torch.nn
MODULES: list[tuple[Any, tuple[int, ...]]] = [
    (Recurrent(N.LSTM(3, 4, 2, batch_first=True, bidirectional=True)), (2, 5, 3)),
    (Recurrent(N.LSTM(3, 4)), (5, 2, 3)),
    (Recurrent(N.RNN(3, 4, 2)), (5, 2, 3)),
    (Recurrent(N.RNN(3, 4, nonlinearity="relu", batch_first=True)), (2, 5, 3)),
    (N.ConvTranspose2d(2, 4, 3, 2, padding=1, output_padding=1, groups=2), (1, 2, 4, 5)),
    (N.ConvTranspose1d(2, 3, 4, 3, dilation=2), (1, 2, 6)),
    (N.Conv3d(2, 4, (1, 2, 3), (1, 2, 1), padding=(0, 1, 1), groups=2), (1, 2, 3, 4, 5)),
    (N.AvgPool2d(3, 2, 1, ceil_mode=True), (1, 2, 6, 8)),
    (N.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 2, 6, 8)),
    (N.MaxPool2d(3, 2, 1, ceil_mode=True), (1, 2, 6, 8)),
    (N.AvgPool3d(2, 2, 1), (1, 2, 3, 4, 5)),
    (N.Upsample(scale_factor=(2.5, 1.5), mode="bilinear", recompute_scale_factor=True), (1, 2, 4, 6)),
    (N.Upsample(scale_factor=2, mode="bilinear", align_corners=True), (1, 2, 4, 6)),
    (N.Upsample(scale_factor=(2, 3)), (1, 2, 4, 6)),
    (N.LocalResponseNorm(3), (1, 5, 4, 4)),
    (N.InstanceNorm2d(3, affine=True), (2, 3, 4, 4)),
    *[
        (Sampled(mode=mode, padding_mode=padding, align_corners=corners), (1, 2, 4, 5))
        for mode, padding, corners in (("bilinear", "zeros", False), ("nearest", "border", True),
                                       ("bilinear", "reflection", True), ("bilinear", "reflection", False))
    ],
]  # fmt: skip


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: str(value).replace("\n", ""))
def test_torch_modules(module: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), x, check_trace=False)
        wanted = module(x).numpy()
    model = ct.convert(
        traced, inputs=[ct.TensorType("x", shape=shape)], outputs=[ct.TensorType("y")], skip_model_load=True,
        compute_precision=ct.precision.FLOAT32, minimum_deployment_target=ct.target.iOS17,
    )  # fmt: skip
    model.save(str(tmp_path / "p.mlpackage"))
    got = mil.load(tmp_path / "p.mlpackage").predict({"x": x.numpy()})["y"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6)


def test_multiplications_of_a_recurrent_layer(tmp_path: Path) -> None:
    """Both directions: 3 steps of 2 samples, 4 gates of 5 units, each of 4 inputs and 5 states."""
    state, back = np.zeros((2, 10), np.float16), {"direction": "bidirectional"}
    for key, shape in (("weight_ih", (20, 4)), ("weight_hh", (20, 5))):
        back |= {key: np.ones(shape, np.float16), f"{key}_back": np.ones(shape, np.float16)}
    build = lambda x: mb.lstm(x=x, initial_h=state, initial_c=state, **back)  # noqa: E731
    packages.save_program(tmp_path / "p.mlpackage", build, {"x": SEQUENCE})
    graph = Graph(read_package(tmp_path / "p.mlpackage").functions["main"])
    assert [macs_of(graph, operation) for operation in graph.operations] == [2 * 3 * 2 * 20 * (4 + 5)]


# -- the fast policies and operands of two types ---------------------------------------------------------------------

SEQUENCE = np.random.default_rng(2).normal(size=(3, 2, 4)).astype(np.float16)
GATES = {"weight_ih": np.ones((12, 4), np.float16) / 8, "weight_hh": np.ones((12, 4), np.float16) / 8}


@pytest.mark.parametrize(
    "build",
    [
        lambda x: mb.gru(x=x, initial_h=np.zeros((2, 4), np.float16), **GATES)[0],
        lambda x: mb.l2_pool(x=x, kernel_sizes=[2], pad_type="same"),
        lambda x: mb.avg_pool(x=x, kernel_sizes=[3], strides=[2], pad_type="valid", ceil_mode=True),
        lambda x: mb.resize_bilinear(x=x, target_size_height=3, target_size_width=7),
        lambda x: mb.resample(
            x=mb.expand_dims(x=x, axes=[0]), coordinates=PLACES, sampling_mode="bilinear", padding_mode="constant",
            padding_value=np.float16(1), coordinates_mode="normalized_zero_to_one", align_corners=True,
        ),
        lambda x: mb.crop_resize(x=mb.expand_dims(x=x, axes=[0]), boxes=BOXES[:1], target_height=2, target_width=2),
        lambda x: mb.conv(x=x, weight=np.ones((3, 2, 2), F32), pad_type="same"),
        lambda x: mb.linear(x=x, weight=np.ones((3, 4), F32) / 8),
        lambda x: mb.matmul(x=x, y=np.ones((4, 3), F32) / 8),
        lambda x: mb.layer_norm(x=x, axes=[-1], gamma=np.ones(4, F32), beta=np.ones(4, F32)),
        lambda x: mb.prelu(x=x, alpha=np.full(2, 0.25, F32)),
    ],
)  # fmt: skip
def test_bfloat16_and_operands_of_two_types(build: Callable[..., Any], tmp_path: Path) -> None:
    """Near the same in float32; since iOS 17 weights may be wider than what they are applied to."""
    (exact,) = run(tmp_path, build, x=SEQUENCE)
    (fast,) = run(tmp_path, build, compute="bfloat16", x=SEQUENCE)
    np.testing.assert_allclose(fast, exact, rtol=0.05, atol=0.05)


def quantized(x: Any, **more: Any) -> Any:
    weight = np.arange(1, 5, dtype=np.uint8).reshape(4, 1, 1, 1)
    numbers = {"quantization_type": "linear", "quant_scale": np.float32(0.5), "quant_bias": np.float32(0)}
    return mb.conv_quantized(x=mb.cast(x=x, dtype="fp32"), weight=weight, **numbers | more)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda x: mb.resize(x=x, shape=[3, 3], resized_dims=np.uint32(2)),
            "LINEAR of int32: how it is rounded is not specified",
        ),
        (
            lambda x: mb.max_pool(
                x=mb.cast(x=x, dtype="fp32"), kernel_sizes=[1, 1], strides=[4, 4], pad_type="valid", ceil_mode=True
            ),
            "ceil_mode with a window outside the input",
        ),
        (lambda x: quantized(x, quantization_type="lut"), "quantization_type 'lut', expected 'linear'"),
        (lambda x: quantized(x, nbits=2), "a weight of up to 4 in 2 bits"),
        (lambda x: quantized(x, quant_scale=np.ones(2, np.float32)), "nor one for each of 4 channels"),
    ],
)
def test_what_is_not_specified_is_refused(build: Callable[..., Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(mil.MILError, match=message):
        run(tmp_path, build, x=np.zeros((1, 1, 6, 6), np.int32))


def test_an_image_index_that_does_not_exist(tmp_path: Path) -> None:
    build = lambda x, i: mb.crop_resize(x=x, boxes=BOXES, box_indices=i)  # noqa: E731
    (fine,) = run(tmp_path, build, x=SQUARE, i=np.zeros(3, np.int32))
    assert np.isfinite(fine).all()
    for index in (1, -1):
        with pytest.raises(mil.MILError, match=r"an image index of .*, expected 0 to 0"):
            run(tmp_path, build, x=SQUARE, i=np.array([0, index, 0], np.int32))
