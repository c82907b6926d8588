"""`python -m app_bridge card | publish`: a model card of an artefact, and both as a hub's repository."""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app_bridge import licence
from app_bridge.publishing import card, checks, publish
from app_bridge.publishing.hub import MAIN, Contents, Hub
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.common.staging import write_file
from model_export import artefact as exported
from quantization.catalogue import human

# A part of git's rules (git check-ref-format), without characters that an address would need to quote.
_BRANCH = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|\Z)))\w(?:[\w./-]*[\w-])?", re.ASCII)


def add_parsers(verbs: Any) -> None:
    """Add the verbs `card` and `publish`."""
    text = "write a model card with the parity, quality and size figures of an artefact"
    parser = verbs.add_parser("card", description=text)
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="what `python -m model_export all` wrote")
    add("--output", type=Output(), metavar="FILE", help="where it goes (default: stdout)")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--quality", type=Path, metavar="FILE", help="the JSON that `python -m quantization evaluate --json` printed")
    add("--base-model", metavar="ORG/NAME", help="the hub repository of the checkpoint (the export does not know it)")
    add("--repo", metavar="ORG/NAME", help="where it will be published (for its title and the download command)")
    parser.set_defaults(run=run_card)
    text = "upload an artefact with its card to a hub's repository, in one commit (a dry run, unless --upload is given)"
    parser = verbs.add_parser("publish", description=text)
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="what `python -m model_export all` wrote")
    add("--repo", required=True, metavar="ORG/NAME", help="the repository; it is made if it isn't there")
    add("--private", action="store_true", help="make it a private one")
    add("--revision", default=MAIN, metavar="BRANCH", help="the branch; it is made if it isn't there (default: main)")
    add("--card", type=Path, metavar="FILE", help="a card from `app_bridge card --output`, perhaps edited")
    add("--upload", action="store_true", help="do it; without, only say what would be done")
    parser.set_defaults(run=run_publish)


def run_card(args: argparse.Namespace) -> dict[str, Any]:
    """Write the card of an artefact that is as it was exported. UserError with everything that is wrong."""
    _print_utf8()
    faults = [
        fault for name in (args.base_model, args.repo) if name is not None for fault in checks.repository_faults(name)
    ]
    if args.output is not None and (fault := _output_fault(args.output, args.overwrite)):
        faults.append(f"--output {args.output}: {fault}")
    if faults:
        raise UserError("; ".join(faults))
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
    """Check the artefact and the repository, say or do the rest. UserError; CheckFailed when the listing is wrong."""
    _print_utf8()
    if not _BRANCH.fullmatch(args.revision):
        raise UserError(f"--revision: got {args.revision!r}, expected the name of a branch")
    files, text = publish.prepare(args.artefact, args.repo, args.card)
    licence.log_research_term(args.artefact)
    hub = Hub(args.repo, args.revision, args.debug)
    if args.upload and not hub.token:
        raise UserError(f"{hub.endpoint} wants a token to write: `hf auth login`, or set HF_TOKEN")
    before, unknown = _contents(hub, args.upload)
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
        effort = f"{human(sent)} in {time.monotonic() - began:.0f} s" if sent else "nothing to do"
        document["said"] = f"{url}: {len(files)} files, as the manifest has them ({effort})"
        if not args.json:
            print(document["said"])
    return document


def _contents(hub: Hub, needed: bool) -> tuple[Contents | None, str | None]:
    """The repository's contents, and why they are not known, where they need not be."""
    try:
        with progress(f"ask {hub.endpoint}"):
            return hub.contents(), None
    except UserError as error:
        if needed:
            raise
        return None, str(error)


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The plan for people: the card, the files, the terms, how to do it."""
    files = document["files"]
    if document["dry_run"]:
        yield f"{'-' * 20} {card.FILE} {'-' * 20}\n{document['card']}{'-' * 51}"
    yield f"{document['endpoint']}/{document['repository']} ({document['revision']}):"
    yield from (f"{file['status']:>8}  {human(file['size']):>9}  {file['name']}" for file in files)
    yield from (f" deleted{'':13}{name}" for name in document["deleted"])
    if document["unknown"]:
        yield f"what it has is not known: {document['unknown']}"
    elif not document["exists"]:
        yield "it will be made: there is none, or the token may not see it"
    new = [file["size"] for file in files if file["status"] != "same"]
    yield f"{len(new)} of {len(files)} files, {human(sum(new))} of {human(sum(file['size'] for file in files))}"
    yield f"licence: {document['licence']}" + (": for research only" if document["research_only"] else "")
    if document["dry_run"]:
        token = "" if document["token"] else ", after `hf auth login` or with HF_TOKEN"
        yield f"nothing was sent; for real: the same command with --upload{token}"


def _output_fault(output: Path, overwrite: bool) -> str | None:
    """Why a card can't be written there."""
    if output.is_dir():
        return "is a folder: expected the name of a file"
    if not output.parent.is_dir():
        return f"no such folder: {output.parent}: expected one that exists"
    if os.path.lexists(output) and not overwrite:
        return "exists, perhaps with changes of yours: choose another, or replace it with --overwrite"
    return None


def _print_utf8() -> None:
    """From here on, print in UTF-8 whatever the locale, as a card's file is."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
