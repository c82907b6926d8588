"""Blocks that were made to break the executor: MILError in one line, at load where it can be known there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.proto import Model_pb2

from model_export import mil
from model_export.mil import limits
from model_export.mil.executor import MILExecutor
from model_export.mil.program import (
    MOST_DEPTH,
    Block,
    Constant,
    Function,
    ListType,
    NamedType,
    Operation,
    Program,
    StateType,
    TensorType,
)

import mil_packages as packages  # isort: skip

X, BOOL, TWO = TensorType("fp32", (2,)), TensorType("bool", ()), TensorType("bool", (2,))
YES, ZERO = Constant(BOOL, np.array(True)), Constant(TensorType("int32", ()), np.array(0, np.int32))
GIVEN = np.array([1, -2], np.float32)


def operation(type: str, name: str, result: Any = X, blocks: tuple[Block, ...] = (), **inputs: Any) -> Operation:
    """One that makes `name`; an input is a name, a constant, or several."""
    outputs = (NamedType(name, result if isinstance(result, TensorType) else None, result),) if result else ()
    outputs = tuple(replace(item, other=None) if item.type else item for item in outputs)
    given = {key: value if isinstance(value, tuple) else (value,) for key, value in inputs.items()}
    return Operation(type, name, given, outputs, {}, blocks)


def program(*operations: Operation, returns: str = "y", inputs: tuple[NamedType, ...] = ()) -> Program:
    function = Function("main", "CoreML8", (NamedType("x", X), *inputs), Block((), (returns,), operations), {"x": X},
                        {returns: X})  # fmt: skip
    return Program(Path("made.mlpackage"), 9, {"main": function}, "main")


def branch(name: str, *blocks: Block, result: Any = X, pred: Any = YES) -> Operation:
    return operation("cond", name, result, blocks, pred=pred)


def block(*operations: Operation, returns: tuple[str, ...], inputs: tuple[NamedType, ...] = ()) -> Block:
    return Block(inputs, returns, operations)


RELU = block(operation("relu", "a", x="x"), returns=("a",))
OTHER = block(operation("relu", "a", x="x"), operation("square", "b", x="a"), returns=("b",))
LOOP_X = (NamedType("v", X),)
NEVER = block(returns=("no",), inputs=LOOP_X)


LATER = block(operation("relu", "a", x="later"), returns=("a",))


def deep(levels: int) -> Operation:
    inner = operation("relu", "y0", x="x")
    for level in range(1, levels + 1):
        both = tuple(block(inner, returns=(inner.outputs[0].name,)) for _ in range(2))
        # the same operation twice: each block has names of its own
        inner = branch(f"y{level}", *both)
    return replace(inner, outputs=(NamedType("y", X),))


def test_the_control_runs() -> None:
    for pred, expected in ((YES, [1, 0]), (Constant(BOOL, np.array(False)), [1, 0])):
        (y,) = MILExecutor(program(branch("y", RELU, OTHER, pred=pred))).predict({"x": GIVEN}).values()
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((branch("y", RELU),), r"y \(cond, CoreML8\): blocks with .* \[\(0, 1\)\], expected \[\(0, 1\), \(0, 1\)\]"),
        ((branch("y"),), r"blocks with .* \[\], expected"),
        ((branch("y", RELU, replace(RELU, inputs=LOOP_X)),), r"blocks with .*\(1, 1\)"),
        ((branch("y", RELU, replace(RELU, outputs=("a", "a"))),), r"blocks with .*\(0, 2\)"),
        ((operation("relu", "y", x="x", blocks=(RELU,)),), r"y \(relu, CoreML8\): blocks"),
        ((branch("y", RELU, block(returns=("z",))),), r"undefined values \['z'\]"),
        ((branch("y", RELU, LATER), operation("relu", "later", x="y")),
         r"'a' uses undefined values \['later'\]"),
        ((branch("y", RELU, block(operation("relu", "a", x="y"), returns=("a",))),),  # itself
         r"'a' uses undefined values \['y'\]"),
        ((branch("w", RELU, RELU), operation("relu", "y", x="a")), r"'y' uses undefined values \['a'\]"),
        ((branch("y", RELU, block(operation("relu", "x", x="x"), returns=("x",))),), "defines 'x' a second time"),
        ((branch("y", RELU, block(operation("mystery", "a", x="x"), returns=("a",))),), r"a \(mystery, CoreML8\)"),
        ((branch("y", RELU, block(operation("reshape", "a", x="x"), returns=("a",))),), "reshape, .* shape is missing"),
        ((operation("while_loop", "y", X, (NEVER, NEVER), loop_vars=("x", "x")),), r"blocks .*expected \[\(2, 1\)"),
        ((operation("read_state", "y", input="x"),), "input is not a state"),
        ((operation("list_read", "y", ls="x", index=ZERO),), "ls is not a list"),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be(made: tuple[Operation, ...], message: str) -> None:
    with pytest.raises(mil.MILError, match=message) as caught:
        MILExecutor(program(*made))
    assert "\n" not in str(caught.value)


ALWAYS = block(operation("identity", "yes", BOOL, x=YES), returns=("yes",), inputs=LOOP_X)
LONGER = block(operation("concat", "w", TensorType("fp32", (None,)), values=("v", "v"), axis=ZERO), returns=("w",),
               inputs=LOOP_X)  # fmt: skip
SHAPE = operation("shape", "s", TensorType("int32", (1,)), x="x")
BOTH = operation("greater", "no", TWO, x="v", y=Constant(X, GIVEN))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (branch("y", RELU, RELU, pred="x"), r"y \(cond, CoreML8\): pred is fp32\[2\], expected a bool"),
        (branch("y", block(SHAPE, returns=("s",)), RELU), r"y \(cond, CoreML8\): 's' is int32\[1\], 'y' fp32\[2\]"),
        (operation("while_loop", "y", X, (ALWAYS, block(SHAPE, returns=("s",), inputs=LOOP_X)), loop_vars="x"),
         r"'s' is int32\[1\], 'v' fp32\[2\]"),
        (operation("while_loop", "y", X, (replace(ALWAYS, inputs=(NamedType("u", TensorType("fp32", (3,))),)), LONGER),
                   loop_vars="x"), r"'u' is fp32\[3\], 'v' fp32\[2\]"),
    ],
)  # fmt: skip
def test_types_of_blocks_that_contradict_their_operation(made: Operation, message: str) -> None:
    with pytest.raises(mil.MILError, match=message):
        MILExecutor(program(made))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (operation("while_loop", "y", X, (block(BOTH, returns=("no",), inputs=LOOP_X), LONGER), loop_vars="x"),
         r"\(while_loop\): the condition is no single bool"),
        (operation("while_loop", "y", X, (ALWAYS, LONGER), loop_vars="x"),
         r"\(while_loop\): 'v' came out as float32\[4\], declared fp32\[2\]"),
    ],
)  # fmt: skip
def test_values_that_are_not_of_their_declared_type(made: Operation, message: str) -> None:
    with pytest.raises(mil.MILError, match=message):
        MILExecutor(program(made)).predict({"x": GIVEN})


def test_names_cannot_write_on_the_terminal() -> None:
    with pytest.raises(mil.MILError) as caught:
        MILExecutor(program(operation("a\n\x1b[2Jb\u202e", "y", x="x")))
    assert r"y (a\n\x1b[2Jb\u202e, CoreML8)" in str(caught.value)


def test_blocks_in_blocks() -> None:
    assert MILExecutor(program(deep(6))).predict({"x": GIVEN})["y"].tolist() == [1, 0]
    inner = operation("relu", "y0", x="x")
    for level in range(1, MOST_DEPTH + 4):
        inner = branch(f"y{level}", block(inner, returns=(f"y{level - 1}",)), RELU)
    with pytest.raises(mil.MILError, match=f"blocks in blocks more than {MOST_DEPTH} deep"):
        MILExecutor(program(replace(inner, outputs=(NamedType("y", X),))))


def test_a_specification_with_blocks_in_blocks_without_end(tmp_path: Path) -> None:
    path = tmp_path / "p.mlpackage"
    packages.save_program(path, lambda x: packages.mb.relu(x=x, name="y"), {"x": GIVEN})
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = Model_pb2.Model()
    model.ParseFromString(file.read_bytes())
    (place,) = model.mlProgram.functions["main"].block_specializations.values()
    for _ in range(2000):
        made = place.operations.add(type="cond")
        made.outputs.add(name="y")
        place = made.blocks.add(outputs=["y"])
    file.write_bytes(model.SerializeToString())
    with pytest.raises(mil.MILError) as caught:
        mil.load(path)
    assert "\n" not in str(caught.value)


def test_what_a_block_holds_is_counted_with_what_is_around_it() -> None:
    large = TensorType("fp32", (10**9,))
    shape = Constant(TensorType("int32", (1,)), np.array([10**9], np.int32))
    first = operation("fill", "f", large, shape=shape)
    inside = block(operation("fill", "g", large, shape=shape), operation("relu", "a", x="x"), returns=("a",))
    last = operation("reduce_sum", "s", TensorType("fp32", (1,)), x="f")
    MILExecutor(program(branch("y", inside, RELU)))
    with pytest.raises(mil.MILError, match=r"at 'g' \(fill\) its values take 80\d+ bytes, expected at most 4294967296"):
        MILExecutor(program(first, branch("y", inside, RELU), last))


@pytest.mark.parametrize(
    "other", [ListType(TensorType("fp32", (10**9,)), 2), StateType(TensorType("fp32", (2 * 10**9,)))]
)
def test_lists_and_states_are_counted(other: Any) -> None:
    if isinstance(other, ListType):
        made = program(operation("make_list", "l", other), operation("relu", "y", x="x"))
    else:
        made = program(operation("relu", "y", x="x"), inputs=(NamedType("s", None, other),))
        function = made.functions["main"]
        feature = mil.program.Feature("s", "stateType", other.tensor)
        made = replace(made, functions={"main": replace(function, state_features={"s": feature})})
    with pytest.raises(mil.MILError, match=r"take 80\d+ bytes, expected at most"):
        MILExecutor(made)


@pytest.mark.parametrize(
    "large",
    [
        lambda x: torch.full([1 << 20, 1 << 20], 1.0),
        lambda x: x.repeat(1 << 20, 1 << 20),
        lambda x: torch.nn.functional.pad(x, [1 << 31, 0]),
        lambda x: x.reshape(-1, 1) + torch.zeros(1, 1).expand(1, 1 << 40),
        lambda x: x[:1].expand(1 << 40).contiguous(),
        lambda x: torch.arange(1 << 40),
    ],
)
def test_a_result_is_refused_before_it_is_computed(large: Any) -> None:
    x = torch.ones(2)
    with torch.inference_mode(), limits.Guard(1 << 20):
        assert torch.cat([x.repeat(2), x + 1, x.new_zeros(3)]).sum() == 8  # the control
        assert torch.nonzero(x).shape == (2, 1)  # its size is in the numbers
        assert x.expand(1 << 40, 2).shape[0] == 1 << 40  # takes no memory
        with pytest.raises(mil.MILError, match=r"a result of \d+ bytes, expected at most 1048576"):
            large(x)
