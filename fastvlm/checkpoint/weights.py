"""The weight files of a checkpoint folder: which they are, what their headers say, and reading one tensor at a time.

Nothing is ever written, and nothing is executed: safetensors hold data only, and old `.bin` files go through
`torch.load(weights_only=True)`.
"""

import math
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from fastvlm.common.documents import Unreadable, is_lfs_pointer, lfs_pointer, load, loads, shown
from fastvlm.common.dtypes import (
    ARRAYS,
    ITEMSIZE,
    SAFETENSORS_DTYPES,
    Array,
    as_array,
    as_float32,
    as_tensor,
    bits_of,
    dtype_name,
)
from fastvlm.common.errors import UserError
from fastvlm.common.findings import Finding, Steps

if TYPE_CHECKING:
    import torch

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(
    r"(?P<stem>model|pytorch_model)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.safetensors|\.bin)"
)
_AGAIN = "download it again"
_KEPT = 4  # factors of adapters: those of the tensor that is read, and of the next


class Change(Protocol):
    """What an adapter makes of a tensor (`fastvlm.checkpoint.merging`)."""

    def rows(self, weights: "Weights", start: int, stop: int) -> Array:
        """Rows `start` to `stop` of the merged tensor, float32, in memory of their own."""
        ...


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is; `source` is its name in the file, `offset` its first byte (not for .bin).

    `extended`: it is read with a row more than the file has, which repeats the first one. `change`: it is read merged
    with an adapter, in float32, whatever the file has.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    source: str
    offset: int = -1
    extended: bool = False
    change: Change | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * ITEMSIZE.get(self.dtype, 0)  # a .bin file may hold what no checkpoint may


