"""The three assets of a Core AI bundle: their files, and what Apple's runtime says of their functions."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mode
from typing import Any

from app_bridge.app.engine import EngineFacts
from app_bridge.rules import finding
from app_bridge.validation.check_config import integer, value_at
from app_bridge.validation.subject import Subject, kind_of
from fastvlm.common.cli import progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import real_path
from fastvlm.common.findings import Finding, Steps
from model_export.artefact import hash_file
from model_export.coreai import contract
from model_export.coreai.contract import OPEN, Function, Tensor
from model_export.coreai.process import Runtime, RuntimeEnded

Interfaces = dict[str, Function]  # role -> what the engine calls of its asset
_CACHE_RANKS = (4, 5)  # [batch, heads, context, head], and with the layers in front
# The rule of an axis that metadata.json, or another asset, gives the size of.
_AXES = {
    ("vision", "input", 0): {2: "image-size", 3: "image-size"},
    ("vision", "output", 0): {1: "image-token-count", 2: "embedding-width"},
    ("embedding", "output", 0): {2: "embedding-width"},
    ("main", "input", 0): {2: "embedding-width"},
    ("main", "output", 0): {2: "vocab-size"},
}


def check_assets(subject: Subject, metadata: Mapping[str, Any], ours: bool) -> Steps[Interfaces]:
    """Check the assets' files and load what is sound, each function in a child process; return their interfaces."""
    found: Interfaces = {}
    with progress("load in Apple's runtime"):
        loader = _Loader()
        for role in contract.ASSETS:
            name = value_at(metadata, f"assets.{role}")
            if isinstance(name, str) and (yield from _check_files(subject, name, ours)):
                yield from loader.load(subject, role, name, _entry(metadata), found)
    return found


def _entry(metadata: Mapping[str, Any]) -> str:
    """The decoder's function: the first that function_map has for main."""
    names = value_at(metadata, "language.function_map.main")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else contract.FUNCTION


def inside(subject: Subject, name: str) -> bool:
    """Whether a name in metadata.json leads to something below the bundle."""
    path = Path(name)
    below = not path.is_absolute() and ".." not in path.parts and bool(path.parts)
    return below and real_path(subject.folder / name).is_relative_to(real_path(subject.folder))


def _check_files(subject: Subject, name: str, ours: bool) -> Steps[bool]:
    """Return whether an asset's files are there, and its program what its hash says: the runtime doesn't look."""
    if not inside(subject, name):
        yield finding("asset-outside", f"{contract.METADATA}: assets", repr(name))
        return False
    folder = subject.folder / name
    compiled = name if name.endswith(f"{contract.SUFFIX}c") else f"{name}c"
    if (subject.folder / compiled).is_dir() and (compiled == name or not folder.exists()):
        subject.checked.append(f"{compiled}: is compiled, for a Mac alone to read: its interface is not known")
        return False
    if not folder.is_dir():
        yield finding("file-missing/asset", name, "no such folder")
        return False
    about = yield from subject.read_json(f"{name}/{contract.METADATA}")
    if about is not None and about.get("assetVersion") != contract.ASSET_VERSION:
        where, got = f"{name}/{contract.METADATA}: assetVersion", kind_of(about.get("assetVersion"))
        yield finding("asset-version", where, got, version=contract.ASSET_VERSION)
        about = None
    program, stored = folder / contract.PROGRAM, folder / contract.PROGRAM_HASH
    if absent := [path.name for path in (program, stored) if path.is_symlink() or not path.is_file()]:
        yield finding("file-missing/asset", f"{name}/{', '.join(absent)}", "no plain file")
        return False
    if stored.stat().st_size != 32 or stored.read_bytes().hex() != hash_file(program)["sha256"]:
        yield finding("asset-hash", f"{name}/{contract.PROGRAM}", f"another sha256 than in {contract.PROGRAM_HASH}")
        return False
    return about is not None


class _Loader:
    """Apple's runtime, begun again after each crash."""

    def __init__(self) -> None:
        self.runtime = Runtime()

    def load(self, subject: Subject, role: str, name: str, entry: str, found: Interfaces) -> Steps[None]:
        """Add to `found` what the engine calls of an asset."""
        folder = subject.folder / name
        try:
            wanted = entry if role == "main" else contract.FUNCTION
            names, function = self.runtime.load(role, folder, wanted)
            if role == "embedding" and contract.EMBED in names:
                wanted = contract.EMBED
                _, function = self.runtime.load(role, folder, wanted)
            if role == "vision" and contract.ENCODE in names:
                wanted = contract.PROJECT
                _, encode = self.runtime.load(role, folder, contract.ENCODE)
                _, function = self.runtime.load("projector", folder, wanted)
                if encode is not None and function is not None:
                    yield from _check_projector(name, encode, function)
                    function = Function(encode.inputs, function.outputs, encode.states + function.states)
        except (UserError, RuntimeEnded) as error:
            crashed = isinstance(error, RuntimeEnded)
            got = str(error).rpartition("Apple's runtime ")[2]
            yield finding("asset-crashes" if crashed else "asset-refused", name, got)
            if crashed:
                self.runtime = Runtime()
            return
        if function is None:
            yield finding("function-missing", name, f"functions {', '.join(names) or 'none'}", name=wanted)
            return
        found[role] = function
        subject.checked.append(f"{name}: loaded in Apple's runtime (the interpreter in coreai-core)")


