"""`fastvlm card | publish`: a model card of an artefact, and both as a hub's repository."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app_bridge import licence
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.common.staging import write_file
from fastvlm.common.units import format_bytes
from model_export import artefact as exported


def add_parsers(verbs: Any) -> None:
    """Add the verbs `card` and `publish`."""
    text = "Write a model card with the parity, quality and size figures of an artefact."
    parser = verbs.add_parser("card", description=text)
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="an artefact of `fastvlm export`")
    add("--output", type=Output(file=True), metavar="FILE", help="the card's file (default: stdout)")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--quality", type=Path, metavar="FILE", help="the JSON that `fastvlm evaluate --json` printed")
    text = "the hub repository of the checkpoint (the export does not know it)"
    add("--base-model", type=_repository, metavar="ORG/NAME", help=text)
    text = "the repository that it will be in (for its title and the download command)"
    add("--repo", type=_repository, metavar="ORG/NAME", help=text)
    parser.check(_output_faults)
    parser.set_defaults(run=run_card)
    text = "Upload an artefact with its card to a hub's repository, in one commit (a dry run unless --upload is given)."
    parser = verbs.add_parser("publish", description=text)
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="an artefact of `fastvlm export`")
    text = "the repository, created if it doesn't exist"
    add("--repo", type=_repository, required=True, metavar="ORG/NAME", help=text)
    add("--private", action="store_true", help="create the repository as private")
    add("--revision", default="main", metavar="BRANCH", help="the branch, created if it doesn't exist (default: main)")
    add("--card", type=Path, metavar="FILE", help="a card from `fastvlm card --output`, perhaps edited")
    add("--upload", action="store_true", help="upload; without it, only print the plan")
    parser.set_defaults(run=run_publish)


def run_card(args: argparse.Namespace) -> dict[str, Any]:
    """Write the card of an artefact that is as it was exported; UserError with all of its faults."""
    from app_bridge.publishing import card, checks  # huggingface_hub, Jinja2

    _print_utf8()
    manifest = exported.read_manifest(args.artefact)
    quality = card.read_quality(args.quality, manifest) if args.quality else None
    if faults := checks.artefact_faults(args.artefact, manifest):
        raise UserError("; ".join(faults))
    licence.log_research_term(args.artefact)
    text = card.make(args.artefact, manifest, args.repo, quality, args.base_model)
    for finding in licence.check(args.artefact, manifest):
        log(f"it can't be published: {finding.line()}")
    if args.output is not None:
        write_file(args.output, text.encode())
        print(f"{args.output}: {len(text.encode())} bytes")
    elif not args.json:
        print(text, end="")
    return {"output": str(args.output) if args.output else None, "card": text}


def run_publish(args: argparse.Namespace) -> dict[str, Any]:
    """Check the artefact and the repository; print the plan or carry it out. CheckFailed when the listing is wrong."""
    from app_bridge.publishing import publish  # huggingface_hub, Jinja2
    from app_bridge.publishing.hub import Hub

    _print_utf8()
    files, text = publish.prepare(args.artefact, args.repo, args.card)
    licence.log_research_term(args.artefact)
    hub = Hub(args.repo, args.revision, args.debug)
    if args.upload and not hub.token:
        raise UserError(f"{hub.endpoint} wants a token to write: `hf auth login`, or set HF_TOKEN")
    before, unknown = None, None
    try:
        with progress(f"ask {hub.endpoint}"):
            before = hub.contents()
    except UserError as error:
        if args.upload:
            raise
        unknown = str(error)
    if before is not None:
        publish.check_repository(hub, files, before, args.private)
    document = publish.changes(hub, files, before) | {
        "dry_run": not args.upload,
        "unknown": unknown,
        "exists": None if unknown else before is not None,
        "token": bool(hub.token),
        "licence": licence.licence_file(args.artefact),
        "research_only": licence.research_only(args.artefact),
        "card": text,
    }
    if not args.json:
        print("\n".join(_lines(document)))
    if args.upload:
        began = time.monotonic()
        document |= publish.upload(hub, files, before or hub.create(args.private))
        url, sent = f"{hub.endpoint}/{hub.name}/tree/{document['commit']}", document["sent"]
        effort = f"{format_bytes(sent)} in {time.monotonic() - began:.0f} s" if sent else "nothing to do"
        document["said"] = f"{url}: {len(files)} files, as the manifest has them ({effort})"
        if not args.json:
            print(document["said"])
    return document


def _repository(text: str) -> str:
    """The argparse type of a hub's ORG/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if text.count("/") != 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected ORG/NAME, a user or an organization and a name")
    return text


def _output_faults(args: argparse.Namespace) -> Iterator[str]:
    """Yield a fault where a card can't be written to its path."""
    if args.output and not args.output.parent.is_dir():
        yield f"--output {args.output}: no such folder: {args.output.parent}: expected one that exists"
    elif args.output and os.path.lexists(args.output) and not args.overwrite:
        yield f"--output {args.output}: exists, perhaps with changes of yours: choose another, or use --overwrite"


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The plan for people: the card, the files, the terms, how to do it."""
    files = document["files"]
    if document["dry_run"]:
        yield f"{'-' * 20} README.md {'-' * 20}\n{document['card']}{'-' * 51}"
    yield f"{document['endpoint']}/{document['repository']} ({document['revision']}):"
    yield from (f"{file['status']:>8}  {format_bytes(file['size']):>9}  {file['name']}" for file in files)
    yield from (f" deleted{'':13}{name}" for name in document["deleted"])
    if document["unknown"]:
        yield f"what it has is not known: {document['unknown']}"
    elif not document["exists"]:
        yield "it will be made: there is none, or the token may not see it"
    new, total = [file["size"] for file in files if file["status"] != "same"], sum(file["size"] for file in files)
    yield f"{len(new)} of {len(files)} files, {format_bytes(sum(new))} of {format_bytes(total)}"
    yield f"licence: {document['licence']}" + (": for research only" if document["research_only"] else "")
    if document["dry_run"]:
        token = "" if document["token"] else ", after `hf auth login` or with HF_TOKEN"
        yield f"nothing was sent; for real: the same command with --upload{token}"


def _print_utf8() -> None:
    """Switch stdout to UTF-8, whatever the locale, as a card's file is."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
