"""`python -m benchmarks encoder`: is the exported encoder right, lean and small, each figure beside its bar (issue 4).

Every step runs in a process of its own. Everything here is computed by the MIL executor and PyTorch: it says what the
saved program computes, not what the Neural Engine makes of it.
"""

from pathlib import Path
from typing import Any

from benchmarks.suites import suite
from benchmarks.suites.encoder_steps import FORCED_HEADROOM, RIVAL_FORM
from benchmarks.suites.suite import DEMO, Bar, Figures, export, result, run_step, step, synthetic
from fastvlm.common.cli import log
from model_export.contract import PACKAGE
from quantization.coreml.compression import COMPRESSIONS

SIZES = (256, 512, 768, 1024)
ORDINARY = "ordinary"
PEAKS = ("3e4", "3e5", "3e6")  # of the streams
# After the GELU of the last patch embedding: the published 7B, 1.5B and 0.5B (docs/NEURAL_ENGINE.md), and more.
GELU_PEAKS = ("1.3e4", "5.6e4", "2.5e5", "2e6")
# Picture size -> checkpoints of which a naive fp16 export is made, too: at 1024 it takes 7.5 GB of memory.
RANGES = {256: (*PEAKS, ORDINARY), 1024: PEAKS[:1]}
GELU_NAIVE = {256: GELU_PEAKS[2:], 1024: GELU_PEAKS[2:3]}  # where float16 ends before
SHAPE = "encoder"  # of the scaled checkpoints: the real encoder, which is all that is asked for
MIN_SNR = (20, 30, 40)  # dB
QUESTIONS = 200
CURVE = "compression.png"
MOVES = ("transpose", "reshape", "squeeze")

_FORMS = ("fp16", *COMPRESSIONS)


def _bars() -> dict[str, Bar]:
    """Issue 4, "What it must show"."""
    return _range_bars() | _gelu_bars() | _graph_bars() | _compression_bars()


def _range_bars() -> dict[str, Bar]:
    bars: dict[str, Bar] = {}
    for size, naive in RANGES.items():
        for peak in PEAKS:
            at = f"{peak}_{size}"
            bars |= {
                f"strict_{at}": Bar(f"streams at {peak}, {size} x {size}: strict fp16", ">=", 45, "dB"),
                f"typed_{at}": Bar("  as typed", ">=", 60, "dB"),
                f"reached_{at}": Bar("  peak of the lesser stage", ">=", None, ""),
            }
            if peak in naive:
                bars[f"naive_{at}"] = Bar("  naive fp16, strict", "<", 10, "dB")
        at = f"{ORDINARY}_{size}"
        bars |= {
            f"strict_{at}": Bar(f"ordinary checkpoint, {size} x {size}: strict fp16", ">=", None, "dB"),
            f"typed_{at}": Bar("  as typed", ">=", None, "dB"),
            f"forced_{at}": Bar(f"  a headroom of {FORCED_HEADROOM:g} forced, as typed", ">=", None, "dB"),
            f"forced_gain_{at}": Bar("  k forced above not", ">=", -1, "dB"),
        }
        if ORDINARY in naive:
            bars[f"naive_{at}"] = Bar("  naive fp16, as typed", ">=", None, "dB")
            bars[f"gain_{at}"] = Bar("  ours above naive", ">=", -1, "dB")
    return bars


