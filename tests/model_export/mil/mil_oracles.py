"""NumPy oracles of operations that coremltools does not evaluate itself, written from its documentation."""

from collections.abc import Callable
from typing import Any

import numpy as np


def pads(size: int, kernel: int, stride: int, dilation: int, pad_type: str, pad: tuple[int, int]) -> tuple[int, int]:
    if pad_type == "valid":
        return 0, 0
    if pad_type == "custom":
        return pad
    reach = (kernel - 1) * dilation + 1
    total = max(0, (int(np.ceil(size / stride)) - 1) * stride + reach - size)
    return (total // 2, total - total // 2) if pad_type == "same" else (total - total // 2, total // 2)


def np_conv(
    x: np.ndarray, weight: np.ndarray, bias: Any = None, strides: Any = None, pad_type: str = "valid", pad: Any = None,
    dilations: Any = None, groups: int = 1,
) -> np.ndarray:  # fmt: skip
    axes = range(2, x.ndim)
    strides, dilations, pad = strides or [1, 1], dilations or [1, 1], pad or [0, 0, 0, 0]
    around = [
        pads(x.shape[2 + i], weight.shape[2 + i], strides[i], dilations[i], pad_type, (pad[2 * i], pad[2 * i + 1]))
        for i in range(len(axes))
    ]
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations)]
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *around])
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=[*axes])
    steps = (slice(None, None, step) for some in (strides, dilations) for step, _ in zip(some, axes))
    windows = windows[(slice(None), slice(None), *steps)]
    parts = [
        np.tensordot(part, kernel, ([1, *range(x.ndim, 2 * x.ndim - 2)], [1, *axes]))
        for part, kernel in zip(np.split(windows, groups, 1), np.split(weight, groups))
    ]
    out = np.moveaxis(np.concatenate(parts, -1), -1, 1)
    return out if bias is None else out + bias.reshape(-1, *[1] * len(axes))


def np_conv_transpose(
    x: np.ndarray, weight: np.ndarray, bias: Any = None, strides: Any = (1, 1), pad_type: str = "valid",
    pad: Any = None, dilations: Any = (1, 1), groups: int = 1,
) -> np.ndarray:  # fmt: skip
    """A convolution of x with zeros between its values, by the kernel turned round."""
    (n, c, h, w), (sh, sw) = x.shape, strides
    spread = np.zeros((n, c, (h - 1) * sh + 1, (w - 1) * sw + 1))
    spread[:, :, ::sh, ::sw] = x
    kernel = [part.swapaxes(0, 1)[:, :, ::-1, ::-1] for part in np.split(weight, groups)]
    rows, columns = ((size - 1) * dilation for size, dilation in zip(weight.shape[2:], dilations))
    around = [rows, rows, columns, columns]
    full = np_conv(spread, np.concatenate(kernel), bias, None, "custom", around, list(dilations), groups)
    if pad_type == "custom":
        full = full[:, :, pad[0] : full.shape[2] - pad[1], pad[2] : full.shape[3] - pad[3]]
    return full


def np_pool(x: np.ndarray, reduce: Callable[..., Any], kernel_sizes: Any, strides: Any, pad_type: str, pad: Any = None,
            exclude_padding_from_average: bool = True, **_: Any) -> np.ndarray:  # fmt: skip
    pad = pad or [0, 0, 0, 0]
    around = [
        pads(x.shape[2 + i], kernel_sizes[i], strides[i], 1, pad_type, (pad[2 * i], pad[2 * i + 1])) for i in range(2)
    ]
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *around], constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel_sizes, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1]]
    return reduce(windows if exclude_padding_from_average else np.nan_to_num(windows), axis=(-2, -1))


def np_norm(x: np.ndarray, mean: Any, variance: Any, gamma: Any = None, beta: Any = None, epsilon: float = 1e-5) -> Any:
    def channel(value: np.ndarray) -> np.ndarray:
        return value.reshape(-1, *[1] * (x.ndim - 2)) if value.ndim == 1 else value

    y = (x - channel(mean)) / np.sqrt(channel(variance) + epsilon)
    return y if gamma is None else y * channel(gamma) + channel(beta)


def np_instance_norm(x: np.ndarray, gamma: Any = None, beta: Any = None, epsilon: float = 1e-5) -> np.ndarray:
    return np_norm(x, x.mean((2, 3), keepdims=True), x.var((2, 3), keepdims=True), gamma, beta, epsilon)


def np_lrn(x: np.ndarray, size: int, alpha: float, beta: float, k: float) -> np.ndarray:
    squares = np.pad(x**2, [(0, 0), (size // 2, (size - 1) // 2), (0, 0), (0, 0)])
    total = sum(squares[:, i : i + x.shape[1]] for i in range(size))
    return x / (k + alpha / size * total) ** beta


def np_bilinear(x: np.ndarray, scale_factor_height: int, scale_factor_width: int, align_corners: bool) -> np.ndarray:
    for axis, scale in ((-2, scale_factor_height), (-1, scale_factor_width)):
        size = x.shape[axis]
        place = np.arange(size * scale)
        grid = place * (size - 1) / (size * scale - 1) if align_corners else (place + 0.5) / scale - 0.5
        grid = np.clip(grid, 0, size - 1)
        low = np.floor(grid).astype(int)
        high = np.minimum(low + 1, size - 1)
        x, part = np.moveaxis(x, axis, -1), grid - low
        x = np.moveaxis(x[..., low] * (1 - part) + x[..., high] * part, -1, axis)
    return x


def np_pixel_shuffle(x: np.ndarray, upscale_factor: int) -> np.ndarray:
    (n, c, h, w), r = x.shape, upscale_factor
    return x.reshape(n, c // r**2, r, r, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // r**2, h * r, w * r)


def np_pixel_unshuffle(x: np.ndarray, downscale_factor: int) -> np.ndarray:
    (n, c, h, w), r = x.shape, downscale_factor
    return x.reshape(n, c, h // r, r, w // r, r).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * r**2, h // r, w // r)


def np_cumsum(x: np.ndarray, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> np.ndarray:
    x = np.flip(x, axis) if reverse else x
    total = np.cumsum(x, axis) - (x if exclusive else 0)
    return np.flip(total, axis) if reverse else total
