"""What each operation of a random program gives: NumPy in float64, from coremltools' documentation, with the error that
float32 arithmetic may add."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import mil_oracles as plain
import mil_oracles_tensor as moves
import mil_oracles_windows as windows
import numpy as np

Formula = Callable[..., Any]


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def _reduced(function: Formula) -> Formula:
    def run(x: np.ndarray, axes: Any, keep_dims: bool) -> np.ndarray:
        return function(x, axis=tuple(axes), keepdims=keep_dims)

    return run


def _layer_norm(x: np.ndarray, axes: Any, epsilon: float, gamma: Any = 1, beta: Any = 0) -> np.ndarray:
    axes = tuple(axes)
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt(x.var(axes, keepdims=True) + epsilon) * gamma + beta


def _instance_norm(x: np.ndarray, gamma: Any, beta: Any, epsilon: float) -> np.ndarray:
    gamma, beta = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (gamma, beta))
    return _layer_norm(x, range(2, x.ndim), epsilon, gamma, beta)


def _slice_by_index(
    x: np.ndarray, begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> np.ndarray:
    where: list[Any] = []
    for first, last, step, open_first, open_last, one in zip(begin, end, stride, begin_mask, end_mask, squeeze_mask):
        whole = slice(None if open_first else first, None if open_last else last, step)
        where.append(int(first) if one else whole)
    return x[tuple(where)]


def _slice_by_size(x: np.ndarray, begin: Any, size: Any) -> np.ndarray:
    return x[tuple(slice(a, None if n == -1 else a + n) for a, n in zip(begin, size))]


def _split(x: np.ndarray, axis: int, num_splits: int | None = None, split_sizes: Any = None) -> list[np.ndarray]:
    return np.split(x, num_splits if split_sizes is None else np.cumsum(split_sizes)[:-1], axis)


def _concat(values: Any, axis: int, interleave: bool = False) -> np.ndarray:
    if not interleave:
        return np.concatenate(values, axis)
    return np.stack(values, axis % values[0].ndim + 1).reshape(np.concatenate(values, axis).shape)


def _pad(x: np.ndarray, pad: Any, mode: str, constant_val: float = 0) -> np.ndarray:
    pairs = np.reshape(pad, (-1, 2))
    amounts = [(0, 0)] * (x.ndim - len(pairs)) + [tuple(pair) for pair in pairs]
    name = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}[mode]
    return np.pad(x, amounts, name, **({"constant_values": constant_val} if mode == "constant" else {}))


def _order(x: np.ndarray, axis: int, ascending: bool) -> np.ndarray:
    return np.argsort(x if ascending else -x, axis, kind="stable")


def _topk(x: np.ndarray, k: int, axis: int, ascending: bool) -> list[np.ndarray]:
    places = np.take(_order(x, axis, ascending), range(k), axis)
    return [np.take_along_axis(x, places, axis), places]


def _matmul(x: np.ndarray, y: np.ndarray, transpose_x: bool, transpose_y: bool) -> np.ndarray:
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.trunc(x) if dtype == "int32" else x != 0 if dtype == "bool" else x


def _pool(x: np.ndarray, reduce: Formula, **more: Any) -> np.ndarray:
    return plain.np_pool(x, reduce, **more)


def _clip(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return np.clip(x, alpha, beta)


# Results that are operands, or as exact as these in the declared type.
EXACT: dict[str, Formula] = {
    "abs": np.abs, "ceil": np.ceil, "floor": np.floor, "round": np.rint, "sign": np.sign,
    "relu": lambda x: np.maximum(x, 0), "relu6": lambda x: np.clip(x, 0, 6), "identity": lambda x: x,
    "clip": _clip, "threshold": lambda x, alpha: np.maximum(x, alpha),
    "thresholded_relu": lambda x, alpha: np.where(x >= alpha, x, 0),
    "maximum": np.maximum, "minimum": np.minimum, "equal": np.equal, "not_equal": np.not_equal, "less": np.less,
    "less_equal": np.less_equal, "greater": np.greater, "greater_equal": np.greater_equal,
    "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor,
    "logical_not": np.logical_not, "select": lambda cond, a, b: np.where(cond, a, b), "cast": _cast,
    "reduce_max": _reduced(np.max), "reduce_min": _reduced(np.min),
    "reduce_argmax": lambda x, axis, keep_dims: np.argmax(x, axis, keepdims=keep_dims),
    "reduce_argmin": lambda x, axis, keep_dims: np.argmin(x, axis, keepdims=keep_dims),
    "reshape": lambda x, shape: x.reshape(shape), "transpose": lambda x, perm: x.transpose(perm),
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(axes)), "squeeze": lambda x, axes: x.squeeze(tuple(axes)),
    "slice_by_index": _slice_by_index, "slice_by_size": _slice_by_size, "split": _split, "concat": _concat,
    "stack": lambda values, axis: np.stack(values, axis), "reverse": lambda x, axes: np.flip(x, tuple(axes)),
    "tile": lambda x, reps: np.tile(x, reps), "pad": _pad, "gather": moves.np_gather,
    "gather_along_axis": lambda x, indices, axis: np.take_along_axis(x, indices, axis),
    "gather_nd": moves.np_gather_nd, "topk": _topk, "argsort": _order, "shape": lambda x: np.array(x.shape),
    "flatten2d": lambda x, axis: x.reshape(int(np.prod(x.shape[:axis])), -1), "band_part": moves.np_band_part,
    "one_hot": lambda indices, one_hot_vector_size: np.eye(one_hot_vector_size)[indices],
    "fill_like": lambda ref_tensor, value: np.full(ref_tensor.shape, value),
    "sliding_windows": moves.np_sliding_windows, "reverse_sequence": moves.np_reverse_sequence,
    "depth_to_space": moves.np_depth_to_space, "space_to_depth": moves.np_space_to_depth,
    "pixel_shuffle": plain.np_pixel_shuffle, "pixel_unshuffle": plain.np_pixel_unshuffle,
    "max_pool": lambda x, **more: _pool(x, np.nanmax, **more), "floor_div": np.floor_divide,
}  # fmt: skip

# One rounding, or two.
ROUNDED: dict[str, Formula] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide, "mod": np.mod, "square": np.square,
    "sqrt": np.sqrt, "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "prelu": lambda x, alpha: np.where(x >= 0, x, alpha.reshape(-1, *[1] * (x.ndim - 2)) * x),
    "clamped_relu": lambda x, alpha, beta: np.minimum(np.where(x >= 0, x, alpha * x), beta),
}  # fmt: skip

# Functions that libraries approximate.
APPROXIMATED: dict[str, Formula] = {
    "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan, "atanh": np.arctanh, "cos": np.cos, "cosh": np.cosh,
    "erf": _erf, "exp": np.exp, "exp2": np.exp2, "sin": np.sin, "sinh": np.sinh, "tan": np.tan, "tanh": np.tanh,
    "sigmoid": _sigmoid, "silu": lambda x: x * _sigmoid(x), "softplus": lambda x: np.logaddexp(0, x),
    "softsign": lambda x: x / (1 + np.abs(x)), "pow": np.power, "softmax": _softmax,
    "log": lambda x, epsilon: np.log(x + epsilon), "rsqrt": lambda x, epsilon: 1 / np.sqrt(x + epsilon),
    "inverse": lambda x, epsilon: 1 / (x + epsilon),
    "gelu": lambda x, mode: {
        "EXACT": lambda: x / 2 * (1 + _erf(x / np.sqrt(2))),
        "TANH_APPROXIMATION": lambda: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "SIGMOID_APPROXIMATION": lambda: x * _sigmoid(1.702 * x),
    }[mode](),
    "elu": lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0))),
    "scaled_tanh": lambda x, alpha, beta: alpha * np.tanh(beta * x),
    "sigmoid_hard": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "reduce_prod": _reduced(np.prod), "reduce_l2_norm": lambda x, axes, keep_dims: np.sqrt(
        np.square(x).sum(tuple(axes), keepdims=keep_dims)),
    "reduce_log_sum_exp": lambda x, axes, keep_dims: np.log(np.exp(x).sum(tuple(axes), keepdims=keep_dims)),
    "reduce_log_sum": lambda x, axes, keep_dims: np.log(x.sum(tuple(axes), keepdims=keep_dims)),
}  # fmt: skip

# Sums of products: their error is a share of the same sum of magnitudes.
SUMS: dict[str, Formula] = {
    "reduce_sum": _reduced(np.sum), "reduce_mean": _reduced(np.mean),
    "reduce_l1_norm": lambda x, axes, keep_dims: np.abs(x).sum(tuple(axes), keepdims=keep_dims),
    "reduce_sum_square": lambda x, axes, keep_dims: np.square(x).sum(tuple(axes), keepdims=keep_dims),
    "cumsum": lambda x, axis, exclusive, reverse: plain.np_cumsum(x, axis, exclusive, reverse),
    "matmul": _matmul, "linear": lambda x, weight, bias=0: x @ weight.T + bias, "conv": windows.np_conv_nd,
    "conv_transpose": windows.np_conv_transpose_nd, "einsum": lambda values, equation: np.einsum(equation, *values),
    "avg_pool": lambda x, **more: _pool(x, np.nanmean, **more),
    "linear_activation": lambda x, alpha, beta: alpha * x + beta,
    "scatter": moves.np_scatter, "scatter_along_axis": moves.np_scatter_along_axis, "scatter_nd": moves.np_scatter_nd,
}  # fmt: skip

NORMS: dict[str, Formula] = {
    "layer_norm": _layer_norm, "instance_norm": _instance_norm, "batch_norm": plain.np_norm,
    "l2_norm": lambda x, epsilon: x / np.sqrt(
        np.maximum(np.square(x).sum((-3, -2, -1), keepdims=True), 0) + epsilon),
}  # fmt: skip

FORMULAS = EXACT | ROUNDED | APPROXIMATED | SUMS | NORMS
BOOLEAN = {"equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or",
           "logical_xor", "logical_not"}  # fmt: skip
COUNTS = {"reduce_argmax", "reduce_argmin", "argsort", "shape"}


def _wide(value: Any) -> Any:
    """Floats as float64, integers as int64."""
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind not in "fi":
        return value
    return value.astype(np.float64 if value.dtype.kind == "f" else np.int64)


def _magnitudes(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_magnitudes, value))
    return np.abs(value) if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind == "f" else value


def _called(op: str, wide: Mapping[str, Any]) -> Any:
    function = FORMULAS[op]
    # NumPy's own functions have no names for their operands.
    return function(*(wide[key] for key in "xy" if key in wide)) if isinstance(function, np.ufunc) else function(**wide)


def formula(op: str, arguments: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The results of an operation on these operands and parameters, each with the bound of its error."""
    wide = {key: _wide(value) for key, value in arguments.items() if key != "validate_indices"}
    with np.errstate(all="ignore"):
        found = _called(op, wide)
        results = [np.asarray(value) for value in (found if isinstance(found, list) else [found])]
        return [(value, _error(op, value, wide) if value.dtype.kind == "f" else np.zeros(())) for value in results]


def _error(op: str, value: np.ndarray, wide: Mapping[str, Any]) -> np.ndarray:
    if op in EXACT:
        return np.zeros(())
    if op in ROUNDED:
        return 2.0**-22 * np.abs(value)
    if op in APPROXIMATED:
        return 1e-5 * np.abs(value) + 1e-6
    if op in SUMS:
        return 2e-6 * np.abs(_called(op, {key: _magnitudes(item) for key, item in wide.items()})) + 1e-30
    gain = np.abs(wide.get("gamma", np.ones(1))).max() / np.sqrt(float(wide["epsilon"]))
    return 1e-5 * np.abs(value) + 1e-6 * gain * max(np.abs(wide["x"]).max(initial=0), 1)
