"""The Mac-only check: skipped with a reason elsewhere; its judgement, on stand-ins for Core ML."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvlm.cli import run
from model_export import contract, mac, mil
from model_export.__main__ import build_parser


def test_elsewhere_it_says_why_it_was_skipped_and_what_it_would_establish(
    tiny_artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if sys.platform == "darwin":
        pytest.skip("this is a Mac: the check itself runs")
    assert run(build_parser, ["mac", "--model", str(tiny_artefact), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == len(mac.ESTABLISHES) and all("skipped (Core ML runs on macOS only" in line for line in lines)
    assert json.loads(last)["status"] == "skipped"
    assert run(build_parser, ["mac", "--model", str(tiny_artefact / "no.mlpackage")]) == 2


def test_agreement_is_judged(tiny_artefact: Path) -> None:
    package = tiny_artefact / contract.PACKAGE
    program, executor = mil.read_package(package), mil.load(package)

    def predict(function: str, unit: str, pixels: np.ndarray) -> np.ndarray:
        features = executor.predict({contract.INPUT: pixels})[contract.OUTPUT]
        if unit == "CPU_AND_GPU":
            raise RuntimeError("no such device\nmore")
        return features * 1.2 if unit == "CPU_AND_NE" else features

    found = {check["unit"]: check for check in mac.compare(package, program, predict)}
    assert found["CPU_ONLY"]["passed"] and found["CPU_ONLY"]["snr_db"] > 45
    assert found["CPU_AND_GPU"]["fault"] == "does not load or run (no such device)"
    assert not found["CPU_AND_NE"]["passed"] and found["CPU_AND_NE"]["snr_db"] < 20
    nan = mac.compare(package, program, lambda *_: np.full((1, 4, 256), np.nan, np.float32))
    assert [check["fault"] for check in nan] == ["gives NaN or infinity"] * 3


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
def test_core_ml_agrees_with_the_executor(tiny_artefact: Path) -> None:
    assert run(build_parser, ["mac", "--model", str(tiny_artefact)]) == 0