def _gelu_bars() -> dict[str, Bar]:
    bars: dict[str, Bar] = {}
    for size in RANGES:
        for kind, name in (("", "picture"), ("noise_", "N(0, 1) noise")):
            at = f"{kind}gelu_typed_{ORDINARY}_{size}"
            bars[at] = Bar(f"the same encoder, ordinary, {size} x {size}, {name}: as typed", ">=", None, "dB")
        for peak in GELU_PEAKS:
            at = f"{peak}_{size}"
            bars[f"gelu_reached_{at}"] = Bar(
                f"patch embedding at {peak} after its GELU, {size} x {size}", ">=", None, ""
            )
            for kind, name in (("", "picture"), ("noise_", "N(0, 1) noise")):
                bars |= {
                    f"{kind}gelu_strict_{at}": Bar(f"  strict fp16, {name}", ">=", 45, "dB"),
                    f"{kind}gelu_typed_{at}": Bar(f"  as typed, {name}", ">=", None, "dB"),
                    f"{kind}gelu_gain_{at}": Bar("  above the ordinary one", ">=", -1, "dB"),
                }
                if peak in GELU_NAIVE[size]:
                    bars[f"{kind}gelu_naive_{at}"] = Bar(f"  naive fp16, strict, {name}", "<", 15, "dB")
            bars |= {
                f"gelu_added_{at}": Bar("  operations added", "<=", None, ""),
                f"gelu_byte_share_{at}": Bar("  their share of the bytes moved", "<=", None, ""),
                f"gelu_float32_{at}": Bar("  float32 operations", "<=", 0, ""),
                f"gelu_findings_{at}": Bar("  audit findings", "<=", 0, ""),
            }
    return bars


def _graph_bars() -> dict[str, Bar]:
    # Ours has 14 moves: each of six attentions needs two reshapes (the depthwise convolution before it is over the
    # grid, the softmax over the list of positions), and the contract's (1, N, C) a reshape and a transpose.
    bars: dict[str, Bar] = {}
    for size in SIZES:
        bars |= {
            f"findings_{size}": Bar(f"audit findings, {size} x {size}", "<=", 0, ""),
            f"moves_{size}": Bar("  transposes, reshapes and squeezes", "<", 10, ""),
        }
    bars |= {f"naive_{kind}": Bar(f"  plain trace: {kind}s", "<=", None, "") for kind in MOVES}
    bars["multi_size"] = Bar("multifunction package / a single one", "<=", 1.03, "x")
    for size in SIZES:
        bars |= {
            f"multi_snr_{size}": Bar(f"  encode_{size}: as typed", ">=", None, "dB"),
            f"multi_difference_{size}": Bar("  largest difference to the single package", "<=", 0, ""),
        }
    return bars


def _compression_bars() -> dict[str, Bar]:
    bars = {
        "palette_time": Bar(f"{RIVAL_FORM}: time, ours / coremltools'", "<=", 0.1, "x"),
        "palette_seconds": Bar("  ours, one core", "<=", None, "s"),
        "coremltools_seconds": Bar("  coremltools, one core", "<=", None, "s"),
        "palette_tensors": Bar("  tensors", "<=", None, ""),
        "palette_error": Bar("  squared error, ours / coremltools', worst tensor", "<=", 1.0, "x"),
        "palette_worse": Bar("  tensors with more error than coremltools'", "<=", None, ""),
        "palette_error_all": Bar("  squared error, ours / coremltools', all tensors", "<=", None, "x"),
        "scaled_size": Bar("  with a per-channel scale: bytes / fp16's", "<=", 1.0, "x"),
        "scaled_seconds": Bar("  with a per-channel scale: time", "<=", None, "s"),
    }
    for form in (*_FORMS, *(f"min-snr-{least}" for least in MIN_SNR)):
        bars |= {
            f"demo_bytes_{form}": Bar(f"demo encoder, {form}", "<=", None, "MB"),
            f"demo_snr_{form}": Bar("  as typed", ">=", None, "dB"),
            f"demo_agreement_{form}": Bar(f"  same answer as PyTorch, {QUESTIONS} questions", ">=", None, ""),
        }
    bars |= {f"real_bytes_{form}": Bar(f"real encoder's weights, {form}", "<=", None, "MB") for form in _FORMS}
    bars["real_written"] = Bar(f"  {RIVAL_FORM}: |weight.bin / predicted - 1|", "<=", 0.01, "")
    return bars


def add_parser(subparsers: Any) -> None:
    """Add the verb `encoder`."""
    suite.add_suite(
        subparsers,
        SUITE,
        help="the exported encoder: range, graph, resolutions, compression",
        description="Measure the exported encoder on the real shape with random weights, and compressed encoders on the"
        f" demo checkpoint (their curve goes to DIR/{CURVE}). Exit 1 when a bar is missed.",
    )


