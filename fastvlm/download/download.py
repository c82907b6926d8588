"""`python -m fastvlm download`: what Apple publishes, and hub repositories: resumable, checked, atomic.

Until a download is whole, checked and opens as a checkpoint (or is an artefact, as Apple's ready-made models are), all
of it lives in the folder TARGET.partial beside its target; then one rename publishes it. Run again, an interrupted one
goes on from the byte where it stopped.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.filesize import decimal

from fastvlm.checkpoint.folder_kind import REPOSITORY
from fastvlm.common.cli import log, one_line, progress
from fastvlm.common.documents import loads, object_or_empty
from fastvlm.common.errors import UserError
from fastvlm.common.staging import PARTIAL, held, remove
from fastvlm.download.fetch import (
    CHUNK,
    MOST,
    DiskFull,
    Report,
    Retries,
    Transient,
    body,
    fetch,
    need_disk,
    open_url,
    persist,
    remote_size,
    write_json,
)
from fastvlm.download.unpack import name_faults, unpack

ZOO = json.loads((Path(__file__).parents[1] / "checkpoint/zoo.json").read_text(encoding="utf-8"))
PUBLISHED = ZOO["checkpoints"] | ZOO["artefacts"]
RETRIES = Retries()
RECORD = ".download.json"  # in a finished folder: where it came from, and each file's size and sha256
DATA_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "*.model", "LICENSE*", "NOTICE*")
PACKAGE_FILES = "*.mlpackage/*"  # a Core ML package is a folder, the only one that is taken
RESEARCH_ONLY = "apple-amlr"  # the hub's tag for Apple's research licence
LISTING_LIMIT = 64 << 20  # bytes of a hub's answer that are read


def add_parser(subparsers: Any) -> None:
    """Add the verb `download`."""
    parser = subparsers.add_parser(
        "download",
    )
    add = parser.add_argument
    names = f"{', '.join(PUBLISHED)}, 0.5B for fastvlm_0.5b_stage3, or a hub's org/name[@revision]"
    add("name", nargs="?", type=full_name, metavar="NAME", help=names)
    add("--all", action="store_true", help="the six published checkpoints")
    add("--output-dir", type=Path, default=Path("checkpoints"), help="makes NAME in it (default: %(default)s)")
    add("--overwrite", action="store_true", help="download again; the new one replaces the old when it is whole")
    add("--dry-run", action="store_true", help="say what would be downloaded, and how many bytes")
    parser.set_defaults(run=run)


def full_name(name: str) -> str:
    """The published checkpoint that a size stands for, as 0.5B or FastVLM-0.5B; every other name as it is."""
    size = name.lower().removeprefix("fastvlm").lstrip("-_")
    return str(ZOO["short"].get(size, name))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Download NAME, or all: a failure doesn't stop the others, and is reported at the end (UserError, exit 2)."""
    if args.all == bool(args.name):
        raise UserError(f"give one NAME or --all: {', '.join(PUBLISHED)}, or a hub repository org/name")
    results: list[dict[str, Any]] = []
    for name in ZOO["checkpoints"] if args.all else [args.name]:
        try:
            result = download(name, args.output_dir, args.overwrite, args.dry_run, RETRIES)
            print(f"{name}: {result['status']}, {result['path']}, {decimal(result['bytes'])}", flush=True)
        except (UserError, OSError) as error:
            if not args.all:
                raise
            log(f"{name}: {one_line(error)}")
            result = {"name": name, "status": "failed", "error": one_line(error)}
        results.append(result)
    document = {"checkpoints": results}
    failed = [f"{result['name']}: {result['error']}" for result in results if result["status"] == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(results)} downloads failed: {'; '.join(failed)}", document)
    return document


