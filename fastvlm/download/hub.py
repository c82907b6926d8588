"""A hub's repository: its data files at one commit, each by a listed hash."""

import hashlib
import os
import re
import shutil
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastvlm.checkpoint.folder_kind import REPOSITORY
from fastvlm.common.cli import Step, log, one_line, progress
from fastvlm.common.documents import loads, object_or_empty
from fastvlm.common.errors import UserError
from fastvlm.common.staging import PARTIAL
from fastvlm.download.fetch import CHUNK, Retries, fetch, need_disk, persist, request, write_json
from fastvlm.download.unpack import name_faults

RECORD = ".download.json"  # in a finished folder: where it came from, and each file's size and sha256
DATA_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "*.model", "LICENSE*", "NOTICE*")
PACKAGE_FILES = "*.mlpackage/*"  # a Core ML package is a folder, the only one that is taken
RESEARCH_ONLY = "apple-amlr"  # the hub's tag for Apple's research licence
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # git's of a blob (SHA-1), or SHA-256


def endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _secrets() -> dict[str, str]:
    """The user's hub token, if there is one, as a header."""
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def from_hub(repository: str, revision: str, work: Path, retries: Retries) -> dict[str, Any]:
    """Fill work/files with the repository's data files (top level and Core ML packages, no pickles, no code), each hash
    checked.

    Not by huggingface_hub's `snapshot_download`, which (2.4.0) begins an interrupted file anew in the next run and
    checks sizes, not hashes.
    """
    info, wanted = listing(repository, revision, retries)
    sha, card = info["sha"], info.get("cardData")
    card = card if isinstance(card, dict) else {}
    licence = card.get("license_name") or card.get("license") or "not stated by the repository"
    log(f"{repository} at {sha}; licence: {licence}" + (": research only" if licence == RESEARCH_ONLY else ""))
    folder, total, done = work / "files", sum(size for size, _ in wanted.values()), 0
    if object_or_empty(work / "revision.json").get("sha") != sha:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(work / "revision.json", {"sha": sha})
    folder.mkdir(exist_ok=True)
    for left in folder.glob(PARTIAL):  # of a record, by a run that was killed
        left.unlink()
    need_disk(work, total - min(total, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())))
    files: dict[str, Any] = {}
    with progress(repository, sized=True) as step:
        for name, (size, digest) in wanted.items():
            path, part = folder / name, work / "part"
            sha256 = _verified(path, digest) if path.exists() else ""
            if not sha256:
                url = f"{endpoint()}/{info['id']}/resolve/{sha}/{quote(name)}"
                fetch(url, part, retries, size, _secrets(), report=partial(_advance, step, done, total))
                sha256 = _verified(part, digest)
                if not sha256:
                    part.unlink()
                    raise UserError(f"{url}: content differs from the hash that the hub lists; removed, run again")
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, path)
            done += size
            files[name] = {"size": size, "sha256": sha256}
    return {"revision": sha, "licence": licence, "files": files, "warnings": []}


def _advance(step: Step, before: int, total: int, have: int, _of_file: int) -> None:
    step.at(before + have, total)


def listing(repository: str, revision: str, retries: Retries) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
    """(the hub's `model info` document, {name: (size, hash)} of the files wanted, small ones first), or UserError.

    GET /api/models/{id}/revision/{revision}?blobs=true, like huggingface_hub's `HfApi.model_info(files_metadata=True)`,
    which has side requests of its own (/api/agent-harnesses, at the endpoint set when it was imported).
    """
    from huggingface_hub import constants

    where = f"{endpoint()}/{repository}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{where} is out of reach: HF_HUB_OFFLINE is set; unset it to download")
    url = f"{endpoint()}/api/models/{repository}/revision/{quote(revision or 'main', safe='')}?blobs=true"

    def ask() -> bytes:
        with request(url, retries.timeout, _secrets()) as response:
            return b"".join(response.iter_raw())

    try:
        info = loads(persist(ask, retries, where))
        names = [file["rfilename"] for file in info["siblings"]]
        chosen = [
            (name, file.get("size"), str((file.get("lfs") or {}).get("sha256") or file.get("blobId")))
            for name, file in zip(names, info["siblings"])
            if name.casefold() != RECORD and _wanted(name)  # our record has that name
        ]
        commit = re.fullmatch(r"[0-9a-f]{40}", info["sha"]) and REPOSITORY.fullmatch(info["id"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} sent no usable listing ({one_line(error)}); check HF_ENDPOINT") from error
    if not any(name.endswith(".safetensors") for name, *_ in chosen):
        listed = ", ".join(name for name in names if "/" not in name) or "nothing"
        raise UserError(f"{where} has no *.safetensors at its top level (it has {listed}); pickles are not downloaded")
    faults = [] if commit else [f"{info['id']!r} at {info['sha']!r} is no repository at a commit"]
    faults += [f"{name!r} is {fault}" for name, *_ in chosen for fault in name_faults(name)]
    faults += [
        f"{name!r} comes without size or hash"
        for name, size, digest in chosen
        if type(size) is not int or size < 0 or not _HASH.fullmatch(digest)
    ]
    if faults:
        raise UserError(f"{where}: unusable listing: {'; '.join(faults)}")
    return info, {name: (size, digest) for name, size, digest in sorted(chosen, key=lambda entry: (entry[1], entry[0]))}


def _wanted(name: str) -> bool:
    """Whether a file of a repository is data: at its top level, or in a Core ML package, a folder."""
    own = "/" not in name and any(fnmatch(name, pattern) for pattern in DATA_FILES)
    return own or fnmatch(name, PACKAGE_FILES)


def _verified(path: Path, expected: str) -> str:
    """The SHA-256 of `path` if `expected` is that, or git's SHA-1 of a blob of this content; else ""."""
    with open(path, "rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        content.seek(0)
        blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        while len(expected) == 40 and (chunk := content.read(CHUNK)):
            blob.update(chunk)
    return sha256 if expected in (sha256, blob.hexdigest()) else ""
