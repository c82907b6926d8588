"""The bars and their table, and the sections of `benchmarks export`."""

import json
import math
import operator
import sys

import psutil
import pytest

from benchmarks import environment
from benchmarks.__main__ import build_parser
from benchmarks.suites import encoder, export, suite
from fastvlm.common import cli
from fastvlm.common.errors import CheckFailed


@pytest.mark.parametrize(
    ("value", "bar", "passed", "shown"),
    [
        (0.69, {"most": 0.7}, True, 0.69),
        (0.71, {"most": 0.7}, False, 0.71),
        (49.9, {"least": 50}, False, 49.9),
        (0.1, {}, None, 0.1),
        (math.nan, {"least": 50}, False, None),
        (9.9, {"below": 10}, True, 9.9),
        (10.0, {"below": 10}, False, 10.0),
        (-math.inf, {"below": 10}, True, None),  # JSON has no infinity
        (1.00025, {"most": 1}, False, 1.00025),  # just beyond its bar it does not look as if on it
        (1.00025, {"most": 2}, True, 1.0),
    ],
)
def test_bars(run, value, bar, passed, shown):
    run.add("key", "a figure", value, "x", **bar)
    assert (run.figures["key"]["passed"], run.figures["key"]["value"]) == (passed, shown)
    with pytest.raises(KeyError, match="two figures key"):
        run.add("key", "another", 1)


def test_every_section_reports_its_figures(made, run):
    for section in export.SUITE.sections.values():
        section(run)
    assert run.figures["encoder_peak_ratio"]["value"] == 1.0 and run.figures["snr_typed"]["passed"]
    assert sum("--quant" in command for command in made) == 6
    bars = {key for key, figure in run.figures.items() if figure["bound"] is not None}
    assert bars == {
        "demo_seconds", "busy_seconds_ratio", "whole_seconds", "whole_peak", "parity_seconds", "large_peak",
        "encoder_seconds", "encoder_peak", "executor_float32_ratio", "executor_typed_ratio", "snr_typed", "snr_float32",
        "answers_fp16", "answers_int8",
    }  # fmt: skip


def test_a_function_is_called_in_a_process_of_its_own():
    assert suite.call("adding", operator.add, [1], ["two"]) == [1, "two"]
    with pytest.raises(CheckFailed, match="exit 1"):
        suite.call("failing", operator.add, 1, "two")
    assert suite.run_step("failing", [sys.executable, "-c", "import sys; sys.exit(1)"], check=False).returncode == 1
    with pytest.raises(CheckFailed, match="exit 2"):  # a usage error is no measurement
        suite.run_step("misused", [sys.executable, "-c", "import sys; sys.exit(2)"], check=False)


@pytest.mark.parametrize(("value", "code"), [(0.0, 0), (3.0, 1)])
def test_a_missed_bar_is_exit_1(tmp_path, monkeypatch, capsys, value, code):
    made = suite.Suite("encoder", {"graph": lambda run: run.add("x", "x", value, most=1)})
    monkeypatch.setattr(encoder, "SUITE", made)
    argv = ["encoder", "--work-dir", str(tmp_path), "--json"]
    assert cli.run(build_parser, argv) == code
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["figures"]["x"]["value"] == value and document["passed"] is (code == 0)


def test_busy_processes_end_with_the_block():
    before, loads = set(psutil.Process().children()), set()
    with pytest.raises(ZeroDivisionError), export.busy(2):
        loads = set(psutil.Process().children()) - before
        1 / 0  # noqa: B018
    assert len(loads) == 2 and not any(load.is_running() for load in loads)


def test_the_table(run, capsys):
    run.add("ratio", "a ratio", 0.8, "x", most=0.7)
    run.add("other", "another", 0.8, "x", most=1.2)
    run.add("broken", "broken", -math.inf, "dB", least=1)
    machine = {"environment": environment.describe(), "load_before": environment.load()}
    suite.print_document("export", {"figures": run.figures, **machine})
    printed = capsys.readouterr().out
    assert "not finite" in printed and "≤ 0.7" in printed and "✓" in printed and "✗" in printed
    assert environment.describe()["cpu"] in printed


def test_environment_is_stable_and_names_the_versions():
    first = environment.describe()
    assert first == environment.describe()
    assert {"torch", "coremltools", "numpy", "transformers"} <= set(first["packages"])
    assert first["cores"] >= 1 and first["memory_gib"] > 0
    assert "1min" not in first