def download(
    name: str,
    output_dir: Path = Path("checkpoints"),
    overwrite: bool = False,
    dry_run: bool = False,
    retries: Retries = RETRIES,
) -> dict[str, Any]:
    """Download what Apple published as `name`, or a hub's `org/name` or `org/name@revision`, to output_dir/name.

    Returns {name, status, path, source, revision, licence, bytes, files, warnings}; sizes in bytes. UserError when it
    can't be had whole, isn't safe to unpack, doesn't open as a checkpoint, or would replace something else.
    """
    repository, _, revision = name.partition("@")
    if repository in PUBLISHED and not revision:
        base = os.environ.get("FASTVLM_ZOO_URL") or ZOO["base_url"]
        source = f"{base.rstrip('/')}/{PUBLISHED[repository]}"
    elif REPOSITORY.fullmatch(repository):
        source = f"{_endpoint()}/{repository}"
    else:
        raise UserError(f"unknown NAME {name!r}: expected {', '.join(PUBLISHED)}, or a hub's org/name")
    target = output_dir / repository
    work = target.with_name(target.name + ".partial")
    done = _finished(target, revision, overwrite)
    if done:
        if work.exists() and not (work / "part").exists():  # a kill came between publishing and clearing away
            with suppress(UserError), _locked(work):
                remove(work)
        return {**done, "status": "already complete", "path": str(target)}
    if dry_run:
        retries = replace(retries, waits=(), timeout=min(retries.timeout, 10.0))  # nothing is lost by asking again
        size = _ask_size(source, repository, revision, work, retries)
        return {"name": name, "status": "would download", "path": str(target), "source": source, "bytes": size}
    with _locked(work):
        if (work / "replaced").exists() and not target.exists():  # a kill came between the two renames
            os.rename(work / "replaced", target)
        done = _finished(target, revision, overwrite)
        if done is None:
            done = _ready(work, source, revision) or _complete(name, source, revision, work, retries)
            _publish(work, target)
    return {**done, "status": "downloaded", "path": str(target)}


# --- the folder and its states ---------------------------------------------------------------------------------------


def _finished(target: Path, revision: str, overwrite: bool) -> dict[str, Any] | None:
    """The record of the finished download in `target`; None when there is none, or it is to be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    record = _record(target)
    if not record.get("files"):
        raise UserError(f"{target} exists and isn't from this command; move it away, or choose another --output-dir")
    if overwrite:
        return None
    changed = _changed(target, record)
    if changed:
        raise UserError(f"{target} changed since its download: {', '.join(changed)}; --overwrite downloads it again")
    if revision not in ("", record.get("requested"), record.get("revision")):
        raise UserError(f"{target} holds revision {record.get('revision')}, not {revision}; --overwrite replaces it")
    return record


def _record(folder: Path) -> dict[str, Any]:
    """The record in a finished folder; {} for what this command has not written."""
    record = object_or_empty(folder / RECORD)
    files = record.get("files")
    sized = isinstance(files, dict) and all(isinstance(one, dict) and "size" in one for one in files.values())
    return record if sized else {}


def _changed(folder: Path, record: dict[str, Any]) -> list[str]:
    """The files of a record that are gone or have another size."""
    files = ((name, folder / name, file["size"]) for name, file in record["files"].items())
    return [name for name, path, size in files if not path.is_file() or path.stat().st_size != size]


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the working folder alone; clear it away when nothing worth going on from was put into it."""
    with held(work, f"another download is at work in {work}; wait for it to end"):
        try:
            yield
        finally:
            if work.exists() and not any((work / name).exists() for name in ("part", "files", "replaced")):
                remove(work)


def _ready(work: Path, source: str, revision: str) -> dict[str, Any] | None:
    """The record of a download that a kill stopped just before its publication."""
    record = _record(work / "files")
    if (record.get("source"), record.get("requested")) != (source, revision) or _changed(work / "files", record):
        return None
    return record


def _complete(name: str, source: str, revision: str, work: Path, retries: Retries) -> dict[str, Any]:
    """Fill work/files with a checked checkpoint or artefact and its record; returns the record."""
    if name in PUBLISHED:
        facts = _from_zoo(name, source, work, retries)
    else:
        facts = _from_hub(name.partition("@")[0], revision, work, retries)
    warnings = [*facts.pop("warnings"), *_opened(name, work)]
    for warning in warnings:
        log(f"warning: {name}: {warning}")
    size = sum(file["size"] for file in facts["files"].values())
    record = {"name": name, "source": source, "requested": revision, "bytes": size, **facts, "warnings": warnings}
    write_json(work / "files" / RECORD, record)
    return record


