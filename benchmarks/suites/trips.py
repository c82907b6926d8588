"""Round trips: a torch module to a saved ML program and back, by `model_export.mil`, compared and timed."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm.common.cli import log, progress

if TYPE_CHECKING:
    from benchmarks.suites.trip_models import Trip

ROUNDS = 5  # timed rounds of each side, interleaved, after one warm-up


def built(trip: Trip) -> Any:
    """The module of a row of TRIPS in evaluation mode, the same weights each time; normalizations have statistics."""
    import torch

    torch.manual_seed(0)
    module = trip.build().eval()
    with torch.inference_mode():
        if any(isinstance(part, torch.nn.LazyLinear) for part in module.modules()):
            module(*tensors(trip))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Where a layer starts as nothing (zero, a LayerScale of 1e-6), a wrong one would not be seen.
        for weight in module.parameters():
            if weight.numel() > 1 and weight.min() == weight.max():
                noise = torch.rand(weight.shape, generator=generator)
                weight.copy_(noise + 0.5 if weight.max() else (noise - 0.5) / 2)
        norms = [part for part in module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
        for part in norms:  # statistics of noise, else the signal of random weights fades away
            part.train().momentum = None
        if norms:
            module(*(torch.randn((4, *x.shape[1:]), generator=generator) for x in tensors(trip)))
    return module.eval().requires_grad_(False)


def tensors(trip: Trip, seed: int = 0) -> list[Any]:
    """The inputs of a row as tensors."""
    import torch

    return [torch.from_numpy(array) for array in trip.arrays(seed)]


def convert(module: Any, trip: Trip, target: Path, precision: str = "float32") -> Any:
    """Convert as a script by hand does and save; inputs are x0, x1, ... Returns coremltools' model."""
    import torch

    from model_export.encoder.coreml import coremltools, quick_conversion, quiet_conversion

    ct, examples = coremltools(), tensors(trip)
    types = [
        ct.TensorType(name=f"x{i}", shape=tuple(x.shape), dtype=np.int32 if x.dtype == torch.int32 else np.float32)
        for i, x in enumerate(examples)
    ]
    states = [
        ct.StateType(wrapped_type=ct.TensorType(shape=shape, dtype=np.float16), name=state)
        for state, shape in trip.states.items()
    ]
    with quiet_conversion(), quick_conversion():
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


# -- weight compression

KINDS = ("palette4", "palette6-group", "int8", "int4-block", "sparse", "sparse-palette")


def compressed(model: Any, kind: str) -> tuple[Any, Any]:
    """coremltools' model with its weights compressed in a kind of KINDS, and that decompressed by coremltools."""
    from model_export.encoder.coreml import coremltools, quiet_conversion

    coremltools()
    import coremltools.optimize.coreml as cto

    palette, linear = cto.OpPalettizerConfig, cto.OpLinearQuantizerConfig
    prune = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=512)
    passes: dict[str, list[tuple[Any, Any]]] = {
        "palette4": [(cto.palettize_weights, palette(mode="uniform", nbits=4, weight_threshold=512))],
        "palette6-group": [
            (cto.palettize_weights, palette(mode="uniform", nbits=6, granularity="per_grouped_channel", group_size=8,
                                            weight_threshold=512))
        ],
        "int8": [(cto.linear_quantize_weights, linear(mode="linear_symmetric", weight_threshold=512))],
        "int4-block": [
            (cto.linear_quantize_weights, linear(mode="linear", dtype="int4", granularity="per_block", block_size=16,
                                                 weight_threshold=512))
        ],
        "sparse": [(cto.prune_weights, prune)],
        "sparse-palette": [
            (cto.prune_weights, prune),
            (cto.palettize_weights, palette(mode="uniform", nbits=4, weight_threshold=512)),
        ],
    }  # fmt: skip
    with quiet_conversion():
        for number, (compress, config) in enumerate(passes[kind]):
            joint = {"joint_compression": True} if number else {}
            model = compress(model, cto.OptimizationConfig(global_config=config), **joint)
        return model, cto.decompress_weights(model)


# -- speed and agreement, for the benchmark


def measure(*names: str) -> dict[str, Any]:
    """Every row of TRIPS (or those named) against torch, one thread.

    Returns by row the medians of interleaved runs over torch's ("float32", "typed"), the relative "error" in float32
    and the "snr" as typed in dB; and the geometric means of the ratios, the worst error and the least SNR.
    """
    import torch

    from benchmarks.metrics import snr_db
    from benchmarks.suites.trip_models import TRIPS
    from model_export import mil

    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    with progress("round trips", len(names or TRIPS)) as advance, tempfile.TemporaryDirectory() as folder:
        for name in names or TRIPS:
            trip = TRIPS[name].full or TRIPS[name]
            module, examples = built(trip), tensors(trip)
            inputs = {f"x{i}": x.numpy() for i, x in enumerate(examples)}
            with torch.inference_mode():
                expected = flat(built(trip)(*examples))
            runs: dict[str, Callable[[], Any]] = {"torch": partial(torch.inference_mode()(module), *examples)}
            found: dict[str, list[Any]] = {}
            for label, policy, precision in (("float32", "float32", "float32"), ("typed", "as-typed", "float16")):
                package = Path(folder, f"{name}-{label}.mlpackage")
                convert(built(trip), trip, package, precision)
                executor = mil.load(package, compute=policy)
                state = {"state": executor.make_state()} if trip.states else {}
                runs[label] = partial(executor.predict, inputs, **state)
                result = runs[label]()
                found[label] = [result[output] for output in executor.outputs]
            times = _interleaved(runs)
            rows[name] = {label: times[label] / times["torch"] for label in found} | {
                "error": max(relative_error(*pair) for pair in zip(expected, found["float32"], strict=True)),
                "snr": min(snr_db(*pair) for pair in list(zip(expected, found["typed"]))[: trip.typed_outputs]),
                "ms": 1000 * times["torch"],
            }
            log(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in rows[name].items()))
            advance()
    means = {
        label: math.exp(statistics.fmean(math.log(row[label]) for row in rows.values()))
        for label in ("float32", "typed")
    }
    return {
        **means,
        "rows": len(rows),
        "error": max(row["error"] for row in rows.values()),
        "snr": min(row["snr"] for row in rows.values()),
        "of": rows,
    }


def _interleaved(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, run in turn, the order reversed every other round."""
    times: dict[str, list[float]] = {label: [] for label in runs}
    for number in range(ROUNDS + 1):
        for label in list(runs)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            runs[label]()
            times[label].append(time.perf_counter() - start)
    return {label: statistics.median(seconds[1:]) for label, seconds in times.items()}


def flat(outputs: Any) -> list[np.ndarray]:
    """A module's outputs as arrays; a tensor alone is a list of one."""
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest difference over the largest magnitude expected; infinite where shapes differ or one isn't finite."""
    if expected.shape != found.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return math.inf
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())
