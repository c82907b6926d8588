"""`audit`: an encoder's package against the rules for the Neural Engine."""

import argparse
from pathlib import Path
from typing import Any

from fastvlm.common.cli import progress
from model_export import contract


def add_audit(verbs: Any) -> None:
    """Add `audit`."""
    text = "Check an .mlpackage for the Neural Engine: findings with remedies, operations, costs."
    parser = verbs.add_parser("audit", description=text)
    parser.add_argument("package", type=Path, metavar="PACKAGE", help="an .mlpackage, or an artefact with one")
    parser.add_argument("--function", metavar="NAME", help="only this function (default: all)")
    parser.set_defaults(run=run_audit)


def run_audit(args: argparse.Namespace) -> dict[str, Any]:
    """Print the audit and the compute plan; the document's "passed" makes the exit code."""
    inside = args.package / contract.PACKAGE
    package = inside if inside.exists() else args.package
    with progress(f"audit {package}"):
        from model_export.audit import audit, compute_plan

        document = audit.audit(package, args.function)
        document["compute_plan"] = compute_plan.read(package, args.function)
    print("\n".join(audit.lines(document)))
    return document
