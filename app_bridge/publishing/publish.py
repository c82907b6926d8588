"""The publication of an artefact: the files and their card, what becomes of a repository, the upload and its check."""

import hashlib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import ModelInfo

from app_bridge import licence
from app_bridge.publishing import card, checks
from app_bridge.publishing.hub import Hub, Upload
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.files import read_small, read_text
from model_export import artefact as exported
from model_export import contract

# What a loader takes for a part of a model beside the package: an earlier artefact's are deleted, anybody else's are a
# reason to refuse.
_MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.jinja", "tokenizer*", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "generation_config.json", "*processor_config.json",
)  # fmt: skip


def prepare(artefact: Path, repository: str, own_card: Path | None = None) -> tuple[list[Upload], str]:
    """Return the files to publish, sorted by name, and the card's text.

    Raises UserError with everything that forbids publishing them.
    """
    manifest = exported.read_manifest(artefact)
    faults = checks.artefact_faults(artefact, manifest)
    faults += [finding.line() for finding in licence.check(artefact, manifest)]
    faults += [
        f"{contract.MANIFEST}: {where} tells a path of this machine, {path}: export again, with a relative one"
        for where, path in checks.machine_paths(manifest)
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


def check_repository(hub: Hub, files: Sequence[Upload], before: ModelInfo, private: bool) -> None:
    """Raise UserError for a repository with somebody else's model, or a public one where a private one is wanted."""
    held = _names(before)
    lost = [f.name for f in files if f.name in held and f.name != card.FILE and not f.is_in(before)]
    theirs = _stale(files, before) + lost
    if theirs and contract.MANIFEST not in held:
        raise UserError(
            f"{hub.name} holds another model, which this command did not put there ({', '.join(theirs)}): its files"
            " would be loaded with these, or lost; choose another repository, or delete them on its page"
        )
    if private and not before.private:
        raise UserError(f"{hub.name} exists and is public: --private makes a new one; choose another, or leave it out")


def changes(hub: Hub, files: Sequence[Upload], before: ModelInfo | None) -> dict[str, Any]:
    """Return what would become of each file of the repository, as JSON; `before` is None for a new repository."""

    def status(file: Upload) -> str:
        if before is None or file.name not in _names(before):
            return "new"
        return "same" if file.is_in(before) else "changed"

    return {
        "repository": hub.name,
        "revision": hub.revision,
        "endpoint": hub.endpoint,
        "deleted": _stale(files, before) if before else [],
        "files": [{"name": f.name, "size": f.size, "sha256": f.sha256, "status": status(f)} for f in files],
    }


def upload(hub: Hub, files: Sequence[Upload], before: ModelInfo) -> dict[str, Any]:
    """Send what is missing, commit once, and compare the hub's listing with the manifest.

    Returns {"commit", "sent"}, `sent` being the bytes of the files that the repository lacked. Raises CheckFailed when
    the listing has other names, sizes or sha256.
    """
    missing, stale = [file for file in files if not file.is_in(before)], _stale(files, before)
    commit = hub.commit(missing, stale, str(before.sha)) if missing or stale else str(before.sha)
    after = hub.contents(commit)
    if after is None:
        raise CheckFailed(f"{hub.name} at {commit}: is not there after the upload: run it again")
    if wrong := [file.name for file in files if not file.is_in(after)] + _stale(files, after):
        raise CheckFailed(
            f"{hub.name} at {commit}: after the upload its listing is not what the manifest says ({', '.join(wrong)}):"
            " do not use that commit; run it again"
        )
    return {"commit": commit, "sent": sum(file.size for file in missing)}


def _names(contents: ModelInfo) -> set[str]:
    return {file.rfilename for file in contents.siblings or ()}


def _stale(files: Sequence[Upload], contents: ModelInfo) -> list[str]:
    """The repository's parts of a model that are not among `files`."""
    others = sorted(_names(contents) - {file.name for file in files})
    return [
        name
        for name in others
        if name.startswith(f"{contract.PACKAGE}/")
        or ("/" not in name and any(fnmatchcase(name, pattern) for pattern in _MODEL_FILES))
    ]


def _read_card(path: Path, research_only: bool) -> str:
    """The user's card; UserError for what the hub would refuse, and for a licence that is not the weights'."""
    try:
        text = read_text(path)
    except (UnicodeDecodeError, OSError) as error:
        why = f"is not UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"--card {path}: {why}: expected Markdown, as `fastvlm card` writes it") from error
    faults = checks.card_faults(text)
    if research_only and not re.search(rf"^license: {card.RESEARCH_LICENCE}$", text, re.MULTILINE):
        faults.append(f"the weights are for research only: expected `license: {card.RESEARCH_LICENCE}` in it")
    if card.PLACEHOLDER in text:
        faults.append(f"it names {card.PLACEHOLDER} as its repository: make it with `--repo`, or edit that")
    if faults:
        raise UserError(f"--card {path}: {'; '.join(faults)}")
    return text
