"""The compute plan's process: what it prints is read, and nothing that it does can end the audit."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastvlm.common.errors import UserError
from model_export.audit import compute_plan

PACKAGE = Path("any.mlpackage")
ENGINE, CPU = "neural engine", "cpu"
CONV = {"function": "main", "operation": "a", "type": "ios17.conv", "supported": [CPU, ENGINE], "preferred": ENGINE}
TOPK = {"function": "main", "operation": "b", "type": "ios17.topk", "supported": [CPU], "preferred": CPU}
PLAN = [CONV | {"cost": 0.75}, TOPK | {"cost": 0.25}]


def read(code: str, timeout: float = 30.0) -> dict[str, Any]:
    """`compute_plan.read` on a Mac whose process runs this Python code instead."""
    command = [sys.executable, "-S", "-c", code]
    return compute_plan.read(PACKAGE, platform="darwin", command=command, timeout=timeout)


def test_a_plan_is_the_last_line_of_the_process() -> None:
    plan = read(f"print('chatter of a library'); print({json.dumps({'operations': PLAN})!r})")
    assert plan == {"status": "read", "operations": PLAN, "devices": {"cpu": 1, "neural engine": 1}}
    text = compute_plan.lines(plan)
    assert text[0] == "compute plan: 2 operations: 1 on cpu, 1 on neural engine"
    assert text[1:] == ["  main: b (ios17.topk) on cpu, could be on cpu, cost 25.00%"]


@pytest.mark.parametrize(
    "code, timeout, reason",
    [
        ("import os; os.abort()", 30, "the process was ended by SIGABRT"),
        ("print('{\"operations\": [7]}')", 30, "the process printed no plan"),
        ("import time; time.sleep(60)", 0.5, "the process was stopped after 0 s"),
    ],
    ids=["abort", "wrong", "hang"],
)
def test_a_process_without_a_plan_is_a_failed_plan(code: str, timeout: float, reason: str) -> None:
    plan = read(code, timeout)
    assert plan["status"] == "failed" and reason in plan["reason"]
    (line,) = compute_plan.lines(plan)
    assert line.startswith("compute plan: failed (the process ") and "\n" not in line


def test_off_a_mac_it_is_skipped_and_says_what_it_would_establish() -> None:
    plan = compute_plan.read(PACKAGE, platform="linux", command=["/no/such/program"])
    (line,) = compute_plan.lines(plan)
    assert plan["status"] == "skipped"
    assert line.startswith("compute plan: skipped (needs macOS): it would say for each operation which of the CPU")


class MLNeuralEngineComputeDevice: ...


class MLCPUComputeDevice: ...


class MLFutureComputeDevice: ...


class FakePlan:
    """Stands in for coremltools' MLComputePlan: two functions, a constant that is placed nowhere, an unknown cost."""

    def __init__(self) -> None:
        def operation(name: str, type: str) -> SimpleNamespace:
            return SimpleNamespace(operator_name=type, outputs=[SimpleNamespace(name=name)], blocks=[], inputs={})

        def function(*operations: SimpleNamespace) -> SimpleNamespace:
            return SimpleNamespace(block=SimpleNamespace(operations=list(operations)))

        functions = {
            "main": function(operation("w", "const"), operation("y", "ios17.conv")),
            "small": function(operation("z", "ios17.topk")),
        }
        self.model_structure = SimpleNamespace(program=SimpleNamespace(functions=functions))

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        if operation.operator_name == "const":
            return None
        engine, cpu = MLNeuralEngineComputeDevice(), MLCPUComputeDevice()
        chosen = engine if "conv" in operation.operator_name else MLFutureComputeDevice()
        return SimpleNamespace(preferred_compute_device=chosen, supported_compute_devices=[engine, cpu])

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        return SimpleNamespace(weight=0.5) if "conv" in operation.operator_name else None


def test_operations_of_a_plan() -> None:
    conv, topk = compute_plan.operations_of(FakePlan())
    assert conv == CONV | {"operation": "y", "cost": 0.5}
    assert (topk["function"], topk["preferred"], topk["cost"]) == ("small", "MLFutureComputeDevice", None)
    assert compute_plan.operations_of(FakePlan(), "small") == [topk]


def test_a_plan_without_the_function_or_a_program() -> None:
    with pytest.raises(UserError, match="has the functions main, small, not large"):
        compute_plan.operations_of(FakePlan(), "large")
    plan = FakePlan()
    plan.model_structure.program = None  # type: ignore[assignment]
    with pytest.raises(UserError, match="no ML program"):
        compute_plan.operations_of(plan)


@pytest.mark.skipif(sys.platform == "darwin", reason="says what happens elsewhere")
def test_the_process_starts_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = compute_plan.read(PACKAGE, "main", platform="darwin")
    assert plan["reason"] == "a compute plan needs macOS"


@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS: reads Core ML's own plan of the tiny package")
def test_the_real_plan_of_the_tiny_package(tiny_artefact: Path) -> None:
    plan = compute_plan.read(tiny_artefact / "fastvithd.mlpackage")
    assert plan["status"] == "read" and plan["operations"], plan
