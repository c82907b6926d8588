"""The measuring of processes, the bars and their table, and the sections of `benchmarks export`."""

import math

import psutil
import pytest

from benchmarks import environment
from benchmarks.suites import export, steps, suite
from fastvlm.common.children import Finished


@pytest.mark.parametrize(
    ("key", "value", "passed"),
    [
        ("executor_float32_ratio", 0.69, True),
        ("executor_float32_ratio", 0.71, False),
        ("snr_typed", 49.9, False),
        ("answers_int4", 0.1, None),
        ("snr_typed", float("nan"), False),
    ],
)
def test_bars(key, value, passed):
    assert suite.judge(export.BARS[key], value)["passed"] is passed


@pytest.mark.parametrize(
    ("value", "passed"), [(9.9, True), (10.0, False), (float("-inf"), True), (float("inf"), False)]
)
def test_a_bar_from_below(value, passed):
    found = suite.judge(suite.Bar("naive", "<", 10, "dB"), value)
    assert found["passed"] is passed
    assert found["value"] == (value if math.isfinite(value) else None)  # JSON has no infinity


def test_a_figure_just_beyond_its_bar_does_not_look_as_if_on_it():
    assert suite.judge(suite.Bar("error", "<=", 1, "x"), 1.00025)["value"] == 1.00025
    assert suite.judge(suite.Bar("error", "<=", 2, "x"), 1.00025)["value"] == 1.0


def test_every_section_reports_bars_and_every_step_exists(tmp_path, monkeypatch):
    made = []

    def run(description, command, check=True):
        made.append(command)
        if command[2] == "benchmarks.suites.steps":
            assert command[3] in steps.STEPS
        if "--output-dir" in command:
            (export.Path(command[command.index("--output-dir") + 1]) / "x.mlpackage").mkdir(parents=True)
        return Finished(0, 2.0, 10**9, "{}\n")

    monkeypatch.setattr(export, "run_step", run)
    monkeypatch.setattr(suite, "run_step", run)
    figures = {}
    for section in export.SUITE.sections.values():
        figures |= section(tmp_path, tmp_path / "work")
    assert set(figures) <= set(export.BARS)
    assert figures["encoder_peak_ratio"] == 1.0
    assert sum("--quant" in command for command in made) == 6


def test_busy_processes_end_with_the_block():
    before, loads = set(psutil.Process().children()), set()
    with pytest.raises(ZeroDivisionError), export.busy(2):
        loads = set(psutil.Process().children()) - before
        1 / 0  # noqa: B018
    assert len(loads) == 2 and not any(load.is_running() for load in loads)


def test_the_table(capsys):
    figures = {
        key: suite.judge(export.BARS[key], 0.8)
        for key in ("executor_float32_ratio", "executor_typed_ratio", "answers_int4")
    }
    figures["broken"] = suite.judge(suite.Bar("broken", ">=", 1, "dB"), float("-inf"))
    machine = {"environment": environment.describe(), "load_before": environment.load()}
    suite.print_table("export", {"figures": figures, **machine})
    printed = capsys.readouterr().out
    assert "not finite" in printed
    assert "≤ 0.7" in printed and "✓" in printed and "✗" in printed
    assert environment.describe()["cpu"] in printed


def test_environment_is_stable_and_names_the_versions():
    first = environment.describe()
    assert first == environment.describe()
    assert {"torch", "coremltools", "numpy", "transformers"} <= set(first["packages"])
    assert first["cores"] >= 1 and first["memory_gib"] > 0
    assert "1min" not in first
