"""More cases of convolution, pooling, products and normalization: other ranks, and operands of several types."""

from functools import partial
from typing import Any

import numpy as np
from mil_case import Case, uniform
from mil_oracles import np_instance_norm, np_lrn, np_norm
from mil_oracles_windows import np_conv_nd, np_conv_quantized, np_conv_transpose_nd, np_pool_nd

LINE, PLANE, SPACE = uniform(2, 4, 7), uniform(2, 4, 5, 6), uniform(1, 4, 3, 4, 5)


def convolutions() -> list[Case]:
    line, plane, space = uniform(6, 4, 3), uniform(6, 4, 3, 2), uniform(6, 4, 2, 3, 2)
    settings: list[tuple[np.ndarray, dict[str, Any]]] = [
        (LINE, {"weight": line, "pad_type": "same", "strides": [2]}),
        (LINE, {"weight": line, "pad_type": "same_lower", "strides": [3], "dilations": [2]}),
        (LINE, {"weight": line[:, :2].copy(), "groups": 2, "pad_type": "custom", "pad": [2, 0], "bias": uniform(6)}),
        (PLANE, {"weight": plane, "pad_type": "same_lower", "strides": [1, 2]}),
        (PLANE, {"weight": uniform(8, 1, 3, 2), "groups": 4, "pad_type": "custom", "pad": [0, 1, 2, 1]}),
        (SPACE, {"weight": space, "pad_type": "valid"}),
        (SPACE, {"weight": space, "pad_type": "same", "strides": [2, 1, 2], "bias": uniform(6)}),
        (SPACE, {"weight": space, "pad_type": "same_lower", "dilations": [1, 1, 2]}),
        (SPACE, {"weight": space[:, :2].copy(), "groups": 2, "pad_type": "custom", "pad": [0, 1, 1, 1, 2, 0]}),
    ]
    cases = [Case("conv", {"x": x}, more, np_conv_nd) for x, more in settings]
    for x, weight in ((LINE, line), (PLANE, plane), (SPACE, space)):
        cases += [
            Case("conv", {"x": x, "weight": weight}, {"pad_type": kind}, np_conv_nd) for kind in ("same_lower", "valid")
        ]
    cases += [Case("conv", {"x": PLANE, "weight": plane, "bias": uniform(6)}, {"pad_type": "same"}, np_conv_nd)]
    return cases


def quantized() -> list[Case]:
    """Scales and shifts are sums of few powers of two: the weights are numbers of fp16."""
    numbers = np.random.default_rng(5)
    line, plane, space = (numbers.integers(0, 256, shape).astype(np.uint8) for shape in
                          ((6, 4, 3), (6, 2, 3, 2), (6, 4, 2, 3, 2)))  # fmt: skip
    each = {"quant_scale": np.float32([1, 2, 4, 8, 16, 32]) / 1024, "quant_bias": np.float32([0, -1, -2, 1, -4, 0.5])}
    one = {"quant_scale": np.float32(1 / 128), "quant_bias": np.float32(-1)}
    settings: list[tuple[np.ndarray, dict[str, Any]]] = [
        (LINE, {"weight": line, **one, "pad_type": "same", "strides": [2]}),
        (PLANE, {"weight": plane, **each, "groups": 2, "bias": np.arange(250, 256).astype(np.uint8)}),
        (PLANE, {"weight": plane >> 5, **each, "nbits": 3, "groups": 2, "pad_type": "custom", "pad": [0, 1, 2, 1]}),
        (SPACE, {"weight": space, **one, "dilations": [1, 1, 2]}),
    ]
    linear = {"quantization_type": "linear"}
    return [Case("conv_quantized", {"x": x}, linear | more, np_conv_quantized) for x, more in settings]


def transposed() -> list[Case]:
    line, plane, space = uniform(4, 3, 3), uniform(4, 3, 3, 2), uniform(4, 3, 2, 3, 2)
    bias = uniform(3, seed=1)
    settings: list[tuple[np.ndarray, dict[str, Any]]] = [
        (LINE, {"weight": line, "strides": [2], "bias": bias}),
        (LINE, {"weight": line, "strides": [2], "pad_type": "custom", "pad": [1, 0], "dilations": [2]}),
        (LINE, {"weight": line[..., :1].copy(), "strides": [3], "pad_type": "same", "bias": bias}),
        (PLANE, {"weight": plane, "strides": [2, 3], "pad_type": "same"}),
        (PLANE, {"weight": plane, "strides": [1, 2], "pad_type": "same", "output_shape": [2, 3, 5, 11]}),
        (PLANE, {"weight": plane, "strides": [2, 2], "output_shape": [2, 3, 12, 12], "bias": bias}),
        (PLANE, {"weight": plane, "pad_type": "custom", "pad": [1, 1, 0, 1], "strides": [2, 2],
                 "output_shape": [2, 3, 9, 12]}),
        (SPACE, {"weight": space, "strides": [2, 1, 2], "bias": bias}),
        (SPACE, {"weight": space[:, :2].copy(), "groups": 2, "pad_type": "custom", "pad": [0, 1, 1, 1, 0, 0]}),
        (SPACE, {"weight": space, "strides": [2, 2, 2], "pad_type": "same"}),
    ]  # fmt: skip
    cases = [Case("conv_transpose", {"x": x}, more, np_conv_transpose_nd) for x, more in settings]
    return [*cases, Case("conv_transpose", {"x": PLANE, "weight": plane}, {}, np_conv_transpose_nd)]


