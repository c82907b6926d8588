"""Every operation that the executor knows, each with an oracle that shares no code with it.

The oracle is coremltools' value inference or NumPy written here.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
from mil_case import BOOLS, C4, INTS, POSITIVE, UNIT, Arrays, Case, X, Y, uniform
from mil_cases_images import images
from mil_cases_recurrent import recurrent
from mil_cases_tensor import tensor
from mil_cases_windows import more_windows
from mil_oracles import (
    np_bilinear,
    np_conv,
    np_conv_transpose,
    np_cumsum,
    np_instance_norm,
    np_lrn,
    np_norm,
    np_pixel_shuffle,
    np_pixel_unshuffle,
    np_pool,
)

from model_export import mil


def f16(array: Any) -> Any:
    """A parameter as the fp16 program has it."""
    if isinstance(array, tuple):
        return tuple(map(f16, array))
    floating = isinstance(array, (np.ndarray, np.generic)) and array.dtype == np.float32
    return array.astype(np.float16) if floating else array


# -- the cases ------------------------------------------------------------------------------------------------------


def unary() -> list[Case]:
    plain = (
        "abs atan ceil cos cosh erf exp exp2 floor relu relu6 round sigmoid sign sin sinh softplus softsign square tanh"
    )
    cases = [Case(op, {"x": X}) for op in plain.split()]
    cases += [Case(op, {"x": UNIT}) for op in ["acos", "asin", "atanh", "tan"]]
    cases += [Case(op, {"x": POSITIVE}) for op in ["sqrt", "rsqrt", "log", "inverse"]]
    cases += [
        Case("rsqrt", {"x": POSITIVE}, {"epsilon": np.float32(0.1)}),
        Case("silu", {"x": X}, {}, lambda x: x / (1 + np.exp(-x))),
    ]
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
    cases += [
        Case(
            "matmul",
            {"x": uniform(2, 3, 128, 64, low=2), "y": uniform(2, 3, 64, 160, low=2)},
            {},
            lambda x, y: np.float64(x) @ np.float64(y),
        )
    ]
    cases += [Case("scaled_dot_product_attention", {"query": a, "key": a * 0.5, "value": a + 1}, target="iOS18")]
    mask = {"query": a, "key": a * 0.5, "value": a + 1, "attn_mask": uniform(2, 3, 3)}
    cases += [Case("scaled_dot_product_attention", mask, target="iOS18")]
    boolean = mask | {"attn_mask": np.eye(3, dtype=bool) | np.eye(3, k=1, dtype=bool)}
    return [*cases, Case("scaled_dot_product_attention", boolean, target="iOS18")]


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
        Case(
            "upsample_nearest_neighbor",
            {"x": X},
            {"scale_factor_height": 2, "scale_factor_width": 3},
            lambda x, scale_factor_height, scale_factor_width: x.repeat(2, -2).repeat(3, -1),
        ),
    ]
    for corners in (True, False):
        scales = {"scale_factor_height": 2, "scale_factor_width": 3, "align_corners": corners}
        cases.append(Case("upsample_bilinear", {"x": X}, scales, np_bilinear))
    return cases


def lists() -> list[Case]:
    """Operations whose parameter `values` is a list: built apart, since its items are inputs."""
    return [
        Case("concat", {"x": X, "y": Y[:, :2].copy()}, {"axis": 1}, lambda x, y, axis: np.concatenate([x, y], axis)),
        Case("stack", {"x": X, "y": Y}, {"axis": 2}, lambda x, y, axis: np.stack([x, y], axis)),
        Case(
            "einsum",
            {"x": uniform(2, 3, 4, 5), "y": uniform(2, 5, 4, 3)},
            {"equation": "nchw,nwhu->nchu"},
            lambda x, y, equation: np.einsum(equation, x, y),
        ),
    ]


def casts() -> list[Case]:
    wide = X * 50
    cases = [Case("cast", {"x": wide}, {"dtype": dtype}, half=False) for dtype in ("int32", "bool", "fp16")]
    return [*cases, Case("cast", {"x": INTS}, {"dtype": "fp32"}, half=False)]


CASES = [
    *unary(), *binary(), *windows(), *products(), *norms(), *reductions(), *movements(), *lists(), *casts(),
    *images(), *recurrent(), *more_windows(), *tensor(),
]  # fmt: skip


NARROW = ("bool", "int8", "uint8")


def apply(case: Case, variables: dict[str, Any]) -> list[Any]:
    """Add the case's operation to the program under construction; its outputs."""
    operation = getattr(packages.mb, case.op)
    if case.op in ("concat", "stack", "einsum"):
        result = operation(values=[variables["x"], variables["y"]], **case.parameters)
    elif case.op == "reshape_like":
        result = operation(x=variables["x"], ref_tensors=(variables["first"], variables["second"]), **case.parameters)
    else:
        # A model's inputs cannot be bool or narrow integers.
        others = [name for name, array in case.inputs.items() if array.dtype.name in NARROW]
        variables |= {name: packages.mb.cast(x=variables[name], dtype=case.inputs[name].dtype.name) for name in others}
        result = operation(**variables, **case.parameters)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def halved(case: Case) -> Case:
    """The case as an fp16 program has it; iOS 15 has no fp16 inputs."""
    inputs = {name: f16(array) for name, array in case.inputs.items()}
    parameters = {name: f16(value) for name, value in case.parameters.items()}
    return Case(case.op, inputs, parameters, case.oracle, max(case.target, "iOS16"))