@dataclass
class Weights:
    """Every tensor of a folder by its source name; `read` maps one into memory."""

    folder: Path
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    _handles: dict[Path, Any] = field(default_factory=dict)
    _kept: dict[tuple[Path, str], Array] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, info: TensorInfo, mapped: bool = False, alone: bool = False) -> "torch.Tensor":
        """The tensor in memory of its own, or mapped from the file (no copy, and the process grows as it is used);
        `alone`: in a mapping that ends with it."""
        if not mapped or info.change is not None:
            whole = replace(info, shape=info.shape or (1,))
            return as_tensor(self.rows(whole, 0, whole.shape[0]).reshape(info.shape))
        if info.extended:
            import torch

            rows = self.read(_plain(info), mapped, alone)
            return torch.cat([rows, rows[:1]])
        if alone and info.offset >= 0:
            with safe_open(info.file, "pt", device="cpu") as file:
                alone_tensor: torch.Tensor = file.get_tensor(info.source)
                return alone_tensor
        handle = self._handles.get(info.file)
        if handle is None:
            handle = load_bin(info.file) if info.offset < 0 else safe_open(info.file, "pt", device="cpu")
            self._handles[info.file] = handle
        tensor: torch.Tensor = handle[info.source] if isinstance(handle, Mapping) else handle.get_tensor(info.source)
        return tensor

    def rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        """Rows from `start` to `stop` or the last one, in memory of their own; bfloat16 as its bits, uint16.

        Read, not mapped: every page read of a mapped file would count as this process's memory.
        """
        if info.extended:
            inner, last = _plain(info), info.shape[0] - 1
            if stop <= last:
                return self.rows(inner, start, stop)
            return np.concatenate([self.rows(inner, min(start, last), last), self.rows(inner, 0, 1)])
        if info.change is not None:
            return info.change.rows(self, start, max(start, min(stop, info.shape[0])))
        if info.offset < 0:  # an old .bin file, whose tensors are where PyTorch says
            tensor = self.read(info, mapped=True)
            return as_array(tensor.reshape(info.shape)[start:stop]).copy()
        count = max(0, min(stop, info.shape[0]) - start)
        part = np.empty((count, *info.shape[1:]), ARRAYS.get(info.dtype, info.dtype))
        rest = bits_of(part, np.uint8).data
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + start * math.prod(info.shape[1:]) * part.itemsize)
            while rest:  # one read is at most 2 GiB on Linux
                count = file.readinto(rest)
                if not count:
                    raise UserError(f"{info.file} became shorter while it was read; is it still being written?")
                rest = rest[count:]
        return part

    def floats(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Array:
        """`rows` in float32; by default all of them."""
        whole = replace(info, shape=info.shape or (1,))
        return as_float32(self.rows(whole, start, whole.shape[0] if stop is None else stop))

    def kept(self, info: TensorInfo) -> Array:
        """`floats` of a small tensor, kept until some others were asked for: an adapter's factors are used for a few
        rows at a time."""
        key = (info.file, info.source)
        with self._lock:
            if key not in self._kept:
                while len(self._kept) >= _KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = self.floats(info)
            return self._kept[key]

    def unmap(self) -> None:
        """Unmap files, but where a tensor still uses the memory."""
        self._handles.clear()
        with self._lock:
            self._kept.clear()


def _plain(info: TensorInfo) -> TensorInfo:
    """An extended tensor as it is in the file."""
    return replace(info, shape=(info.shape[0] - 1, *info.shape[1:]), extended=False)


def scan(folder: Path) -> Steps[Weights]:
    """Find the weight files of `folder` and read their headers; yields a finding for each fault in them."""
    weights = Weights(folder)
    present = [folder / name for name in _SINGLE if (folder / name).is_file()]
    indexes = [folder / f"{name}.index.json" for name in _SINGLE if (folder / f"{name}.index.json").is_file()]
    if present:
        weights.files = present[:1]
        if ignored := [path.name for path in present[1:] + indexes]:
            only = f"{present[0].name} alone"
            yield Finding("weights-twice", present[0].name, f"{', '.join(ignored)} beside it", only, severity="warning")
        weights.tensors = (yield from scan_file(weights, present[0])) or {}
    elif indexes:
        yield from _scan_index(weights, indexes[0])
    else:
        yield from _scan_shards(weights)
    return weights


def _scan_shards(weights: Weights) -> Steps[None]:
    """Shards without an index: their names say how many there are."""
    folder = weights.folder
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("._"))
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    sets = sorted({(match["stem"], match["count"], match["suffix"]) for match in shards})
    if len(sets) != 1:
        others = tuple(name for name in names if name.endswith((".safetensors", ".bin", ".pth")))
        expected = "model.safetensors, pytorch_model.bin or a whole set of shards of one of them"
        remedy = "found only" if others else "download the checkpoint again"
        yield Finding("weights-missing", str(folder), "no weights", expected, remedy, details=others)
        return
    stem, count, suffix = sets[0]
    absent = set(range(1, int(count) + 1)) - {int(match["number"]) for match in shards}
    if absent:
        yield _shards_missing(folder, (f"{stem}-{number:05d}-of-{count}{suffix}" for number in sorted(absent)))
        return
    index = f"{stem}{suffix}.index.json"
    got = f"no index; the {len(shards)} shards are complete by their names"
    yield Finding("index-missing", index, got, severity="warning")
    for match in shards:
        path = folder / match.string
        weights.files.append(path)
        entries = (yield from scan_file(weights, path)) or {}
        if twice := sorted(set(entries) & set(weights.tensors)):
            yield Finding("shards-wrong", path.name, "tensors of another shard, too", details=tuple(twice))
        weights.tensors.update(entries)


def _shards_missing(folder: Path, names: Iterable[str]) -> Finding:
    details = tuple(names)
    number = f"{len(details)} missing shard{'s' * (len(details) > 1)}"
    return Finding("shard-missing", str(folder), number, remedy="download what is missing", details=details)


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name and len(name.encode()) < 256


