"""`python -m app_bridge publish`: an artefact and its card as a hub's repository; a dry run without `--upload`."""

import argparse
import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from app_bridge.publishing import card
from app_bridge.publishing.hub import MAIN, Held, Hub, Upload, client
from app_bridge import licence
from fastvlm.common.cli import add_common, progress
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.files import read_small, read_text
from model_export import artefact as exported
from model_export import contract
from quantization.catalogue import human

# What a loader takes for a part of a model beside the package: an earlier artefact's are deleted, anybody else's are a
# reason to refuse.
_OF_A_MODEL = (
    "*.safetensors", "*.safetensors.index.json", "*.jinja", "tokenizer*", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "generation_config.json", "*processor_config.json",
)  # fmt: skip
# A part of git's rules (git check-ref-format), without characters that an address would need to quote.
_BRANCH = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|\Z)))\w(?:[\w./-]*[\w-])?", re.ASCII)


def add_parser(verbs: Any) -> None:
    """Add the verb `publish`."""
    text = "upload an artefact with its card to a hub's repository, in one commit (a dry run, unless --upload is given)"
    parser = verbs.add_parser("publish", help=text, description=text)
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="what `python -m model_export all` wrote")
    add("--repo", required=True, metavar="ORG/NAME", help="the repository; it is made if it isn't there")
    add("--private", action="store_true", help="make it a private one")
    add("--revision", default=MAIN, metavar="BRANCH", help="the branch; it is made if it isn't there (default: main)")
    add("--card", type=Path, metavar="FILE", help="a card from `app_bridge card --output`, perhaps edited")
    add("--upload", action="store_true", help="do it; without, only say what would be done")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, ask the repository what it has, say or do the rest. UserError; CheckFailed when the listing is wrong."""
    from huggingface_hub import get_token

    card.print_utf8()
    if not _BRANCH.fullmatch(args.revision):
        raise UserError(f"--revision: got {args.revision!r}, expected the name of a branch")
    files, text = prepare(args.artefact, args.repo, args.card)
    licence.log_research_term(args.artefact)
    with client(args.debug) as wire:
        hub = Hub(args.repo, args.revision, wire)
        if args.upload and not get_token():
            raise UserError(f"{hub.endpoint} wants a token to write: `hf auth login`, or set HF_TOKEN")
        held, unknown = _ask(hub, args.upload)
        stale = _stale(held, files) if held else []
        if held:
            _check_room(hub, held, files, stale, args.private)
        document = _plan(hub, files, held, stale) | {"dry_run": not args.upload, "unknown": unknown, "card": text}
        document["exists"] = None if unknown else held is not None
        document |= {"token": bool(get_token()), "licence": licence.licence_file(args.artefact)}
        document["research_only"] = licence.research_only(args.artefact)
        if not args.json:
            print("\n".join(_lines(document)))
        if args.upload:
            document |= _upload(hub, files, held, stale, args.private)
            if not args.json:
                print(document["said"])
    return document


def prepare(artefact: Path, repository: str, own_card: Path | None = None) -> tuple[list[Upload], str]:
    """The files to publish and the card's text. UserError with everything that keeps them from being published."""
    faults = card.name_faults(repository)
    manifest = exported.read_manifest(artefact)
    faults += card.exported_faults(artefact, manifest)
    faults += [finding.line() for finding in licence.check(artefact, manifest)]
    faults += [
        f"{contract.MANIFEST}: {where} tells a path of this machine, {path}: export again, with a relative one"
        for where, path in _paths(manifest)
    ]
    text = ""
    try:
        if own_card is not None:
            text = _read_card(own_card, licence.research_only(artefact))
        elif not faults:
            text = card.make(artefact, manifest, repository)
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise UserError(f"not publishable: {'; '.join(faults)}")
    files = [Upload(name, artefact / name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
    for name, content in ((contract.MANIFEST, read_small(artefact / contract.MANIFEST)), (card.FILE, text.encode())):
        files.append(Upload(name, content, len(content), hashlib.sha256(content).hexdigest()))
    return sorted(files, key=lambda file: file.name), text


def _read_card(path: Path, research_only: bool) -> str:
    """The user's card; UserError for what the hub would refuse, and for a licence that is not the weights'."""
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise UserError(f"--card {path}: is not UTF-8 ({error.reason}): expected Markdown") from error
    except OSError as error:
        raise UserError(
            f"--card {path}: {error.strerror}: expected Markdown, as `app_bridge card` writes it"
        ) from error
    faults = card.check(text)
    if research_only and not re.search(rf"^license: {card.RESEARCH_LICENCE}$", text, re.MULTILINE):
        faults.append(f"the weights are for research only: expected `license: {card.RESEARCH_LICENCE}` in it")
    if card.ANYWHERE in text:
        faults.append(f"it names {card.ANYWHERE} as its repository: make it with `--repo`, or edit that")
    if faults:
        raise UserError(f"--card {path}: {'; '.join(faults)}")
    return text


def _paths(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, path) of each path of this machine in a manifest."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from _paths(one, f"{where}.{key}".strip("."))
    if isinstance(value, str) and (path := card.machine_path(value)):
        yield where, path


def _ask(hub: Hub, needed: bool) -> tuple[Held | None, str | None]:
    """What the repository has, and why that isn't known, where it need not be."""
    try:
        with progress(f"ask {hub.endpoint}"):
            return hub.ask(), None
    except UserError as error:
        if needed:
            raise
        return None, str(error)


def _stale(held: Held, files: list[Upload]) -> list[str]:
    """The repository's parts of a model that are none of `files`."""

    def is_part(name: str) -> bool:
        folder, _, rest = name.partition("/")
        return folder == contract.PACKAGE or (not rest and any(fnmatchcase(name, one) for one in _OF_A_MODEL))

    return sorted(name for name in set(held.files) - {file.name for file in files} if is_part(name))


def _check_room(hub: Hub, held: Held, files: list[Upload], stale: list[str], private: bool) -> None:
    """UserError for a repository that isn't one to publish to."""
    lost = [file.name for file in files if file.name in held.files and file.name != card.FILE and not held.has(file)]
    if (stale or lost) and contract.MANIFEST not in held.files:
        raise UserError(
            f"{hub.name} holds another model, which this command did not put there ({', '.join(stale + lost)}): its"
            " files would be loaded with these, or lost; choose another repository, or delete them on its page"
        )
    if private and not held.private:
        raise UserError(f"{hub.name} exists and is public: --private makes a new one; choose another, or leave it out")


def _plan(hub: Hub, files: list[Upload], held: Held | None, stale: list[str]) -> dict[str, Any]:
    """What becomes of each file."""

    def status(file: Upload) -> str:
        if held is None or file.name not in held.files:
            return "new"
        return "same" if held.has(file) else "changed"

    return {
        "repository": hub.name,
        "revision": hub.revision,
        "endpoint": hub.endpoint,
        "deleted": stale,
        "files": [{"name": f.name, "size": f.size, "sha256": f.sha256, "status": status(f)} for f in files],
    }


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


def _upload(hub: Hub, files: list[Upload], held: Held | None, stale: list[str], private: bool) -> dict[str, Any]:
    """Send what is missing, commit once, and hold the listing against the manifest. CheckFailed when they differ."""
    began, held = time.monotonic(), held or hub.make(private)
    missing = [file for file in files if not held.has(file)]
    todo = bool(missing or stale)
    commit = hub.commit(missing, stale, held) if todo else held.commit
    after = hub.ask_at(commit)
    wrong = [file.name for file in files if not after.has(file)] + _stale(after, files)
    if wrong:
        raise CheckFailed(
            f"{hub.name} at {commit}: after the upload its listing is not what the manifest says ({', '.join(wrong)}):"
            " do not use that commit; run it again"
        )
    seconds, wire = time.monotonic() - began, hub.wire
    what = f"{human(wire.sent)} sent in {seconds:.0f} s" if todo else "nothing to do"
    lost = f", {wire.again} times sent again after a lost connection" if wire.again else ""
    said = f"{hub.endpoint}/{hub.name}/tree/{commit}: {len(files)} files, as the manifest has them ({what}{lost})"
    return {"commit": commit, "sent": wire.sent, "again": wire.again, "said": said}
