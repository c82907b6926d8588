"""`python -m benchmarks encoder`: is the exported encoder right, lean and small, each figure beside its bar.

Everything here is computed by the MIL executor and PyTorch: it says what the saved program computes, not what the
Neural Engine makes of it.
"""

from pathlib import Path
from typing import Any

from benchmarks.suites import encoder_steps, steps, suite
from benchmarks.suites.compression_plot import write_plot
from benchmarks.suites.encoder_steps import FORCED_HEADROOM, RIVAL_FORM
from benchmarks.suites.suite import DEMO, Run, call, export, run_step, synthetic
from fastvlm.common.cli import log
from model_export.contract import PACKAGE
from quantization.coreml.compression import COMPRESSIONS

SIZES = (256, 512, 768, 1024)
PEAKS = ("3e4", "3e5", "3e6")  # of the streams
# After the GELU of the last patch embedding: the published 7B, 1.5B and 0.5B (docs/NEURAL_ENGINE.md), and more.
GELU_PEAKS = ("1.3e4", "5.6e4", "2.5e5", "2e6")
# Picture size -> checkpoints of which a naive fp16 export is made, too: at 1024 it takes 7.5 GB of memory.
RANGES = {256: (*PEAKS, "ordinary"), 1024: PEAKS[:1]}
GELU_NAIVE = {256: GELU_PEAKS[2:], 1024: GELU_PEAKS[2:3]}  # where float16 ends before
SHAPE = "encoder"  # of the scaled checkpoints: the real encoder alone
MIN_SNR = (20, 30, 40)  # dB
QUESTIONS = 200
CURVE = "compression.png"
FORMS = ("fp16", *COMPRESSIONS)
_INPUTS = {"": "picture", "noise_": "N(0, 1) noise"}  # prefix of a figure's key -> what it is measured on


def add_parser(subparsers: Any) -> None:
    """Add the verb `encoder`."""
    suite.add_suite(
        subparsers, SUITE,
        description="Measure the exported encoder on the real shape with random weights, and compressed encoders on the"
        f" demo checkpoint (their curve goes to DIR/{CURVE}).",
    )  # fmt: skip


def _ranges(run: Run) -> None:
    """Streams that leave float16's range, and an ordinary checkpoint."""
    ordinary = run.store / f"synthetic-{SHAPE}-float32"
    if not ordinary.is_dir():
        call("writing a random encoder", encoder_steps.ordinary_checkpoint, ordinary, SHAPE)
    for size, naive in RANGES.items():
        hot = run.work / f"hot-{size}"
        text = f"writing checkpoints with hot streams for {size} x {size}"
        reached = call(text, encoder_steps.hot_checkpoints, hot, SHAPE, size, PEAKS)
        for peak in PEAKS:
            at = f"{peak}_{size}"
            packages = _packages(run, hot.with_name(f"{hot.name}-{peak}"), at, size, peak in naive)
            snr = _snr(hot.with_name(f"{hot.name}-{peak}"), size, packages)[""]
            run.add(f"strict_{at}", f"streams at {peak}, {size} x {size}: strict fp16", snr["strict"], "dB", least=45)
            run.add(f"typed_{at}", "  as typed", snr["typed"], "dB", least=60)
            run.add(f"reached_{at}", "  peak of the lesser stage", reached[peak])
            if peak in naive:
                run.add(f"naive_{at}", "  naive fp16, strict", snr["naive"], "dB", below=10)
        _ordinary(run, ordinary, size, "ordinary" in naive)


def _ordinary(run: Run, checkpoint: Path, size: int, naive: bool) -> None:
    at, forced = f"ordinary_{size}", run.work / f"forced-{size}.mlpackage"
    call("exporting with exponents forced", encoder_steps.forced_export, checkpoint, forced, size)
    packages = _packages(run, checkpoint, at, size, naive, "as-typed") | {"forced": ("as-typed", str(forced))}
    snr = _snr(checkpoint, size, packages)[""]
    run.add(f"strict_{at}", f"ordinary checkpoint, {size} x {size}: strict fp16", snr["strict"], "dB")
    run.add(f"typed_{at}", "  as typed", snr["typed"], "dB")
    run.add(f"forced_{at}", f"  a headroom of {FORCED_HEADROOM:g} forced, as typed", snr["forced"], "dB")
    run.add(f"forced_gain_{at}", "  k forced above not", snr["forced"] - snr["typed"], "dB", least=-1)
    if naive:
        run.add(f"naive_{at}", "  naive fp16, as typed", snr["naive"], "dB")
        run.add(f"gain_{at}", "  ours above naive", snr["typed"] - snr["naive"], "dB", least=-1)


