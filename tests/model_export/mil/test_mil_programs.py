"""Branches, loops, lists and states: programs of coremltools' builder against Python, a decoder against PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
import torch
from mil_packages import mb

from model_export import mil
from model_export.mil.executor import MILExecutor

import coremltools as ct  # isort: skip

X = np.array([1.5, -2, 3], np.float32)
Build = Callable[..., Any]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(build, inputs) -> package`."""

    def save(build: Build, inputs: dict[str, np.ndarray], target: str = "iOS18") -> Path:
        packages.save_program(tmp_path / "p.mlpackage", build, inputs, target)
        return tmp_path / "p.mlpackage"

    return save


def scalar(value: int) -> np.ndarray:
    return np.array([value], np.int32)


# -- branches and loops -----------------------------------------------------------------------------------------------


def collatz(n: Any) -> Any:
    """Steps and the largest number on the way: a loop with a branch in it, and values from outside."""
    one = mb.squeeze(x=mb.sub(x=n, y=mb.sub(x=n, y=1)))  # not known at load
    start = mb.squeeze(x=n)

    def body(n: Any, steps: Any, largest: Any) -> Any:
        odd = mb.equal(x=mb.mod(x=n, y=2), y=one)
        after = mb.cond(
            pred=odd,
            _true_fn=lambda: mb.add(x=mb.mul(x=n, y=3), y=one),
            _false_fn=lambda: mb.floor_div(x=n, y=2),
        )
        return after, mb.add(x=steps, y=one), mb.maximum(x=largest, y=after)

    loop = mb.while_loop(_cond=lambda n, *_: mb.greater(x=n, y=one), _body=body, loop_vars=(start, 0, start))
    return tuple(mb.identity(x=item, name=name) for item, name in zip(loop, ("last", "steps", "largest")))


def python_collatz(n: int) -> tuple[int, int, int]:
    steps, largest = 0, n
    while n > 1:
        n = 3 * n + 1 if n % 2 else n // 2
        steps, largest = steps + 1, max(largest, n)
    return n, steps, largest


@pytest.mark.parametrize("compute", ["as-typed", "float32", "bfloat16"])
def test_a_loop_with_a_branch_in_it(saved: Callable[..., Path], compute: str) -> None:
    executor = mil.load(saved(collatz, {"n": scalar(1)}, "iOS16"), compute=compute)
    for n in (1, 2, 7, 27, 8):  # 1: no iteration
        found = executor.predict({"n": scalar(n)})
        assert (found["last"], found["steps"], found["largest"]) == python_collatz(n)


def nested(x: Any, n: Any) -> Any:
    """sum over i < n, j < i of x * (i - j), and the inner loop's names meet the outer's."""
    count = mb.squeeze(x=n)

    def outer(i: Any, total: Any) -> Any:
        def inner(j: Any, total: Any) -> Any:
            weight = mb.cast(x=mb.sub(x=i, y=j), dtype="fp32")
            return mb.add(x=j, y=1), mb.add(x=total, y=mb.mul(x=x, y=weight))

        inner_loop = mb.while_loop(_cond=lambda j, _: mb.less(x=j, y=i), _body=inner, loop_vars=(0, total))
        return mb.add(x=i, y=1), inner_loop[1]

    zeros = mb.sub(x=x, y=x)
    return mb.while_loop(_cond=lambda i, _: mb.less(x=i, y=count), _body=outer, loop_vars=(0, zeros))[1]


def test_a_loop_in_a_loop(saved: Callable[..., Path]) -> None:
    executor = mil.load(saved(nested, {"x": X, "n": scalar(1)}))
    (name,) = executor.outputs
    for n in (0, 1, 4):
        expected = sum((X * (i - j) for i in range(n) for j in range(i)), np.zeros(3))
        np.testing.assert_allclose(executor.predict({"x": X, "n": [n]})[name], expected, rtol=1e-6)