def pools() -> list[Case]:
    kinds: list[dict[str, Any]] = [{"pad_type": "valid"}, {"pad_type": "same"}, {"pad_type": "same_lower"},
                                   {"pad_type": "custom", "pad": [1, 0]}]  # fmt: skip
    ceil: list[tuple[np.ndarray, dict[str, Any]]] = [
        (LINE, {"kernel_sizes": [2], "strides": [3], "pad_type": "valid"}),
        (LINE, {"kernel_sizes": [3], "strides": [3], "pad_type": "custom", "pad": [1, 1]}),
        (PLANE, {"kernel_sizes": [2, 3], "strides": [2, 2], "pad_type": "valid"}),
        (PLANE, {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}),
        (PLANE, {"kernel_sizes": [2, 2], "strides": [3, 4], "pad_type": "custom", "pad": [1, 1, 1, 1]}),
    ]
    settings = [(x, more | {"ceil_mode": True}) for x, more in ceil]
    for x in (LINE, PLANE, SPACE):
        n = x.ndim - 2
        for more in kinds:
            pad = {"pad": (more["pad"] * n)} if "pad" in more else {}
            settings.append((x, more | pad | {"kernel_sizes": [2, 3, 2][:n], "strides": [2, 1, 3][:n]}))
    cases = []
    for x, more in settings:
        cases.append(Case("max_pool", {"x": x}, more, partial(np_pool_nd, kind="max")))
        cases += [
            Case("avg_pool", {"x": x}, more | {"exclude_padding_from_average": exclude},
                 partial(np_pool_nd, kind="average"))
            for exclude in (True, False)
        ]  # fmt: skip
        if x.ndim < 5:
            cases.append(Case("l2_pool", {"x": x}, more, partial(np_pool_nd, kind="l2")))
    plain = {"kernel_sizes": [2], "pad_type": "valid"}
    return [*cases, Case("max_pool", {"x": LINE}, plain, partial(np_pool_nd, kind="max"), "iOS15")]


def products() -> list[Case]:
    a, ints = uniform(2, 3, 4), np.arange(-6, 6, dtype=np.int32).reshape(3, 4)
    cases = [
        Case("matmul", {"x": uniform(4)}, {"y": uniform(4, 5)}, lambda x, y: x @ y),
        Case("matmul", {"x": uniform(2, 1, 3, 4), "y": uniform(3, 4, 2)}),
        Case("matmul", {"x": ints}, {"y": ints, "transpose_y": True}, half=False),
        Case("linear", {"x": ints}, {"weight": ints, "bias": ints[:, 0].copy()}, half=False),
        Case("linear", {"x": uniform(4)}, {"weight": uniform(3, 4)}),
        Case("linear", {"x": uniform(2, 3, 2, 4)}, {"weight": uniform(3, 4)}),
    ]

    def einsum(x: np.ndarray, y: np.ndarray, equation: str) -> np.ndarray:
        shared = [0, 2] if x.ndim == 4 else [1]
        for axis in shared:
            size = max(x.shape[axis], y.shape[axis])
            x, y = (value.repeat(size // value.shape[axis], axis) for value in (x, y))
        return np.einsum(equation, x, y)

    for x, y, equation in (
        (uniform(3, 4, 5), uniform(5, 4, 2), "chw,whr->chr"),
        (uniform(3, 1, 5), uniform(5, 4, 2), "abc,cbd->abd"),
        (uniform(1, 3, 4, 5), uniform(2, 5, 1, 3), "nchw,nwhu->nchu"),
    ):
        cases.append(Case("einsum", {"x": x, "y": y}, {"equation": equation}, einsum))
    mask = np.zeros((3, 3), np.float32)
    mask[1], mask[0, 2] = -np.inf, -np.inf
    query = {"query": a, "key": a * 0.5, "value": a + 1}

    def attention(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
        with np.errstate(invalid="ignore"):
            scores = np.float64(query) @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
            scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
            powers = np.exp(scores - scores.max(-1, keepdims=True))
            return powers / powers.sum(-1, keepdims=True) @ value

    # The second row sees nothing.
    for given in (mask, mask == 0, mask[0].copy(), uniform(1, 1, 3)):
        cases.append(Case("scaled_dot_product_attention", query | {"attn_mask": given}, {}, attention, "iOS18"))
    return cases


def norms() -> list[Case]:
    gamma = uniform(4, low=0.5, high=1.5, seed=2)
    affine = {"gamma": gamma, "beta": gamma - 1}
    statistics = {"mean": gamma - 1, "variance": gamma}
    cases = [Case("batch_norm", {"x": x}, statistics, np_norm) for x in (LINE, SPACE)]
    cases += [Case("batch_norm", {"x": LINE}, statistics | affine, np_norm)]

    def instance(x: np.ndarray, **more: Any) -> np.ndarray:
        return np_instance_norm(x[..., None] if x.ndim == 3 else x, **more).reshape(x.shape)

    for x in (LINE, PLANE[:, :, :1, :1].copy()):
        cases.append(Case("instance_norm", {"x": x}, affine, instance))
    cases += [Case("layer_norm", {"x": x}, {"axes": axes}) for x, axes in ((LINE, [0, -1]), (SPACE, [-3, 1]))]

    def lrn(x: np.ndarray, **more: Any) -> np.ndarray:
        return np_lrn(x.reshape(*x.shape[:2], -1, 1), **more).reshape(x.shape)

    values = {"alpha": np.float32(0.5), "beta": np.float32(0.75), "k": np.float32(2)}
    for x, size in ((LINE, 2), (LINE, 5), (SPACE, 4), (PLANE, 1)):
        cases.append(Case("local_response_norm", {"x": x}, values | {"size": size}, lrn))
    return [*cases, Case("l2_norm", {"x": uniform(3, 4, 5)}), Case("l2_norm", {"x": SPACE})]


def more_windows() -> list[Case]:
    return [*convolutions(), *quantized(), *transposed(), *pools(), *products(), *norms()]