def _opened(name: str, work: Path) -> tuple[str, ...]:
    """The warnings about what has arrived. UserError where it is no checkpoint and no whole artefact."""
    from fastvlm.checkpoint.exported import recognise

    exported = recognise(work / "files")
    if exported is not None and (exported.ours or len(exported.parts) == 2):
        log(f"{name} is {exported.name}, not a checkpoint: it has {exported.holds}")
        return ()
    from fastvlm.checkpoint.checkpoint import open_checkpoint  # torch takes seconds: not at import

    try:
        return open_checkpoint(work / "files").warnings
    except UserError as error:
        raise UserError(f"{name} arrived whole but is no usable checkpoint (kept in {work}): {error}") from error


def _publish(work: Path, target: Path) -> None:
    """One rename makes the finished folder the target; a target that is there steps aside and is removed."""
    (work / "part").unlink(missing_ok=True)
    shutil.rmtree(work / "replaced", ignore_errors=True)
    if target.exists():
        os.rename(target, work / "replaced")
    os.rename(work / "files", target)
    remove(work)


def _ask_size(source: str, repository: str, revision: str, work: Path, retries: Retries) -> int:
    """The download's bytes as the server announces them, after checking that the disk has room."""
    if repository in PUBLISHED:
        size = persist(lambda: remote_size(source, retries.timeout), retries, source)
        need_disk(work.parent, 2 * size)
    else:
        size = sum(file["size"] for file in _listing(repository, revision, retries)[1])
        need_disk(work.parent, size)
    return size


# --- the published checkpoints --------------------------------------------------------------------------------


def _from_zoo(name: str, url: str, work: Path, retries: Retries) -> dict[str, Any]:
    licence = ZOO["licence"]
    log(f"{name} is under the {licence['name']}: {licence['notice']} ({licence['url']})")
    archive = work / "part"
    with progress(name, sized=True) as step:
        validator = fetch(url, archive, retries, unpacked=True, report=step.at)
    shutil.rmtree(work / "files", ignore_errors=True)
    try:
        with progress(f"{name}: unpacking", sized=True) as step:
            files = unpack(archive, work / "files", step.at)
    except DiskFull:
        raise
    except UserError as error:
        archive.unlink()  # going on from these bytes would never end well
        raise UserError(f"{url}: {error}; removed, run again to download it anew") from error
    for file in [file for file in files if file.casefold() == RECORD]:  # where ours goes; it says nothing to us
        del files[file]
        (work / "files" / file).unlink()
    odd = [file for file in files if not any(fnmatch(file, pattern) for pattern in (*DATA_FILES, PACKAGE_FILES))]
    warnings = [f"holds files that are not read or run: {', '.join(odd)}"] if odd else []
    return {"revision": validator, "licence": licence["name"], "files": files, "warnings": warnings}


# --- hub repositories ------------------------------------------------------------------------------------------------


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _secrets() -> dict[str, str]:
    """The user's hub token, if there is one, as a header."""
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _from_hub(repository: str, revision: str, work: Path, retries: Retries) -> dict[str, Any]:
    """Fill work/files with the repository's data files (top level and Core ML packages, no pickles, no code), each hash
    checked.

    Not by huggingface_hub's `snapshot_download`, which (2.4.0) begins an interrupted file anew in the next run and
    checks sizes, not hashes.
    """
    info, wanted = _listing(repository, revision, retries)
    sha, card = info["sha"], info.get("cardData")
    card = card if isinstance(card, dict) else {}
    licence = card.get("license_name") or card.get("license") or "not stated by the repository"
    log(f"{repository} at {sha}; licence: {licence}" + (": research only" if licence == RESEARCH_ONLY else ""))
    folder, total, done = work / "files", sum(file["size"] for file in wanted), 0
    if object_or_empty(work / "revision.json").get("sha") != sha:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(work / "revision.json", {"sha": sha})
    folder.mkdir(exist_ok=True)
    for left in folder.glob(PARTIAL):  # of a record, by a run that was killed
        left.unlink()
    need_disk(work, total - min(total, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())))
    files: dict[str, Any] = {}
    with progress(repository, sized=True) as step:
        for file in wanted:
            name, size = file["rfilename"], file["size"]
            path, part = folder / name, work / "part"
            sha256 = _verified(path, file) if path.exists() else ""
            if not sha256:
                url = f"{_endpoint()}/{info['id']}/resolve/{sha}/{quote(name)}"
                fetch(url, part, retries, size, _secrets(), report=_part_of(step.at, done, total))
                sha256 = _verified(part, file)
                if not sha256:
                    part.unlink()
                    raise UserError(f"{url}: content differs from the hash that the hub lists; removed, run again")
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, path)
            done += size
            files[name] = {"size": size, "sha256": sha256}
    return {"revision": sha, "licence": licence, "files": files, "warnings": []}


