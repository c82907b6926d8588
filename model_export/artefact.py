"""An artefact folder: its manifest, its licences, and whether every byte is what the export wrote."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.checkpoint import folder_kind
from fastvlm.checkpoint.exported import recognise
from fastvlm.checkpoint.folder_kind import REPOSITORY
from fastvlm.common import threads
from fastvlm.common.cli import progress
from fastvlm.common.documents import Unreadable, load
from fastvlm.common.errors import UserError
from fastvlm.common.files import LICENCES, is_macs, leaving, licence_files, read_small, small_files, stays_inside
from model_export import contract, elsewhere, manifest_form

if TYPE_CHECKING:  # torch, which verify and the app's verbs need not wait for
    from fastvlm.checkpoint.adapter import Adapter
    from fastvlm.checkpoint.checkpoint import Checkpoint

FORMAT, FORMAT_VERSION = "fastvlm-artefact", 3  # 3: powers of two by layer, activations in their scaled form
_PACKAGES = ("torch", "timm", "transformers", "tokenizers", "safetensors", "coremltools", "numpy")
_SELF = "manifest_sha256"
_CHUNK = 1 << 24  # bytes hashed at once: longer than a thread waits for its turn in between
_SHOWN = 10  # faults of a manifest

# What a hub's repository has besides: the card, git's attributes and the client's notes. Not the artefact's, no fault.
_OF_A_HUB = {"README.md", ".gitattributes", ".cache"}
_LICENCE_BYTES = 1 << 20

# Apple's research licence: what its text calls itself, and the sentence that it asks to go along with every copy.
APPLE_LICENCE = "Apple Machine Learning Research Model"
APPLE_ATTRIBUTION = f"{APPLE_LICENCE} is licensed under the {APPLE_LICENCE} License Agreement."
CHANGES = "What was changed:"  # what the record of changes in NOTICE begins with
_APPLE = f"""\
The checkpoint came without a licence file. If its weights are Apple's FastVLM weights, or derived from them, they and
this artefact are for research purposes only, under the {APPLE_LICENCE} License Agreement: see
LICENSE_MODEL in https://github.com/apple/ml-fastvlm, which you must pass on with them, and this notice:
{APPLE_ATTRIBUTION}
"""


def check_replaced(target: Path, overwrite: bool, record: str, what: str) -> bool:
    """Whether something would be replaced; UserError unless that has the `record` that is in what such a command
    wrote, and with `overwrite`. An empty folder is nothing."""
    if not os.path.lexists(target):
        return False
    if not target.is_dir():
        raise UserError(f"--output-dir {target}: is a file: choose another name")
    if not any(target.iterdir()):
        return False
    if not (target / record).is_file():
        raise UserError(f"--output-dir {target}: is no {what} (it has no {record}): choose another")
    if not overwrite:
        raise UserError(f"--output-dir {target}: exists: choose another, or replace it with --overwrite")
    return True


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse, before any work, a target that the export will not be able to replace, or must not."""
    if not check_replaced(target, overwrite, contract.MANIFEST, "artefact"):
        return
    try:
        listed = _listed_files(read_manifest(target, older=True))
    except UserError as error:
        raise UserError(f"--output-dir {target}: what it holds is unknown, remove it yourself: {error}") from error
    if extra := _extra(target, listed):
        raise UserError(
            f"--output-dir {target}: replacing it would delete what no export wrote; move that away first:"
            f" {', '.join(extra)}"
        )