def _gelus(run: Run) -> None:
    """A GELU whose values leave float16's range, on pictures and on noise."""
    for size in RANGES:
        hot = run.work / f"hot-gelu-{size}"
        text = f"writing checkpoints with a hot patch embedding for {size} x {size}"
        reached = call(text, encoder_steps.hot_gelus, hot, SHAPE, size, GELU_PEAKS)
        plain = _snr(hot, size, _packages(run, hot, f"gelu-ordinary-{size}", size))
        for kind, name in _INPUTS.items():
            label = f"the same encoder, ordinary, {size} x {size}, {name}: as typed"
            run.add(f"{kind}gelu_typed_ordinary_{size}", label, plain[kind]["typed"], "dB")
        for peak in GELU_PEAKS:
            at, checkpoint, naive = f"{peak}_{size}", hot.with_name(f"{hot.name}-{peak}"), peak in GELU_NAIVE[size]
            snr = _snr(checkpoint, size, packages := _packages(run, checkpoint, f"gelu-{at}", size, naive))
            label = f"patch embedding at {peak} after its GELU, {size} x {size}"
            run.add(f"gelu_reached_{at}", label, reached[peak])
            for kind, name in _INPUTS.items():
                gain = snr[kind]["typed"] - plain[kind]["typed"]
                run.add(f"{kind}gelu_strict_{at}", f"  strict fp16, {name}", snr[kind]["strict"], "dB", least=45)
                run.add(f"{kind}gelu_typed_{at}", f"  as typed, {name}", snr[kind]["typed"], "dB")
                run.add(f"{kind}gelu_gain_{at}", "  above the ordinary one", gain, "dB", least=-1)
                if naive:
                    run.add(f"{kind}gelu_naive_{at}", f"  naive, strict, {name}", snr[kind]["naive"], "dB", below=15)
            scaled = call("its cost", encoder_steps.scaling, Path(packages["typed"][1]).parent)
            run.add(f"gelu_added_{at}", "  operations added", scaled["added"])
            run.add(f"gelu_byte_share_{at}", "  their share of the bytes moved", scaled["byte_share"])
            run.add(f"gelu_float32_{at}", "  float32 operations", scaled["float32"], most=0)
            run.add(f"gelu_findings_{at}", "  audit findings", scaled["findings"], most=0)


def _packages(
    run: Run, checkpoint: Path, name: str, size: int, naive: bool = False, naive_policy: str = "strict-fp16"
) -> dict[str, tuple[str, str]]:
    """What `encoder_steps.snr` compares: our export in both policies, and a plain script's."""
    ours = str(_exported(checkpoint, run.work / name, size))
    packages = {"strict": ("strict-fp16", ours), "typed": ("as-typed", ours)}
    if naive:
        packages["naive"] = naive_policy, str(_naive(checkpoint, run.work / f"naive-{name}.mlpackage", size))
    return packages


