"""Each operation against an oracle that shares no code with it: coremltools' value inference, or NumPy written here.

The cases are saved as packages and run from their bytes, in float32 and (where the operation takes fp16) as typed,
where the result must be the oracle's, rounded to fp16 once.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mil_packages as packages
import numpy as np
import pytest

from model_export import mil
from model_export.mil.registry import supported

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    op: str
    inputs: Arrays
    parameters: dict[str, Any] = field(default_factory=dict)
    oracle: Callable[..., Any] | None = None  # None: coremltools' value inference
    target: str = "iOS17"
    half: bool = True

    def __str__(self) -> str:
        short = {k: v for k, v in self.parameters.items() if not isinstance(v, np.ndarray) or v.size < 5}
        return f"{self.op}-{'-'.join(f'{k}={v}' for k, v in short.items())}".replace(" ", "")


def uniform(*shape: int, low: float = -3, high: float = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


X = uniform(2, 4, 5, 6)
Y = uniform(2, 4, 5, 6, seed=1)
POSITIVE = uniform(2, 3, 4, low=0.1)
UNIT = uniform(2, 3, 4, low=-0.9, high=0.9)
INTS = np.arange(-6, 6, dtype=np.int32).reshape(3, 4)
BOOLS = np.arange(12).reshape(3, 4) % 3 == 0
C4 = uniform(4, low=0.5, high=1.5, seed=2)


def f16(array: Any) -> Any:
    """A parameter as the fp16 program has it."""
    if isinstance(array, tuple):
        return tuple(map(f16, array))
    floating = isinstance(array, (np.ndarray, np.generic)) and array.dtype == np.float32
    return array.astype(np.float16) if floating else array


# -- oracles that coremltools lacks ---------------------------------------------------------------------------------


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


# -- the cases ------------------------------------------------------------------------------------------------------


def unary() -> list[Case]:
    plain = (
        "abs atan ceil cos cosh erf exp exp2 floor relu relu6 round sigmoid sign sin sinh softplus softsign square tanh"
    )
    cases = [Case(op, {"x": X}) for op in plain.split()]
    cases += [Case(op, {"x": UNIT}) for op in ["acos", "asin", "atanh", "tan"]]
    cases += [Case(op, {"x": POSITIVE}) for op in ["sqrt", "rsqrt", "log", "inverse"]]
    cases += [Case("rsqrt", {"x": POSITIVE}, {"epsilon": np.float32(0.1)}), Case("silu", {"x": X}, {}, np_silu)]
    cases += [Case("logical_not", {"x": BOOLS}, half=False)]
    cases += [Case("clip", {"x": X}, {"alpha": np.float32(-1), "beta": np.float32(2)})]
    cases += [Case("threshold", {"x": X}, {"alpha": np.float32(0.5)})]
    modes = ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    cases += [Case("gelu", {"x": X}, {"mode": mode}) for mode in modes]
    cases += [Case(op, {"x": X}, {"alpha": np.float32(0.25)}) for op in ("elu", "leaky_relu", "thresholded_relu")]
    both = {"alpha": np.float32(0.25), "beta": np.float32(0.75)}
    cases += [Case(op, {"x": X}, both) for op in ("clamped_relu", "linear_activation", "scaled_tanh", "sigmoid_hard")]
    cases += [Case("prelu", {"x": X}, {"alpha": C4}), Case("softmax", {"x": X}, {"axis": 1})]
    cases += [Case("softplus_parametric", {"x": X}, {"alpha": C4, "beta": C4})]
    return cases


def np_matmul(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ y.astype(np.float64)


def np_silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def binary() -> list[Case]:
    ops = "add sub mul real_div floor_div mod maximum minimum equal not_equal greater greater_equal less less_equal"
    cases = [Case(op, {"x": np.round(X), "y": np.round(Y[:, :1]) + 3.5}) for op in ops.split()]
    cases += [Case(op, {"x": INTS, "y": INTS[:1] + 9}, half=False) for op in ["add", "sub", "mul", "floor_div", "mod"]]
    cases += [Case("add", {"x": X, "y": Y}), Case("mul", {"x": X}, {"y": np.float32(0.3)})]
    cases += [Case("sub", {"y": X}, {"x": np.float32(1)}), Case("pow", {"x": POSITIVE, "y": UNIT})]
    logical = {"x": BOOLS, "y": BOOLS[::-1].copy()}
    cases += [Case(op, logical, half=False) for op in ("logical_and", "logical_or", "logical_xor")]
    cases += [
        Case(
            "select",
            {"cond": BOOLS, "a": UNIT[0, :, :], "b": POSITIVE[0]},
            oracle=lambda cond, a, b: np.where(cond, a, b),
        )
    ]
    return cases


def windows() -> list[Case]:
    weight, bias = uniform(6, 4, 3, 3, seed=3), uniform(6, seed=4)
    settings: list[dict[str, Any]] = [
        {"pad_type": "valid"},
        {"pad_type": "custom", "pad": [1, 1, 2, 2], "strides": [2, 2]},
        {"pad_type": "custom", "pad": [0, 1, 2, 0]},
        {"pad_type": "same", "strides": [2, 1]},
        {"pad_type": "same_lower", "strides": [2, 2]},
        {"pad_type": "same", "dilations": [2, 1]},
    ]
    cases = [Case("conv", {"x": X}, {"weight": weight, "bias": bias, **extra}, np_conv) for extra in settings]
    cases += [Case("conv", {"x": X}, {"weight": weight[:, :2].copy(), "groups": 2, "pad_type": "valid"}, np_conv)]
    cases += [Case("conv", {"x": X}, {"weight": weight[:4, :1].copy(), "groups": 4, "pad_type": "same"}, np_conv)]
    cases += [Case("conv", {"x": X, "weight": weight}, {"pad_type": "valid"}, np_conv)]
    cases += [Case("conv", {"x": X[:, :, 0].copy()}, {"weight": weight[:, :, 0].copy(), "pad_type": "valid"}, np_conv)]
    transposed, strides = uniform(4, 3, 3, 2, seed=5), [2, 1]
    cases += [Case("conv_transpose", {"x": X}, {"weight": transposed, "strides": strides}, np_conv_transpose)]
    custom = {
        "weight": transposed,
        "strides": strides,
        "bias": bias[:3].copy(),
        "pad_type": "custom",
        "pad": [1, 0, 1, 1],
    }
    cases += [Case("conv_transpose", {"x": X}, custom, np_conv_transpose)]
    grouped = {"weight": transposed[:, :1].copy(), "groups": 2, "dilations": [1, 2]}
    cases += [Case("conv_transpose", {"x": X}, grouped, np_conv_transpose)]
    for pool, extra in itertools.product(("avg_pool", "max_pool"), ("valid", "custom", "same", "same_lower")):
        parameters = {"kernel_sizes": [3, 2], "strides": [2, 1], "pad_type": extra}
        parameters |= {"pad": [1, 0, 1, 1]} if extra == "custom" else {}
        reduce = np.nanmean if pool == "avg_pool" else np.nanmax
        for exclude in (True, False) if pool == "avg_pool" else (True,):
            more = {"exclude_padding_from_average": exclude} if pool == "avg_pool" else {}
            cases.append(Case(pool, {"x": X}, parameters | more, lambda x, reduce=reduce, **p: np_pool(x, reduce, **p)))
    return cases


def products() -> list[Case]:
    a, b = uniform(2, 3, 4), uniform(2, 4, 5, seed=1)
    cases = [
        Case("linear", {"x": a}, {"weight": uniform(6, 4), "bias": uniform(6)}),
        Case("linear", {"x": a}, {"weight": uniform(6, 4)}),
    ]
    cases += [Case("matmul", {"x": a, "y": b}), Case("matmul", {"x": a}, {"y": b})]
    swapped = {"x": a.swapaxes(1, 2).copy(), "y": b.swapaxes(1, 2).copy()}
    cases += [Case("matmul", swapped, {"transpose_x": True, "transpose_y": True})]
    cases += [Case("matmul", {"x": uniform(2, 3, 128, 64, low=2), "y": uniform(2, 3, 64, 160, low=2)}, {}, np_matmul)]
    cases += [Case("scaled_dot_product_attention", {"query": a, "key": a * 0.5, "value": a + 1}, target="iOS18")]
    mask = {"query": a, "key": a * 0.5, "value": a + 1, "attn_mask": uniform(2, 3, 3)}
    return [*cases, Case("scaled_dot_product_attention", mask, target="iOS18")]


def norms() -> list[Case]:
    gamma, beta = C4, C4 - 1
    statistics = {"mean": beta, "variance": gamma, "gamma": gamma, "beta": beta, "epsilon": np.float32(1e-3)}
    cases = [
        Case("batch_norm", {"x": X}, statistics, np_norm),
        Case("instance_norm", {"x": X}, {"gamma": gamma, "beta": beta}, np_instance_norm),
    ]
    cases += [Case("l2_norm", {"x": X}, {"epsilon": np.float32(1e-3)})]
    for axes in ([-1], [2, 3], [1]):
        sizes = [X.shape[axis] for axis in axes]
        affine = {"gamma": uniform(*sizes, low=0.5), "beta": uniform(*sizes, seed=7)}
        cases.append(Case("layer_norm", {"x": X}, {"axes": axes, "epsilon": np.float32(1e-3), **affine}))
    lrn = {"size": 3, "alpha": np.float32(0.25), "beta": np.float32(0.75), "k": np.float32(1)}
    return [*cases, Case("local_response_norm", {"x": X}, lrn, np_lrn)]


def reductions() -> list[Case]:
    names = ["sum", "mean", "max", "min", "prod", "l1_norm", "l2_norm", "log_sum_exp", "sum_square"]
    choices: list[dict[str, Any]] = [{"axes": [-1], "keep_dims": True}, {"axes": [0, 2], "keep_dims": False}]
    cases = [Case(f"reduce_{name}", {"x": UNIT}, extra) for name in names for extra in choices]
    cases += [Case("reduce_log_sum", {"x": POSITIVE}, extra) for extra in choices]
    return cases + [
        Case(f"reduce_{name}", {"x": UNIT}, {"axis": 1, "keep_dims": False}) for name in ("argmax", "argmin")
    ]


def movements() -> list[Case]:
    begin = {"begin": [0, 1, -1, 0], "end": [2, 4, 0, 5], "stride": [1, 2, -2, 1]}
    masks = {"begin_mask": [True, False, False, False], "end_mask": [False, False, False, True]}
    squeezed = {"begin": [1, 0, 2, 0], "end": [2, 4, 3, 6], "squeeze_mask": [True, False, False, False]}
    indices = np.array([[3, 0], [1, 2]], np.int32)
    along = np.zeros((2, 4, 5, 6), np.int32) + np.arange(6, dtype=np.int32)[::-1]
    cases = [
        Case("identity", {"x": X}),
        Case("expand_dims", {"x": UNIT}, {"axes": [0, -1]}),
        Case("squeeze", {"x": X[:1, :, :1].copy()}, {"axes": [0, 2]}),
        Case("squeeze", {"x": X[:1, :, :1].copy()}),
        Case("reshape", {"x": X}, {"shape": [0, -1, 3, 5]}),
        Case("transpose", {"x": X}, {"perm": [2, 0, 3, 1]}),
        Case("reverse", {"x": X}, {"axes": [1, 3]}),
        Case("slice_by_index", {"x": X}, begin),
        Case("slice_by_index", {"x": X}, begin | masks),
        Case("slice_by_index", {"x": X}, squeezed),
        Case("slice_by_size", {"x": X}, {"begin": [0, 1, 2, 0], "size": [2, 2, -1, 3]}),
        Case("pixel_shuffle", {"x": X}, {"upscale_factor": 2}, np_pixel_shuffle),
        Case("pixel_unshuffle", {"x": uniform(1, 2, 4, 6)}, {"downscale_factor": np.uint32(2)}, np_pixel_unshuffle),
        Case("split", {"x": X}, {"num_splits": 3, "axis": 3}, lambda x, **_: np.split(x, 3, 3)),
        Case("split", {"x": X}, {"split_sizes": [1, 3, 2], "axis": -1}),
        Case("pad", {"x": X}, {"pad": [1, 0, 2, 1], "mode": "constant", "constant_val": np.float32(0.5)}),
        Case("pad", {"x": X}, {"pad": [1, 2, 2, 1], "mode": "reflect"}),
        Case("pad", {"x": X}, {"pad": [1, 2, 2, 1], "mode": "replicate"}),
        Case("tile", {"x": X}, {"reps": [1, 2, 1, 3]}),
        Case("flatten2d", {"x": X}, {"axis": 2}),
        Case("shape", {"x": X}),
        Case("fill", {}, {"shape": [2, 3], "value": np.float32(0.5)}, half=False),
        Case("cumsum", {"x": X}, {"axis": 1}, np_cumsum),
        Case("cumsum", {"x": X}, {"axis": 2, "exclusive": True, "reverse": True}, np_cumsum),
        Case("argsort", {"x": X}, {"axis": -1, "ascending": True}),
        Case("argsort", {"x": X}, {"axis": 1, "ascending": False}),
        Case("topk", {"x": X}, {"k": 2, "axis": -1, "ascending": True}, target="iOS15"),
        Case("topk", {"x": X}, {"k": 3, "axis": 1}),
        Case("gather", {"x": X, "indices": indices}, {"axis": 1}),
        Case(
            "gather",
            {"x": X, "indices": indices - 4},
            {"axis": 1},
            lambda x, indices, axis: np.take(x, indices, axis),
            "iOS15",
        ),
        Case("gather_along_axis", {"x": X, "indices": along}, {"axis": 3}),
        Case("upsample_nearest_neighbor", {"x": X}, {"scale_factor_height": 2, "scale_factor_width": 3}, np_nearest),
    ]
    for corners in (True, False):
        scales = {"scale_factor_height": 2, "scale_factor_width": 3, "align_corners": corners}
        cases.append(Case("upsample_bilinear", {"x": X}, scales, np_bilinear))
    return cases


def np_nearest(x: np.ndarray, scale_factor_height: int, scale_factor_width: int) -> np.ndarray:
    return x.repeat(scale_factor_height, -2).repeat(scale_factor_width, -1)


def lists() -> list[Case]:
    """Operations whose parameter `values` is a list: built apart, since its items are inputs."""
    return [
        Case("concat", {"x": X, "y": Y[:, :2].copy()}, {"axis": 1}, lambda x, y, axis: np.concatenate([x, y], axis)),
        Case("stack", {"x": X, "y": Y}, {"axis": 2}, lambda x, y, axis: np.stack([x, y], axis)),
        Case(
            "einsum", {"x": uniform(2, 3, 4, 5), "y": uniform(2, 5, 4, 3)}, {"equation": "nchw,nwhu->nchu"}, np_einsum
        ),
    ]


def np_einsum(x: np.ndarray, y: np.ndarray, equation: str) -> np.ndarray:
    return np.einsum(equation, x, y)


def casts() -> list[Case]:
    wide = X * 50
    cases = [Case("cast", {"x": wide}, {"dtype": dtype}, half=False) for dtype in ("int32", "bool", "fp16")]
    return [*cases, Case("cast", {"x": INTS}, {"dtype": "fp32"}, half=False)]


CASES = [
    *unary(), *binary(), *windows(), *products(), *norms(), *reductions(), *movements(), *lists(), *casts()
]  # fmt: skip


def apply(case: Case, variables: dict[str, Any]) -> list[Any]:
    """Add the case's operation to the program under construction; its outputs."""
    operation = getattr(packages.mb, case.op)
    if case.op in ("concat", "stack", "einsum"):
        result = operation(values=[variables["x"], variables["y"]], **case.parameters)
    else:
        # A model's inputs cannot be bool.
        booleans = [name for name, array in case.inputs.items() if array.dtype == np.bool_]
        variables |= {name: packages.mb.cast(x=variables[name], dtype="bool") for name in booleans}
        result = operation(**variables, **case.parameters)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def halved(case: Case) -> Case:
    """The case as an fp16 program has it; iOS 15 has no fp16 inputs."""
    inputs = {name: f16(array) for name, array in case.inputs.items()}
    parameters = {name: f16(value) for name, value in case.parameters.items()}
    return Case(case.op, inputs, parameters, case.oracle, max(case.target, "iOS16"))


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], list[np.ndarray]]:
    """`evaluate(half, index) -> outputs` of CASES[index]. All cases of a target are one saved program, run once."""

    @functools.cache
    def run(half: bool, target: str) -> dict[int, list[np.ndarray]]:
        chosen = {i: halved(case) if half else case for i, case in enumerate(CASES) if case.half or not half}
        chosen = {i: case for i, case in chosen.items() if case.target == target}
        counts: dict[int, int] = {}

        def build(**variables: Any) -> Any:
            named: list[Any] = []
            for i, case in chosen.items():
                outputs = apply(case, {name: variables[f"i{i}_{name}"] for name in case.inputs})
                counts[i] = len(outputs)
                named += [packages.mb.identity(x=output, name=f"o{i}_{j}") for j, output in enumerate(outputs)]
            return tuple(named)

        inputs = {f"i{i}_{name}": array for i, case in chosen.items() for name, array in case.inputs.items()}
        inputs = {name: array.astype(np.int32) if array.dtype == np.bool_ else array for name, array in inputs.items()}
        path = tmp_path_factory.mktemp("operations") / "operations.mlpackage"
        packages.save_program(path, build, inputs, target)
        outputs = mil.load(path, "as-typed" if half else "float32").predict(inputs)
        return {i: [outputs[f"o{i}_{j}"] for j in range(count)] for i, count in counts.items()}

    return lambda half, index: run(half, (halved(CASES[index]) if half else CASES[index]).target)[index]


