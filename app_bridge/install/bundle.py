"""`python -m app_bridge bundle | restore`: a model into an app, whole or not at all, and the one before it back."""

import argparse
import errno
import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app_bridge import kept
from app_bridge.app import facts, resources
from app_bridge.install import clone
from app_bridge.kept import real
from app_bridge.validation import licence
from benchmarks.estimate.estimate import facts as measured
from fastvlm.common import findings, staging
from fastvlm.common.cli import add_common, log, progress
from fastvlm.common.documents import load_object, object_or_empty
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.data.prompt import render_prompt
from model_export import artefact as exported
from model_export import contract
from quantization.catalogue import SIZES, human

NAME = "bundle.json"  # what an app of one's own has to do with the model beside it
FORMAT, FORMAT_VERSION = "fastvlm-bundle", 1


def add_parsers(verbs: Any) -> None:
    """The verbs `bundle` and `restore`."""
    text = "put an artefact where an app looks for its model, checked first; the model that was there is kept"
    parser = verbs.add_parser("bundle", help=text, description=text)
    parser.add_argument("artefact", type=Path, metavar="ARTEFACT")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--app", type=Output(), metavar="FOLDER", help="app/ of a checkout of apple/ml-fastvlm")
    target.add_argument(
        "--output-dir", type=Output(whole=True), metavar="FOLDER", help="a bundle for an app of your own"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier bundle in --output-dir")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would happen, write nothing")
    parser.set_defaults(run=run_bundle)
    add_common(parser)
    text = "bring back the model that `bundle` replaced; what is there now is kept in turn"
    parser = verbs.add_parser("restore", help=text, description=text)
    parser.add_argument(
        "--app", type=Path, required=True, metavar="FOLDER", help="app/ of a checkout of apple/ml-fastvlm"
    )
    parser.set_defaults(run=run_restore)
    add_common(parser)


def run_bundle(args: argparse.Namespace) -> dict[str, Any]:
    """Check the artefact, print every finding, and install it unless one is an error (exit 1)."""
    from app_bridge.app import sources
    from app_bridge.validation.validate import validate

    source = args.artefact.expanduser()
    manifest = exported.read(source)
    target = real(args.app or args.output_dir)
    if args.app:
        if args.overwrite:
            raise UserError("--overwrite: is for --output-dir: with --app the model that is there is kept")
        wanted = sources.read(target)
        place = kept.Place(target, wanted.model_folder)
        model = place.model
    else:
        _check_output(target, args.overwrite)
        wanted, model = _own_app(), target / "model"
    files = _files(source, manifest)
    found = validate(source, wanted)
    if args.app:
        found = resources.collisions(files, model, model.parent) + found
    elif (group := resources.group(target)) is not None:
        found = resources.collisions([*files, NAME], target, group) + found
    findings.show(found, log)
    document = {
        "passed": not findings.errors(found),
        "artefact": str(source),
        "model": str(model),
        "findings": [finding.document() for finding in found],
        "dry_run": args.dry_run,
    }
    if not document["passed"]:
        log(f"{model}: not touched: {findings.count(found)}")
        return document
    licence.say(source)
    if args.app:
        return document | _into_app(source, files, place, args.dry_run)
    instructions = guide(source, exported.read_whole(source), wanted)
    if not exported.is_ours(manifest):  # what --overwrite will be able to replace
        instructions |= {"files": {name: file.sha256 for name, file in files.items()}}
    return document | _stand_alone(source, files, target, instructions, args)


def run_restore(args: argparse.Namespace) -> dict[str, Any]:
    """Exchange the app's model for the one that was kept. UserError if there is none."""
    place = kept.found(real(args.app))
    with kept.opened(place):
        if not os.path.lexists(place.previous):
            raise UserError(f"{place.home}: nothing to restore: `bundle` has replaced no model of this app")
        back, now = describe(place.previous), describe(place.model) if place.occupied() else None
        place.install(place.previous)
    print(f"{place.model}: restored: {_line(back)}")
    if now:
        print(f"  replaced: {_line(now)}: kept: `restore` once more brings it back")
    return {"model": str(place.model), "restored": back, "replaced": now}