def _snr(checkpoint: Path, size: int, packages: dict[str, tuple[str, str]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = call("comparing packages", encoder_steps.snr, checkpoint, size, packages)
    return found


def _graph(run: Run) -> None:
    # Ours has 14 moves: each of six attentions needs two reshapes (the depthwise convolution before it is over the
    # grid, the softmax over the list of positions), and the contract's (1, N, C) a reshape and a transpose.
    for size in SIZES:
        package = _exported(synthetic(run.store), run.work / f"single-{size}", size)
        found = call(f"auditing {size} x {size}", encoder_steps.audited, package)
        run.add(f"findings_{size}", f"audit findings, {size} x {size}", found["findings"], most=0)
        run.add(f"moves_{size}", "  transposes, reshapes and squeezes", sum(found["moves"].values()), below=10)
    naive = _naive(synthetic(run.store), run.work / "naive.mlpackage", SIZES[0])
    for kind, count in call("auditing the plain trace", encoder_steps.audited, naive)["moves"].items():
        run.add(f"naive_{kind}", f"  plain trace: {kind}s", count)


def _multifunction(run: Run) -> None:
    checkpoint, folder = synthetic(run.store), run.work / "multi"
    singles = {size: str(_exported(checkpoint, run.work / f"single-{size}", size)) for size in SIZES}
    flags = ["--resolutions", *map(str, SIZES), "--image-size", str(SIZES[-1])]
    run_step("exporting every resolution in one package", export("vision", checkpoint, folder, *flags))
    package = folder / PACKAGE
    sizes = call("weighing packages", encoder_steps.package_sizes, [package, singles[SIZES[-1]]])
    run.add("multi_size", "multifunction package / a single one", sizes[0] / sizes[1], "x", most=1.03)
    for size, single in singles.items():
        found = call(f"comparing encode_{size}", encoder_steps.function, checkpoint, package, size, single)
        run.add(f"multi_snr_{size}", f"  encode_{size}: as typed", found["snr"], "dB")
        run.add(f"multi_difference_{size}", "  largest difference to the single package", found["difference"], most=0)


def _palettization(run: Run) -> None:
    found = call("clustering, ours and coremltools'", encoder_steps.palettization, synthetic(run.store))
    seconds, errors = found["seconds"], found["errors"]
    ratios = [ours / theirs if theirs else 1.0 + (ours > 0) for ours, theirs in errors]
    total = sum(ours for ours, _ in errors) / sum(theirs for _, theirs in errors)
    worse = sum(ours > theirs for ours, theirs in errors)
    ratio = seconds["ours"] / seconds["coremltools"]
    run.add("palette_time", f"{RIVAL_FORM}: time, ours / coremltools'", ratio, "x", most=0.1)
    run.add("palette_seconds", "  ours, one core", seconds["ours"], "s")
    run.add("coremltools_seconds", "  coremltools, one core", seconds["coremltools"], "s")
    run.add("palette_tensors", "  tensors", len(errors))
    run.add("palette_error", "  squared error, ours / coremltools', worst tensor", max(ratios), "x", most=1)
    run.add("palette_worse", "  tensors with more error than coremltools'", worse)
    run.add("palette_error_all", "  squared error, ours / coremltools', all tensors", total, "x")
    run.add("scaled_size", "  with a per-channel scale: bytes / fp16's", found["scaled_size"], "x", most=1)
    run.add("scaled_seconds", "  with a per-channel scale: time", seconds["scaled"], "s")


def _compression(run: Run) -> None:
    flags = {form: ("--vision-quant", form) for form in FORMS}
    flags |= {f"min-snr-{least}": ("--min-snr", str(least)) for least in MIN_SNR}
    folders = {name: run.work / f"demo-{name}" for name in flags}
    for name, folder in folders.items():
        run_step(f"demo encoder, {name}", export("vision", DEMO, folder, *flags[name]))
    paths = {name: str(folder) for name, folder in folders.items()}
    encoders = call(f"asking {QUESTIONS} demo questions of each", encoder_steps.curve, DEMO, QUESTIONS, paths)
    for name, found in encoders.items():
        run.add(f"demo_bytes_{name}", f"demo encoder, {name}", found["bytes"] / 1e6, "MB")
        run.add(f"demo_snr_{name}", "  as typed", found["snr"], "dB")
        label = f"  same answer as PyTorch, {QUESTIONS} questions"
        run.add(f"demo_agreement_{name}", label, found["agreement"])
    real = _exported(synthetic(run.store), run.work / "real-compressed", SIZES[0], "--vision-quant", RIVAL_FORM)
    sizes = call("sizes on the real shape", encoder_steps.sizes, synthetic(run.store), real)
    for form, size in sizes["weight_bytes"].items():
        run.add(f"real_bytes_{form}", f"real encoder's weights, {form}", size / 1e6, "MB")
    off = abs(sizes["written"] / sizes["predicted"] - 1)
    run.add("real_written", f"  {RIVAL_FORM}: |weight.bin / predicted - 1|", off, most=0.01)
    title = f"Compressed encoder of the demo checkpoint, {QUESTIONS} questions, MIL executor as typed"
    write_plot(encoders, run.store / CURVE, title)
    log(f"curve: {run.store / CURVE}")


def _exported(checkpoint: Path, folder: Path, size: int, *flags: str) -> Path:
    """The package of an encoder exported for pictures of this size, if this run has not made it yet."""
    if not folder.is_dir():
        command = export("vision", checkpoint, folder, "--image-size", str(size), *flags)
        run_step(f"exporting {folder.name}", command)
    return folder / PACKAGE


def _naive(checkpoint: Path, target: Path, size: int) -> Path:
    """The package that a plain script makes."""
    call(f"a plain script's {target.stem}", steps.plain_export, checkpoint, target, size)
    return target


SUITE = suite.Suite(
    "encoder",
    {
        "ranges": _ranges,
        "gelu": _gelus,
        "graph": _graph,
        "multifunction": _multifunction,
        "palettization": _palettization,
        "compression": _compression,
    },
)
