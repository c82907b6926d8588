"""`benchmarks encoder` on tiny checkpoints: its sections as they run for real, and each step's negative control."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as benchmarks_main
from benchmarks.suites import encoder, encoder_steps, steps, suite
from fastvlm.common import cli, threads
from fastvlm.common.children import Finished
from fastvlm.common.errors import CheckFailed
from model_export import __main__ as model_export_main
from model_export.contract import PACKAGE
from model_export.encoder import compress

Export = Callable[..., Path]


def in_process(command: Sequence[str], say: Callable[[str], None] = print) -> Finished:
    """Run a step's command here, which spares the imports of a process of its own."""
    python, dash, module, *arguments = command
    assert (python, dash) == (sys.executable, "-m")
    if module == "model_export":
        return Finished(cli.run(model_export_main.build_parser, arguments), 1.0, 1, "")
    table = {"benchmarks.suites.steps": steps.STEPS, "benchmarks.suites.encoder_steps": encoder_steps.STEPS}[module]
    return Finished(0, 1.0, 1, json.dumps(table[arguments[0]](*arguments[1:])) + "\n")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_fast_vlm: Path) -> Path:
    """The suite over the tiny checkpoint at 64 and 128 pixels; the store."""
    monkeypatch.setattr(suite.children, "run", in_process)
    monkeypatch.setattr(encoder, "synthetic", lambda store: tiny_fast_vlm)
    monkeypatch.setattr(encoder, "SIZES", (64, 128))
    monkeypatch.setattr(encoder, "PEAKS", ("3e5",))
    monkeypatch.setattr(encoder, "RANGES", {128: ("3e5", "ordinary")})
    monkeypatch.setattr(encoder, "SHAPE", "tiny")
    (tmp_path / "work").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`export(checkpoint, *flags) -> package`, once for the same arguments."""
    made: dict[tuple[object, ...], Path] = {}

    def run(checkpoint: Path, *flags: str) -> Path:
        if (checkpoint, flags) not in made:
            folder = tmp_path_factory.mktemp("encoder") / "out"
            assert in_process(suite.export("vision", checkpoint, folder, *flags)).returncode == 0
            made[checkpoint, flags] = folder / PACKAGE
        return made[checkpoint, flags]

    return run


@pytest.mark.slow
def test_hot_streams_and_the_ordinary_one(tiny):
    figures = encoder._ranges(tiny, tiny / "work")
    assert 3e5 / 1.42 < figures["reached_3e5_128"] < 3e5 * 1.42  # the nearest power of two
    assert figures["strict_3e5_128"] > 45
    assert figures["naive_3e5_128"] < 10  # the negative control of ours: the same streams without a power of two
    assert figures["typed_ordinary_128"] > 50
    assert abs(figures["gain_ordinary_128"]) < 6 and abs(figures["forced_gain_ordinary_128"]) < 6
    assert (tiny / "synthetic-tiny-float32").is_dir()


@pytest.mark.slow
def test_hot_patch_embeddings(tiny, monkeypatch):
    monkeypatch.setattr(encoder, "GELU_PEAKS", ("2.5e5",))
    monkeypatch.setattr(encoder, "GELU_NAIVE", {128: ("2.5e5",)})
    figures = encoder._gelus(tiny, tiny / "work")
    assert figures.keys() <= encoder._gelu_bars().keys()
    at = "2.5e5_128"
    assert figures[f"gelu_reached_{at}"] == pytest.approx(2.5e5, rel=0.02)
    assert figures[f"gelu_float32_{at}"] == 0 and figures[f"gelu_added_{at}"] >= 6
    for kind in ("", "noise_"):
        assert figures[f"{kind}gelu_strict_{at}"] > 45 and figures[f"{kind}gelu_gain_{at}"] > -1
        assert figures[f"{kind}gelu_naive_{at}"] < 15  # the negative control


@pytest.mark.slow
def test_graph_and_functions(tiny):
    figures = encoder._graph(tiny, tiny / "work") | encoder._multifunction(tiny, tiny / "work")
    assert figures["findings_64"] >= 0 and figures["moves_128"] == figures["moves_64"]
    plain = sum(figures[f"naive_{kind}"] for kind in encoder.MOVES)
    assert plain > figures["moves_128"] > 0
    assert figures["multi_difference_64"] == 0 and figures["multi_snr_128"] > 50
    assert figures["multi_size"] > 1


@pytest.mark.slow
def test_another_packages_function_is_not_equal(tiny_fast_vlm, make_checkpoint, export):
    """The negative control: a single package of other weights."""
    multi = export(tiny_fast_vlm, "--resolutions", "64")
    other = export(make_checkpoint(seed=1), "--image-size", "64")
    found = encoder_steps.functions(str(tiny_fast_vlm), str(multi), f"64:{other}")
    assert found["multi_difference_64"] > 0.01
    assert found["multi_snr_64"] > 50  # it is the function that is compared with PyTorch


def test_forced_exponents_are_really_in_the_package(tiny_fast_vlm, export, tmp_path):
    """They change no value beyond rounding, so only the stored weights tell."""
    ours, forced = export(tiny_fast_vlm), tmp_path / "forced.mlpackage"
    encoder_steps.forced_export(str(tiny_fast_vlm), str(forced), "128")
    weights = [(package / "Data/com.apple.CoreML/weights/weight.bin").read_bytes() for package in (ours, forced)]
    assert weights[0] != weights[1]
    found = encoder_steps.snr(str(tiny_fast_vlm), "128", f"a=as-typed:{ours}", f"b=as-typed:{forced}")
    assert found["b"] > found["a"] - 6


def test_snr_sees_another_checkpoint(make_checkpoint, tiny_fast_vlm, export):
    run = f"x=strict-fp16:{export(tiny_fast_vlm)}"
    assert encoder_steps.snr(str(tiny_fast_vlm), "128", run)["x"] > 45
    assert encoder_steps.snr(str(make_checkpoint(seed=1)), "128", run)["x"] < 10


def test_palettes_beside_coremltools(tiny_fast_vlm, monkeypatch):
    for name, value in threads.environment(1).items():
        monkeypatch.setenv(name, value)  # which the step sets: undone after the test
    every = compress.weights
    monkeypatch.setattr(
        compress, "weights", lambda encoder: dict(list(every(encoder).items())[-6:])
    )  # a few, for speed
    found = encoder_steps.palettization(str(tiny_fast_vlm))
    assert found["palette_tensors"] > 2 and found["palette_time"] > 0
    assert 0.5 < found["palette_error"] < 1.01
    assert 0.2 < found["scaled_size"] < 1

    from quantization.coreml import compression
    from quantization.coreml.compression import Compressed
    from quantization.coreml.palettes import Palette

    store = compression.compress

    def worse(weight, form):
        good = store(weight, form).stored
        assert isinstance(good, Palette)
        return Compressed(form, Palette(good.indices, good.lut + np.float16(0.01), good.scale))

    monkeypatch.setattr(compression, "compress", worse)  # the negative control: tables that are off
    assert encoder_steps.palettization(str(tiny_fast_vlm))["palette_error"] > 1.01


@pytest.mark.slow
def test_curve_and_sizes(tiny, tiny_fast_vlm, monkeypatch):
    monkeypatch.setattr(encoder, "DEMO", tiny_fast_vlm)
    monkeypatch.setattr(encoder, "QUESTIONS", 2)
    monkeypatch.setattr(encoder, "MIN_SNR", (20,))
    monkeypatch.setattr(encoder, "_FORMS", ("fp16", "palette4-g16", "int8"))
    monkeypatch.setattr(encoder.suite, "DEMO", tiny_fast_vlm)
    figures = encoder._compression(tiny, tiny / "work")
    assert figures["demo_snr_fp16"] > figures["demo_snr_int8"] > figures["demo_snr_palette4-g16"] > 5
    assert figures["demo_snr_min-snr-20"] > 19
    assert figures["demo_bytes_fp16"] > figures["demo_bytes_int8"] > figures["demo_bytes_palette4-g16"]
    assert figures["demo_agreement_fp16"] == 1
    assert figures["real_bytes_fp16"] > figures["real_bytes_int8"] > figures["real_bytes_palette4"]
    assert (tiny / encoder.CURVE).read_bytes()[:4] == b"\x89PNG"


def test_the_sections_figures_all_have_bars():
    """What has no bar is not reported, so a slip in a key would hide a figure."""
    assert {f"{kind}_{peak}_{size}" for kind in ("strict", "typed", "reached") for peak in encoder.PEAKS
            for size in encoder.RANGES} <= set(encoder.SUITE.bars)  # fmt: skip
    assert {f"demo_snr_{form}" for form in encoder._FORMS} <= set(encoder.SUITE.bars)
    for key in ("findings_512", "moves_512", "multi_difference_1024", "palette_error", "real_written", "scaled_size"):
        assert encoder.SUITE.bars[key].bound is not None


def test_a_figure_without_a_bar_is_a_fault(tmp_path):
    odd = suite.Suite("odd", {}, {"only": lambda store, work: {"unknown": 1.0}})
    args = benchmarks_main.build_parser().parse_args(["encoder", "--section", "graph", "--work-dir", str(tmp_path)])
    args.section, args.json = ["only"], True
    with pytest.raises(KeyError, match="unknown"):
        suite.run(odd, args)


@pytest.mark.parametrize(("value", "code"), [(0.0, 0), (3.0, 1)])
def test_a_missed_bar_is_exit_1(tmp_path, monkeypatch, capsys, value, code):
    made = suite.Suite("encoder", {"x": suite.Bar("x", "<=", 1, "")}, {"graph": lambda store, work: {"x": value}})
    monkeypatch.setattr(encoder, "SUITE", made)
    argv = ["encoder", "--work-dir", str(tmp_path), "--json"]
    assert cli.run(benchmarks_main.build_parser, argv) == code
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["figures"]["x"]["value"] == value and document["passed"] is (code == 0)


def test_a_step_that_fails_stops_the_section():
    command = [sys.executable, "-c", "import sys; sys.exit(7)"]
    with pytest.raises(CheckFailed, match="exit 7"):
        suite.run_step("failing", command)
    assert suite.run_step("failing", command, check=False).returncode == 7
