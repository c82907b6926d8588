"""`python -m app_bridge validate`: an artefact against what the app will do with it, from the artefact's bytes."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from app_bridge import licence
from app_bridge.app import packages, resources
from app_bridge.app.facts import AppFacts, Changed, table
from app_bridge.validation.check_config import check_config, check_preprocessor
from app_bridge.validation.check_coreml import check_package
from app_bridge.validation.check_tokenizer import check_tokenizer
from app_bridge.validation.check_weights import check_weights
from app_bridge.validation.subject import AGAIN, Encoder, Subject, error_at, listed, warn_at
from fastvlm.common import findings
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.findings import Finding, Steps, collect
from model_export import artefact as exported
from model_export import contract
from quantization.catalogue import LOADERS, Loader

# Facts that decide what an app writes into its prompt, and not whether a model loads and runs in it.
_OF_PROMPT = {"system_prompt", "turn", "turn_separator", "prompt_end"}
# Rules that an app's own changes can break: what is to be compared with the published app's.
_APPS = {"model-type": "model_type", "processor-class": "processor_class", "key-missing": "config"} | dict.fromkeys(
    ("weight-name", "weight-missing", "weight-unknown", "weight-shape"), "layers"
)


def add_parser(verbs: Any) -> None:
    """The verb `validate`."""
    text = "hold an artefact to what the app will do with it, before Xcode opens; exit 1 if the app can't run it"
    parser = verbs.add_parser("validate", description=text)
    parser.add_argument("artefact", type=Path, metavar="ARTEFACT")
    parser.add_argument(
        "--app",
        type=Path,
        metavar="FOLDER",
        help="read the app's sources and project in ml-fastvlm/app (default: our table of it)",
    )
    parser.set_defaults(run=run_validate)


def run_validate(args: argparse.Namespace) -> dict[str, Any]:
    """Print every finding, and the differences between the app and our table; the document has "passed"."""
    differences: list[str] = []
    facts = table()
    if args.app is not None:
        from app_bridge.app import sources  # tree-sitter

        facts, ours = sources.read(args.app), facts
        differences = sources.differences(facts, ours)
    subject, found = _examine(args.artefact, facts)
    if args.app is not None:
        model = resources.model_path(args.app, facts.model_folder)
        found = resources.collisions(subject.bundled, model, model.parent) + found
    document = {
        "passed": not findings.errors(found),
        "findings": [finding.document() for finding in found],
        "checked": subject.checked,
        "facts": str(args.app) if args.app is not None else "table",
        "differences": differences,
    }
    _print(args.artefact, document, found)
    return document


def validate(artefact: Path, facts: AppFacts) -> list[Finding]:
    """Everything that the app would trip over, errors first; empty when nothing is wrong.

    UserError for a folder that is no artefact at all.
    """
    return _examine(artefact, facts)[1]


@progress("validate")
def _examine(artefact: Path, facts: AppFacts) -> tuple[Subject, list[Finding]]:
    """What was compared, and everything that is wrong."""
    manifest = exported.read(artefact)
    ours = exported.is_ours(manifest)
    bundled = (*((contract.MANIFEST,) if ours else ()), *manifest["files"])  # not what a hub's client put there
    if (refused := _refused(manifest)) is not None:
        return Subject(artefact, facts, frozenset(), bundled=bundled, checked=[contract.MANIFEST]), [refused]
    differing = _differing(artefact, manifest) if ours else {}
    weights = frozenset(map(str, (manifest.get("llm") or {}).get("files") or ()))
    subject = Subject(artefact, facts, frozenset(differing), weights, bundled)
    _, found = collect(_check_files(subject))
    found += resources.check(bundled)
    found += licence.check(artefact, manifest)
    subject.checked.append("the licence and what goes with it")
    found += _check_bytes(differing, [finding.where for finding in findings.errors(found)])
    if ours:
        subject.checked.append("every file's sha256")
    else:
        expected = f"what an export records: not known are {', '.join(manifest['unknown'])}"
        remedy = "trust who made it, or export the checkpoint yourself"
        found.append(warn_at("made-elsewhere", contract.MANIFEST, "no such file", expected, remedy))
    found += packages.check(facts) if facts.packages else []
    number = len(facts.packages)
    subject.checked.append(f"{number} Swift packages" if number else "Swift packages: not known of this app")
    found = [*map(_changed, facts.changed), *(_remedied(finding, facts, ours) for finding in found)]
    return subject, sorted(found, key=lambda finding: finding.severity != "error")


def _check_files(subject: Subject) -> Steps[None]:
    """The files that the app reads, each with what the others say of it."""
    config = yield from check_config(subject)
    encoder = yield from check_package(subject)
    yield from check_preprocessor(subject, encoder, config)
    encoder = encoder or Encoder()
    rows = yield from check_weights(subject, config, encoder.channels, _loader(subject.facts))
    yield from check_tokenizer(subject, config, rows, encoder.tokens)
    resource = subject.facts.bundle_resource
    if resource != contract.CONFIG and not (subject.folder / resource).is_file():
        expected = "the resource by which the app finds its model"
        yield error_at("file-missing", resource, "no such file", expected)


def _changed(changed: Changed) -> Finding:
    """A declaration of the app's that has to be read by somebody: of the prompt, for what the answers are worth."""
    at = warn_at if {*changed.facts} <= _OF_PROMPT else error_at
    got = f"{changed.what}, which differs from the published app at {changed.where}"
    expected = f"the published declaration, on which {', '.join(changed.facts)} rest"
    return at("app-differs", changed.where, got, expected, "check by hand what the app makes of the model there")


