"""`inspect` and `verify`: what is in an artefact, and whether it is as it was exported."""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from fastvlm.common.cli import progress
from fastvlm.common.units import format_bytes
from model_export import contract
from model_export.commands import programs


def add_inspect(verbs: Any) -> None:
    """Add `inspect`."""
    parser = verbs.add_parser("inspect", description="Show what is in an artefact or an .mlpackage.")
    parser.add_place("--model", metavar="PATH", help="an artefact, or an .mlpackage", required=False)
    parser.add_argument("--supported", action="store_true", help="show the operations that the executor runs, by opset")
    parser.check(_one_of)
    parser.set_defaults(run=run_inspect)


def _one_of(args: argparse.Namespace) -> list[str]:
    given = args.model is not None
    if given == args.supported:
        return ["PATH: not with --supported" if given else "PATH: is missing"]
    return []


def add_verify(verbs: Any) -> None:
    """Add `verify`."""
    text = "Name every file that changed by a byte, is missing or is extra; exit 1 if there is one."
    parser = verbs.add_parser("verify", description=text)
    parser.add_place("--model", metavar="ARTEFACT", help="an artefact's folder")
    parser.set_defaults(run=run_verify)


def run_inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return what is known of the artefact or package, or of the executor."""
    if args.supported:
        with progress("import coremltools"):
            rows = programs.supported()
        programs.print_supported(rows)
        return {"supported": rows}
    with progress(f"read {args.model}"):
        from model_export import artefact
        from model_export.encoder import package

        if args.model.suffix == ".mlpackage":
            document: dict[str, Any] = {"package": package.describe_package(args.model)}
            document["program"] = programs.describe_program(args.model)
        else:
            document = artefact.read(args.model)
            if not artefact.is_ours(document):
                document = artefact.read_whole(args.model)
                print(f"made elsewhere, no {contract.MANIFEST}; not known: {', '.join(document['unknown'])}")
            artefact.check_complete(args.model, document)
            if (args.model / contract.PACKAGE).exists():
                document["package"] = package.describe_package(args.model / contract.PACKAGE)
    for name, entry in document.get("files", {}).items():
        print(f"{format_bytes(entry['size']):>12}  {name}")
    for key in ("parts", "config", "image"):
        if key in document:
            print(f"{key}: {_flat(document[key])}")
    if adapter := artefact.fine_tuned(document.get("sources", {})):
        print(f"fine-tuned: {adapter}")
    if "vision" in document:
        for line in _vision_lines(document["vision"]):
            print(f"vision: {line}")
    if "llm" in document:
        language = document["llm"]
        stored = f"recipe {language['recipe']['name']}" if "recipe" in language else language["stored_as"]
        decisions = f", {_flat(language['decisions'])}" if "decisions" in language else ""
        print(f"llm: {stored}, {language['bits_per_weight']} bits a weight{decisions}")
    for key, value in document.get("package", {}).items():
        print(f"package {key}: {_flat(value)}")
    if "program" in document:
        programs.print_program(document["program"])
    for line in parity_lines(document.get("parity", {})):
        print(f"parity: {line}")
    return document


def _vision_lines(vision: dict[str, Any]) -> Iterator[str]:
    """The manifest's facts of the encoder, beside those of its package."""
    yield f"{_flat(vision['resolutions'])} pixels, {vision['channels']} channels"
    if fp16 := vision.get("fp16"):
        headroom = fp16["headroom"]
        yield (
            f"{len(fp16['layer_exponents'])} layers carry powers of two,"
            f" {len(fp16['activation_exponents'])} activations are in their scaled form: minimum headroom to 65504"
            f" {headroom['before']['least']}x before, {headroom['after']['least']}x now"
        )
    if small := vision.get("compression"):
        forms = _flat(dict(Counter(small["forms"].values()).most_common()))
        yield (
            f"weights {format_bytes(small['weight_bytes'])} instead of {format_bytes(small['float16_weight_bytes'])}:"
            f" {forms}, float16 {len(small['wide'])}"
        )
    if scaling := vision.get("scaling"):
        yield f"{scaling['operations']} operations added for them, {scaling['byte_share']:.1%} of the bytes moved"


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    """Print a line for each finding; "passed" is False when there is one."""
    from model_export import artefact

    document = artefact.read_manifest(args.model)
    findings = artefact.verify_aloud(args.model, document)
    for finding in findings:
        print(finding)
    verdict = f"{len(findings)} findings" if findings else f"{len(document['files'])} files as they were exported"
    print(f"{args.model}: {verdict}")
    return {"passed": not findings, "findings": findings}


def parity_lines(parity: Mapping[str, Any]) -> list[str]:
    """Return the verdicts that a manifest holds: on the export, and on its recipe."""
    recipe = parity.get("recipe") or {}
    return [line for line in (parity.get("verdict"), recipe.get("sentence")) if line]


def _flat(value: Any) -> str:
    """A dictionary or list on one line, without what is not set."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return " ".join(map(_flat, value)) or "none"
    return str(value)
