"""`fastvlm validate`: the bytes of an artefact checked against the code of the app that will read them."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from app_bridge import licence
from app_bridge.app import packages, resources
from app_bridge.app.differences import differences as differing_lines
from app_bridge.app.engine import EngineFacts, engine
from app_bridge.app.facts import AppFacts, Changed, table
from app_bridge.rules import AGAIN, finding
from app_bridge.rules import table as rules
from app_bridge.validation.check_bundle import check_bundle
from app_bridge.validation.check_config import check_config, check_preprocessor
from app_bridge.validation.check_coreml import check_package
from app_bridge.validation.check_tokenizer import check_tokenizer
from app_bridge.validation.check_weights import check_weights
from app_bridge.validation.subject import Encoder, Subject, listed
from fastvlm.common import findings
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.findings import Finding, Steps, collect
from fastvlm.common.units import counted
from model_export import artefact as exported
from model_export import contract
from quantization.catalogue import LOADERS, Loader

# Facts that decide what an app writes into its prompt, and not whether a model loads and runs in it.
_OF_PROMPT = {"system_prompt", "turn", "turn_separator", "prompt_end"}


def add_parser(verbs: Any) -> None:
    """Add the verb `validate`."""
    text = "Check an artefact against the app's code, before Xcode opens; exit 1 if the app can't run it."
    parser = verbs.add_parser("validate", description=text)
    parser.add_argument("artefact", type=Path, metavar="ARTEFACT")
    parser.add_argument(
        "--app",
        type=Path,
        metavar="FOLDER",
        help="read the app's sources and project in ml-fastvlm/app (default: our table of it)",
    )
    parser.add_argument(
        "--runner",
        type=Path,
        metavar="FOLDER",
        help="of a Core AI bundle: read the engine's sources in a checkout of apple/coreai-models (default: our table)",
    )
    parser.set_defaults(run=run_validate)


def run_validate(args: argparse.Namespace) -> dict[str, Any]:
    """Print every finding, and the differences between the app and our table; the document has "passed"."""
    differences: list[str] = []
    facts, wanted = table(), engine()
    bundle = exported.is_bundle(exported.read(args.artefact))
    if bundle and args.app is not None:
        raise UserError(f"--app: {args.artefact} is a Core AI bundle, which that app can't load: leave it out")
    if args.runner is not None and not bundle:
        raise UserError(f"--runner: {args.artefact} is no Core AI bundle, which that engine loads: leave it out")
    if args.app is not None:
        from app_bridge.app import sources  # tree-sitter

        facts, ours = sources.read(args.app), facts
        differences = differing_lines(facts, ours)
    if args.runner is not None:
        from app_bridge.app import runner  # tree-sitter

        wanted, published = runner.read(args.runner), wanted
        differences = differing_lines(wanted, published)
    subject, problems = _examine(args.artefact, facts, wanted)
    if args.app is not None:
        model = resources.model_path(args.app, facts.model_folder)
        problems = resources.collisions(subject.bundled, model, model.parent) + problems
    document = {
        "passed": not findings.errors(problems),
        "findings": [problem.document() for problem in problems],
        "checked": subject.checked,
        "facts": str(args.app or args.runner or "table"),
        "differences": differences,
    }
    _print(args.artefact, document, problems, "engine" if bundle else "demo app")
    return document


def validate(artefact: Path, facts: AppFacts) -> list[Finding]:
    """Return the findings about an artefact in an app, or about a bundle in Apple's engine as published, errors first;
    none where it will run.

    Raises UserError for a folder that is no artefact at all.
    """
    return _examine(artefact, facts, engine())[1]


@progress("validate")
def _examine(artefact: Path, facts: AppFacts, wanted: EngineFacts) -> tuple[Subject, list[Finding]]:
    """The artefact with the checks that were done, and their findings. `wanted`: by the engine, of a bundle."""
    manifest = exported.read(artefact)
    ours, bundle = exported.is_ours(manifest), exported.is_bundle(manifest)
    bundled = (*((contract.MANIFEST,) if ours else ()), *manifest["files"])  # not what a hub's client put there
    if not bundle and (refused := _refused(manifest)) is not None:
        return Subject(artefact, facts, frozenset(), bundled=bundled, checked=[contract.MANIFEST]), [refused]
    lines = exported.verify_aloud(artefact, manifest) if ours else []
    differing = {name: how for name, _, how in (line.partition(": ") for line in lines)}
    weights = frozenset(map(str, (manifest.get("llm") or {}).get("files") or ()))
    subject = Subject(artefact, facts, frozenset(differing), weights, bundled)
    _, problems = collect(check_bundle(subject, wanted, ours) if bundle else _check_files(subject))
    problems += [] if bundle else resources.check(bundled)
    problems += licence.check(artefact, manifest)
    subject.checked.append("the licence and what goes with it")
    problems += _check_bytes(differing, [error.where for error in findings.errors(problems)])
    if ours:
        subject.checked.append("every file's sha256")
    else:
        unknown = ", ".join(manifest["unknown"])
        problems.append(finding("made-elsewhere", contract.MANIFEST, "no such file", unknown=unknown))
    if not bundle:
        problems += packages.check(facts) if facts.packages else []
        subject.checked.append(f"{len(facts.packages) or 'no known'} Swift packages")
    changed = [_engine_changed(each) for each in wanted.changed] if bundle else map(_changed, facts.changed)
    problems = [*changed, *(_remedied(problem, facts, ours) for problem in problems)]
    return subject, sorted(problems, key=lambda problem: problem.severity != "error")


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
        yield finding("file-missing/resource", resource, "no such file")


def _changed(changed: Changed) -> Finding:
    """The finding about a declaration of the app's that has to be checked by hand."""
    rule = "app-differs/prompt" if {*changed.facts} <= _OF_PROMPT else "app-differs"
    got = f"{changed.what}, which differs from the published app at {changed.where}"
    return finding(rule, changed.where, got, facts=", ".join(changed.facts))


