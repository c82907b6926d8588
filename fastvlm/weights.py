"""The weight files of a checkpoint folder: which they are, what their headers say, and reading one tensor at a time.

Headers are checked before any library maps a file, because a lying one is a crash there. Nothing is ever written, and
nothing is executed: safetensors hold data only, and old `.bin` files go through `torch.load(weights_only=True)`.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastvlm.dtypes import SAFETENSORS_DTYPES, dtype_name
from fastvlm.errors import UserError
from fastvlm.files import load_json

LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_SINGLE = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Fault:
    """Something that makes the input unusable: one line, and where it applies the whole list of names."""

    line: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.details:
            return self.line
        shown, rest = ", ".join(self.details[:20]), len(self.details) - 20
        more = f" and {rest} more (`python -m fastvlm doctor` lists all)" if rest > 0 else ""
        return f"{self.line}: {shown}{more}"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is; `source` is its name in the file, `offset` its first byte (not for .bin)."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    source: str
    offset: int = -1

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * getattr(torch, self.dtype).itemsize


@dataclass
class Weights:
    """Every tensor of a folder by its source name; `read` maps one into memory."""

    folder: Path
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _handles: dict[Path, Any] = field(default_factory=dict)

    def read(self, info: TensorInfo, mapped: bool = False) -> torch.Tensor:
        """The tensor in memory of its own, or mapped from the file (no copy, and the process grows as it is used)."""
        if mapped or info.offset < 0:
            handle = self._handles.get(info.file)
            if handle is None:
                handle = load_bin(info.file) if info.offset < 0 else safe_open(info.file, "pt", device="cpu")
                self._handles[info.file] = handle
            tensor = handle[info.source] if isinstance(handle, Mapping) else handle.get_tensor(info.source)
            return tensor if mapped else tensor.clone()
        tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            rest = tensor.reshape(-1).view(torch.uint8).numpy().data
            while rest:  # one read is at most 2 GiB on Linux
                count = file.readinto(rest)
                if not count:
                    raise UserError(f"{info.file} became shorter while it was read; is it still being written?")
                rest = rest[count:]
        return tensor


def scan(folder: Path) -> Weights:
    """Find the weight files of `folder` and read their headers; whatever is wrong is in `.faults`."""
    weights = Weights(folder)
    present = [folder / name for name in _SINGLE if (folder / name).is_file()]
    indexes = [folder / f"{name}.index.json" for name in _SINGLE if (folder / f"{name}.index.json").is_file()]
    if present:
        weights.files = present[:1]
        ignored = [path.name for path in present[1:] + indexes]
    elif indexes:
        _scan_index(weights, indexes[0])
        return weights
    else:
        weights.faults.append(_no_weights(folder))
        return weights
    if ignored:
        weights.warnings.append(f"several sets of weights: reading {present[0].name}, ignoring {', '.join(ignored)}")
    weights.tensors = _scan_file(weights, present[0]) or {}
    return weights


def _no_weights(folder: Path) -> Fault:
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pth") for path in folder.glob(pattern))
    expected = "model.safetensors, pytorch_model.bin or shards with model.safetensors.index.json"
    if not others:
        return Fault(f"no weights: {folder} has none of {expected}; download the checkpoint again")
    return Fault(f"no usable weights: {folder} has neither {expected}; found only", tuple(others))


def _scan_index(weights: Weights, index: Path) -> None:
    document = read_json(index, weights.faults)
    mapping = document.get("weight_map") if isinstance(document, dict) else None
    if document is None:
        return
    if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
        weights.faults.append(Fault(f"wrong index: {index.name} has no weight_map of names to files"))
        return
    outside = sorted({name for name in mapping.values() if Path(name).name != name or name in ("", ".", "..")})
    if outside:
        weights.faults.append(Fault(f"wrong index: {index.name} names files outside the folder", tuple(outside)))
        return
    found: dict[str, TensorInfo] = {}
    readable: set[str] = set()
    for name in sorted(set(mapping.values())):
        path = index.parent / name
        if not path.is_file():
            count = sum(1 for value in mapping.values() if value == name)
            weights.faults.append(Fault(f"missing shard: {name} (with {count} tensors) is not in {index.parent}"))
            continue
        weights.files.append(path)
        entries = _scan_file(weights, path)
        if entries is not None:
            readable.add(name)
            found.update(entries)
    absent, unlisted = [], sorted(set(found) - set(mapping))
    for name, file in mapping.items():
        if file in readable and (name not in found or found[name].file.name != file):
            absent.append(name)
    if absent:
        line = f"wrong index: {index.name} names {len(absent)} tensors that their file doesn't hold"
        weights.faults.append(Fault(line, tuple(absent)))
    if unlisted:
        line = f"wrong index: {index.name} doesn't name {len(unlisted)} tensors that the shards hold"
        weights.faults.append(Fault(line, tuple(unlisted)))
    weights.tensors = found


def _scan_file(weights: Weights, path: Path) -> dict[str, TensorInfo] | None:
    """The tensors of one file, or None (and a fault) if it can't be used."""
    if is_lfs_pointer(path):
        weights.faults.append(lfs_fault(path))
        return None
    try:
        if path.suffix == ".bin":
            loaded = load_bin(path)
            weights._handles[path] = loaded
            return {name: TensorInfo(dtype_name(t.dtype), tuple(t.shape), path, name) for name, t in loaded.items()}
        return read_header(path)
    except HeaderError as error:
        weights.faults.append(Fault(f"{path.name}: {error}; download it again"))
    except OSError as error:
        weights.faults.append(Fault(f"{path.name}: cannot be read: {error.strerror or error}"))
    return None


