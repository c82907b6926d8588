"""`python -m benchmarks quantization`: what converting costs beside the peers' converters, and whose bytes it writes.

Every run is a process of its own, ours and the peers' in turns, the order reversed from round to round; figures are
medians, and what is judged are ratios of one session. mlx_lm is our environment's; mlx_vlm brings another mlx-lm and so
needs an environment of its own: FASTVLM_MLX_VLM_PYTHON is its Python.
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suites import quantization_steps, quantization_sweep, suite
from benchmarks.suites.suite import Run, call, export, run_step, synthetic
from fastvlm.common.children import Finished
from fastvlm.common.cli import log

MLX_VLM_PYTHON = "FASTVLM_MLX_VLM_PYTHON"
ROUNDS, ROUNDS_7B = 3, 2
FP4 = ("mxfp4", "nvfp4")
# mlx_vlm with our environment's transformers, torch and mlx: what `pip install mlx-vlm` into it gives
_WITH_OURS = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module("mlx_vlm", run_name="__main__", alter_sys=True)
"""
# A ratio of the 0.5B conversions: key, label, our side, the peer's, bars of time and of memory.
_SMALL_RATIOS = (
    ("vlm", "0.5B to 4 bit, ours in its layout / mlx_vlm.convert", "vlm", "mlx_vlm", 0.6, 0.6),
    ("app", "0.5B to 4 bit, ours in the app's layout / mlx_vlm.convert", "app", "mlx_vlm", 0.6, 0.6),
    ("torch", "  ours in its layout / mlx_vlm.convert where torch is installed", "vlm", "mlx_vlm_torch", 1, 0.5),
    ("app_torch", "  ours in the app's layout / the same", "app", "mlx_vlm_torch", 1, 0.5),
)
_SIDES = {
    "vlm": "ours, mlx-vlm's layout",
    "app": "ours, the app's layout",
    "mlx_vlm": "mlx_vlm.convert, an environment without torch",
    "mlx_vlm_torch": "mlx_vlm.convert, with our environment's packages",
    "mlx_lm": "mlx_lm.convert, the text model alone",
}

Command = Callable[[Path], list[str]]  # (folder to write) -> a converter's command


def add_parser(subparsers: Any) -> None:
    """Add the verb `quantization`."""
    suite.add_suite(
        subparsers, SUITE,
        description="Convert random checkpoints of the real shapes, the peers and ours in turns. mlx_vlm.convert runs"
        f" with the Python in {MLX_VLM_PYTHON}.",
    )  # fmt: skip


def _convert_small(run: Run) -> None:
    checkpoint, text = _inputs(run.store, "small")
    sides = {"vlm": _ours(checkpoint, "int4", "--layout", "mlx-vlm"), "app": _ours(checkpoint, "int4"),
             "mlx_lm": _mlx_lm(text, "affine")}  # fmt: skip
    if peer := os.environ.get(MLX_VLM_PYTHON):
        packages = subprocess.check_output([peer, "-c", "import mlx_vlm; print(mlx_vlm.__path__[0])"], text=True)
        flags = ["convert", "--hf-path", str(checkpoint), "-q", "--q-bits", "4", "--mlx-path"]
        beside = [sys.executable, "-c", _WITH_OURS, str(Path(packages.strip()).parent)]
        sides["mlx_vlm"] = lambda target: [peer, "-m", "mlx_vlm", *flags, str(target)]
        sides["mlx_vlm_torch"] = lambda target: [*beside, *flags, str(target)]
    else:
        log(f"mlx_vlm.convert: skipped, no bar judged: set {MLX_VLM_PYTHON} to a Python that has mlx-vlm 0.7.10")
    costs = in_turns("small", sides, run.work, ROUNDS)
    for key, label, ours, theirs, time, peak in _SMALL_RATIOS:
        if theirs in costs:
            _add_ratio(run, key, label, costs[ours], costs[theirs], time, peak)
    for name, label in _SIDES.items():
        if name in costs:
            run.add_cost(f"small_{name}", f"  {label}", costs[name])


def _convert_large(run: Run) -> None:
    checkpoint, text = _inputs(run.store, "large")
    sides = {"ours": _ours(checkpoint, "int4"), "mlx_lm": _mlx_lm(text, "affine")}
    costs = in_turns("large", sides, run.work, ROUNDS_7B)
    _add_ratio(run, "large", "7B to 4 bit, ours / mlx_lm.convert", costs["ours"], costs["mlx_lm"], 0.4, None)
    run.add_cost("large_ours", "  ours", costs["ours"], peak=1)
    run.add_cost("large_mlx_lm", "  mlx_lm.convert", costs["mlx_lm"])