def expected(case: Case) -> list[np.ndarray]:
    if case.oracle is None:
        return packages.value_inference(case.op, case.target, **case.inputs, **case.parameters)
    result = case.oracle(**case.inputs, **case.parameters)
    return list(result) if isinstance(result, (list, tuple)) else [np.asarray(result)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_float32(index: int, evaluate: Callable[[bool, int], list[np.ndarray]]) -> None:
    for got, wanted in zip(evaluate(False, index), expected(CASES[index]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


HALF = [index for index, case in enumerate(CASES) if case.half]


@pytest.mark.parametrize("index", HALF, ids=lambda index: str(CASES[index]))
def test_as_typed_is_rounded_once(index: int, evaluate: Callable[[bool, int], list[np.ndarray]]) -> None:
    case = halved(CASES[index])

    def wide(values: dict[str, Any]) -> dict[str, Any]:  # the same numbers in more precision
        return {k: v.astype(np.float32) if getattr(v, "dtype", None) == np.float16 else v for k, v in values.items()}

    exact = Case(case.op, wide(case.inputs), wide(case.parameters), case.oracle, case.target)
    for got, wanted in zip(evaluate(True, index), expected(exact), strict=True):
        if got.dtype != np.float16:
            np.testing.assert_array_equal(got, wanted)
            continue
        rounded = wanted.astype(np.float16)
        # A float32 result beside a rounding boundary may fall to the other side: one unit in the last place, rarely.
        np.testing.assert_allclose(got, rounded, rtol=1.1e-3, atol=1e-6)
        assert (got != rounded).mean() <= 0.02


def test_every_operation_has_a_case() -> None:
    tested = {case.op for case in CASES}
    assert {op for op in supported() if not op.startswith("constexpr_")} == tested