def _scan_index(weights: Weights, index: Path) -> Steps[None]:
    try:
        document = load(index)
    except Unreadable as error:
        yield error.finding(index.name)
        return
    mapping = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
        yield Finding("index-wrong", index.name, shown(mapping), "a weight_map of names to files")
        return
    counts = Counter(mapping.values())
    if outside := sorted(name for name in counts if not _is_file_name(name)):
        yield Finding("index-wrong", index.name, "names outside the folder", "files beside it", details=tuple(outside))
        return
    present = [name for name in sorted(counts) if (index.parent / name).is_file()]
    if missing := sorted(set(counts) - set(present)):
        yield _shards_missing(index.parent, (f"{name} (with {counts[name]} tensors)" for name in missing))
    readable: set[str] = set()
    for name in present:
        weights.files.append(index.parent / name)
        entries = yield from scan_file(weights, index.parent / name)
        if entries is not None:
            readable.add(name)
            weights.tensors.update(entries)
    held = weights.tensors
    absent = [
        name
        for name, file in mapping.items()
        if file in readable and (name not in held or held[name].file.name != file)
    ]
    unlisted = sorted(set(held) - set(mapping))
    for names, expected in ((absent, "only tensors that their file holds"), (unlisted, "every tensor of the shards")):
        if names:
            got = f"{len(names)} {'other' if names is absent else 'unlisted'} tensors"
            yield Finding("index-wrong", index.name, got, expected, details=tuple(names))


def scan_file(weights: Weights, path: Path) -> Steps[dict[str, TensorInfo] | None]:
    """The tensors of one file, or None (and a finding) if it can't be used."""
    try:
        if is_lfs_pointer(path):
            raise lfs_pointer(path)
        if path.suffix != ".bin":
            return read_header(path)
        loaded = weights._handles[path] = load_bin(path)
        return {name: TensorInfo(dtype_name(t.dtype), tuple(t.shape), path, name) for name, t in loaded.items()}
    except Unreadable as error:
        yield error.finding(path.name)
    except OSError as error:
        yield Finding("file-unreadable", path.name, error.strerror or str(error))
    return None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file. Raises Unreadable ("file-truncated", "header-invalid", "dtype-unsupported").

    The library checks the header against the file's size, and does so before anything is read by it. Format
    (huggingface.co/docs/safetensors): 8 bytes little-endian header length, JSON header, data without holes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise Unreadable(
                "file-truncated", f"{size} bytes", f"a header of {length} bytes behind the first 8", _AGAIN
            )
        raw = file.read(length)
    try:
        header = loads(raw)
    except Unreadable as error:
        raise Unreadable("header-invalid", f"{error} as the header", "a safetensors file", _AGAIN) from error
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        if "incomplete metadata" in str(error):  # offsets and shapes agree, the file has another size
            end = 8 + length + max(entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry)
            rule = "file-truncated" if size < end else "header-invalid"
            raise Unreadable(rule, f"{size} bytes", f"{end} by its header", _AGAIN) from error
        raise Unreadable("header-invalid", str(error), "a safetensors file", _AGAIN) from error
    header.pop("__metadata__", None)
    if unknown := sorted({entry["dtype"] for entry in header.values()} - set(SAFETENSORS_DTYPES)):
        raise Unreadable("dtype-unsupported", f"tensors of type {', '.join(unknown)}", "F32, F16 or BF16")
    return {
        name: TensorInfo(
            SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), path, name, 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def load_bin(path: Path) -> "dict[str, torch.Tensor]":
    """A PyTorch `.bin` state dict, weights only, memory-mapped where its format (zip, since torch 1.6) allows it.
    Raises Unreadable ("pickle-unreadable", "state-dict-invalid")."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch raises many types for damaged or unsafe files; all mean the same here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unreadable("pickle-unreadable", reason[:200], "a weights-only PyTorch file", _AGAIN) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise Unreadable("state-dict-invalid", type(state).__name__, "a mapping of names to tensors")
    try:
        "".join(state).encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        raise Unreadable("state-dict-invalid", "a name that is no text", "names of text", "save it again") from error
    odd = [name for name, value in state.items() if value.layout != torch.strided or value.is_meta]
    if odd:
        raise Unreadable("state-dict-invalid", shown(odd[0]), "dense tensors with values", "save it again as one")
    return state
