"""`fastvlm bundle | restore`: put a model into an app in one step, and bring the previous one back."""

import argparse
import errno
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app_bridge import licence
from app_bridge.app import facts, resources
from app_bridge.install import clone, guide, package
from app_bridge.install.describe import describe, line
from app_bridge.install.place import Place, holds, locked, used_by_bundle
from app_bridge.validation import validate
from fastvlm.common import findings, staging
from fastvlm.common.cli import log, progress
from fastvlm.common.documents import object_or_empty
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output, real_path
from fastvlm.common.findings import Finding
from fastvlm.common.units import format_bytes
from model_export import artefact as exported
from model_export import contract

Files = dict[str, dict[str, Any]]  # name -> {"size", "sha256"}


def add_parsers(verbs: Any) -> None:
    """Add the verbs `bundle` and `restore`."""
    text = "Put an artefact where an app looks for its model, checked first; the model that was there is kept."
    parser = verbs.add_parser("bundle", description=text)
    parser.add_argument("artefact", type=Path, metavar="ARTEFACT")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--app", type=Output(), metavar="FOLDER", help="app/ of a checkout of apple/ml-fastvlm")
    target.add_argument(
        "--output-dir", type=Output(whole=True), metavar="FOLDER", help="a bundle for an app of your own"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier bundle in --output-dir")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print the changes, but write nothing"
    )
    parser.check(_faults)
    parser.set_defaults(run=run_bundle)
    text = "Bring back the model that `bundle` replaced; the present one is kept in turn."
    parser = verbs.add_parser("restore", description=text)
    parser.add_argument(
        "--app", type=Path, required=True, metavar="FOLDER", help="app/ of a checkout of apple/ml-fastvlm"
    )
    parser.set_defaults(run=run_restore)


def run_bundle(args: argparse.Namespace) -> dict[str, Any]:
    """Check the artefact, print every finding, and install it unless one is an error (exit 1)."""
    from app_bridge.app import sources  # tree-sitter

    source, target = args.artefact.expanduser(), real_path(args.app or args.output_dir)
    manifest = exported.read(source)
    framework: Path | None
    if exported.is_bundle(manifest):
        return _into_package(source, manifest, target, args)
    if args.app:
        wanted = sources.read(target)
        place = Place(target, wanted.model_folder)
        model, framework, names = place.model, place.model.parent, []
    else:
        _check_output(target, args.overwrite)
        wanted, model, framework, names = guide.own_app(), target / "model", resources.group(target), [guide.NAME]
    files = _files(source, manifest)
    problems = validate.validate(source, wanted)
    if framework is not None:
        problems = resources.collisions([*files, *names], model if args.app else target, framework) + problems
    document = _judged(problems, source, model, args.dry_run)
    if not document["passed"]:
        return document
    if args.app:
        return document | _into_app(source, files, place, args.dry_run)
    instructions = guide.guide(source, exported.read_whole(source), wanted)
    if not exported.is_ours(manifest):  # `--overwrite` has no manifest to compare with
        instructions |= {"files": {name: entry["sha256"] for name, entry in files.items()}}
    if args.dry_run:
        print(f"{target}: would become: {line(describe(source))}, {guide.NAME}")
        return document | {"new": describe(source)}
    with staging.staged(target, replace=args.overwrite) as folder:
        sizes = _copy(source, files, folder / "model")
        text = json.dumps(instructions, indent=2, ensure_ascii=False) + "\n"
        (folder / guide.NAME).write_text(text, encoding="utf-8")
    print(f"{target}: {line(describe(source))}: {_ways(sizes)}; the steps for its app are in {guide.NAME}")
    return document | {"new": describe(source), "bytes": sizes}