class HeaderError(Exception):
    """A weight file whose contents can't be what it says."""


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The safetensors header, checked against the file's size; HeaderError says what is wrong.

    Format (huggingface.co/docs/safetensors): 8 bytes little-endian header length, JSON header, data without holes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise HeaderError(f"truncated safetensors header: the file has {size} bytes, expected at least 8")
        if length > _MAX_HEADER:
            raise HeaderError(f"lying safetensors header: it claims {length} bytes, the limit is {_MAX_HEADER}")
        if length > size - 8:
            raise HeaderError(f"truncated safetensors header: it claims {length} bytes, the file has {size - 8} more")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted((*map(int, entry["data_offsets"]), name) for name, entry in entries.items())
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        kinds = {name: str(entry["dtype"]) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise HeaderError(f"lying safetensors header: not the JSON that the format asks for ({error})") from error
    _check_spans(spans, shapes, kinds, size - 8 - length)
    starts = {name: 8 + length + begin for begin, _, name in spans}
    return {
        name: TensorInfo(dtype_name(SAFETENSORS_DTYPES[kinds[name]]), shapes[name], path, name, starts[name])
        for name in entries
    }


def _check_spans(spans: list[Any], shapes: dict[str, tuple[int, ...]], kinds: dict[str, str], available: int) -> None:
    unknown = sorted({kind for kind in kinds.values() if kind not in SAFETENSORS_DTYPES})
    if unknown:
        raise HeaderError(f"tensors of unsupported types {', '.join(unknown)}; expected F32, F16 or BF16")
    sizes = {name: math.prod(shape) * SAFETENSORS_DTYPES[kinds[name]].itemsize for name, shape in shapes.items()}
    beyond = [name for _, end, name in spans if end > available and sum(sizes.values()) <= available]
    if beyond:
        raise HeaderError(f"lying safetensors header: {beyond[0]} is said to end beyond the file's {available} bytes")
    position = 0
    for begin, end, name in spans:
        if begin != position or end - begin != sizes[name] or min(shapes[name], default=0) < 0:
            raise HeaderError(
                f"lying safetensors header: {name} is said to be at bytes {begin}..{end}, expected {position}.."
                f"{position + sizes[name]} from its shape {list(shapes[name])} and type {kinds[name]}"
            )
        position = end
    if position > available:
        first = next(name for _, end, name in spans if end > available)
        raise HeaderError(f"truncated data: {available} bytes, the header says {position} (first lost: {first})")
    if position < available:
        raise HeaderError(f"lying safetensors header: {available - position} bytes of data belong to no tensor")


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """A PyTorch `.bin` state dict, weights only, memory-mapped where its format (zip, since torch 1.6) allows it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch raises many types for damaged or unsafe files; all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HeaderError(f"not a readable weights-only PyTorch file ({reason[:200]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise HeaderError("not a state dict: expected a mapping of names to tensors")
    return state


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git-LFS pointer instead of its content."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_MAGIC)) == LFS_MAGIC
    except OSError:
        return False


def lfs_fault(path: Path) -> Fault:
    """The fault for a pointer file."""
    return Fault(f"Git-LFS pointer: {path.name} is a pointer, not the file; run `git lfs pull` in {path.parent}")


def read_json(path: Path, faults: list[Fault]) -> Any:
    """The JSON document in `path`, or None and a fault."""
    if is_lfs_pointer(path):
        faults.append(lfs_fault(path))
        return None
    try:
        return load_json(path)
    except OSError as error:
        faults.append(Fault(f"{path.name}: cannot be read: {error.strerror or error}"))
    except (ValueError, RecursionError) as error:
        faults.append(Fault(f"{path.name}: not JSON ({error})"))
    return None
