"""`benchmarks encoder` on tiny checkpoints: its sections as they run for real, and each step's negative control."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.suites import encoder, encoder_steps, step, suite
from fastvlm.common import cli, threads
from fastvlm.common.children import Finished
from model_export import __main__ as model_export_main
from model_export.contract import PACKAGE
from model_export.encoder import compress

pytestmark = pytest.mark.slow

Export = Callable[..., Path]


def in_process(command: Sequence[str], say: Callable[[str], None] = print) -> Finished:
    """Run a step's command here, which spares the imports of a process of its own."""
    python, dash, module, *arguments = command
    assert (python, dash) == (sys.executable, "-m")
    if module == "model_export":
        return Finished(cli.run(model_export_main.build_parser, arguments), 1.0, 1, "")
    assert module == "benchmarks.suites.step"
    return Finished(0, 1.0, 1, json.dumps({"result": step.run(*arguments)}))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, run: suite.Run, tiny_fast_vlm: Path) -> Callable[..., dict[str, float]]:
    """`tiny(section, ...)`: the figures' values of sections over the tiny checkpoint at 64 and 128 pixels."""
    monkeypatch.setattr(suite.children, "run", in_process)
    monkeypatch.setattr(encoder, "synthetic", lambda store: tiny_fast_vlm)
    for name, value in (("SIZES", (64, 128)), ("PEAKS", ("3e5",)), ("RANGES", {128: ("3e5", "ordinary")}),
                        ("SHAPE", "tiny")):  # fmt: skip
        monkeypatch.setattr(encoder, name, value)

    def figures(*sections: suite.Section) -> dict[str, float]:
        for section in sections:
            section(run)
        return {key: -math.inf if figure["value"] is None else figure["value"] for key, figure in run.figures.items()}

    return figures


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
def test_hot_streams_and_the_ordinary_one(tiny, tmp_path):
    figures = tiny(encoder._ranges)
    assert 3e5 / 1.42 < figures["reached_3e5_128"] < 3e5 * 1.42  # the nearest power of two
    assert figures["strict_3e5_128"] > 45
    assert figures["naive_3e5_128"] < 10  # the negative control of ours: the same streams without a power of two
    assert figures["typed_ordinary_128"] > 50
    assert abs(figures["gain_ordinary_128"]) < 6 and abs(figures["forced_gain_ordinary_128"]) < 6
    assert (tmp_path / "synthetic-tiny-float32").is_dir()


@pytest.mark.slow
def test_hot_patch_embeddings(tiny, monkeypatch):
    monkeypatch.setattr(encoder, "GELU_PEAKS", ("2.5e5",))
    monkeypatch.setattr(encoder, "GELU_NAIVE", {128: ("2.5e5",)})
    figures = tiny(encoder._gelus)
    at = "2.5e5_128"
    assert figures[f"gelu_reached_{at}"] == pytest.approx(2.5e5, rel=0.02)
    assert figures[f"gelu_float32_{at}"] == 0 and figures[f"gelu_added_{at}"] >= 6
    for kind in ("", "noise_"):
        assert figures[f"{kind}gelu_strict_{at}"] > 45 and figures[f"{kind}gelu_gain_{at}"] > -1
        assert figures[f"{kind}gelu_naive_{at}"] < 15  # the negative control


@pytest.mark.slow
def test_graph_and_functions(tiny):
    figures = tiny(encoder._graph, encoder._multifunction)
    assert figures["findings_64"] >= 0 and figures["moves_128"] == figures["moves_64"]
    plain = sum(figures[f"naive_{kind}"] for kind in ("transpose", "reshape", "squeeze"))
    assert plain > figures["moves_128"] > 0
    assert figures["multi_difference_64"] == 0 and figures["multi_snr_128"] > 50
    assert figures["multi_size"] > 1


