"""The devices that Core ML would use: MLComputePlan of a package, read in a process of its own, on a Mac.

`python -m model_export.audit.compute_plan PACKAGE [FUNCTION]` compiles the package and prints one JSON line. It is a
process of its own because the framework ends the whole process, uncatchable, where it should raise (coremltools #2757,
#2758).
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvlm.common import children
from fastvlm.common.errors import CheckFailed, UserError
from model_export.encoder.coreml import coremltools

ESTABLISHES = (
    "for each operation which of the CPU, the GPU and the Neural Engine could run it, which one the system would"
    " choose, and its share of the estimated cost"
)
TIMEOUT = 900.0  # seconds; compiling for the Neural Engine takes minutes for a large model
_DEVICES = {
    "MLNeuralEngineComputeDevice": "neural engine",
    "MLGPUComputeDevice": "gpu",
    "MLCPUComputeDevice": "cpu",
}


def read(
    package: Path,
    function: str | None = None,
    *,
    platform: str = sys.platform,
    command: Sequence[str] | None = None,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """The plan as {"status": "read", "operations": [...], "devices": {...}}; never raises for what the process does.

    Off macOS {"status": "skipped", "reason", "would_say"}; when the process crashed, hung or said nothing {"status":
    "failed", "reason"}. `command` stands in for the process in tests.
    """
    if platform != "darwin":
        return {"status": "skipped", "reason": "needs macOS", "would_say": ESTABLISHES}
    if command is None:
        command = [sys.executable, "-m", "model_export.audit.compute_plan", str(package.resolve())]
        command += [function] if function else []
    try:
        operations = children.run(command, timeout=timeout).document("the process")["operations"]
        devices = Counter(str(operation["preferred"]) for operation in operations)
    except (UserError, CheckFailed) as error:
        return {"status": "failed", "reason": str(error)}
    except (KeyError, TypeError):
        return {"status": "failed", "reason": "the process printed no plan"}
    if not operations:
        return {"status": "failed", "reason": "it places no operation"}
    return {"status": "read", "operations": operations, "devices": dict(sorted(devices.items()))}


def operations_of(plan: Any, function: str | None = None) -> list[dict[str, Any]]:
    """A `MLComputePlan`'s operations, of one function or of all: name of the first output, type, devices, cost share.

    Constants, which the plan places nowhere, are left out. Raises UserError for a model without a program or without
    that function.
    """
    program = plan.model_structure.program
    if program is None:
        raise UserError("the compute plan holds no ML program")
    if function is not None and function not in program.functions:
        raise UserError(f"the compute plan has the functions {', '.join(program.functions)}, not {function}")
    placed = []
    for name, item in program.functions.items():
        for operation in item.block.operations if function in (None, name) else ():
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            if usage is None:
                continue
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            placed.append(
                {
                    "function": name,
                    "operation": operation.outputs[0].name if operation.outputs else "",
                    "type": operation.operator_name,
                    "supported": sorted(map(_device, usage.supported_compute_devices)),
                    "preferred": _device(usage.preferred_compute_device),
                    "cost": None if cost is None else float(cost.weight),
                }
            )
    return placed


def _device(device: Any) -> str:
    return _DEVICES.get(type(device).__name__, type(device).__name__)


def lines(plan: dict[str, Any]) -> list[str]:
    """A plan from `read` as text: how many operations where, then each that is not on the Neural Engine."""
    if plan["status"] != "read":
        otherwise = f": it would say {plan['would_say']}" if "would_say" in plan else ""
        return [f"compute plan: {plan['status']} ({plan['reason']}){otherwise}"]
    placed = ", ".join(f"{count} on {device}" for device, count in plan["devices"].items())
    text = [f"compute plan: {len(plan['operations'])} operations: {placed or 'none placed'}"]
    for operation in plan["operations"]:
        if operation["preferred"] != "neural engine":
            cost = "unknown" if operation["cost"] is None else f"{operation['cost']:.2%}"
            where = f"on {operation['preferred']}, could be on {', '.join(operation['supported'])}"
            name = f"{operation['function']}: {operation['operation']} ({operation['type']})"
            text.append(f"  {name} {where}, cost {cost}")
    return text


def compiled_plan(package: str, function: str | None = None) -> dict[str, Any]:
    """Compile a package and read its plan for the CPU and the Neural Engine. macOS only."""
    if sys.platform != "darwin":
        raise UserError("a compute plan needs macOS")
    ct = coremltools()
    from coremltools.models.compute_plan import MLComputePlan

    with tempfile.TemporaryDirectory() as folder:
        compiled = ct.utils.compile_model(package, str(Path(folder) / "model.mlmodelc"))
        plan = MLComputePlan.load_from_path(str(compiled), compute_units=ct.ComputeUnit.CPU_AND_NE)
        return {"operations": operations_of(plan, function)}


if __name__ == "__main__":
    sys.exit(children.answer(lambda: compiled_plan(*sys.argv[1:])))