def test_what_a_branch_returns_may_be_a_value_from_outside_or_a_constant(saved: Callable[..., Path]) -> None:
    """And nothing is written over that is returned twice: `kept` is the branch's own value under another name."""

    def build(x: Any, n: Any) -> Any:
        kept = mb.add(x=x, y=1.0, name="kept")
        constant = np.array([7, 8, 9], np.float32)
        positive = mb.greater(x=mb.squeeze(x=n), y=0)
        chosen = mb.cond(pred=positive, _true_fn=lambda: mb.identity(x=kept), _false_fn=lambda: mb.const(val=constant))
        return mb.exp(x=chosen, name="grown"), mb.relu(x=kept, name="positive"), mb.identity(x=chosen, name="chosen")

    executor = mil.load(saved(build, {"x": X, "n": scalar(1)}))
    for n, expected in ((1, X + 1), (0, np.array([7, 8, 9]))):
        found = executor.predict({"x": X, "n": scalar(n)})
        np.testing.assert_allclose(found["chosen"], expected)
        np.testing.assert_allclose(found["grown"], np.exp(expected), rtol=1e-6)
        np.testing.assert_allclose(found["positive"], np.maximum(X + 1, 0))


def test_watch_sees_the_operations_of_a_loop_in_each_iteration(saved: Callable[..., Path]) -> None:
    executor = mil.load(saved(collatz, {"n": scalar(1)}))
    seen: list[str] = []
    watched = executor.run({"n": scalar(6)}, lambda operation, outputs: seen.append(operation.type))
    assert watched["steps"] == 8  # 6 3 10 5 16 8 4 2 1
    assert (seen.count("cond"), seen.count("mod"), seen.count("floor_div"), seen.count("while_loop")) == (8, 8, 6, 1)
    assert {"cond", "floor_div", "while_loop"} <= {operation.type for operation in executor.operations}
    assert [operation.type for operation, _ in executor.watched({"n": scalar(6)})] == seen


def test_in_float32_reaches_the_blocks(saved: Callable[..., Path]) -> None:
    def build(x: Any) -> Any:
        third = np.float16(1 / 3)
        return mb.while_loop(
            _cond=lambda i, _: mb.less(x=i, y=5),
            _body=lambda i, x: (mb.add(x=i, y=1), mb.mul(x=x, y=third)),
            loop_vars=(0, x),
        )[1]

    typed = mil.load(saved(build, {"x": X.astype(np.float16)}))
    wide, (name,) = typed.in_float32(), typed.outputs
    half, exact = X.astype(np.float16), X.astype(np.float32)
    for _ in range(5):
        half, exact = half * np.float16(1 / 3), exact * np.float32(np.float16(1 / 3))
    np.testing.assert_array_equal(typed.predict({"x": X})[name], half)
    np.testing.assert_array_equal(wide.predict({"x": X})[name], exact.astype(np.float16))
    assert (half != exact.astype(np.float16)).any()


# -- lists ------------------------------------------------------------------------------------------------------------


def test_lists(saved: Callable[..., Path]) -> None:
    """Written in a loop, as TensorArray of TensorFlow is: prefix sums."""

    def build(x: Any, n: Any) -> Any:
        def body(i: Any, ls: Any, total: Any) -> Any:
            total = mb.add(x=total, y=x)
            return mb.add(x=i, y=1), mb.list_write(ls=ls, index=i, value=total), total

        empty = mb.make_list(init_length=1, elem_shape=(3,), dtype="fp32")
        loop = mb.while_loop(
            _cond=lambda i, *_: mb.less(x=i, y=mb.squeeze(x=n)), _body=body, loop_vars=(0, empty, mb.sub(x=x, y=x))
        )
        ls = loop[1]
        more = mb.list_scatter(ls=ls, indices=np.array([3, 0], np.int32), value=np.array([[9, 9, 9], [8, 8, 8]], "f"))
        return (
            mb.list_gather(ls=ls, indices=np.arange(3, dtype=np.int32), name="before"),
            mb.list_gather(ls=more, indices=np.array([3, 0, 1], np.int32), name="after"),
            mb.list_read(ls=ls, index=1, name="second"),
            mb.identity(x=mb.list_length(ls=more), name="length"),
        )

    found = mil.load(saved(build, {"x": X, "n": scalar(1)})).predict({"x": X, "n": scalar(3)})
    np.testing.assert_array_equal(found["before"], [X, X + X, X + X + X])
    np.testing.assert_array_equal(found["after"], [[9, 9, 9], [8, 8, 8], X + X])
    np.testing.assert_array_equal(found["second"], X + X)
    assert found["length"] == 4


