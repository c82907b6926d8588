"""The command: ranges, warnings, faults, and that its ranges hold what others measured."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.__main__ import build_parser
from benchmarks.estimate import estimate
from benchmarks.estimate.devices import devices, facts
from fastvlm.common import cli

DEVICES = sorted(devices())


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(build_parser, ["estimate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", estimate.SHAPE_NAMES)
def test_a_range_for_every_device_and_shape(device: str, shape: str) -> None:
    result = estimate.estimate(shape, device, "int4")
    assert result["label"] == "estimate"
    stages = result["stages"]
    assert list(stages) == ["encode", "project", "prefill"]
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


@settings(max_examples=30)
@given(
    st.sampled_from(estimate.SHAPE_NAMES), st.sampled_from(DEVICES), st.integers(1, 15), st.integers(0, 500),
    st.integers(1, 500),
)  # fmt: skip
def test_more_picture_and_more_prompt_take_longer(shape: str, device: str, side: int, prompt: int, more: int) -> None:
    def total(sides: int, length: int) -> dict[str, Any]:
        found: dict[str, Any] = estimate.estimate(shape, device, "fp16", 64 * sides, length)["total"]
        return found

    here = total(side, prompt)
    for other in (total(side + 1, prompt), total(side, prompt + more)):
        assert other["low"] >= here["low"] * (1 - 1e-12)
        assert other["high"] >= here["high"] * (1 - 1e-12)


def test_smaller_weights_decode_faster_and_larger_models_slower() -> None:
    def decode(shape: str, recipe: str) -> float:
        return float(estimate.estimate(shape, "m4-max", recipe)["decode"]["low"])

    assert decode("7b", "int4") > decode("7b", "int8") > decode("7b", "fp16")
    assert decode("0.5b", "int4") > decode("1.5b", "int4") > decode("7b", "int4")


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


@pytest.mark.parametrize(
    ("device", "settings", "said"),
    [
        ("m1", {}, "encode: extrapolated: no usable published point of a Mac with this chip"),
        ("iphone-16", {}, "prefill: extrapolated: no usable published point of any phone"),
        ("iphone-13", {}, "memory_gbps of the A15 not confirmed by a source"),
        ("m1-max", {"resolution": 1536}, "encode: extrapolated: larger than the published points"),
        ("m1-max", {"prompt": 2048}, "prefill: extrapolated: larger than the published points"),
        ("m1-max", {"units": "CPU_AND_GPU"}, "no published point of the encoder alone on the GPU"),
        ("iphone-17-pro", {}, "matrix units"),
    ],
)
def test_weaknesses_are_said(device: str, settings: dict[str, Any], said: str) -> None:
    assert any(said in warning for warning in estimate.estimate("0.5b", device, **settings)["warnings"])


def test_the_same_chip_in_another_phone_is_no_extrapolation() -> None:
    """iPhone 12 has the 12 Pro's A14; an M1 in a tablet isn't one in a Mac, which has a fan."""
    assert width("iphone-12", "encode") == width("iphone-12-pro", "encode") < width("iphone-13", "encode")
    assert width("ipad-pro-m1", "prefill") > width("m1", "prefill")


def test_a_device_with_points_within_their_reach_has_no_warning() -> None:
    assert estimate.estimate("0.5b", "m1-max")["warnings"] == []


def test_what_does_not_fit_is_said() -> None:
    assert any("don't fit" in warning for warning in estimate.estimate("7b", "iphone-12-pro", "fp16")["warnings"])
    assert not any("don't fit" in warning for warning in estimate.estimate("0.5b", "iphone-12-pro")["warnings"])


# --- the command line


def test_table_and_document(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, "--shape", "0.5b", "--device", "m1-max", "--resolution", "512")
    assert (code, err) == (0, "")
    assert "estimate: 0.5b fp16 on Mac with M1 Max" in out and "error on points held out" in out
    stages = re.findall(r"^(encode|project|prefill|total|decode)\b.* … ", out, re.MULTILINE)
    assert stages == ["encode", "project", "prefill", "total", "decode"]  # each of them a range
    code, out, _ = answer(capsys, "--shape", "0.5b", "--device", "m1-max", "--resolution", "512", "--json")
    assert json.loads(out.splitlines()[-1]) == json.loads(json.dumps(estimate.estimate("0.5b", "m1-max", "fp16", 512)))


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "--list")
    assert code == 0 and all(device in out for device in DEVICES)
    assert set(json.loads(answer(capsys, "--list", "--json")[1].splitlines()[-1])["devices"]) == set(DEVICES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "0.5b", "--device", "m0"], ["--device m0: unknown; expected one of m1, ", "iphone-15-pro"]),
        (["--device", "m1"], ["--shape is missing"]),
        (["--shape", "0.5b"], ["--device is missing"]),
        (["--shape", "9b", "--device", "x", "--resolution", "100", "--prompt-length", "-1"],
         ["--shape 9b", "--device x", "--resolution 100", "--prompt-length -1"]),
        (["--shape", "0.5b", "--device", "m1", "--resolution", "0"], ["--resolution 0: expected a multiple of 64"]),
        (["--shape", "0.5b", "--device", "m1", "--resolution", "4096"], ["to 2048"]),
        (["--shape", "0.5b", "--device", "m1", "--recipe", "nope"], ["unknown recipe 'nope'"]),
        (["--shape", "0.5b", "--device", "m1", "--recipe", "fit"], ["leaves the schemes open"]),
        (["--shape", "0.5b", "--device", "m1", "--recipe", "fit:1MB"], ["does not fit"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]) -> None:
    code, out, err = answer(capsys, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and all(word in err for word in said)


def test_units_that_nobody_measured_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = answer(capsys, "--shape", "0.5b", "--device", "m1", "--units", "CPU_ONLY")
    assert code == 2 and "CPU_ONLY" in err


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from benchmarks.estimate import command; command.known_devices(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
