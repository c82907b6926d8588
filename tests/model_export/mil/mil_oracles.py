"""NumPy oracles of operations that coremltools does not evaluate itself, written from its documentation."""

import itertools
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
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: int = 1,
) -> np.ndarray:
    rank = x.ndim - 2
    strides, dilations, pad = strides or [1] * rank, dilations or [1] * rank, pad or [0] * 2 * rank
    kernel = weight.shape[2:]
    around = [
        pads(x.shape[2 + i], kernel[i], strides[i], dilations[i], pad_type, (pad[2 * i], pad[2 * i + 1]))
        for i in range(rank)
    ]
    x = np.pad(x, [(0, 0), (0, 0), *around])
    sizes = [(x.shape[2 + i] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1 for i in range(rank)]
    out = np.zeros((x.shape[0], weight.shape[0], *sizes))
    per_in, per_out = weight.shape[1], weight.shape[0] // groups
    for place in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(place[i] * strides[i], place[i] * strides[i] + (kernel[i] - 1) * dilations[i] + 1, dilations[i])
            for i in range(rank)
        )
        for o in range(weight.shape[0]):
            first = o // per_out * per_in
            part = x[(slice(None), slice(first, first + per_in), *window)]
            out[(slice(None), o, *place)] = (part * weight[o]).reshape(x.shape[0], -1).sum(1)
    return out if bias is None else out + bias.reshape(-1, *[1] * rank)


def np_conv_transpose(
    x: np.ndarray, weight: np.ndarray, bias: Any = None, strides: Any = (1, 1), pad_type: str = "valid",
    pad: Any = None, dilations: Any = (1, 1), groups: int = 1,
) -> np.ndarray:  # fmt: skip
    (n, _, h, w), (per_out, kh, kw) = x.shape, weight.shape[1:]
    (sh, sw), (dh, dw) = strides, dilations
    full = np.zeros((n, per_out * groups, (h - 1) * sh + (kh - 1) * dh + 1, (w - 1) * sw + (kw - 1) * dw + 1))
    per_in = x.shape[1] // groups
    for c, i, j in itertools.product(range(x.shape[1]), range(kh), range(kw)):
        group = slice(c // per_in * per_out, (c // per_in + 1) * per_out)
        rows, columns = slice(i * dh, i * dh + h * sh, sh), slice(j * dw, j * dw + w * sw, sw)
        full[:, group, rows, columns][:, :, :h, :w] += x[:, c, None] * weight[c, :, i, j, None, None]
    if bias is not None:
        full = full + bias.reshape(-1, 1, 1)
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


def np_matmul(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ y.astype(np.float64)


def np_silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def np_nearest(x: np.ndarray, scale_factor_height: int, scale_factor_width: int) -> np.ndarray:
    return x.repeat(scale_factor_height, -2).repeat(scale_factor_width, -1)


def np_einsum(x: np.ndarray, y: np.ndarray, equation: str) -> np.ndarray:
    return np.einsum(equation, x, y)
