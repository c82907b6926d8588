"""Round trips: a torch module to a saved ML program and back, by `model_export.mil`, compared and timed."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.common.cli import progress

ROUNDS = 9  # timed rounds of each side, interleaved, after one warm-up


def built(name: str) -> Any:
    """The module of a row of TRIPS in evaluation mode, the same weights each time; normalizations have statistics."""
    import torch

    from benchmarks.suites.trip_models import TRIPS

    torch.manual_seed(0)
    trip = TRIPS[name]
    module = trip.build().eval()
    with torch.inference_mode():
        if any(isinstance(part, torch.nn.LazyLinear) for part in module.modules()):
            module(*tensors(name))
    for part in module.modules():  # else random weights' signal fades away, and a wrong layer isn't seen
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.train()
            part.momentum = None
    if module.training is False and any(part.training for part in module.modules()):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            module(*(torch.randn((4, *x.shape[1:]), generator=generator) for x in tensors(name)))
    return module.eval().requires_grad_(False)


def tensors(name: str, seed: int = 0) -> list[Any]:
    """The inputs of a row as tensors."""
    import torch

    from benchmarks.suites.trip_models import TRIPS

    return [torch.from_numpy(array) for array in TRIPS[name].arrays(seed)]


def convert(module: Any, name: str, target: Path, precision: str = "float32") -> Any:
    """Convert as a script by hand does and save; inputs are x0, x1, ... Returns coremltools' model."""
    import torch

    from benchmarks.suites.trip_models import TRIPS
    from model_export.encoder.coreml import coremltools, quiet_conversion

    ct, trip, examples = coremltools(), TRIPS[name], tensors(name)
    types = [
        ct.TensorType(name=f"x{i}", shape=tuple(x.shape), dtype=np.int32 if x.dtype == torch.int32 else np.float32)
        for i, x in enumerate(examples)
    ]
    states = [
        ct.StateType(wrapped_type=ct.TensorType(shape=shape, dtype=np.float16), name=state)
        for state, shape in trip.states.items()
    ]
    with quiet_conversion():
        if trip.route == "export":
            program = torch.export.export(module, tuple(examples)).run_decompositions({})
        elif trip.route == "script":
            program = torch.jit.script(module)
        else:
            program = torch.jit.trace(module, examples, check_trace=False)
        model = ct.convert(
            program, inputs=types, states=states or None, skip_model_load=True,
            compute_precision=getattr(ct.precision, precision.upper()), minimum_deployment_target=ct.target.iOS18,
        )  # fmt: skip
    model.save(str(target))
    return model