def _ranges(store: Path, work: Path) -> Figures:
    ordinary = store / f"synthetic-{SHAPE}-float32"
    if not ordinary.is_dir():
        run_step("writing a random encoder", step("encoder_steps", "ordinary_checkpoint", ordinary, SHAPE))
    figures: Figures = {}
    for size in RANGES:
        hot = work / f"hot-{size}"
        made = result(
            f"writing checkpoints with hot streams for {size} x {size}",
            step("encoder_steps", "hot_checkpoints", hot, SHAPE, size, *PEAKS),
        )
        for peak in PEAKS:
            figures |= _one_peak(hot.with_name(f"{hot.name}-{peak}"), work, peak, size)
            figures[f"reached_{peak}_{size}"] = made[peak]
        figures |= _ordinary(ordinary, work, size)
    return figures


def _gelus(store: Path, work: Path) -> Figures:
    figures: Figures = {}
    for size in RANGES:
        hot = work / f"hot-gelu-{size}"
        made = result(
            f"writing checkpoints with a hot patch embedding for {size} x {size}",
            step("encoder_steps", "hot_gelus", hot, SHAPE, size, *GELU_PEAKS),
        )
        ordinary = f"gelu_typed_{ORDINARY}_{size}"
        plain = _exported(hot, work / f"gelu-ordinary-{size}", size)
        figures |= result("the ordinary one", step("encoder_steps", "snr", hot, size, f"{ordinary}=as-typed:{plain}"))
        for peak in GELU_PEAKS:
            at, checkpoint = f"{peak}_{size}", hot.with_name(f"{hot.name}-{peak}")
            ours = _exported(checkpoint, work / f"gelu-{at}", size)
            runs = [f"gelu_strict_{at}=strict-fp16:{ours}", f"gelu_typed_{at}=as-typed:{ours}"]
            if peak in GELU_NAIVE[size]:
                naive = _naive(checkpoint, work / f"naive-gelu-{at}.mlpackage", size)
                runs.append(f"gelu_naive_{at}=strict-fp16:{naive}")
            figures |= result(f"patch embedding at {peak}", step("encoder_steps", "snr", checkpoint, size, *runs))
            figures[f"gelu_reached_{at}"] = made[peak]
            for kind in ("", "noise_"):
                gain = figures[f"{kind}gelu_typed_{at}"] - figures[kind + ordinary]
                figures[f"{kind}gelu_gain_{at}"] = gain
            scaled = result("what it took", step("encoder_steps", "scaling", ours.parent))
            figures |= {f"gelu_{name}_{at}": value for name, value in scaled.items()}
    return figures


def _one_peak(checkpoint: Path, work: Path, peak: str, size: int) -> Figures:
    at = f"{peak}_{size}"
    ours = _exported(checkpoint, work / f"ours-{at}", size)
    runs = [f"strict_{at}=strict-fp16:{ours}", f"typed_{at}=as-typed:{ours}"]
    if peak in RANGES[size]:
        runs.append(f"naive_{at}=strict-fp16:{_naive(checkpoint, work / f'naive-{at}.mlpackage', size)}")
    return result(f"streams at {peak}, {size} x {size}", step("encoder_steps", "snr", checkpoint, size, *runs))


def _ordinary(checkpoint: Path, work: Path, size: int) -> Figures:
    at, forced = f"{ORDINARY}_{size}", work / f"forced-{size}.mlpackage"
    ours = _exported(checkpoint, work / f"ours-{at}", size)
    run_step("exporting with exponents forced", step("encoder_steps", "forced_export", checkpoint, forced, size))
    runs = [f"strict_{at}=strict-fp16:{ours}", f"typed_{at}=as-typed:{ours}", f"forced_{at}=as-typed:{forced}"]
    if ORDINARY in RANGES[size]:
        runs.append(f"naive_{at}=as-typed:{_naive(checkpoint, work / f'naive-{at}.mlpackage', size)}")
    found = result(f"ordinary checkpoint, {size} x {size}", step("encoder_steps", "snr", checkpoint, size, *runs))
    gains = {f"forced_gain_{at}": found[f"forced_{at}"] - found[f"typed_{at}"]}
    if ORDINARY in RANGES[size]:
        gains[f"gain_{at}"] = found[f"typed_{at}"] - found[f"naive_{at}"]
    return found | gains