@pytest.mark.parametrize("place", [-1, 5])
def test_a_place_that_a_list_does_not_have(saved: Callable[..., Path], place: int) -> None:
    def build(n: Any) -> Any:
        ls = mb.make_list(init_length=5, elem_shape=(2,), dtype="fp32")
        return mb.list_read(ls=ls, index=mb.squeeze(x=n))

    executor = mil.load(saved(build, {"n": scalar(0)}))
    (never_written,) = executor.predict({"n": scalar(4)}).values()
    np.testing.assert_array_equal(never_written, [0, 0])
    with pytest.raises(mil.MILError, match=rf"\(list_read\) failed: IndexError: index {place} of a list of 5"):
        executor.predict({"n": scalar(place)})


# -- states -----------------------------------------------------------------------------------------------------------

WORDS, WIDTH, LENGTH = 11, 8, 6


class Decoder(torch.nn.Module):
    """One attention layer with a KV cache of LENGTH places, one token at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, WIDTH)
        self.qkv, self.head = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WORDS)
        self.register_buffer("keys", torch.zeros(1, LENGTH, WIDTH))
        self.register_buffer("values", torch.zeros(1, LENGTH, WIDTH))

    def forward(self, token: torch.Tensor, place: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """token (1, 1) int32, place (1, LENGTH, 1) with a single 1, mask (1, 1, LENGTH) 0 up to there -> logits."""
        q, k, v = self.qkv(self.embed(token)).chunk(3, -1)
        self.keys.mul_(1 - place).add_(place * k)
        self.values.mul_(1 - place).add_(place * v)
        weights = torch.softmax(q @ self.keys.transpose(1, 2) * WIDTH**-0.5 + mask, -1)
        return self.head(weights @ self.values)


def step(token: int, place: int) -> dict[str, np.ndarray]:
    return {
        "token": np.array([[token]], np.int32),
        "place": (np.arange(LENGTH) == place).astype(np.float16).reshape(1, LENGTH, 1),
        "mask": np.where(np.arange(LENGTH) <= place, 0, -1e4).astype(np.float16).reshape(1, 1, LENGTH),
    }


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Path]:
    torch.manual_seed(0)
    model = Decoder().eval().requires_grad_(False)
    example = [torch.from_numpy(array) for array in step(1, 0).values()]
    example = [array.float() if array.is_floating_point() else array for array in example]
    traced = torch.jit.trace(model, example, check_trace=False)
    model.keys.zero_(), model.values.zero_()
    cache = ct.TensorType(shape=(1, LENGTH, WIDTH), dtype=np.float16)
    converted = ct.convert(
        traced,
        inputs=[ct.TensorType(name, array.shape, dtype=array.dtype.type) for name, array in step(1, 0).items()],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        states=[ct.StateType(wrapped_type=cache, name=name) for name in ("keys", "values")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    path = tmp_path_factory.mktemp("decoder") / "decoder.mlpackage"
    converted.save(str(path))
    return model, path


def generated(run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and all logits."""
    tokens, logits = [1], []
    for place in range(LENGTH):
        logits.append(run(step(tokens[-1], place)).reshape(-1).astype(np.float32))
        tokens.append(int(logits[-1].argmax()))
    return tokens, np.stack(logits)


def test_a_decoder_with_a_cache_generates_as_in_pytorch(decoder: tuple[Decoder, Path]) -> None:
    model, path = decoder
    model.keys.zero_(), model.values.zero_()

    def torch_run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        given = [torch.from_numpy(array) for array in inputs.values()]
        return model(*(array.float() if array.is_floating_point() else array for array in given)).numpy()

    expected_tokens, expected = generated(torch_run)
    for compute, tolerance in (("float32", 2e-3), ("as-typed", 5e-3)):
        executor = mil.load(path, compute=compute)
        state, other = executor.make_state(), executor.make_state()
        tokens, logits = generated(lambda inputs: executor.predict(inputs, state)["logits"])  # noqa: B023
        assert tokens == expected_tokens and len(set(tokens)) > 2
        np.testing.assert_allclose(logits, expected, atol=tolerance)
        np.testing.assert_allclose(state.read_state("keys"), model.keys.numpy(), atol=tolerance)
        assert state.read_state("keys").dtype == np.float16
        # the states of another sequence are its own, and a state that is forgotten changes the answer
        assert not other.read_state("keys").any()
        np.testing.assert_array_equal(generated(lambda i: executor.predict(i, other)["logits"])[1], logits)  # noqa: B023
        fresh = executor.predict(step(tokens[2], 2), executor.make_state())["logits"].reshape(-1)
        assert np.abs(fresh.astype(np.float32) - expected[2]).max() > 10 * tolerance


