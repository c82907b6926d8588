"""`fastvlm download`: Apple's published models, and hub repositories: resumable, checked, atomic.

Until a download is whole, checked and opens as a checkpoint (or is an artefact, as Apple's ready-made models are), all
of it lives in the folder TARGET.partial beside its target; then one rename publishes it. Run again, an interrupted one
goes on from the byte where it stopped.
"""

import argparse
import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastvlm.checkpoint.folder_kind import REPOSITORY
from fastvlm.common.cli import log, one_line, progress
from fastvlm.common.documents import object_or_empty
from fastvlm.common.errors import UserError
from fastvlm.common.staging import held, publish, put_back, remove
from fastvlm.common.units import format_bytes
from fastvlm.download.fetch import (
    DiskFull,
    Retries,
    announced_size,
    fetch,
    need_disk,
    persist,
    write_json,
)
from fastvlm.download.hub import DATA_FILES, PACKAGE_FILES, RECORD, endpoint, from_hub, listing
from fastvlm.download.unpack import unpack

ZOO = json.loads((Path(__file__).parents[1] / "checkpoint/zoo.json").read_text(encoding="utf-8"))
PUBLISHED = ZOO["checkpoints"] | ZOO["artefacts"]
RETRIES = Retries()


def add_parser(subparsers: Any) -> None:
    """Add the verb `download`."""
    parser = subparsers.add_parser("download")
    add = parser.add_argument
    names = f"{', '.join(PUBLISHED)}, 0.5B for fastvlm_0.5b_stage3, or a hub's org/name[@revision]"
    add("name", nargs="?", type=full_name, metavar="NAME", help=names)
    add("--all", action="store_true", help="the six published checkpoints")
    add(
        "--output-dir",
        type=Path,
        default=Path("checkpoints"),
        help="the folder that NAME is created in (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="download again; the old one is replaced when the new one is complete")
    add("--dry-run", action="store_true", help="print the files to download and their bytes")
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
            print(f"{name}: {result['status']}, {result['path']}, {format_bytes(result['bytes'])}", flush=True)
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
        source = f"{endpoint()}/{repository}"
    else:
        raise UserError(f"unknown NAME {name!r}: expected {', '.join(PUBLISHED)}, or a hub's org/name")
    target = output_dir / repository
    work = target.with_name(target.name + ".partial")
    busy = f"another download is at work in {work}; wait for it to end"
    record = _finished(target, revision, overwrite)
    if record:
        if work.exists():  # a kill came between publishing and clearing away
            with suppress(UserError), held(work, busy):
                remove(work)
        return {**record, "status": "already complete", "path": str(target)}
    if dry_run:
        retries = replace(retries, waits=(), timeout=min(retries.timeout, 10.0))  # nothing is lost by asking again
        size = _ask_size(source, repository, revision, work, retries)
        return {"name": name, "status": "would download", "path": str(target), "source": source, "bytes": size}
    with held(work, busy):
        try:
            put_back(work, target)
            record = _finished(target, revision, overwrite)
            if record is None:
                record = _complete(name, source, revision, work, retries)
                publish(work / "files", target, replace=True)
                remove(work)
        finally:
            if work.exists() and not any((work / name).exists() for name in ("part", "files", "old")):
                remove(work)  # nothing to go on from
    return {**record, "status": "downloaded", "path": str(target)}


# --- the folder and its states ---------------------------------------------------------------------------------------


def _finished(target: Path, revision: str, overwrite: bool) -> dict[str, Any] | None:
    """The record of the finished download in `target`; None when there is none, or it is to be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    record = object_or_empty(target / RECORD)
    files = record.get("files")
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(entry, dict) and "size" in entry for entry in files.values())
    ):
        raise UserError(f"{target} exists and isn't from this command; move it away, or choose another --output-dir")
    if overwrite:
        return None
    paths = {name: target / name for name in files}
    changed = [name for name, path in paths.items() if not path.is_file() or path.stat().st_size != files[name]["size"]]
    if changed:
        raise UserError(f"{target} changed since its download: {', '.join(changed)}; --overwrite downloads it again")
    if revision not in ("", record.get("requested"), record.get("revision")):
        raise UserError(f"{target} holds revision {record.get('revision')}, not {revision}; --overwrite replaces it")
    return record


def _complete(name: str, source: str, revision: str, work: Path, retries: Retries) -> dict[str, Any]:
    """Fill work/files with a checked checkpoint or artefact and its record; returns the record."""
    if name in PUBLISHED:
        facts = _from_zoo(name, source, work, retries)
    else:
        facts = from_hub(name.partition("@")[0], revision, work, retries)
    warnings = [*facts.pop("warnings"), *_opened(name, work)]
    for warning in warnings:
        log(f"warning: {name}: {warning}")
    size = sum(file["size"] for file in facts["files"].values())
    record = {"name": name, "source": source, "requested": revision, "bytes": size, **facts, "warnings": warnings}
    write_json(work / "files" / RECORD, record)
    return record


def _opened(name: str, work: Path) -> tuple[str, ...]:
    """The warnings about the downloaded folder. UserError where it is no checkpoint and no whole artefact."""
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


def _ask_size(source: str, repository: str, revision: str, work: Path, retries: Retries) -> int:
    """The download's bytes as the server announces them, after checking that the disk has room."""
    if repository in PUBLISHED:
        size = persist(lambda: announced_size(source, retries.timeout), retries, source)
        need_disk(work.parent, 2 * size)
    else:
        size = sum(size for size, _ in listing(repository, revision, retries)[1].values())
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