def sources(checkpoint: "Checkpoint", advance: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """The checkpoint's identity: its layout, sha256 and size of each file that was read, and `sha256` over all of them.

    With an adapter also "adapter": its name, kind and base, what it changes, and its files. `advance(n)` after every n
    bytes. Names only, no paths: the same checkpoint elsewhere is the same source.
    """
    adapter = checkpoint.adapter
    of_adapter = set() if adapter is None else {*adapter.files}
    files = hash_files(checkpoint.path, _names(checkpoint.path, {*checkpoint.files} - of_adapter), advance)
    document = {"layout": checkpoint.layout, "form": checkpoint.form, "dtype": checkpoint.dtype, "files": files}
    listed = _listed(files)
    if adapter is not None:
        files = hash_files(adapter.path, _names(adapter.path, of_adapter), advance)
        document["adapter"] = adapter_facts(adapter) | {"files": files}
        listed += f"adapter\n{_listed(files)}"
    return document | {"sha256": hashlib.sha256(listed.encode()).hexdigest()}


def adapter_facts(adapter: "Adapter") -> dict[str, Any]:
    """An adapter's name, kind and base, and what it changes. Where it names its base by a path, its last part."""
    base = adapter.base if adapter.base is None or REPOSITORY.fullmatch(adapter.base) else Path(adapter.base).name
    return {"name": adapter.path.resolve().name, "kind": adapter.kind, "base": base, **adapter.facts}


def _names(folder: Path, read: Iterable[Path]) -> set[str]:
    """The files that were read of a folder, and the small ones beside them, relative."""
    beside = (path for path in small_files(folder) if path.is_file())
    return {path.relative_to(folder).as_posix() for path in (*read, *beside)}


def _listed(files: Mapping[str, Mapping[str, Any]]) -> str:
    return "".join(f"{entry['sha256']}  {name}\n" for name, entry in files.items())


def fine_tuned(sources: Mapping[str, Any]) -> str | None:
    """What a manifest's `sources` say of an adapter, in a few words; None without one."""
    adapter = sources.get("adapter")
    if not isinstance(adapter, dict):
        return None
    base = f", of {adapter['base']}" if adapter.get("base") else ""
    return f"{adapter.get('kind')} {adapter.get('name')}{base}"


def carry_licences(checkpoint: Path, folder: Path, changes: Sequence[str], adapter: Path | None = None) -> list[str]:
    """Copy the checkpoint's licence files into `folder`, and write a NOTICE of the changes.

    The adapter's own are `adapter-…` there: they are not the weights'. Returns the copied names. Apple's licence asks
    for its text and attribution passed on, and modifications disclosed.
    """
    carried = []
    for path in licence_files(checkpoint):
        (folder / path.name).write_bytes(_licence(path))
        carried.append(path.name)
    for path in [] if adapter is None else licence_files(adapter):
        content, name = _licence(path), f"adapter-{path.name}"
        if path.name not in carried or (folder / path.name).read_bytes() != content:
            (folder / name).write_bytes(content)
            carried.append(name)
    notice = folder / contract.NOTICE
    before = notice.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if notice.exists() else ""
    licences = [name for name in carried if name.lower().startswith(LICENCES)]
    apples = any(is_apples((folder / name).read_text("utf-8", errors="replace")) for name in licences)
    terms = f"\n{APPLE_ATTRIBUTION}\n" if apples else "" if licences else "\n" + _APPLE
    listed = "".join(f"- {change}\n" for change in changes)
    text = f"This artefact was made from a FastVLM checkpoint. {CHANGES}\n{listed}"
    notice.write_text(before + text + terms, encoding="utf-8")
    return carried


def _licence(path: Path) -> bytes:
    """The content of a licence file; UserError for what is none."""
    if path.is_symlink() and not stays_inside(path):
        raise UserError(f"{path}: {leaving(path)}")
    try:
        return read_small(path, _LICENCE_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: no licence: move it away") from None


def is_apples(licence: str) -> bool:
    """Whether a licence's text is Apple's research licence, wherever its lines break."""
    return APPLE_LICENCE in " ".join(licence.split())


def versions(further: Sequence[str] = ()) -> dict[str, str]:
    """Python and the packages whose versions decide the artefact's bytes, `further` ones included."""
    names = (*_PACKAGES, *further)
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def hash_files(
    folder: Path, names: Iterable[str], advance: Callable[[int], Any] | None = None
) -> dict[str, dict[str, Any]]:
    """{name: {"sha256", "size"}} of files in `folder`, sorted by name. `advance(n)` after every n bytes."""
    return {name: hash_file(folder / name, advance) for name in sorted(names)}


def files_in(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest and what macOS adds, relative, with forward slashes, sorted."""
    paths = (path for path in folder.rglob("*") if (path.is_symlink() or not path.is_dir()) and not is_macs(path.name))
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != contract.MANIFEST)


def write_manifest(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Write export.json: `document` and the sha256 and size of every file in `folder`. Returns what was written.

    The bytes are canonical JSON with a hash of themselves, so that a change to the manifest shows, too.
    """
    names = files_in(folder)
    with ThreadPoolExecutor(threads.count()) as pool:
        files = document.get("files") or dict(zip(names, pool.map(lambda name: hash_file(folder / name), names)))
    complete = {"format": FORMAT, "format_version": FORMAT_VERSION, **document, "files": files}
    complete[_SELF] = _self_hash(complete)
    (folder / contract.MANIFEST).write_bytes(_canonical(complete))
    return complete


def read_manifest(artefact: Path, older: bool = False) -> dict[str, Any]:
    """The artefact's export.json; with `older`, of any format up to ours. Raises UserError when it cannot be read."""
    path = artefact / contract.MANIFEST
    if not path.exists() and not recognise(artefact) and (reason := folder_kind.instead_of_artefact(artefact)):
        raise UserError(reason)
    if not artefact.is_dir():
        what = "is a file" if artefact.is_file() else "no such folder"
        raise UserError(f"{artefact}: {what}: expected an exported artefact's folder")
    try:
        document = load(path)
    except Unreadable as error:
        if error.rule != "file-missing":
            raise UserError(f"{error.finding(str(path))}: export again") from None
        if not recognise(artefact):
            names = f"{contract.CONFIG}, model.safetensors, {contract.PACKAGE} and, if it was exported here"
            raise UserError(f"{artefact}: expected an artefact: a folder with {names}, {contract.MANIFEST}") from None
        raise UserError(
            f"{artefact}: it was exported elsewhere: it has no {contract.MANIFEST}, the record of sources and sha256"
            " that this needs: export the checkpoint with `fastvlm export`"
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path}: is not the manifest of an artefact (no format {FORMAT!r})")
    got = document.get("format_version")
    if got != FORMAT_VERSION and not (older and got in range(1, FORMAT_VERSION)):
        raise UserError(f"{path}: format version {got!r}, expected {FORMAT_VERSION}: export again")
    files = document.get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise UserError(f"{path}: `files` does not list files inside the artefact with sha256 and size: export again")
    if got == FORMAT_VERSION and (faults := manifest_form.faults(document)):
        raise UserError(f"{path}: is not what an export writes: {'; '.join(faults[:_SHOWN])}: export again")
    return document


def read(artefact: Path) -> dict[str, Any]:
    """The artefact's manifest: its export.json, or for one made elsewhere the same keys as far as names tell.

    Nothing of an artefact made elsewhere is opened. UserError for a folder that is no artefact.
    """
    exported = None if (artefact / contract.MANIFEST).exists() else recognise(artefact)
    return read_manifest(artefact) if exported is None else elsewhere.listed(artefact, exported, _OF_A_HUB)


def is_bundle(document: Mapping[str, Any]) -> bool:
    """Whether a manifest is of a Core AI bundle."""
    config = document.get("config")
    return isinstance(config, dict) and config.get("format") == "coreai"


def is_ours(document: Mapping[str, Any]) -> bool:
    """Whether `read` or `read_whole` had an export.json to read."""
    return document.get("format") == FORMAT


def read_whole(artefact: Path) -> dict[str, Any]:
    """`read` of an artefact that can be run: ours is as large as it was exported, and of one made elsewhere package and
    headers were read. UserError with what is missing."""
    document = read(artefact)
    return check_whole(artefact) if is_ours(document) else elsewhere.described(artefact, document)


def verify(artefact: Path, advance: Callable[[int], Any] | None = None) -> list[str]:
    """One line for every file that changed by a byte, is missing or is extra; empty when the artefact is as exported.

    Raises UserError for a folder that is no artefact at all.
    """
    document = read_manifest(artefact)
    findings = []
    raw = read_small(artefact / contract.MANIFEST)
    if raw != _canonical(document) or document.get(_SELF) != _self_hash(document):
        findings.append(f"{contract.MANIFEST}: changed since the export")
    findings += _missing_or_resized(artefact, document["files"])
    flagged = {finding.split(": ")[0] for finding in findings}
    for name, entry in document["files"].items():
        if name not in flagged and hash_file(artefact / name, advance)["sha256"] != entry["sha256"]:
            findings.append(f"{name}: changed: its sha256 is not that of the export")
    extra = (name for name in _extra(artefact, _listed_files(document)) if name.split("/")[0] not in _OF_A_HUB)
    findings += [f"{name}: extra: not written by the export" for name in extra]
    return sorted(findings)


def verify_aloud(artefact: Path, document: Mapping[str, Any]) -> list[str]:
    """`verify`, with its progress shown."""
    with progress("verify", sum(entry["size"] for entry in document["files"].values()), sized=True) as advance:
        return verify(artefact, advance)


def check_whole(artefact: Path) -> dict[str, Any]:
    """The manifest of an artefact whose files are all there, in size; UserError if not (`verify` reads them)."""
    document = read_manifest(artefact)
    findings = _missing_or_resized(artefact, document["files"])
    if findings:
        raise UserError(f"{artefact}: is not as it was exported: {'; '.join(findings)}; export again")
    return document


def check_parts(artefact: Path, document: Mapping[str, Any]) -> None:
    """UserError if the artefact is one half of a model."""
    if absent := [part for part in ("vision", "llm") if part not in document.get("parts", ())]:
        raise UserError(f"{artefact}: holds only part of a model (no {', '.join(absent)}): export with `all`")
    check_complete(artefact, document)


def check_complete(artefact: Path, document: Mapping[str, Any]) -> None:
    """UserError for a manifest of ours that lacks what is read of it."""
    if not is_ours(document):
        return
    parts = {part for part in ("vision", "llm") if part not in document.get("parts", ())}
    faults = [f"no {key}" for key in manifest_form.FORM if key not in document and key not in parts]
    if faults := faults + manifest_form.faults(document, complete=True):
        raise UserError(f"{artefact / contract.MANIFEST}: {'; '.join(faults[:_SHOWN])}: export again")


def check_for_app(artefact: Path, document: Mapping[str, Any]) -> None:
    """UserError if the manifest's artefact is one half of a model, or in another layout than the app's."""
    config = document.get("config")
    if is_bundle(document):
        raise UserError(f"{artefact}: is a Core AI bundle, expected an artefact for Core ML and MLX")
    if (layout := config.get("layout") if isinstance(config, dict) else None) != contract.LAYOUTS[0]:
        raise UserError(f"{artefact}: is in the layout {layout}, which the app can't load: export with --layout app")
    check_parts(artefact, document)


def _missing_or_resized(artefact: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    findings = []
    for name, entry in files.items():
        path = artefact / name
        if path.is_symlink() or not path.is_file():
            findings.append(f"{name}: " + ("missing" if not os.path.lexists(path) else "not a plain file any more"))
        elif path.stat().st_size != entry["size"]:
            findings.append(f"{name}: changed: {path.stat().st_size} bytes, expected {entry['size']}")
    return findings


def _extra(artefact: Path, listed: set[str]) -> list[str]:
    """Files and folders that the manifest does not have, but for what macOS adds."""
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    names = [path.relative_to(artefact).as_posix() for path in sorted(artefact.rglob("*")) if not is_macs(path.name)]
    return [name for name in names if name not in listed and name not in folders]


def _listed_files(document: Mapping[str, Any]) -> set[str]:
    return {contract.MANIFEST, *document["files"]}


def _is_entry(name: str, entry: Any) -> bool:
    """A relative path that stays inside, and a sha256 and size."""
    inside = bool(name) and not name.startswith("/") and ".." not in name.split("/") and not set("\\\0") & set(name)
    sized = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("size")) is int
    return inside and sized


def hash_file(path: Path, advance: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """The file's sha256 and size. `advance(n)` after every n bytes."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        chunk = memoryview(bytearray(min(_CHUNK, max(1, path.stat().st_size))))
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            size += count
            if advance is not None:
                advance(count)
    return {"sha256": digest.hexdigest(), "size": size}


def _canonical(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _self_hash(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({key: value for key, value in document.items() if key != _SELF})).hexdigest()
