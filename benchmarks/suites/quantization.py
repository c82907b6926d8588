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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.suites import quantization_sweep, suite
from benchmarks.suites.suite import Bar, Figures, export, result, run_step, step, synthetic
from fastvlm.common.cli import log

MLX_VLM_PYTHON = "FASTVLM_MLX_VLM_PYTHON"
ROUNDS, ROUNDS_7B = 3, 2
FP4 = ("mxfp4", "nvfp4")

# A converter: (folder to write) -> its command.
Sides = Mapping[str, Callable[[Path], list[str]]]


def _bars() -> dict[str, Bar]:
    """key -> bar (issues 5 and 16, "What it must show"); the sections fill them in."""

    def side(key: str, name: str, peak: float | None = None) -> dict[str, Bar]:
        return {
            f"{key}_seconds": Bar(f"  {name}", "<=", None, "s"),
            f"{key}_peak": Bar("    its peak memory", "<=", peak, "GB"),
        }

    def against(key: str, name: str, time: float | None, peak: float | None) -> dict[str, Bar]:
        return {
            f"{key}_seconds_ratio": Bar(f"{name}, time", "<=", time, "x"),
            f"{key}_peak_ratio": Bar("  peak memory", "<=", peak, "x"),
        }

    bars = {
        **against("vlm", "0.5B to 4 bit, ours in its layout / mlx_vlm.convert", 0.6, 0.6),
        **against("app", "0.5B to 4 bit, ours in the app's layout / mlx_vlm.convert", 0.6, 0.6),
        **against("torch", "  ours in its layout / mlx_vlm.convert where torch is installed", 1, 0.5),
        **against("app_torch", "  ours in the app's layout / the same", 1, 0.5),
        **side("small_vlm", "ours, mlx-vlm's layout"),
        **side("small_app", "ours, the app's layout"),
        **side("small_mlx_vlm", "mlx_vlm.convert, an environment without torch"),
        **side("small_mlx_vlm_torch", "mlx_vlm.convert, with our environment's packages"),
        **side("small_mlx_lm", "mlx_lm.convert, the text model alone"),
        **against("large", "7B to 4 bit, ours / mlx_lm.convert", 0.4, None),
        **side("large_ours", "ours", 1),
        **side("large_mlx_lm", "mlx_lm.convert"),
    }
    for mode in FP4:
        bars |= against(mode, f"0.5B to {mode}, ours / mlx_lm.convert", 0.25, 0.25)
        bars |= side(f"{mode}_ours", "ours") | side(f"{mode}_mlx_lm", "mlx_lm.convert")
    return bars | {
        "different_schemes": Bar("settings whose bytes differ from mlx.core.quantize's", "<=", 0, ""),
        "compared_schemes": Bar("  settings compared", ">=", None, ""),
        "different_tensors": Bar("tensors of the 0.5B int4 that differ from mlx_lm.convert's", "<=", 0, ""),
        "compared_tensors": Bar("  tensors compared", ">=", None, ""),
    }


def add_parser(subparsers: Any) -> None:
    """Add the verb `quantization`."""
    suite.add_suite(
        subparsers,
        SUITE,
        help="what quantizing costs beside mlx_lm.convert and mlx_vlm.convert, and whose bytes it gives",
        description="Convert random checkpoints of the real shapes, the peers and ours in turns. Exit 1 when a bar is"
        f" missed. mlx_vlm.convert runs with the Python in {MLX_VLM_PYTHON}.",
    )


def _convert_small(store: Path, work: Path) -> Figures:
    checkpoint, text = _inputs(store, "small")
    sides: dict[str, Callable[[Path], list[str]]] = {
        "vlm": lambda target: export("llm", checkpoint, target, "--quant", "int4", "--layout", "mlx-vlm"),
        "app": lambda target: export("llm", checkpoint, target, "--quant", "int4"),
        "mlx_lm": lambda target: _mlx_lm(text, target, "affine"),
    }
    peer = os.environ.get(MLX_VLM_PYTHON)
    if peer:
        packages = subprocess.check_output([peer, "-c", "import mlx_vlm; print(mlx_vlm.__path__[0])"], text=True)
        flags = ["convert", "--hf-path", str(checkpoint), "-q", "--q-bits", "4", "--mlx-path"]
        sides["mlx_vlm"] = lambda target: [peer, "-m", "mlx_vlm", *flags, str(target)]
        beside = [sys.executable, "-c", _WITH_OURS, str(Path(packages.strip()).parent)]
        sides["mlx_vlm_torch"] = lambda target: [*beside, *flags, str(target)]
    else:
        log(f"mlx_vlm.convert: skipped, no bar judged: set {MLX_VLM_PYTHON} to a Python that has mlx-vlm 0.7.10")
    figures = _in_turns("small", sides, work, ROUNDS)
    for key, ours, theirs in (
        ("vlm", "vlm", "mlx_vlm"),
        ("app", "app", "mlx_vlm"),
        ("torch", "vlm", "mlx_vlm_torch"),
        ("app_torch", "app", "mlx_vlm_torch"),
    ):
        if theirs in sides:
            figures |= _ratios(key, figures, f"small_{ours}", f"small_{theirs}")
    return figures


