"""The Mac-only check: skipped with a reason elsewhere; its judgement, on stand-ins for Core ML."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import checks as tables
from benchmarks.mac import check as mac_check
from benchmarks.mac import report
from fastvlm.common.children import Finished
from model_export import contract, mil
from model_export.__main__ import build_parser
from model_export.audit import mac
from model_export.config import COMPUTE_UNITS


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac: the check itself runs")
def test_elsewhere_it_says_why_it_was_skipped_and_what_it_would_establish(cli: Any, tiny_artefact: Path) -> None:
    answer = cli("mac", "--model", tiny_artefact, "--json")
    assert answer.code == 0 and answer.document["status"] == "skipped"
    assert answer.err.count("skipped (Core ML runs on macOS only") == len(mac.ESTABLISHES)
    assert cli("mac", "--model", tiny_artefact / "no.mlpackage").code == 2


@pytest.mark.slow
def test_agreement_is_judged(tiny_artefact: Path) -> None:
    package = tiny_artefact / contract.PACKAGE
    program, executor = mil.read_package(package), mil.load(package)
    exact = mil.MILExecutor(program, "float32", contract.MAIN)

    def predict(function: str, unit: str, pixels: np.ndarray) -> np.ndarray:
        if unit == "ALL":
            return exact.predict({contract.INPUT: pixels})[contract.OUTPUT]
        features = executor.predict({contract.INPUT: pixels})[contract.OUTPUT]
        if unit == "CPU_AND_GPU":
            raise Exception("{\n    reason = no such device;\n}")  # as coremltools words a framework's error
        return features * 1.2 if unit == "CPU_AND_NE" else features

    checks = {check["unit"]: check for check in mac.compare(package, program, predict)}
    assert checks["ALL"]["passed"] and json.loads(json.dumps(checks, allow_nan=False)) == checks  # equal features
    assert checks["CPU_ONLY"]["passed"] and checks["CPU_ONLY"]["snr_db"] > 45
    assert checks["CPU_AND_GPU"]["fault"] == "does not load or run ({; reason = no such device;; })"
    assert not checks["CPU_AND_NE"]["passed"] and checks["CPU_AND_NE"]["snr_db"] < 20
    nan = mac.compare(package, program, lambda *_: np.full((1, 4, 256), np.nan, np.float32))
    assert [check["fault"] for check in nan] == ["gives NaN or infinity"] * len(COMPUTE_UNITS)


@pytest.mark.slow
def test_mac_reports_table_reads_what_mac_and_audit_say(tiny_artefact: Path) -> None:
    """Their own documents, with a stand-in for Core ML, hold its requirements; each spoilt once does not."""
    package = tiny_artefact / contract.PACKAGE
    program, executor = mil.read_package(package), mil.load(package)
    known = {one.name: one for one in tables.load(report.TABLE)}

    def fault(name: str, document: dict) -> str | None:
        return mac_check.judge(known[name], mac_check.Outcome(Finished(0, 1.0, 0, ""), document))

    checks = mac.compare(
        package, program, lambda *a: executor.predict({contract.INPUT: a[2]})[contract.OUTPUT], ["ALL"]
    )
    good = {"status": "run", "checks": checks, "passed": True}
    assert fault("coreml-ALL", good) is None
    for bad in ({"checks": []}, {"checks": [{**checks[0], "passed": False}]}, {"status": "skipped"}):
        assert str(next(iter(bad))) in str(fault("coreml-ALL", good | bad))
    args = build_parser().parse_args(["audit", str(package)])
    audited = args.run(args) | {"compute_plan": {"status": "read", "operations": [{}], "devices": {"neural engine": 1}}}
    assert fault("placement", audited) is None
    assert "compute_plan.status" in str(fault("placement", audited | {"compute_plan": {"status": "failed"}}))


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
def test_core_ml_agrees_with_the_executor(cli: Any, tiny_artefact: Path) -> None:
    assert cli("mac", "--model", tiny_artefact).code == 0
