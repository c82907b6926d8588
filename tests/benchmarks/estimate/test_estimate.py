"""The command: ranges, warnings, faults, and that its ranges hold what others measured."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.estimate import estimate
from benchmarks.estimate.devices import devices, facts
from quantization.catalogue import SIZES

DEVICES = sorted(devices())


@pytest.mark.parametrize("shape", tuple(SIZES))
def test_a_range_for_every_device_and_shape(shape: str) -> None:
    for device in DEVICES:
        result = estimate.estimate(shape, device, "int4")
        stages = result["stages"]
        assert result["label"] == "estimate" and list(stages) == ["encode", "project", "prefill"]
        for stage in (*stages.values(), result["total"], result["decode"]):
            assert 0 < stage["low"] < stage["high"] < math.inf
        for edge in ("low", "high"):
            assert result["total"][edge] == pytest.approx(sum(stage[edge] for stage in stages.values()))
        for stage in stages.values():
            assert sum(stage["shares"].values()) == pytest.approx(1)
            assert stage["shares"][stage["dominant"]] == max(stage["shares"].values())
        json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("shape", "resolution", "ms"),
    [("0.5b", 256, 31.7), ("0.5b", 512, 49.9), ("0.5b", 768, 95.8), ("0.5b", 1024, 167), ("1.5b", 768, 152),
     ("1.5b", 1024, 233), ("7b", 768, 446), ("7b", 1024, 641)],
)  # fmt: skip
def test_the_papers_times_lie_in_the_ranges(shape: str, resolution: int, ms: float) -> None:
    """M1 Max, float16, no text: figure 1a and table 6. Though the ranges are for a newer MLX."""
    total = estimate.estimate(shape, "m1-max", "fp16", resolution, 0)["total"]
    assert total["low"] < ms / 1e3 < total["high"]
    assert total["high"] / total["low"] < 1.7  # not by being wide


def test_bytes_are_the_recipes() -> None:
    """int4 in groups of 64: 4.5 bits a weight; a budget is spent; the encoder by its own rules."""
    exact = estimate.estimate("0.5b", "m1", "int4")["bytes"]
    assert exact["layers"] == pytest.approx(357826560 * 4.5 / 8, rel=1e-6)
    assert exact["output"] == pytest.approx(151936 * 896 * 4.5 / 8, rel=1e-6)
    assert estimate.estimate("0.5b", "m1", "fit:400MB")["bytes"]["language"] == pytest.approx(400e6, rel=1e-3)


def test_a_compressed_encoder_has_fewer_bytes_and_is_no_slower(tmp_path: Path) -> None:
    recipe = tmp_path / "small.json"
    recipe.write_text(
        json.dumps(
            {"name": "small", "version": 2, "rules": [
                {"pattern": "vision_encoder.*", "scheme": {"mode": "coreml", "form": "palette4"}},
                {"pattern": "*", "scheme": {"dtype": "float16"}},
            ]}
        )
    )  # fmt: skip
    small, wide = (estimate.estimate("0.5b", "iphone-15-pro", name, 256) for name in (str(recipe), "fp16"))
    assert small["bytes"]["encoder"] < 0.3 * wide["bytes"]["encoder"]
    assert small["stages"]["encode"]["high"] < wide["stages"]["encode"]["high"]


# --- how sure it is


def width(device: str, stage: str, **settings: Any) -> float:
    found = estimate.estimate("0.5b", device, **settings)["stages"][stage]
    return float(found["high"] / found["low"])


def test_ranges_are_the_residuals_and_widen_away_from_the_points() -> None:
    spread = facts("calibration.json")["spread"]
    assert width("m1-max", "encode") == pytest.approx(math.exp(2 * spread["encode"]["seen"]))
    assert width("m1", "encode") == pytest.approx(math.exp(2 * spread["encode"]["unseen"]))
    assert width("m1-max", "encode", resolution=1536) == pytest.approx(math.exp(2 * spread["encode"]["outside"]))
    assert width("iphone-12-pro", "prefill") > width("m1", "prefill") > width("m1-max", "prefill")
    assert width("m1-max", "encode", units="CPU_AND_GPU") == pytest.approx(9)
    assert width("m5", "prefill") > 4 * width("m4", "prefill") * 0.99
    # iPhone 12 has the 12 Pro's A14; an M1 in a tablet isn't one in a Mac, which has a fan
    assert width("iphone-12", "encode") == width("iphone-12-pro", "encode") < width("iphone-13", "encode")
    assert width("ipad-pro-m1", "prefill") > width("m1", "prefill")


@pytest.mark.parametrize(
    ("shape", "device", "settings", "said"),
    [
        ("0.5b", "m1", {}, "encode: extrapolated: no usable published point of a Mac with this chip"),
        ("0.5b", "iphone-16", {}, "prefill: extrapolated: no usable published point of any phone"),
        ("0.5b", "iphone-13", {}, "memory_gbps of the A15 not confirmed by a source"),
        ("0.5b", "m1-max", {"resolution": 1536}, "encode: extrapolated: larger than the published points"),
        ("0.5b", "m1-max", {"prompt": 2048}, "prefill: extrapolated: larger than the published points"),
        ("0.5b", "m1-max", {"units": "CPU_AND_GPU"}, "no published point of the encoder alone on the GPU"),
        ("0.5b", "iphone-17-pro", {}, "matrix units"),
        ("7b", "iphone-12-pro", {}, "don't fit"),
    ],
)
def test_weaknesses_are_said(shape: str, device: str, settings: dict[str, Any], said: str) -> None:
    assert any(said in warning for warning in estimate.estimate(shape, device, **settings)["warnings"])
    assert estimate.estimate("0.5b", "m1-max")["warnings"] == []  # has points, and within their reach


# --- the command line


def test_table_document_and_list(cli: Callable[..., Any]) -> None:
    words = ("estimate", "--shape", "0.5B", "--device", "MacBook Pro M1Max", "--resolution", "512")
    answer = cli(*words)
    assert (answer.code, answer.err) == (0, "")
    assert "estimate: 0.5b fp16 on Mac with M1 Max" in answer.out and "error on points held out" in answer.out
    stages = re.findall(r"^(encode|project|prefill|total|decode)\b.* … ", answer.out, re.MULTILINE)
    assert stages == ["encode", "project", "prefill", "total", "decode"]  # each of them a range
    expected = estimate.estimate("0.5b", "m1-max", "fp16", 512)
    assert cli(*words, "--json").document == json.loads(json.dumps(expected))
    assert all(device in cli("estimate", "--list").out for device in DEVICES)
    assert set(cli("estimate", "--list", "--json").document["devices"]) == set(DEVICES)


SHAPE, DEVICE = ("--shape", "0.5b"), ("--device", "m1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*SHAPE, "--device", "m0"), ["--device: m0: unknown", "expected one of m1, ", "iphone-15-pro"]),
        ((), ["--shape: is missing", "--device: is missing"]),
        (("--shape", "9b", "--device", "x", "--resolution", "100", "--prompt-length", "-1"),
         ["--shape: got 9b", "--device: x", "--resolution: got 100", "--prompt-length: got -1"]),
        ((*SHAPE, *DEVICE, "--resolution", "4096"), ["to 2048"]),
        ((*SHAPE, *DEVICE, "--recipe", "nope"), ["unknown recipe 'nope'"]),
        ((*SHAPE, *DEVICE, "--recipe", "fit"), ["leaves the schemes open"]),
        ((*SHAPE, *DEVICE, "--recipe", "fit:1MB"), ["does not fit"]),
        ((*SHAPE, *DEVICE, "--units", "CPU_ONLY"), ["--units: got CPU_ONLY"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(cli: Callable[..., Any], words: tuple[str, ...], said: list[str]) -> None:
    answer = cli("estimate", *words)
    assert (answer.code, answer.out) == (2, "")
    assert len(answer.err.splitlines()) == 1 and all(word in answer.err for word in said)


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from benchmarks.estimate import estimate; estimate.known_devices(); exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