def test_a_state_is_read_and_written(decoder: tuple[Decoder, Path]) -> None:
    executor = mil.load(decoder[1])
    state = executor.make_state()
    executor.predict(step(3, 0), state)
    saved = {name: state.read_state(name) for name in ("keys", "values")}
    expected = executor.predict(step(4, 1), state)["logits"]
    restored = executor.make_state()
    for name, value in saved.items():
        restored.write_state(name, value.astype(np.float32))
        value[...] = 0  # an array of the caller's own
    np.testing.assert_array_equal(executor.predict(step(4, 1), restored)["logits"], expected)


def test_states_that_cannot_be_used(decoder: tuple[Decoder, Path], saved: Callable[..., Path]) -> None:
    executor = mil.load(decoder[1])
    state, inputs = executor.make_state(), step(1, 0)
    stateless = mil.load(saved(lambda x: mb.relu(x=x), {"x": X}))
    for call, message in (
        (lambda: executor.predict(inputs), "must be an MLState, but it was not found"),
        (lambda: executor.predict(inputs, stateless.make_state()), "not one that this function's make_state"),
        (lambda: executor.predict(inputs, {}), "not one that this function's make_state"),
        (lambda: executor.predict([inputs], state), "can only be used for one prediction"),
        (lambda: executor.predict({**inputs, "keys": X}, state), "inputs named .*'keys'"),
        (lambda: state.read_state("queries"), "no state 'queries', expected one of"),
        (lambda: state.write_state("keys", X), r"shape \[3\], expected fp16\[1, 6, 8\]"),
    ):
        with pytest.raises(mil.MILError, match=message):
            call()


# -- programs that never end, or take everything ----------------------------------------------------------------------


def test_an_endless_loop_ends(saved: Callable[..., Path]) -> None:
    def build(x: Any) -> Any:
        zero = mb.reduce_sum(x=mb.sub(x=x, y=x), keep_dims=False)

        def body(x: Any) -> Any:  # a loop in a loop: the bound is on all of them together
            return mb.while_loop(
                _cond=lambda x: mb.less(x=zero, y=1.0), _body=lambda x: mb.identity(x=x), loop_vars=(x,)
            )

        return mb.while_loop(_cond=lambda x: mb.less(x=zero, y=1.0), _body=body, loop_vars=(x,))

    executor = MILExecutor(mil.read_package(saved(build, {"x": X})), most_iterations=50)
    with pytest.raises(mil.MILError, match=r"\(while_loop\): the program's loops ran 50 times"):
        executor.predict({"x": X})


def doubling(x: Any, n: Any) -> Any:
    count = mb.squeeze(x=n)
    return mb.while_loop(
        _cond=lambda i, _: mb.less(x=i, y=count),
        _body=lambda i, x: (mb.add(x=i, y=1), mb.concat(values=[x, x], axis=0)),
        loop_vars=(0, x),
    )[1]


def test_values_that_grow_in_a_loop_are_bounded(saved: Callable[..., Path]) -> None:
    executor = MILExecutor(mil.read_package(saved(doubling, {"x": X, "n": scalar(1)})), most_bytes=1 << 20)
    (few,) = executor.predict({"x": X, "n": scalar(3)}).values()
    np.testing.assert_array_equal(few, np.tile(X, 8))
    with pytest.raises(mil.MILError, match=r"expected at most 1048576 \(most_bytes\)"):
        executor.predict({"x": X, "n": scalar(40)})


@pytest.mark.parametrize("place", [2**31 - 1, 2**20])
def test_a_list_that_grows_is_bounded(saved: Callable[..., Path], place: int) -> None:
    def build(x: Any, n: Any) -> Any:
        ls = mb.make_list(init_length=1, elem_shape=(3,), dtype="fp32")
        return mb.list_read(ls=mb.list_write(ls=ls, index=mb.squeeze(x=n), value=x), index=0)

    executor = mil.load(saved(build, {"x": X, "n": scalar(0)}))
    np.testing.assert_array_equal(*executor.predict({"x": X, "n": scalar(0)}).values(), X)
    with pytest.raises(mil.MILError, match=r"\(list_write\) failed: .*a list of \d+ elements"):
        executor.predict({"x": X, "n": scalar(place)})