# mlx_vlm with our environment's transformers, torch and mlx: what `pip install mlx-vlm` into it gives
_WITH_OURS = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module("mlx_vlm", run_name="__main__", alter_sys=True)
"""


def _convert_large(store: Path, work: Path) -> Figures:
    checkpoint, text = _inputs(store, "large")
    sides: Sides = {
        "ours": lambda target: export("llm", checkpoint, target, "--quant", "int4"),
        "mlx_lm": lambda target: _mlx_lm(text, target, "affine"),
    }
    figures = _in_turns("large", sides, work, ROUNDS_7B)
    return figures | _ratios("large", figures, "large_ours", "large_mlx_lm")


def _convert_fp4(store: Path, work: Path) -> Figures:
    checkpoint, text = _inputs(store, "small")
    figures: Figures = {}
    for mode in FP4:
        sides: Sides = {
            "ours": lambda target, mode=mode: export("llm", checkpoint, target, "--quant", mode),  # type: ignore[misc]
            "mlx_lm": lambda target, mode=mode: _mlx_lm(text, target, mode),  # type: ignore[misc]
        }
        figures |= _in_turns(mode, sides, work, 1)
        figures |= _ratios(mode, figures, f"{mode}_ours", f"{mode}_mlx_lm")
    return figures


def _bytes(store: Path, work: Path) -> Figures:
    checkpoint, text = _inputs(store, "small")
    figures = result("every scheme against mlx.core.quantize", step("quantization_steps", "schemes", checkpoint))
    run_step("exporting int4", export("llm", checkpoint, work / "ours", "--quant", "int4"))
    run_step("mlx_lm.convert", _mlx_lm(text, work / "theirs", "affine"))
    compared = step("quantization_steps", "same_tensors", work / "ours", work / "theirs")
    return figures | result("comparing every tensor", compared)


def _mlx_lm(text: Path, target: Path, mode: str) -> list[str]:
    flags = ["--q-mode", mode] if mode != "affine" else ["--q-bits", "4"]
    return [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(text), "--mlx-path", str(target), "-q", *flags]


def _in_turns(key: str, sides: Sides, work: Path, rounds: int) -> Figures:
    """Median seconds and peak of every side, run one after the other `rounds` times."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            target = work / f"{key}-{name}"
            done = run_step(f"{key} {name}, round {number + 1} of {rounds}", sides[name](target))
            log(f"{key} {name}: {done.seconds:.1f} s, {done.peak_gb:.2f} GB")
            seconds[name].append(done.seconds)
            peaks[name].append(done.peak_gb)
            shutil.rmtree(target)
    return {f"{key}_{name}_seconds": statistics.median(values) for name, values in seconds.items()} | {
        f"{key}_{name}_peak": statistics.median(values) for name, values in peaks.items()
    }


def _ratios(key: str, figures: Figures, ours: str, theirs: str) -> Figures:
    return {
        f"{key}_{what}_ratio": figures[f"{ours}_{what}"] / figures[f"{theirs}_{what}"] for what in ("seconds", "peak")
    }


def _inputs(store: Path, size: str) -> tuple[Path, Path]:
    """A random checkpoint ("small" or "large"), and its language model as mlx_lm reads it; each made once."""
    checkpoint = store / "synthetic-0.5b-llava"
    if size == "large":
        checkpoint = synthetic(store, "7b")
    elif not checkpoint.is_dir():
        run_step(f"writing {checkpoint.name}", step("quantization_steps", size, checkpoint))
    text = checkpoint.with_name(f"{checkpoint.name}-text")
    if not text.is_dir():
        run_step(f"writing {text.name}", step("quantization_steps", "text_model", checkpoint, text))
    return checkpoint, text


SUITE = suite.Suite(
    "quantization",
    _bars() | quantization_sweep.BARS,
    {
        "convert-0.5b": _convert_small,
        "convert-7b": _convert_large,
        "convert-fp4": _convert_fp4,
        "bytes": _bytes,
        **quantization_sweep.SECTIONS,
    },
)