def _into_package(source: Path, manifest: Mapping[str, Any], target: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Put a Core AI bundle where a Swift package has a resource, and print the code that loads it."""
    if args.app:
        raise UserError(f"--app: {source} is a Core AI bundle, which that app can't load: give --output-dir")
    package.check_name(target)
    exported.check_target(target, args.overwrite)
    files = _files(source, manifest)
    problems = validate.validate(source, facts.table())
    document = _judged(problems, source, target, args.dry_run)
    if not document["passed"]:
        return document
    total = sum(entry["size"] for entry in files.values())
    if args.dry_run:
        print(f"{target}: would become this bundle: {len(files)} files, {format_bytes(total)}")
        return document
    with staging.staged(target, replace=args.overwrite) as folder:
        sizes = _copy(source, files, folder)
    snippet = package.snippet(target)
    print(f"{target}: {len(files)} files: {_ways(sizes)}\n\n{snippet}")
    return document | {"bytes": sizes, "swift": snippet}


def _judged(problems: Sequence[Finding], source: Path, place: Path, dry_run: bool) -> dict[str, Any]:
    """Show findings and, of a sound artefact, its licence's term; the document's first entries."""
    findings.show(problems, log)
    document = {
        "passed": not findings.errors(problems),
        "artefact": str(source),
        "model": str(place),
        "findings": [problem.document() for problem in problems],
        "dry_run": dry_run,
    }
    if document["passed"]:
        licence.log_research_term(source)
    else:
        log(f"{place}: not touched: {findings.count(problems)}")
    return document


def _faults(args: argparse.Namespace) -> Iterator[str]:
    """Flags that do not go together."""
    if args.app and args.overwrite:
        yield "--overwrite: is for --output-dir: with --app the model that is there is kept"


def run_restore(args: argparse.Namespace) -> dict[str, Any]:
    """Exchange the app's model for the previous one. UserError if there is none."""
    place = used_by_bundle(real_path(args.app))
    with locked(place):
        if not os.path.lexists(place.previous):
            raise UserError(f"{place.home}: nothing to restore: `bundle` has replaced no model of this app")
        back, now = describe(place.previous), describe(place.model) if place.occupied() else None
        place.exchange()
    print(f"{place.model}: restored: {line(back)}")
    if now:
        print(f"  replaced: {line(now)}: kept: `restore` once more brings it back")
    return {"model": str(place.model), "restored": back, "replaced": now}


def _into_app(source: Path, files: Files, place: Place, dry_run: bool) -> dict[str, Any]:
    new = describe(source)
    if dry_run:
        old, changed = _compared(place, files)
        print(f"{place.model}: {'would become' if changed else 'is already'}: {line(new)}")
        if changed and old:
            print(f"  would be kept in {place.previous}: {line(old)}")
        return {"new": new, "replaced": old if changed else None, "changed": changed}
    with locked(place):
        old, changed = _compared(place, files)
        if not changed:
            print(f"{place.model}: is already this model, nothing changed: {line(new)}")
            return {"new": new, "replaced": None, "changed": False}
        with place.replaced() as folder:
            sizes = _copy(source, files, folder)
    print(f"{place.model}: {line(new)}: {_ways(sizes)}")
    if old:
        print(f"  replaced: {line(old)}: kept in {place.previous}")
        print(f"  back again: fastvlm restore --app {shlex.quote(str(place.app))}")
    return {"new": new, "replaced": old, "changed": True, "bytes": sizes, "kept": str(place.previous) if old else None}


def _compared(place: Place, files: Files) -> tuple[dict[str, Any] | None, bool]:
    """The app's model, described, and whether it differs from the artefact in any file."""
    if not place.occupied():
        return None, True
    with progress("compare with the model that is there"):
        same = holds(place.model, {name: entry["sha256"] for name, entry in files.items()})
    return describe(place.model), not same


def _check_output(target: Path, overwrite: bool) -> None:
    """Refuse, before any work, to replace anything but an earlier bundle as it was made."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    names = {path.name for path in target.iterdir()} - {".DS_Store"} if target.is_dir() else set()
    earlier = object_or_empty(target / guide.NAME) if names == {"model", guide.NAME} else {}
    if earlier.get("format") != guide.FORMAT:
        raise UserError(f"--output-dir {target}: is no bundle, or holds more than one: choose another")
    if not overwrite:
        raise UserError(f"--output-dir {target}: exists: choose another, or replace it with --overwrite")
    if (target / "model" / contract.MANIFEST).exists():
        exported.check_target(target / "model", overwrite)
    elif not isinstance(earlier.get("files"), dict) or not holds(target / "model", earlier["files"]):
        raise UserError(f"--output-dir {target}: its model is not as it was bundled: move it away yourself")


def _files(source: Path, manifest: Mapping[str, Any]) -> Files:
    """The files to bundle: the manifest's and the manifest; of an artefact made elsewhere those that are there."""
    if exported.is_ours(manifest):
        return {**manifest["files"], contract.MANIFEST: exported.hash_file(source / contract.MANIFEST)}
    with progress("hash", sum(entry["size"] for entry in manifest["files"].values()), sized=True) as advance:
        return exported.hash_files(source, manifest["files"], advance)


def _copy(source: Path, files: Files, folder: Path) -> dict[str, int]:
    """Clone or copy the files and compare the result's sha256. Returns {"cloned", "copied"} in bytes.

    Raises UserError for a full disk and for a source that has changed since it was checked.
    """
    sizes = {"cloned": 0, "copied": 0}
    total, free = sum(entry["size"] for entry in files.values()), format_bytes(shutil.disk_usage(folder.parent).free)
    with progress("bundle", total, sized=True) as advance:
        for name, entry in sorted(files.items()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                cloned = clone.clone_or_copy(source / name, target)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(
                    f"{folder.parent}: disk full: got {free} free, expected {format_bytes(total)}: free some"
                ) from error
            sizes["cloned" if cloned else "copied"] += entry["size"]
            if exported.hash_file(target, advance)["sha256"] != entry["sha256"]:
                raise UserError(
                    f"{source / name}: changed while it was bundled: leave the artefact alone and try again"
                )
    return sizes


def _ways(sizes: Mapping[str, int]) -> str:
    return " and ".join(f"{format_bytes(size)} {way}" for way, size in sizes.items() if size)