def describe(folder: Path) -> dict[str, Any]:
    """What a model folder holds, as far as it says: published size, recipe, bytes, when it was last written."""
    paths = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()] or [folder]
    stats = [path.lstat() for path in paths]
    config, manifest = object_or_empty(folder / contract.CONFIG), object_or_empty(folder / contract.MANIFEST)
    shape = f"{config.get('num_hidden_layers')} layers of {config.get('hidden_size')}"
    sizes = {  # tests hold these to fastvlm.synthetic.checkpoint's, which takes torch
        "{layers} layers of {hidden}".format(**measured("published.json")["languages"][f"qwen2-{key}"]): name
        for key, name in SIZES.items()
    }
    name = f"FastVLM {sizes[shape]}" if shape in sizes else shape
    try:
        recipe = f"{manifest['llm']['recipe']['name']}, encoder {manifest['config']['vision_quant']}"
    except (KeyError, TypeError):
        quantization = config.get("quantization")
        stored = contract.stored_as(quantization) if isinstance(quantization, dict) and "bits" in quantization else None
        recipe = f"{stored or 'not quantized'}, no {contract.MANIFEST}" if config else "unknown"
    return {
        "name": name if "hidden_size" in config else "no model that we know",
        "recipe": recipe,
        "bytes": sum(one.st_size for one in stats),
        "written": time.strftime("%Y-%m-%d %H:%M", time.localtime(max(one.st_mtime for one in stats))),
    }


def _into_app(source: Path, files: Mapping[str, "File"], place: kept.Place, dry_run: bool) -> dict[str, Any]:
    new = describe(source)
    if dry_run:
        old, changed = _there(place, files)
        print(f"{place.model}: {'would become' if changed else 'is already'}: {_line(new)}")
        if changed and old:
            print(f"  would be kept in {place.previous}: {_line(old)}")
        return {"new": new, "replaced": old if changed else None, "changed": changed}
    with kept.opened(place):
        old, changed = _there(place, files)
        if not changed:
            print(f"{place.model}: is already this model, nothing changed: {_line(new)}")
            return {"new": new, "replaced": None, "changed": False}
        with staging.staged(place.next) as folder:
            how = _copy(source, files, folder)
        place.install(place.next)
    print(f"{place.model}: {_line(new)}: {_how(how)}")
    if old:
        app = shlex.quote(str(place.app))
        print(f"  replaced: {_line(old)}: kept in {place.previous}")
        print(f"  back again: python -m app_bridge restore --app {app}")
    return {"new": new, "replaced": old, "changed": True, "bytes": how, "kept": str(place.previous) if old else None}


def _there(place: kept.Place, files: Mapping[str, "File"]) -> tuple[dict[str, Any] | None, bool]:
    """What the app has now, and whether it is anything else than the artefact, in any file."""
    if not place.occupied():
        return None, True
    with progress("compare with the model that is there"):
        same = kept.holds(place.model, {name: file.sha256 for name, file in files.items()})
    return describe(place.model), not same