@pytest.mark.slow
def test_another_packages_function_is_not_equal(tiny_fast_vlm, make_checkpoint, export):
    """The negative control: a single package of other weights."""
    multi = export(tiny_fast_vlm, "--resolutions", "64")
    other = export(make_checkpoint(seed=1), "--image-size", "64")
    found = encoder_steps.function(str(tiny_fast_vlm), str(multi), 64, str(other))
    assert found["difference"] > 0.01
    assert found["snr"] > 50  # it is the function that is compared with PyTorch


def test_forced_exponents_are_really_in_the_package(tiny_fast_vlm, export, tmp_path):
    """They change no value beyond rounding, so only the stored weights tell."""
    ours, forced = export(tiny_fast_vlm), tmp_path / "forced.mlpackage"
    encoder_steps.forced_export(str(tiny_fast_vlm), str(forced), 128)
    weights = [(package / "Data/com.apple.CoreML/weights/weight.bin").read_bytes() for package in (ours, forced)]
    assert weights[0] != weights[1]
    runs = {"ours": ("as-typed", str(ours)), "forced": ("as-typed", str(forced))}
    found = encoder_steps.snr(str(tiny_fast_vlm), 128, runs)[""]
    assert found["forced"] > found["ours"] - 6


def test_snr_sees_another_checkpoint(make_checkpoint, tiny_fast_vlm, export):
    runs = {"x": ("strict-fp16", str(export(tiny_fast_vlm)))}
    assert encoder_steps.snr(str(tiny_fast_vlm), 128, runs)[""]["x"] > 45
    assert encoder_steps.snr(str(make_checkpoint(seed=1)), 128, runs)[""]["x"] < 10


def test_palettes_beside_coremltools(tiny_fast_vlm, monkeypatch):
    for name, value in threads.environment(1).items():
        monkeypatch.setenv(name, value)  # which the step sets: undone after the test
    every = compress.weights
    monkeypatch.setattr(
        compress, "weights", lambda encoder: dict(list(every(encoder).items())[-6:])
    )  # a few, for speed
    found = encoder_steps.palettization(str(tiny_fast_vlm))
    assert len(found["errors"]) > 2 and min(found["seconds"].values()) > 0 and 0.2 < found["scaled_size"] < 1
    assert 0.5 < max(ours / theirs for ours, theirs in found["errors"]) < 1.01

    from quantization.coreml import compression
    from quantization.coreml.compression import Compressed
    from quantization.coreml.palettes import Palette

    store = compression.compress

    def worse(weight, form):
        good = store(weight, form).stored
        assert isinstance(good, Palette)
        return Compressed(form, Palette(good.indices, good.lut + np.float16(0.01), good.scale))

    monkeypatch.setattr(compression, "compress", worse)  # the negative control: tables that are off
    errors = encoder_steps.palettization(str(tiny_fast_vlm))["errors"]
    assert max(ours / theirs for ours, theirs in errors) > 1.01


@pytest.mark.slow
def test_curve_and_sizes(tiny, tiny_fast_vlm, monkeypatch, tmp_path):
    monkeypatch.setattr(encoder, "DEMO", tiny_fast_vlm)
    monkeypatch.setattr(encoder, "QUESTIONS", 2)
    monkeypatch.setattr(encoder, "MIN_SNR", (20,))
    monkeypatch.setattr(encoder, "FORMS", ("fp16", "palette4-g16", "int8"))
    figures = tiny(encoder._compression)
    assert figures["demo_snr_fp16"] > figures["demo_snr_int8"] > figures["demo_snr_palette4-g16"] > 5
    assert figures["demo_snr_min-snr-20"] > 19
    assert figures["demo_bytes_fp16"] > figures["demo_bytes_int8"] > figures["demo_bytes_palette4-g16"]
    assert figures["demo_agreement_fp16"] == 1
    assert figures["real_bytes_fp16"] > figures["real_bytes_int8"] > figures["real_bytes_palette4"]
    assert (tmp_path / encoder.CURVE).read_bytes()[:4] == b"\x89PNG"
