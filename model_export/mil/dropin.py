"""coremltools' own `MLModel.predict` and `make_state` where there is no Core ML, by this executor."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from .executor import MILExecutor, load
from .features import State
from .program import MILError

_said = False


def install(compute: str = "as-typed") -> None:
    """Let `coremltools.models.MLModel`, and what predicts with it, run ML programs in PyTorch off macOS.

    Models that are made afterwards can predict, with coremltools' checks, names and errors; the first prediction says
    on stderr what ran. A model that the executor refuses is made with coremltools' warning, and raises the reason when
    it is to predict. Where Core ML is, nothing changes. Not for compiled models (`CompiledMLModel`), compute plans or
    compute devices, which only Core ML has.

    Args:
        compute: a policy, as `load` takes it.

    Raises:
        MILError: there is no such policy, or no coremltools.
    """
    from .dtypes import POLICIES

    if compute not in POLICIES:
        raise MILError(f"unknown compute policy {compute!r}, expected one of {', '.join(POLICIES)}")
    try:
        from coremltools.models import model as module
    except ImportError as error:
        raise MILError(f"coremltools is not installed, or its import fails ({error})") from None
    core_ml = module._MLModelProxy
    if core_ml is not None and not issubclass(core_ml, _Proxy):
        print("mil.install: Core ML is here, coremltools goes on predicting with it", file=sys.stderr)
        return
    # Asked before each prediction; the oldest that can do all of it.
    module._macos_version = lambda: (15, 0)
    module._MLModelProxy = type("_MLModelProxy", (_Proxy,), {"compute": compute})
    if getattr(module.MLModel.make_state, "__module__", "") != __name__:
        original = module.MLModel.make_state

        def make_state(self: Any) -> Any:
            """A new state, as coremltools' own; see `mil.install`."""
            if isinstance(self.__proxy__, _Proxy):
                return module.MLState(self.__proxy__.newState())
            return original(self)

        module.MLModel.make_state = make_state


class _Proxy:
    """What coremltools has of Core ML in its native library, of which `MLModel` makes one for each model."""

    compute = "as-typed"

    def __init__(
        self, path: str, compute_units: str = "", function_name: str = "", hints: Any = None, asset: Any = None
    ):
        if asset is not None:
            raise MILError("a compiled model in memory (MLModelAsset); give the .mlpackage that it was compiled from")
        started = time.perf_counter_ns()
        self._executor: MILExecutor = load(path, function_name or None, self.compute)
        self._load_time = time.perf_counter_ns() - started
        self._last_time: int | None = None

    @staticmethod
    def maximum_supported_specification_version() -> int:
        """That of iOS 26."""
        return 10

    def predict(self, data: dict[str, Any], state: State | None = None) -> dict[str, Any]:
        global _said
        if not _said:
            _said = True
            what = f"fastvlm's executor in PyTorch ({self.compute}), not by Core ML"
            print(f"coremltools MLModel: predictions are run by {what}", file=sys.stderr)
        started = time.perf_counter_ns()
        try:
            outputs: dict[str, Any] = self._executor.predict(data, state)
        except MILError as error:
            if words := _words(self._executor, data, state):
                raise MILError(f"{words}: {error}") from error
            raise
        self._last_time = time.perf_counter_ns() - started
        return outputs

    def batchPredict(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.predict(item) for item in data]

    def newState(self) -> State:
        return self._executor.make_state()

    def get_load_duration_in_nano_seconds(self) -> int:
        return self._load_time

    def get_last_predict_duration_in_nano_seconds(self) -> int | None:
        return self._last_time

    @staticmethod
    def get_available_compute_devices() -> list[Any]:
        raise MILError("only Core ML has compute devices; predictions are run in PyTorch, on the processor")


def _words(executor: MILExecutor, data: Mapping[str, Any], state: State | None) -> str:
    """How Core ML begins to say what was wrong with a prediction, as coremltools' tests and users cite it; empty where
    nobody does, or where our own error begins so."""
    for name, feature in executor.interface.input_features.items():
        if feature.kind != "multiArrayType" or name not in data:
            continue
        shape = np.shape(data[name])
        if feature.accepts(shape):
            continue
        given = " x ".join(map(str, shape))
        if feature.shapes:
            return f"MultiArray Shape ({given}) was not in enumerated set of allowed shapes"
        for axis, (size, (least, most)) in enumerate(zip(shape, feature.ranges)):
            if size < least or (most is not None and size > most):
                allowed = f"{least}..{-1 if most is None else most}"
                return f"Size ({size}) of dimension ({axis}) is not in allowed range ({allowed})"
        expected = " x ".join(map(str, feature.shape))
        return f"MultiArray shape ({given}) does not match the shape ({expected}) specified in the model description"
    try:
        executor.interface.cells(state)
        executor.interface.tensors(data, executor.policy)
    except MILError:
        return ""
    return "Unable to compute the prediction using ML Program"