Evaluate = Callable[[str, int], list[np.ndarray]]


def named(cases: dict[int, Case]) -> Arrays:
    """The inputs of cases in one program, by case and name; a model's inputs cannot be bool or narrow integers."""
    arrays = {f"i{i}_{name}": array for i, case in cases.items() for name, array in case.inputs.items()}
    return {name: array.astype(np.int32) if array.dtype.name in NARROW else array for name, array in arrays.items()}


def save_cases(cases: dict[int, Case], target: str, path: Path) -> None:
    """All of them as one program."""

    def build(**variables: Any) -> Any:
        results: list[Any] = []
        for i, case in cases.items():
            outputs = apply(case, {name: variables[f"i{i}_{name}"] for name in case.inputs})
            results += [packages.mb.identity(x=output, name=f"o{i}_{j}") for j, output in enumerate(outputs)]
        return tuple(results)

    packages.save_program(path, build, named(cases), target)


def evaluator(shared: Callable[[str, Callable[[Path], object]], Path]) -> Evaluate:
    """`evaluate(compute, index) -> outputs` of CASES[index], typed fp16 unless compute is "float32".

    All cases of a target are one saved program, run once for each policy.
    """

    @functools.cache
    def run(compute: str, target: str) -> dict[int, list[np.ndarray]]:
        half = compute != "float32"
        cases = {i: halved(case) if half else case for i, case in enumerate(CASES) if case.half or not half}
        cases = {i: case for i, case in cases.items() if case.target == target}
        path = shared(f"{target}-{half}.mlpackage", functools.partial(save_cases, cases, target))
        outputs = mil.load(path, compute=compute).predict(named(cases))
        results: dict[int, list[np.ndarray]] = {i: [] for i in cases}
        for name in sorted(outputs, key=lambda name: [int(number) for number in name[1:].split("_")]):
            results[int(name[1:].split("_")[0])].append(outputs[name])
        return results

    def evaluate(compute: str, index: int) -> list[np.ndarray]:
        case = CASES[index]
        return run(compute, (case if compute == "float32" else halved(case)).target)[index]

    return evaluate


def expected(case: Case) -> list[np.ndarray]:
    """The oracle's outputs."""
    if case.oracle is None:
        return packages.value_inference(case.op, case.target, **case.inputs, **case.parameters)
    result = case.oracle(**case.inputs, **case.parameters)
    return list(result) if isinstance(result, (list, tuple)) else [np.asarray(result)]


def differing(a: np.ndarray, b: np.ndarray) -> float:
    """The share of elements that are not the same number, or both none."""
    return float(((a != b) & ~(np.isnan(a) & np.isnan(b))).mean()) if a.size else 0.0


# Operations that only a whole program can show: test_mil_programs.py and test_mil_features.py.
PROGRAMS = (
    "cond", "while_loop", "make_list", "list_length", "list_read", "list_write", "list_gather", "list_scatter",
    "read_state", "write_state", "coreml_update_state", "classify",
)  # fmt: skip
HALF = [index for index, case in enumerate(CASES) if case.half]