def _remedied(finding: Finding, facts: AppFacts, ours: bool) -> Finding:
    """With another remedy than a new export where it is the app that differs from the published one, and for what no
    export of ours wrote."""
    if not ours and finding.remedy == AGAIN:
        finding = replace(finding, remedy="export its checkpoint with `model_export all`, or ask who made it")
    fact = _APPS.get(finding.rule)
    if fact is None or getattr(facts, fact) == getattr(table(), fact):
        return finding
    return replace(
        finding, remedy=f"the app differs from the published one ({fact}): change the app, or {finding.remedy}"
    )


def _loader(facts: AppFacts) -> Loader:
    """What reads the weights in this app; the newest where no version fits its sources, which is another finding."""
    try:
        return packages.loader(facts)
    except UserError:
        return LOADERS[-1]


def _refused(manifest: dict[str, Any]) -> Finding | None:
    """The one finding about an artefact that isn't for an app at all."""
    parts, language = manifest.get("parts"), manifest.get("llm")
    layout = language.get("layout", "app") if isinstance(language, dict) else "app"
    where = f"{contract.MANIFEST}: " if exported.is_ours(manifest) else "its files: "
    if layout != "app":
        got = f"the layout of {layout}"
        return Finding("artefact-layout", f"{where}llm", got, "the app's", "export with --layout app")
    if absent := [part for part in ("vision", "llm") if not isinstance(parts, list) or part not in parts]:
        got = f"no {', '.join(absent)}"
        return Finding("artefact-partial", f"{where}parts", got, "both halves", "export with `all`")
    return None


def _differing(artefact: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Name -> how the file differs from the manifest."""
    lines = exported.verify_aloud(artefact, manifest)
    return {name: what for name, _, what in (line.partition(": ") for line in lines)}


def _check_bytes(differing: dict[str, str], named: list[str]) -> Iterator[Finding]:
    """Files that differ from the manifest, unless an error names the file already: one fault is one finding."""
    extra = []
    for name, what in differing.items():
        file = name if what.startswith("extra") else name.partition("/")[0]
        # config.json isn't tokenizer_config.json
        if any(re.search(rf"(?<![\w.-]){re.escape(file)}(?![\w-])", where) for where in named):
            continue
        if what.startswith("extra"):
            extra.append(name)
        elif what == "missing":
            yield error_at("file-missing", name, "no such file", "what the export wrote")
        elif name == contract.TOKENIZER:
            remedy = "take it from the model's own export"
            yield error_at("tokenizer-stale", name, what, "the tokenizer that the export wrote", remedy)
        else:
            yield error_at("file-changed", name, what, "what the export wrote, and proved")
    if extra:
        expected = "only what the export wrote"
        yield warn_at("file-extra", listed(extra), f"{len(extra)} files", expected, "move them away")


def _print(artefact: Path, document: dict[str, Any], found: list[Finding]) -> None:
    print(f"{artefact} against {'our table of the demo app' if document['facts'] == 'table' else document['facts']}")
    findings.show(found)
    for line in document["checked"]:
        log(f"checked: {line}")
    if document["facts"] != "table":
        for line in document["differences"] or ["none"]:
            print(f"where the app differs from our table: {line}")
    print(f"{'passed' if document['passed'] else 'failed'}: {findings.count(found)}")
