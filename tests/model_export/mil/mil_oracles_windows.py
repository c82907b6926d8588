"""NumPy oracles of windows over one to three dimensions, each written from its docstring's sum."""

import itertools
from typing import Any

import numpy as np
from mil_oracles import pads


def around(sizes: Any, kernel: Any, strides: Any, dilations: Any, pad_type: str, pad: Any) -> list[tuple[int, int]]:
    pad = [0] * 2 * len(sizes) if pad is None else pad
    axes = enumerate(zip(sizes, kernel, strides, dilations))
    return [pads(*axis, pad_type, (pad[2 * i], pad[2 * i + 1])) for i, axis in axes]


def np_conv_nd(
    x: np.ndarray, weight: np.ndarray, bias: Any = None, strides: Any = None, pad_type: str = "valid", pad: Any = None,
    dilations: Any = None, groups: int = 1,
) -> np.ndarray:  # fmt: skip
    n = x.ndim - 2
    strides, dilations, kernel = strides or [1] * n, dilations or [1] * n, weight.shape[2:]
    padded = np.pad(
        x.astype(np.float64), [(0, 0), (0, 0), *around(x.shape[2:], kernel, strides, dilations, pad_type, pad)]
    )
    counts = [(s - (k - 1) * d - 1) // t + 1 for s, k, d, t in zip(padded.shape[2:], kernel, dilations, strides)]
    out = np.zeros((len(x), len(weight), *counts))
    for place in np.ndindex(*kernel):
        axes = zip(place, dilations, strides, counts)
        taken = padded[(..., *(slice(k * d, k * d + t * (c - 1) + 1, t) for k, d, t, c in axes))]
        for g, (part, some) in enumerate(zip(np.split(taken, groups, 1), np.split(weight, groups))):
            rows = len(weight) // groups
            out[:, g * rows : (g + 1) * rows] += np.einsum("nc...,oc->no...", part, some[(..., *place)])
    return out if bias is None else out + np.asarray(bias).reshape(-1, *[1] * n)


def np_conv_quantized(
    x: np.ndarray, weight: np.ndarray, quant_scale: Any, quant_bias: Any, quantization_type: str, nbits: int = 8,
    **more: Any,
) -> np.ndarray:  # fmt: skip
    """The definition's W_float = W_quantized * scale + bias."""
    scale, shift = (np.float64(v).reshape(-1, *[1] * (weight.ndim - 1)) for v in (quant_scale, quant_bias))
    return np_conv_nd(x, np.float64(weight) * scale + shift, **more)


def np_conv_transpose_nd(
    x: np.ndarray, weight: np.ndarray, bias: Any = None, strides: Any = None, pad_type: str = "valid", pad: Any = None,
    dilations: Any = None, groups: int = 1, output_shape: Any = None,
) -> np.ndarray:  # fmt: skip
    """Each element of x adds the kernel, times itself, to the result."""
    n = x.ndim - 2
    strides, dilations, kernel = strides or [1] * n, dilations or [1] * n, weight.shape[2:]
    sizes = x.shape[2:]
    full = [(s - 1) * t + (k - 1) * d + 1 for s, t, k, d in zip(sizes, strides, kernel, dilations)]
    if output_shape is not None:
        lengths = list(output_shape[2:])
    elif pad_type == "same":
        lengths = [s * t for s, t in zip(sizes, strides)]
    else:
        ends = pad if pad_type == "custom" else [0] * 2 * n
        lengths = [f - ends[2 * i] - ends[2 * i + 1] for i, f in enumerate(full)]
    starts = {"valid": [0] * n, "custom": (pad or [])[::2], "same": [max(0, f - c) // 2 for f, c in zip(full, lengths)]}
    room = [max(f, s + c) for f, s, c in zip(full, starts[pad_type], lengths)]
    out = np.zeros((len(x), weight.shape[1] * groups, *room))
    for place in np.ndindex(*kernel):
        axes = zip(place, dilations, strides, sizes)
        target = out[(..., *(slice(k * d, k * d + t * (s - 1) + 1, t) for k, d, t, s in axes))]
        parts = zip(np.split(x.astype(np.float64), groups, 1), np.split(weight, groups))
        target += np.concatenate([np.einsum("nc...,co->no...", a, b[(..., *place)]) for a, b in parts], 1)
    out = out[(..., *(slice(s, s + c) for s, c in zip(starts[pad_type], lengths)))]
    return out if bias is None else out + np.asarray(bias).reshape(-1, *[1] * n)


def np_pool_nd(
    x: np.ndarray, kind: str, kernel_sizes: Any, strides: Any = None, pad_type: str = "valid", pad: Any = None,
    ceil_mode: bool = False, exclude_padding_from_average: bool = False,
) -> np.ndarray:  # fmt: skip
    """Window by window; kind is average, max, sum or l2. A window reaches over x and the padding, no further."""
    n, sizes = x.ndim - 2, x.shape[2:]
    strides = strides or [1] * n
    sides = around(sizes, kernel_sizes, strides, [1] * n, pad_type, pad)
    counts = []
    for size, (before, after), kernel, stride in zip(sizes, sides, kernel_sizes, strides):
        count = (size + before + after - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
        counts.append(count - (ceil_mode and before + after > 0 and (count - 1) * stride >= size + before))
    out = np.zeros((*x.shape[:2], *counts))
    for place in np.ndindex(*counts):
        values, room = [], 0
        starts = [i * stride - before for i, stride, (before, _) in zip(place, strides, sides)]
        for offset in itertools.product(*map(range, kernel_sizes)):
            where = [start + k for start, k in zip(starts, offset)]
            room += all(-before <= w < size + after for w, size, (before, after) in zip(where, sizes, sides))
            if all(0 <= w < size for w, size in zip(where, sizes)):
                values.append(np.float64(x[(..., *where)]))
        if kind == "max":
            out[(..., *place)] = np.max(values, 0)
        elif kind == "sum":
            out[(..., *place)] = np.sum(values, 0)
        elif kind == "l2":
            out[(..., *place)] = np.sqrt(np.sum(np.square(values), 0))
        else:
            out[(..., *place)] = np.sum(values, 0) / (len(values) if exclude_padding_from_average else room)
    return out
