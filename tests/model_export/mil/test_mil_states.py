"""Nothing is written over that a state holds, but by an update of the state itself that nobody else can see."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_packages  # noqa: F401  (quiet coremltools)
import numpy as np
import pytest
from mil_packages import mb, types

from model_export import mil

import coremltools as ct  # isort: skip

HELD = np.arange(1, 13, dtype=np.float16).reshape(3, 4)
NEW = np.full((1, 4), -9, np.float16)


def updated(x: Any) -> Any:
    return mb.slice_update(x=x, update=NEW, begin=[1, 0], end=[2, 4])


def np_updated(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[:1], NEW, x[2:]])


def as_read(state: Any, x: Any) -> Any:
    return updated(mb.read_state(input=state))


def twice(state: Any, x: Any) -> Any:
    value = mb.read_state(input=state)
    return mb.add(x=updated(value), y=mb.read_state(input=state))


def through_views(state: Any, x: Any) -> Any:
    value = mb.identity(x=mb.reshape(x=mb.read_state(input=state), shape=[1, 3, 4]))
    return updated(mb.squeeze(x=value, axes=[0]))


def through_a_branch(state: Any, x: Any) -> Any:
    value = mb.read_state(input=state)
    positive = mb.greater(x=mb.reduce_sum(x=x, keep_dims=False), y=np.float16(0))
    return updated(
        mb.cond(pred=positive, _true_fn=lambda: mb.identity(x=value), _false_fn=lambda: mb.add(x=value, y=x))
    )


def in_a_branch(state: Any, x: Any) -> Any:
    value = mb.read_state(input=state)
    positive = mb.greater(x=mb.reduce_sum(x=x, keep_dims=False), y=np.float16(0))
    return mb.cond(pred=positive, _true_fn=lambda: updated(value), _false_fn=lambda: mb.add(x=value, y=x))


def in_a_loop(state: Any, x: Any) -> Any:
    return mb.while_loop(
        _cond=lambda i, value: mb.less(x=i, y=3),
        _body=lambda i, value: (mb.add(x=i, y=1), updated(value)),
        loop_vars=(0, mb.read_state(input=state)),
    )[1]


def after_it_was_written(state: Any, x: Any) -> Any:
    """What is written is x + 1; the slice is updated in the same value, later."""
    value = mb.add(x=x, y=np.float16(1))
    mb.coreml_update_state(state=state, value=value)
    return updated(value)


def save(path: Path, build: Callable[[Any, Any], Any]) -> mil.MILExecutor:
    specs = [mb.StateTensorSpec(HELD.shape, dtype=types.fp16), mb.TensorSpec(HELD.shape, dtype=types.fp16)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def program(held: Any, x: Any) -> Any:
        return mb.identity(x=build(held, x), name="y")

    ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
        compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY,
    ).save(str(path))  # fmt: skip
    return mil.load(path)


READERS = [as_read, twice, through_views, through_a_branch, in_a_branch, in_a_loop]


@pytest.mark.parametrize("build", READERS)
def test_a_value_that_was_read_is_not_written_over(tmp_path: Path, build: Callable[[Any, Any], Any]) -> None:
    model = save(tmp_path / "p.mlpackage", build)
    state = model.make_state()
    state.write_state("held", HELD)
    wanted = np_updated(HELD) + (HELD if build is twice else 0)
    for _ in range(2):
        np.testing.assert_array_equal(model.predict({"x": np.ones((3, 4))}, state)["y"], wanted)
        np.testing.assert_array_equal(state.read_state("held"), HELD)


def test_a_value_that_was_written_is_not_written_over(tmp_path: Path) -> None:
    model, x = save(tmp_path / "p.mlpackage", after_it_was_written), HELD
    state = model.make_state()
    np.testing.assert_array_equal(model.predict({"x": x}, state)["y"], np_updated(x + 1))
    np.testing.assert_array_equal(state.read_state("held"), x + 1)


# -- updates of the state itself: (program, what it gives and leaves, in NumPy)


def set_state(state: Any, value: Any) -> Any:
    return mb.coreml_update_state(state=state, value=value)


def plainly(state: Any, x: Any) -> Any:
    return set_state(state, updated(mb.read_state(input=state)))


def on_a_constant(state: Any, x: Any) -> Any:
    """The constant is written to the state, and the next prediction updates it there."""
    old = set_state(state, updated(mb.read_state(input=state)))
    set_state(state, mb.const(val=HELD))
    return old


def on_the_input(state: Any, x: Any) -> Any:
    set_state(state, x)
    return mb.add(x=set_state(state, updated(mb.read_state(input=state))), y=x)


def read_before(state: Any, x: Any) -> Any:
    before = mb.read_state(input=state)
    set_state(state, updated(mb.read_state(input=state)))
    return before


def read_between(state: Any, x: Any) -> Any:
    new = updated(mb.read_state(input=state))
    between = mb.read_state(input=state)
    set_state(state, new)
    return between


def what_was_written(state: Any, x: Any) -> Any:
    """The value that the state holds is read after the state was updated in it."""
    value = mb.add(x=x, y=np.float16(1))
    set_state(state, value)
    set_state(state, updated(mb.read_state(input=state)))
    return value


def in_a_list(state: Any, x: Any) -> Any:
    value = mb.read_state(input=state)
    kept = mb.list_write(ls=mb.make_list(init_length=1, elem_shape=HELD.shape, dtype="fp16"), index=0, value=value)
    set_state(state, updated(value))
    return mb.list_read(ls=kept, index=0)


UPDATES: dict[Any, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    plainly: lambda held, x: (np_updated(held), np_updated(held)),
    on_a_constant: lambda held, x: (np_updated(held), HELD),
    on_the_input: lambda held, x: (np_updated(x) + x, np_updated(x)),
    read_before: lambda held, x: (held, np_updated(held)),
    read_between: lambda held, x: (held, np_updated(held)),
    what_was_written: lambda held, x: (x + 1, np_updated(x + 1)),
    in_a_list: lambda held, x: (held, np_updated(held)),
}


@pytest.mark.parametrize("build", UPDATES, ids=lambda build: build.__name__)
def test_updates_change_nothing_but_the_state(tmp_path: Path, build: Callable[[Any, Any], Any]) -> None:
    model, held = save(tmp_path / "p.mlpackage", build), HELD * np.float16(2)
    state = model.make_state()
    state.write_state("held", held)
    for number in range(3):
        x = np.full(HELD.shape, number, np.float16)
        wanted, held = UPDATES[build](held, x)
        np.testing.assert_array_equal(model.predict({"x": x}, state)["y"], wanted)
        np.testing.assert_array_equal(state.read_state("held"), held)


def test_an_update_is_made_in_the_states_own_memory(tmp_path: Path) -> None:
    """And not where another value shares it: the control."""
    for build, same in ((plainly, True), (read_before, False)):
        model = save(tmp_path / f"{build.__name__}.mlpackage", build)
        state = model.make_state()
        before = state.cells["held"].tensor
        model.predict({"x": HELD}, state)
        assert (state.cells["held"].tensor.data_ptr() == before.data_ptr()) is same


@pytest.mark.parametrize("build", [as_read, twice, through_views])
def test_the_control(tmp_path: Path, build: Callable[[Any, Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it not said that a state keeps its value, these programs would change it."""
    from dataclasses import replace

    from model_export.mil import plan

    built = plan._built

    def forgetful(*given: Any) -> Any:
        return replace(built(*given), keeps=False)

    monkeypatch.setattr(plan, "_built", forgetful)
    model = save(tmp_path / "p.mlpackage", build)
    state = model.make_state()
    state.write_state("held", HELD)
    model.predict({"x": np.ones((3, 4))}, state)
    assert (state.read_state("held") != HELD).any()
