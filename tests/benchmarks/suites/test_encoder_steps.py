"""encoder.json on tiny checkpoints, its commands as they run for real, and each step's negative control."""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import checks
from benchmarks.suites import encoder_steps, step, suite
from fastvlm.common import cli, threads
from fastvlm.common.children import Finished
from model_export import __main__ as model_export_main
from model_export.encoder import compress
from quantization.coreml import compression, palettes

pytestmark = pytest.mark.slow
EACH = {"size": ["128"], "form": ["int8"], "ratio": []}  # one hot checkpoint of a kind; no search, which takes long
WORDS = {
    "256 512 768 1024": "64 128", r"\b(256|1024)\b": "128", "encoder {size}": "tiny {size}", "limit 200": "limit 2",
    "3e4 3e5 3e6": "3e5", "13e3 56e3 25e4 2e6": "25e4", "shape=encoder": "shape=tiny",
    "shape=0.5b dtype=float16": "shape=tiny dtype=float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tiny_fast_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    """The values of all figures, and the folder of what they were measured on."""
    rows = []
    for row in json.loads(suite.table("encoder").read_text()):
        for place, values in row.get("each", {}).items():
            row["each"][place] = EACH.get(place, ["3e5" if "3e5" in values else "25e4"])
            if len(values) == 4 and place == "size":
                row["each"][place] = ["64", "128"]
        if "7.5 GB" not in row["title"] and row["name"] not in [one["name"] for one in rows]:
            rows.append(row)
    text = json.dumps(rows)
    for words, tiny in WORDS.items():
        text, count = re.subn(words, tiny, text)
        assert count, words
    folder = tmp_path_factory.mktemp("suite")
    (folder / "table.json").write_text(text)
    places = {"demo": str(tiny_fast_vlm), "store": str(folder), "work": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite.children, "run", in_process)
        for name, value in threads.environment(1).items():
            patch.setenv(name, value)  # which a step sets: undone after it
        weights = compress.weights
        patch.setattr(compress, "weights", lambda encoder: dict([*weights(encoder).items()][-6:]))
        figures = suite.measure(checks.load(folder / "table.json"), places)
    return {key: -math.inf if one["value"] is None else one["value"] for key, one in figures.items()}, folder


@pytest.fixture
def figures(measured: tuple[dict[str, float], Path]) -> dict[str, float]:
    return measured[0]


def in_process(command: Sequence[str], say: Callable[[str], None] = print) -> Finished:
    """Run a step's command here, which spares the imports of a process of its own."""
    python, dash, module, *words = command
    assert (python, dash) == (sys.executable, "-m")
    if module == "benchmarks.suites.step":
        return Finished(0, 1.0, 1, json.dumps(step.run(*words), default=str))
    with redirect_stdout(StringIO()) as out:
        code = cli.run(model_export_main.build_parser, words)
    return Finished(code, 1.0, 1, out.getvalue())


def test_hot_streams_and_the_ordinary_one(figures):
    assert 3e5 / 1.42 < figures["reached_3e5_128"] < 3e5 * 1.42  # the nearest power of two
    assert figures["strict_3e5_128"] > 45
    assert figures["naive_3e5_128"] < 10  # the negative control of ours: the same streams without a power of two
    assert figures["typed_ordinary_128"] > 50
    assert abs(figures["forced_gain_ordinary_128"]) < 6 and abs(figures["gain_ordinary_256"]) < 6


def test_hot_patch_embeddings(figures):
    at = "25e4_128"
    assert figures[f"gelu_reached_{at}"] == pytest.approx(2.5e5, rel=0.02)
    assert figures[f"gelu_float32_{at}"] == 0 and figures[f"gelu_added_{at}"] >= 6
    for kind in ("", "noise_"):
        assert figures[f"{kind}gelu_strict_{at}"] > 45 and figures[f"{kind}gelu_gain_{at}"] > -1
        assert figures[f"{kind}gelu_naive_{at}"] < 15  # the negative control


def test_graph_and_functions(figures):
    assert figures["findings_64"] >= 0 and figures["moves_128"] == figures["moves_64"]
    plain = sum(figures[f"naive_{kind}"] for kind in ("transpose", "reshape", "squeeze"))
    assert plain > figures["moves_128"] > 0
    assert figures["multi_difference_64"] == 0 and figures["multi_snr_128"] > 50
    assert figures["multi_size"] > 1


def test_compressed_encoders(figures):
    assert figures["demo_snr_int8"] > 10
    assert figures["demo_agreement_int8"] in (0, 0.5, 1) and figures["demo_bytes_int8"] > 1000
    assert figures["real_share_int8"] < 0.6 and 1 <= figures["real_written_int8"] < 1.2
    assert 0.5 < figures["palette_error"] < 1.01 and figures["palette_time"] > 0 and 0.2 < figures["scaled_size"] < 1


def test_no_figure_is_missing(figures):
    assert [key for key, value in figures.items() if value == -math.inf and "naive" not in key] == []


def test_steps_see_what_is_not_the_same(measured, make_checkpoint, tmp_path):
    """The negative controls: other weights, and exponents, which change no value beyond rounding."""
    folder, other = measured[1], str(make_checkpoint(seed=1))
    weights = "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert (folder / "forced-128" / weights).read_bytes() != (folder / "ordinary-128" / weights).read_bytes()
    single = f"{folder}/single-128/fastvithd.mlpackage"
    assert encoder_steps.snr(other, "128", x=f"strict-fp16:{single}")["picture"]["x"] < 10
    command = ["vision", "--checkpoint", other, "--output-dir", str(tmp_path / "out"), "--image-size", "64"]
    assert in_process([sys.executable, "-m", "model_export", *command]).returncode == 0
    multi = f"{folder}/multi/fastvithd.mlpackage"
    compared = encoder_steps.function(f"{folder}/synthetic-0.5b", multi, "64", f"{tmp_path}/out/fastvithd.mlpackage")
    assert compared["difference"] > 0.01 and compared["snr"] > 50  # it is the function that is compared with PyTorch


def test_palettes_that_are_off_are_seen(tiny_fast_vlm, monkeypatch):
    every, store = compress.weights, compression.compress

    def worse(weight: np.ndarray, form: Any) -> compression.Compressed:
        good: Any = store(weight, form).stored
        return compression.Compressed(form, palettes.Palette(good.indices, good.lut + np.float16(0.01), good.scale))

    for name, value in threads.environment(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compress, "weights", lambda encoder: dict([*every(encoder).items()][-4:]))
    monkeypatch.setattr(compression, "compress", worse)
    assert encoder_steps.palettization(str(tiny_fast_vlm))["worst"] > 1.01
