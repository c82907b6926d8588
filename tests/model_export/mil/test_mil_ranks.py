"""Ranks: scalars as inputs, and values whose rank is known only when they are there."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
from mil_cases import CASES, named, save_cases
from mil_packages import mb
from mil_single import run, single, type_of

from model_export import mil
from model_export.mil.executor import MILExecutor
from model_export.mil.program import NamedType, TensorType

X = np.arange(-12, 12, dtype=np.float32).reshape(2, 3, 4)
SIZES = np.array(X.shape, np.int32)


@pytest.mark.parametrize("given", [np.float32(2.5), np.float16(-3), np.int32(7), np.bool_(True)])
def test_a_scalar_as_input_stays_one(given: Any) -> None:
    x = np.asarray(given)
    for op, inputs, parameters, wanted in (
        ("identity", {"x": x}, {}, x),
        ("expand_dims", {"x": x}, {"axes": [0]}, x[None]),
        ("stack", {"x": x, "y": x}, {"values": ("x", "y"), "axis": 0}, np.stack([x, x])),
    ):
        for values in (inputs, {name: value.item() for name, value in inputs.items()}):
            model = single(op, "iOS17", inputs, parameters, [type_of(wanted)])
            (found,) = model.predict(values).values()
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            np.testing.assert_array_equal(found, wanted)
        with pytest.raises(mil.MILError, match=r"input 'x': \w+\[1\], expected \w+\[\]"):
            model.predict(inputs | {"x": x[None]})


# -- a shape of unknown length ----------------------------------------------------------------------------------------

Build = Callable[[Any, Any], Any]
Oracle = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def filled(shape: Any) -> Any:
    return mb.fill(shape=shape, value=2.0)


def reshaped(x: Any, shape: Any) -> Any:
    return mb.reshape(x=x, shape=mb.concat(values=[shape, np.array([-1], np.int32)], axis=0))


def np_reshaped(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return x.reshape(*shape, -1)


# What coremltools declares of the results is right for one size only: `shape` of int32[1], `reduce_sum` of fp32[1].
BUILT: dict[str, tuple[Build, Oracle]] = {
    "fill": (lambda x, s: filled(s), lambda x, s: np.full(s, 2)),
    "exp": (lambda x, s: mb.exp(x=filled(s)), lambda x, s: np.exp(np.full(s, 2, np.float32))),
    "reshape": (reshaped, np_reshaped),
    "back": (lambda x, s: mb.reshape(x=reshaped(x, s), shape=[6, -1]), lambda x, s: x.reshape(6, 4)),
    "shape": (lambda x, s: mb.shape(x=filled(s)), lambda x, s: np.array(s)),
    "gather": (lambda x, s: mb.gather(x=mb.shape(x=filled(s)), indices=[0]), lambda x, s: np.array(s[:1])),
    "sum": (
        lambda x, s: mb.reduce_sum(x=reshaped(x, s), axes=[0], keep_dims=True),
        lambda x, s: np_reshaped(x, s).sum(0, keepdims=True),
    ),
    "expand_dims": (
        lambda x, s: mb.expand_dims(x=reshaped(x, s), axes=[-1, 0]),
        lambda x, s: np_reshaped(x, s)[None, ..., None],
    ),
    "concat": (
        lambda x, s: mb.concat(values=[reshaped(x, s), mb.relu(x=reshaped(x, s))], axis=0),
        lambda x, s: np.concatenate([np_reshaped(x, s), np_reshaped(np.maximum(x, 0), s)]),
    ),
    "cond": (
        lambda x, s: mb.cond(
            pred=mb.less(x=mb.reduce_sum(x=s, keep_dims=False), y=5),
            _true_fn=lambda: mb.mul(x=reshaped(x, s), y=2.0),
            _false_fn=lambda: mb.square(x=reshaped(x, s)),
        ),
        lambda x, s: np_reshaped(x * 2 if sum(s) < 5 else x * x, s),
    ),
    "kept": (  # nothing is written over that another operation still reads
        lambda x, s: mb.add(x=mb.exp(x=mb.identity(x=reshaped(x, s))), y=reshaped(x, s)),
        lambda x, s: np_reshaped(np.exp(x) + x, s),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("compute", ["as-typed", "strict-fp16", "bfloat16"])
def test_a_shape_of_unknown_length(tmp_path: Path, name: str, compute: str) -> None:
    build, expected = BUILT[name]

    def whole(x: Any, n: Any) -> Any:
        return mb.identity(x=build(x, mb.slice_by_index(x=SIZES, begin=[0], end=n)))

    packages.save_program(tmp_path / "p.mlpackage", whole, {"x": X, "n": np.array([1], np.int32)})
    model = mil.load(tmp_path / "p.mlpackage", compute=compute)
    assert any(item.type and item.type.variadic for step in model.operations for item in step.outputs)
    for rank in (1, 2, 3):
        wanted = expected(X, X.shape[:rank])
        (found,) = model.predict({"x": X, "n": [rank]}).values()
        np.testing.assert_allclose(found, wanted, rtol=1e-5)  # and the shape
        (found,) = model.run({"x": X, "n": [rank]}, lambda operation, outputs: None).values()
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("target", ["iOS15", "iOS16", "iOS17", "iOS18"])
def test_every_operation_on_inputs_of_unknown_rank(target: str, shared: Callable[..., Path]) -> None:
    """Each gives what it gives with declared shapes, which test_mil_ops.py holds to the oracles."""
    cases = {index: case for index, case in enumerate(CASES) if case.target == target}
    program = mil.read_package(shared(f"{target}-False.mlpackage", partial(save_cases, cases, target)))
    main = program.functions["main"]
    loose = tuple(NamedType(item.name, TensorType(item.type.dtype, (None,), True)) for item in main.inputs if item.type)
    model = MILExecutor(replace(program, functions={"main": replace(main, inputs=loose)}))
    found, wanted = model.predict(named(cases)), MILExecutor(program).predict(named(cases))
    assert found.keys() == wanted.keys() and len(found) >= len(cases) > 0
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_value_of_unknown_sizes_has_a_rank() -> None:
    """The control: one unknown size is not any number of them; and the element type is known in both cases."""
    inputs, any_rank = {"shape": SIZES[:2]}, TensorType("fp32", (None,), variadic=True)
    (found,) = single("fill", "iOS17", inputs, {"value": 1.5}, [any_rank]).predict(inputs).values()
    np.testing.assert_array_equal(found, np.full((2, 3), 1.5, np.float32))
    with pytest.raises(mil.MILError, match=r"gives \[2, 3\], declared fp32\[\?\]"):
        run("fill", "iOS17", inputs, {"value": 1.5}, [np.zeros(4, np.float32)], known=False)
    with pytest.raises(mil.MILError, match=r"declared int32\[...\]"):
        wrong = TensorType("int32", (None,), variadic=True)
        single("identity", "iOS17", {"x": X}, {}, [wrong]).predict({"x": X})


def test_the_memory_of_a_value_of_any_rank_is_bounded() -> None:
    inputs, any_rank = {"shape": np.full(9, 100, np.int32)}, TensorType("fp32", (None,), variadic=True)
    with pytest.raises(mil.MILError, match=r"\(fill\) failed: ValueError: gives \[100, .*declared fp32\[...\]"):
        single("fill", "iOS17", inputs, {"value": 1.5}, [any_rank]).predict(inputs)
