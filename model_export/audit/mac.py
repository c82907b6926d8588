"""`fastvlm mac`: what only a Mac can say of a package; elsewhere, why that was skipped."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm.common.cli import log, one_line, progress
from fastvlm.common.errors import UserError
from model_export import contract
from model_export.config import COMPUTE_UNITS, COREAI_UNITS, INTERPRETER
from model_export.coreai.contract import METADATA
from model_export.encoder.coreml import coremltools

if TYPE_CHECKING:
    from model_export import mil

# The pessimist's float16 (`strict-fp16`) keeps 45 dB of the graph in float32 on checkpoints that need rescaling: an
# engine that does worse computes something else.
LEAST_SNR_DB = 40.0
MOST_SNR_DB = 300.0  # stands for "equal": JSON has no infinity
ESTABLISHES = {
    "load": "that Core ML compiles the package, and each of its functions loads on each compute unit",
    "finite": "that no value overflows in the device's own arithmetic, on the Neural Engine above all",
    "agreement": f"that each compute unit gives the features of the saved program: {LEAST_SNR_DB:g} dB or more against"
    " the executor in float32; compressed weights are decoded on the way",
}
ESTABLISHES_COREAI = {
    "load": "that the compilers for the GPU and the Neural Engine take the three programs",
    "agreement": f"that each unit gives the interpreter's image embeddings and logits: {LEAST_SNR_DB:g} dB or more",
    "speed": "how long a call takes on each unit, and which delegates the runtime logs",
}
Predict = Callable[[str, str, np.ndarray], np.ndarray]  # function, compute unit, pixels -> features


def add_mac(verbs: Any) -> None:
    """Add the verb `mac` to the sub-parsers of model_export."""
    text = "Run a package in Core ML on every compute unit, against the executor (macOS; elsewhere it says why not)."
    parser = verbs.add_parser("mac", description=text)
    parser.add_argument(
        "--model", required=True, type=Path, metavar="PATH", help="an artefact, an .mlpackage, or a Core AI bundle"
    )
    parser.add_argument(
        "--units",
        nargs="+",
        choices=(*COMPUTE_UNITS, *COREAI_UNITS[1:-1]),
        metavar="UNIT",
        help=f"compute units: {', '.join(COMPUTE_UNITS)}, of a bundle {', '.join(COREAI_UNITS[1:])} (default: all, one"
        " after the other; Core ML can crash the process: to get the other results anyway, run each unit on its own)",
    )
    parser.set_defaults(run=run_mac)


def run_mac(args: argparse.Namespace) -> dict[str, Any]:
    """Print each check with its outcome; the document's "passed" makes the exit code (a skip is no failure)."""
    from model_export import mil

    if (args.model / METADATA).is_file():  # a Core AI bundle
        return _run_bundle(args.model, args.units or COREAI_UNITS)
    package = args.model if args.model.suffix == ".mlpackage" else args.model / contract.PACKAGE
    try:
        program = mil.read_package(package)
    except mil.MILError as error:
        raise UserError(str(error)) from error
    if sys.platform != "darwin":
        for name, text in ESTABLISHES.items():
            print(f"{name}: skipped (Core ML runs on macOS only, this is {sys.platform}); it would establish {text}")
        return {"package": str(package), "status": "skipped", "checks": [], "establishes": ESTABLISHES}
    checks = compare(package, program, _coreml(package), args.units or COMPUTE_UNITS)
    for check in checks:
        outcome = check["fault"] or f"{check['snr_db']:.1f} dB against the executor"
        print(f"{'ok' if check['passed'] else 'FAILED'}: {check['function']} on {check['unit']}: {outcome}")
    return {
        "package": str(package),
        "status": "run",
        "checks": checks,
        "establishes": ESTABLISHES,
        "passed": all(check["passed"] for check in checks),
    }


def _run_bundle(bundle: Path, units: Sequence[str]) -> dict[str, Any]:
    """As `run_mac`, for a Core AI bundle: its programs on the compute units of macOS 27 against the interpreter."""
    from model_export.coreai.process import has_system_runtime
    from model_export.coreai.units import compare as compare_bundle

    if not has_system_runtime():
        for name, text in ESTABLISHES_COREAI.items():
            print(f"{name}: skipped (only macOS 27 has Core AI's compute units); it would establish {text}")
        return {"bundle": str(bundle), "status": "skipped", "checks": [], "establishes": ESTABLISHES_COREAI}
    wanted = [unit for unit in units if unit != INTERPRETER]
    if unknown := [unit for unit in wanted if unit not in COREAI_UNITS]:
        raise UserError(f"--units {unknown[0]}: a Core AI bundle runs on {', '.join(COREAI_UNITS[1:])}")
    checks = compare_bundle(bundle, wanted, LEAST_SNR_DB)
    for check in checks:
        outcome = (
            check["fault"] or f"{check['snr_db']:.1f} dB against the interpreter, {1000 * check['seconds']:.1f} ms"
        )
        print(f"{'ok' if check['passed'] else 'FAILED'}: {check['function']} on {check['unit']}: {outcome}")
    return {
        "bundle": str(bundle),
        "status": "run",
        "checks": checks,
        "establishes": ESTABLISHES_COREAI,
        "passed": all(check["passed"] for check in checks),
    }


def compare(
    package: Path, program: "mil.Program", predict: Predict, units: Sequence[str] = COMPUTE_UNITS
) -> list[dict[str, Any]]:
    """Each function on each compute unit: {function, unit, snr_db or None, fault or None, passed}."""
    from model_export import mil

    checks = []
    with progress("Core ML (functions x units)", len(program.functions) * len(units)) as advance:
        for function in sorted(program.functions):
            executor = mil.MILExecutor(program, "float32", function)
            shape = [size or 1 for size in executor.inputs[contract.INPUT].shape]
            pixels = np.random.default_rng(0).random(shape, dtype=np.float32)
            expected = executor.predict({contract.INPUT: pixels})[contract.OUTPUT]
            for unit in units:
                outcome = _judge(expected, lambda: predict(function, unit, pixels))  # noqa: B023
                checks.append({"function": function, "unit": unit, **outcome})
                advance()
    return checks


def _judge(expected: np.ndarray, predict: Callable[[], np.ndarray]) -> Mapping[str, Any]:
    from model_export.encoder.sensitivity import decibels, relative_noise

    try:
        actual = predict()
    except Exception as error:  # coremltools raises plain ones, too, for a system that is too old
        return {"snr_db": None, "fault": f"does not load or run ({one_line(error)})", "passed": False}
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        what = "NaN or infinity" if actual.shape == expected.shape else f"shape {actual.shape}, not {expected.shape}"
        return {"snr_db": None, "fault": f"gives {what}", "passed": False}
    snr = min(decibels(relative_noise(expected, actual)), MOST_SNR_DB)
    return {"snr_db": snr, "fault": None, "passed": snr >= LEAST_SNR_DB}


def _coreml(package: Path) -> Predict:
    ct = coremltools()

    def predict(function: str, unit: str, pixels: np.ndarray) -> np.ndarray:
        log(f"Core ML: {function} on {unit}")
        several = {} if function == contract.MAIN else {"function_name": function}
        model = ct.models.MLModel(str(package), compute_units=getattr(ct.ComputeUnit, unit), **several)
        return np.asarray(model.predict({contract.INPUT: pixels})[contract.OUTPUT], dtype=np.float32)

    return predict