def _engine_changed(changed: Changed) -> Finding:
    got = f"{changed.what}, which differs from the published engine at {changed.where}"
    return finding("engine-differs", changed.where, got, facts=", ".join(changed.facts))


def _remedied(problem: Finding, facts: AppFacts, ours: bool) -> Finding:
    """The finding with another remedy than a new export, where it is the app that differs from the published one, or
    where no export of ours wrote the artefact."""
    remedy = problem.remedy
    if not ours and remedy == AGAIN:
        remedy = "export its checkpoint with `fastvlm export`, or ask who made it"
    fact = rules().get(problem.rule, {}).get("fact")  # of the app, that the rule rests on
    if fact and getattr(facts, fact) != getattr(table(), fact):
        remedy = f"the app differs from the published one ({fact}): change the app, or {remedy}"
    return replace(problem, remedy=remedy)


def _loader(facts: AppFacts) -> Loader:
    """The loader of weights in this app; the newest where no version fits its sources, which is another finding."""
    try:
        return packages.loader(facts)
    except UserError:
        return LOADERS[-1]


def _refused(manifest: dict[str, Any]) -> Finding | None:
    """The one finding about an artefact that isn't for an app at all."""
    parts, language = manifest.get("parts"), manifest.get("llm")
    layout = language.get("layout", "app") if isinstance(language, dict) else "app"
    where = contract.MANIFEST if exported.is_ours(manifest) else "its files"
    if layout != "app":
        return finding("artefact-layout", f"{where}: llm", f"the layout of {layout}")
    if absent := [part for part in ("vision", "llm") if not isinstance(parts, list) or part not in parts]:
        return finding("artefact-partial", f"{where}: parts", f"no {', '.join(absent)}")
    return None


def _check_bytes(differing: dict[str, str], named: list[str]) -> Iterator[Finding]:
    """Files that differ from the manifest, unless an error names the file already: one fault is one finding."""
    extra = []
    for name, how in differing.items():
        file = name if how.startswith("extra") else name.partition("/")[0]
        # config.json isn't tokenizer_config.json
        if any(re.search(rf"(?<![\w.-]){re.escape(file)}(?![\w-])", where) for where in named):
            continue
        if how.startswith("extra"):
            extra.append(name)
        elif how == "missing":
            yield finding("file-missing", name, "no such file")
        elif name == contract.TOKENIZER:
            yield finding("tokenizer-stale/changed", name, how)
        else:
            yield finding("file-changed", name, how)
    if extra:
        yield finding("file-extra", listed(extra), counted(len(extra), "file"))


def _print(artefact: Path, document: dict[str, Any], problems: list[Finding], reader: str) -> None:
    print(f"{artefact} against {f'our table of the {reader}' if document['facts'] == 'table' else document['facts']}")
    findings.show(problems)
    for line in document["checked"]:
        log(f"checked: {line}")
    if document["facts"] != "table":
        for line in document["differences"] or ["none"]:
            print(f"where the {reader.removeprefix('demo ')} differs from our table: {line}")
    print(f"{'passed' if document['passed'] else 'failed'}: {findings.count(problems)}")