def _stand_alone(
    source: Path, files: Mapping[str, "File"], target: Path, instructions: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    new = describe(source)
    if args.dry_run:
        print(f"{target}: would become: {_line(new)}, {NAME}")
        return {"new": new}
    with staging.staged(target, replace=args.overwrite) as folder:
        how = _copy(source, files, folder / "model")
        (folder / NAME).write_text(json.dumps(instructions, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{target}: {_line(new)}: {_how(how)}; what its app has to do is in {NAME}")
    return {"new": new, "bytes": how}


def guide(artefact: Path, manifest: Mapping[str, Any], wanted: facts.AppFacts) -> dict[str, Any]:
    """What an app of one's own has to do with the model, as JSON. Shapes as Core ML has them; sizes in pixels."""
    config = load_object(artefact / contract.CONFIG)
    pixels = load_object(artefact / contract.PREPROCESSOR_CONFIG)
    functions = contract.functions(manifest["vision"]["image_size"], manifest["config"]["resolutions"])
    channels, token = manifest["vision"]["channels"], wanted.image_token
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "core_ml": {
            "package": contract.PACKAGE,
            "class": f"{wanted.model_class}, which Xcode makes from the package's name",
            "minimum_deployment_target": manifest["config"]["minimum_deployment_target"],
            "functions": {
                name: {
                    "input": _feature(wanted.input_name, wanted.input_dtype, contract.input_shape(size)),
                    "output": _feature(wanted.output_name, wanted.output_dtype, contract.output_shape(size, channels)),
                }
                for name, size in functions.items()
            },
        },
        "preprocessing": {
            "image_strategy": manifest["image"]["image_strategy"],
            "size": manifest["image"]["image_size"],
            "mean": pixels["image_mean"],
            "std": pixels["image_std"],
            "pixels": "RGB, planes first, bicubic, divided by 255, then (x - mean) / std",
        },
        "language_model": {
            "files": manifest["llm"]["files"],
            "keys": {
                "decoder": f"{contract.LANGUAGE_PREFIX}* (Qwen2's names)",
                "projector": [*contract.PROJECTOR_KEYS, "a GELU between the two layers"],
            },
            "quantization": config.get("quantization"),
            "checked_for": {package.name: package.minimum for package in wanted.packages},
            "config": {key.path: key.type for key in wanted.config if key.required and "." not in key.path},
        },
        "prompt": {
            "image_token": token,
            "image_token_index": config["image_token_index"],
            "image_tokens": manifest["image"]["tokens_per_image"],
            "text": render_prompt("{question}"),
            "do": f"replace {token} by that many image tokens, and their embeddings by the projected image features",
            "demo_app": "puts them after the question, without the line break",
        },
        "licence": licence.term(artefact),
    }


def _feature(name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


@dataclass(frozen=True)
class File:
    """A file of the artefact: what its manifest says of it, and what tells whether it was written since."""

    size: int
    sha256: str
    stamp: tuple[int, ...]


def _files(source: Path, manifest: Mapping[str, Any]) -> dict[str, File]:
    """Everything that is bundled: all files of the manifest, and itself (missing ones are `verify`'s to report); of an
    artefact made elsewhere what is there."""
    if exported.is_ours(manifest):
        entries = {**manifest["files"], contract.MANIFEST: exported.hash_file(source / contract.MANIFEST)}
    else:
        with progress("hash", sum(entry["size"] for entry in manifest["files"].values()), sized=True) as advance:
            entries = exported.hash_files(source, manifest["files"], advance)
    return {name: File(entry["size"], entry["sha256"], _stamp(source / name)) for name, entry in entries.items()}


def _stamp(path: Path) -> tuple[int, ...]:
    with suppress(OSError):
        found = path.stat()
        return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return ()


def _copy(source: Path, files: Mapping[str, File], folder: Path) -> dict[str, int]:
    """Bytes cloned, bytes copied. A copy is hashed; a clone is of what was verified, if nobody wrote there since."""
    how = {"cloned": 0, "copied": 0}
    total, free = sum(file.size for file in files.values()), human(shutil.disk_usage(folder.parent).free)
    with progress("bundle", total, sized=True) as advance:
        for name, file in sorted(files.items()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                cloned = clone.place(source / name, target)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(
                    f"{folder.parent}: disk full: got {free} free, expected {human(total)}: free some"
                ) from error
            how["cloned" if cloned else "copied"] += file.size
            if cloned:
                advance(file.size)
                sound = _stamp(source / name) == file.stamp
            else:
                sound = exported.hash_file(target, advance)["sha256"] == file.sha256
            if not sound:
                raise UserError(
                    f"{source / name}: changed while it was bundled: leave the artefact alone and try again"
                )
    return how


def _own_app() -> facts.AppFacts:
    """What every app has to do, without what only Apple's hard-codes: its shapes, and the packages of its time."""
    from app_bridge.app import packages

    newest = json.loads(packages.TABLE.read_text(encoding="utf-8"))["sets"][-1]["pins"]
    return replace(
        facts.table(),
        input_shape=(1, 3, None, None),
        output_shape=(1, None, None),
        packages=tuple(facts.Package(name, "", "exactVersion", version) for name, version in newest.items()),
        api=(),
    )


def _check_output(target: Path, overwrite: bool) -> None:
    """Refuse, before any work, to replace what is no earlier bundle."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    names = {path.name for path in target.iterdir()} - {".DS_Store"} if target.is_dir() else set()
    if names != {"model", NAME} or object_or_empty(target / NAME).get("format") != FORMAT:
        raise UserError(f"--output-dir {target}: is no bundle, or holds more than one: choose another")
    if not overwrite:
        raise UserError(f"--output-dir {target}: exists: choose another, or replace it with --overwrite")
    files = object_or_empty(target / NAME).get("files")
    if (target / "model" / contract.MANIFEST).exists():
        exported.check_target(target / "model", overwrite)
    elif not isinstance(files, dict) or not kept.holds(target / "model", files):
        raise UserError(f"--output-dir {target}: its model is not as it was bundled: move it away yourself")


def _line(described: Mapping[str, Any]) -> str:
    return f"{described['name']}, {described['recipe']}, {human(described['bytes'])}, of {described['written']}"


def _how(how: Mapping[str, int]) -> str:
    return " and ".join(f"{human(size)} {way}" for way, size in how.items() if size)