def _part_of(report: Report, before: int, total: int) -> Report:
    return lambda have, _: report(before + have, total)


def _listing(repository: str, revision: str, retries: Retries) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the hub's `model info` document, its entries for the files wanted, small ones first), or UserError.

    GET /api/models/{id}/revision/{revision}?blobs=true, like huggingface_hub's `HfApi.model_info(files_metadata=True)`,
    which has side requests of its own (/api/agent-harnesses, at the endpoint set when it was imported).
    """
    from huggingface_hub import constants

    where = f"{_endpoint()}/{repository}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{where} is out of reach: HF_HUB_OFFLINE is set; unset it to download")
    url = f"{_endpoint()}/api/models/{repository}/revision/{quote(revision or 'main', safe='')}?blobs=true"

    def ask() -> bytes:
        with open_url(url, secrets=_secrets(), timeout=retries.timeout) as response:
            answer = b"".join(body(response, LISTING_LIMIT))
            if len(answer) < int(response.headers.get("Content-Length", 0)):
                raise Transient(f"connection closed after {len(answer)} bytes of the listing")
            return answer

    try:
        info = loads(persist(ask, retries, where))
        commit = re.fullmatch(r"[0-9a-f]{40}", info["sha"]) and REPOSITORY.fullmatch(info["id"])
        top = [file for file in info["siblings"] if "/" not in file["rfilename"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} sent no usable listing ({one_line(error)}); check HF_ENDPOINT") from error
    top = [file for file in top if file["rfilename"].casefold() != RECORD]  # where ours goes
    wanted = [file for file in top if any(fnmatch(file["rfilename"], pattern) for pattern in DATA_FILES)]
    wanted += [file for file in info["siblings"] if fnmatch(file["rfilename"], PACKAGE_FILES)]
    if not any(file["rfilename"].endswith(".safetensors") for file in wanted):
        held = ", ".join(file["rfilename"] for file in top) or "nothing"
        raise UserError(f"{where} has no *.safetensors at its top level (it has {held}); pickles are not downloaded")
    faults = [] if commit else [f"{info['id']!r} at {info['sha']!r} is no repository at a commit"]
    faults += [f"{file['rfilename']!r} is {fault}" for file in wanted for fault in name_faults(file["rfilename"])]
    faults += [f"{file['rfilename']!r} comes without size or hash" for file in wanted if not _checkable(file)]
    if faults:
        raise UserError(f"{where}: unusable listing: {'; '.join(faults)}")
    return info, sorted(wanted, key=lambda file: (file["size"], file["rfilename"]))


def _checkable(file: dict[str, Any]) -> bool:
    """Whether a listing's entry has what `_verified` needs."""
    large = file.get("lfs")
    digest = large.get("sha256") if isinstance(large, dict) else None if large else file.get("blobId")
    size = file.get("size")
    return type(size) is int and 0 <= size < MOST and isinstance(digest, str)


def _verified(path: Path, file: dict[str, Any]) -> str:
    """The sha256 of `path` if the content is what the hub lists (by sha256, or by git's sha1 of a blob), else ""."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as content:
        while chunk := content.read(CHUNK):
            sha256.update(chunk)
            blob.update(chunk)
    large = file.get("lfs")
    same = sha256.hexdigest() == large["sha256"] if large else blob.hexdigest() == file["blobId"]
    return sha256.hexdigest() if same else ""