def _graph(store: Path, work: Path) -> Figures:
    figures: Figures = {}
    for size in SIZES:
        package = _exported(synthetic(store), work / f"single-{size}", size)
        found = result(f"auditing {size} x {size}", step("encoder_steps", "audited", package))
        figures |= {f"findings_{size}": found["findings"], f"moves_{size}": found["moves"]}
    naive = _naive(synthetic(store), work / "naive.mlpackage", SIZES[0])
    found = result("auditing the plain trace", step("encoder_steps", "audited", naive))
    return figures | {f"naive_{kind}": found[kind] for kind in MOVES}


def _multifunction(store: Path, work: Path) -> Figures:
    checkpoint, folder = synthetic(store), work / "multi"
    singles = [f"{size}:{_exported(checkpoint, work / f'single-{size}', size)}" for size in SIZES]
    flags = ["--resolutions", *map(str, SIZES), "--image-size", str(SIZES[-1])]
    run_step("exporting every resolution in one package", export("vision", checkpoint, folder, *flags))
    return result(
        "comparing every function", step("encoder_steps", "functions", checkpoint, folder / PACKAGE, *singles)
    )


def _palettization(store: Path, work: Path) -> Figures:
    return result("clustering, ours and coremltools'", step("encoder_steps", "palettization", synthetic(store)))


def _compression(store: Path, work: Path) -> Figures:
    folders = []
    for form in _FORMS:
        folders.append(work / f"demo-{form}")
        run_step(f"demo encoder, {form}", export("vision", DEMO, folders[-1], "--vision-quant", form))
    for least in MIN_SNR:
        folders.append(work / f"demo-min-snr-{least}")
        run_step(f"demo encoder, {least} dB or more", export("vision", DEMO, folders[-1], "--min-snr", str(least)))
    asked = step("encoder_steps", "curve", DEMO, QUESTIONS, *folders)
    encoders = {
        name.removeprefix("demo-"): found
        for name, found in result(f"asking {QUESTIONS} demo questions of each", asked)["encoders"].items()
    }
    figures: Figures = {}
    for form, found in encoders.items():
        figures |= {
            f"demo_bytes_{form}": found["bytes"] / 1e6,
            f"demo_snr_{form}": found["snr"],
            f"demo_agreement_{form}": found["agreement"],
        }
    real = _exported(synthetic(store), work / "real-compressed", SIZES[0], "--vision-quant", RIVAL_FORM)
    sizes = result("sizes on the real shape", step("encoder_steps", "sizes", synthetic(store), real))
    figures |= {f"real_bytes_{form}": size / 1e6 for form, size in sizes["weight_bytes"].items()}
    figures["real_written"] = abs(sizes["written"] / sizes["predicted"] - 1)
    _draw(encoders, store / CURVE)
    return figures


def _draw(encoders: dict[str, dict[str, float]], target: Path) -> None:
    from benchmarks.suites.compression_plot import write_plot

    write_plot(
        encoders, target, f"Compressed encoder of the demo checkpoint, {QUESTIONS} questions, MIL executor as typed"
    )
    log(f"curve: {target}")


def _exported(checkpoint: Path, folder: Path, size: int, *flags: str) -> Path:
    """The package of an encoder exported for pictures of this size, if this run has not made it yet."""
    if not folder.is_dir():
        command = export("vision", checkpoint, folder, "--image-size", str(size), *flags)
        run_step(f"exporting {folder.name}", command)
    return folder / PACKAGE


def _naive(checkpoint: Path, target: Path, size: int) -> Path:
    """The package that a plain script makes."""
    run_step(f"a plain script's {target.stem}", step("steps", "plain_export", checkpoint, target, size))
    return target


SUITE = suite.Suite(
    "encoder",
    _bars(),
    {
        "ranges": _ranges,
        "gelu": _gelus,
        "graph": _graph,
        "multifunction": _multifunction,
        "palettization": _palettization,
        "compression": _compression,
    },
)