def _convert_fp4(run: Run) -> None:
    checkpoint, text = _inputs(run.store, "small")
    for mode in FP4:
        sides = {"ours": _ours(checkpoint, mode), "mlx_lm": _mlx_lm(text, mode)}
        costs = in_turns(mode, sides, run.work, 1)
        label = f"0.5B to {mode}, ours / mlx_lm.convert"
        _add_ratio(run, mode, label, costs["ours"], costs["mlx_lm"], 0.25, 0.25)
        run.add_cost(f"{mode}_ours", "  ours", costs["ours"])
        run.add_cost(f"{mode}_mlx_lm", "  mlx_lm.convert", costs["mlx_lm"])


def _bytes(run: Run) -> None:
    checkpoint, text = _inputs(run.store, "small")
    schemes = call("every scheme against mlx.core.quantize", quantization_steps.schemes, checkpoint)
    ours, theirs = run.work / "ours", run.work / "theirs"
    run_step("exporting int4", _ours(checkpoint, "int4")(ours))
    run_step("mlx_lm.convert", _mlx_lm(text, "affine")(theirs))
    tensors = call("comparing every tensor", quantization_steps.same_tensors, ours, theirs)
    label = "settings whose bytes differ from mlx.core.quantize's"
    run.add("different_schemes", label, schemes["different"], most=0)
    run.add("compared_schemes", "  settings compared", schemes["compared"])
    label = "tensors of the 0.5B int4 that differ from mlx_lm.convert's"
    run.add("different_tensors", label, tensors["different"], most=0)
    run.add("compared_tensors", "  tensors compared", tensors["compared"])


def _ours(checkpoint: Path, recipe: str, *flags: str) -> Command:
    return lambda target: export("llm", checkpoint, target, "--quant", recipe, *flags)


def _mlx_lm(text: Path, mode: str) -> Command:
    convert = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(text), "-q"]
    flags = ["--q-mode", mode] if mode != "affine" else ["--q-bits", "4"]
    return lambda target: [*convert, *flags, "--mlx-path", str(target)]


def in_turns(key: str, sides: Mapping[str, Command], work: Path, rounds: int) -> dict[str, Finished]:
    """Median cost of every side, run one after the other `rounds` times, the order reversed every other time."""
    costs: dict[str, list[Finished]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            target = work / f"{key}-{name}"
            done = run_step(f"{key} {name}, round {number + 1} of {rounds}", sides[name](target))
            log(f"{key} {name}: {done.seconds:.1f} s, {done.peak_gb:.2f} GB")
            costs[name].append(done)
            shutil.rmtree(target)
    return {name: _median(each) for name, each in costs.items()}


def _median(costs: Sequence[Finished]) -> Finished:
    peak = statistics.median(one.peak_bytes for one in costs)
    return Finished(0, statistics.median(one.seconds for one in costs), round(peak), "")


def _add_ratio(
    run: Run, key: str, label: str, ours: Finished, theirs: Finished, time: float, peak: float | None
) -> None:
    run.add(f"{key}_seconds_ratio", f"{label}, time", ours.seconds / theirs.seconds, "x", most=time)
    run.add(f"{key}_peak_ratio", "  peak memory", ours.peak_gb / theirs.peak_gb, "x", most=peak)


def _inputs(store: Path, size: str) -> tuple[Path, Path]:
    """A random checkpoint ("small" or "large"), and its language model as mlx_lm reads it; each made once."""
    checkpoint = store / "synthetic-0.5b-llava"
    if size == "large":
        checkpoint = synthetic(store, "7b")
    elif not checkpoint.is_dir():
        call(f"writing {checkpoint.name}", quantization_steps.small, checkpoint)
    text = checkpoint.with_name(f"{checkpoint.name}-text")
    if not text.is_dir():
        call(f"writing {text.name}", quantization_steps.text_model, checkpoint, text)
    return checkpoint, text


SUITE = suite.Suite(
    "quantization",
    {
        "convert-0.5b": _convert_small,
        "convert-7b": _convert_large,
        "convert-fp4": _convert_fp4,
        "bytes": _bytes,
        **quantization_sweep.SECTIONS,
    },
)