def _check_projector(name: str, encode: Function, project: Function) -> Iterator[Finding]:
    """The engine gives the projector what the encoder gave, as it is."""
    given, taken = encode.outputs[:1], project.inputs[:1]
    if [(each.dtype, each.shape) for each in given] != [(each.dtype, each.shape) for each in taken]:
        yield finding("project-input", f"{name}: {contract.PROJECT}", _shown(taken), given=_shown(given))


def check_interfaces(
    subject: Subject, metadata: Mapping[str, Any], found: Interfaces, facts: EngineFacts, ours: bool
) -> Iterator[Finding]:
    """Hold what the engine calls to what it gives and takes, in the order that counts."""
    names = {role: value_at(metadata, f"assets.{role}") for role in found}
    wanted = contract.interfaces(_shape(metadata, found))
    counts = {"input": facts.inputs, "output": 1, "state": facts.states}
    for role, function in found.items():
        groups = {"input": function.inputs, "output": function.outputs, "state": function.states}
        expected = {"input": wanted[role].inputs, "output": wanted[role].outputs, "state": wanted[role].states}
        for kind, tensors in groups.items():
            count = counts[kind] if role == "main" else len(expected[kind])
            if len(tensors) < count or (len(tensors) > count and (kind != "output" or ours)):
                yield finding(f"{kind}-count", f"{names[role]}: {kind}s", _shown(tensors), count=count)
                continue
            for place, (tensor, other) in enumerate(zip(tensors, expected[kind])):
                where = f"{names[role]}: {kind} {tensor.name}"
                if ours and tensor.name != other.name:
                    yield finding(f"{kind}-name/bundle", where, f"this as {kind} {place + 1}", name=other.name)
                if tensor.dtype != other.dtype:
                    yield finding(f"{kind}-dtype", where, tensor.dtype, dtype=other.dtype)
                if kind != "state":
                    yield from _check_shape(kind, where, tensor, other, _AXES.get((role, kind, place), {}))
    if "main" in found and len(found["main"].states) == facts.states:
        yield from _check_cache(names["main"], found["main"].states, metadata)
    if found.keys() >= contract.ASSETS.keys():
        subject.checked.append(
            "functions, inputs, outputs and states: order, dtypes, shapes, and against metadata.json"
        )


def _check_shape(kind: str, where: str, tensor: Tensor, other: Tensor, axes: Mapping[int, str]) -> Iterator[Finding]:
    got, want = tensor.shape, other.shape
    differing = [place for place in range(len(want)) if len(got) == len(want) and got[place] != want[place]]
    # the engine fills in the picture's open axes itself
    differing = [place for place in differing if not (axes.get(place) == "image-size" and got[place] == OPEN)]
    if len(got) != len(want) or any(place not in axes or got[place] == OPEN for place in differing):
        yield finding(f"{kind}-shape/bundle", where, _sizes(got), shape=_sizes(want))
    elif differing:
        place = differing[0]
        yield finding(axes[place], where, f"{got[place]} in {_sizes(got)}", size=want[place])


def _check_cache(name: str, states: tuple[Tensor, ...], metadata: Mapping[str, Any]) -> Iterator[Finding]:
    """Both caches have one shape, whose last axis but one alone may be open: the engine resizes that one."""
    first = states[0].shape
    where = f"{name}: state {states[0].name}"
    if (
        any(state.shape != first for state in states)
        or len(first) not in _CACHE_RANKS
        or OPEN in first[:-2] + first[-1:]
    ):
        yield finding("state-shape", where, " and ".join(_sizes(state.shape) for state in states))
        return
    length, context = integer(value_at(metadata, "language.max_context_length")), first[-2]
    if length is None or context in (OPEN, length):
        return
    yield finding("cache-context" if context < length else "cache-context/longer", where, context, length=length)


def _shape(metadata: Mapping[str, Any], found: Interfaces) -> contract.Shape:
    """The sizes that decide the interfaces: metadata.json's, the width that most assets have, the cache as it is."""

    def size(path: str, role: str, kind: str, axis: int) -> int:
        value = integer(value_at(metadata, path))
        return value if value is not None else _axis(found, role, kind, axis)

    places = (("embedding", "outputs", 2), ("main", "inputs", 2), ("vision", "outputs", 2))
    widths = [width for place in places if (width := _axis(found, *place)) > 0]
    return contract.Shape(
        image_size=size("vision.image_size", "vision", "inputs", 2),
        image_tokens=size("vision.image_token_count", "vision", "outputs", 1),
        hidden=mode(widths) if widths else OPEN,
        vocabulary=size("language.vocab_size", "main", "outputs", 2),
        layers=1, kv_heads=1, head_dim=1, context=1,
    )  # fmt: skip


def _axis(found: Interfaces, role: str, kind: str, axis: int) -> int:
    tensors = getattr(found.get(role), kind, ())
    return tensors[0].shape[axis] if tensors and len(tensors[0].shape) > axis else OPEN


def _sizes(shape: tuple[int, ...]) -> str:
    return f"[{', '.join('?' if size == OPEN else str(size) for size in shape)}]"


def _shown(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{each.name} {each.dtype} {_sizes(each.shape)}" for each in tensors) or "none"
