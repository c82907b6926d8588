"""Nothing is written over that a state holds: slices are updated in place, but never in a value that was read."""

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
