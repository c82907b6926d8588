"""Tensors to and from MLX, and MLX on the CPU: what the tests against MLX share."""

import mlx.core as mx
import numpy as np
import pytest
import torch

DTYPES = {torch.float16: mx.float16, torch.bfloat16: mx.bfloat16, torch.float32: mx.float32}


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def to_mlx(tensor: torch.Tensor) -> mx.array:
    data = mx.array(tensor.contiguous().view(torch.uint8).numpy())
    return data.view(DTYPES[tensor.dtype]) if tensor.dtype in DTYPES else data


def mlx_bytes(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint8)).tobytes()


def torch_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
