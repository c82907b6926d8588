"""The weight files of a checkpoint folder: which they are, what their headers say, and reading one tensor at a time.

Headers are checked before any library maps a file, because a lying one is a crash there. Nothing is ever written, and
nothing is executed: safetensors hold data only, and old `.bin` files go through `torch.load(weights_only=True)`.
"""

import math
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm.common.documents import Fault, is_lfs_pointer, lfs_fault, parse_json, read_json, shown
from fastvlm.common.dtypes import ARRAYS, ITEMSIZE, SAFETENSORS_DTYPES, Array, as_array, as_tensor, bits_of, dtype_name
from fastvlm.common.errors import UserError

if TYPE_CHECKING:
    import torch

_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(
    r"(?P<stem>model|pytorch_model)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.safetensors|\.bin)"
)
_MAX_DIMENSIONS = 8  # a convolution's kernel has 4
_MAX_ELEMENTS = 1 << 48  # of one tensor; no file holds as many


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is; `source` is its name in the file, `offset` its first byte (not for .bin).

    `extended`: it is read with a row more than the file has, which repeats the first one.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    source: str
    offset: int = -1
    extended: bool = False

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
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _handles: dict[Path, Any] = field(default_factory=dict)

    def read(self, info: TensorInfo, mapped: bool = False, alone: bool = False) -> "torch.Tensor":
        """The tensor in memory of its own, or mapped from the file (no copy, and the process grows as it is used);
        `alone`: in a mapping that ends with it."""
        if not mapped:
            whole = replace(info, shape=info.shape or (1,))
            return as_tensor(self.rows(whole, 0, whole.shape[0]).reshape(info.shape))
        if info.extended:
            import torch

            rows = self.read(_plain(info), mapped, alone)
            return torch.cat([rows, rows[:1]])
        from safetensors import safe_open

        if alone and info.offset >= 0:
            with safe_open(info.file, "pt", device="cpu") as file:
                found: torch.Tensor = file.get_tensor(info.source)
                return found
        handle = self._handles.get(info.file)
        if handle is None:
            handle = load_bin(info.file) if info.offset < 0 else safe_open(info.file, "pt", device="cpu")
            self._handles[info.file] = handle
        tensor: torch.Tensor = handle[info.source] if isinstance(handle, Mapping) else handle.get_tensor(info.source)
        return tensor

    def rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        """Rows from `start` to `stop` or the last one, in memory of their own; bfloat16 as its bits, uint16.

        Of a mapped file, every page once read would count as ours.
        """
        if info.extended:
            inner, last = _plain(info), info.shape[0] - 1
            if stop <= last:
                return self.rows(inner, start, stop)
            return np.concatenate([self.rows(inner, min(start, last), last), self.rows(inner, 0, 1)])
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

    def unmap(self) -> None:
        """Let go of mapped files; what tensors use of them stays."""
        self._handles.clear()


def _plain(info: TensorInfo) -> TensorInfo:
    """An extended tensor as it is in the file."""
    return replace(info, shape=(info.shape[0] - 1, *info.shape[1:]), extended=False)


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
        _scan_shards(weights)
        return weights
    if ignored:
        weights.warnings.append(f"several sets of weights: reading {present[0].name}, ignoring {', '.join(ignored)}")
    weights.tensors = _scan_file(weights, present[0]) or {}
    return weights


def _scan_shards(weights: Weights) -> None:
    """Shards without an index: their names say how many there are."""
    names = sorted(path.name for path in weights.folder.iterdir() if path.is_file())
    found = [match for name in names if (match := _SHARD.fullmatch(name))]
    sets = sorted({(match["stem"], match["count"], match["suffix"]) for match in found})
    if len(sets) != 1:
        weights.faults.append(_no_weights(weights.folder, names))
        return
    stem, count, suffix = sets[0]
    numbers = {int(match["number"]) for match in found}
    if numbers != set(range(1, int(count) + 1)):
        absent = sorted(set(range(1, int(count) + 1)) - numbers)
        lost = tuple(f"{stem}-{number:05d}-of-{count}{suffix}" for number in absent)
        weights.faults.append(_missing_shards(weights.folder, lost))
        return
    weights.warnings.append(f"no {stem}{suffix}.index.json: the {len(found)} shards are complete by their names")
    for match in found:
        path = weights.folder / match.string
        weights.files.append(path)
        entries = _scan_file(weights, path) or {}
        twice = sorted(set(entries) & set(weights.tensors))
        if twice:
            weights.faults.append(Fault(f"wrong shards: {path.name} repeats tensors of another one", tuple(twice)))
        weights.tensors.update(entries)


def _no_weights(folder: Path, names: list[str]) -> Fault:
    others = [name for name in names if name.endswith((".safetensors", ".bin", ".pth"))]
    expected = "model.safetensors, pytorch_model.bin or a whole set of shards of one of them"
    if not others:
        return Fault(f"no weights: {folder} has none of {expected}; download the checkpoint again")
    return Fault(f"no usable weights: {folder} has neither {expected}; found only", tuple(others))


def _missing_shards(folder: Path, names: tuple[str, ...]) -> Fault:
    if len(names) == 1:
        return Fault(f"missing shard: {names[0]} is not in {folder}; download it")
    return Fault(f"{len(names)} missing shards: not in {folder}; download them", names)


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name and len(name.encode()) < 256


def _scan_index(weights: Weights, index: Path) -> None:
    document = read_json(index, weights.faults)
    mapping = document.get("weight_map") if isinstance(document, dict) else None
    if document is None:
        return
    if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
        weights.faults.append(Fault(f"wrong index: {index.name} has no weight_map of names to files"))
        return
    counts = Counter(mapping.values())
    outside = sorted(name for name in counts if not _is_file_name(name))
    if outside:
        weights.faults.append(Fault(f"wrong index: {index.name} names files outside the folder", tuple(outside)))
        return
    found: dict[str, TensorInfo] = {}
    readable: set[str] = set()
    missing = []
    for name in sorted(counts):
        path = index.parent / name
        if not path.is_file():
            missing.append(f"{name} (with {counts[name]} tensors)")
            continue
        weights.files.append(path)
        entries = _scan_file(weights, path)
        if entries is not None:
            readable.add(name)
            found.update(entries)
    if missing:
        weights.faults.append(_missing_shards(index.parent, tuple(missing)))
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
    entries = _parse_header(raw)
    spans = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    kinds = {name: entry["dtype"] for name, entry in entries.items()}
    _check_spans(spans, shapes, kinds, size - 8 - length)
    starts = {name: 8 + length + begin for begin, _, name in spans}
    return {
        name: TensorInfo(SAFETENSORS_DTYPES[kinds[name]], shapes[name], path, name, starts[name]) for name in entries
    }


def _parse_header(raw: bytes) -> dict[str, dict[str, Any]]:
    """The header's tensors, their values of the right types: at least as strict as the safetensors library."""
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it doesn't begin with {")
        header = parse_json(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"lying safetensors header: not the JSON that the format asks for ({error})") from error
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise HeaderError("lying safetensors header: __metadata__ is not a mapping of text to text")
    for name, entry in header.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise HeaderError(f"lying safetensors header: {shown(name)} has no dtype")
        for key, most in (("shape", _MAX_DIMENSIONS), ("data_offsets", 2)):
            numbers = entry.get(key)
            if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
                raise HeaderError(
                    f"lying safetensors header: {shown(name)} has {key} {shown(numbers)}, expected a list of whole"
                    " numbers"
                )
            if len(numbers) > most or (key == "data_offsets" and len(numbers) != most):
                raise HeaderError(
                    f"lying safetensors header: {shown(name)} has {len(numbers)} numbers as {key}, expected {most}"
                )
        if math.prod(entry["shape"]) > _MAX_ELEMENTS:
            raise HeaderError(f"lying safetensors header: {shown(name)} has shape {entry['shape']}: more than any file")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(
            f"{shown(next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1))} twice"
        )
    return found


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _check_spans(spans: list[Any], shapes: dict[str, tuple[int, ...]], kinds: dict[str, str], available: int) -> None:
    unknown = sorted({kind for kind in kinds.values() if kind not in SAFETENSORS_DTYPES})
    if unknown:
        raise HeaderError(f"tensors of unsupported types {', '.join(unknown)}; expected F32, F16 or BF16")
    sizes = {name: math.prod(shape) * ITEMSIZE[SAFETENSORS_DTYPES[kinds[name]]] for name, shape in shapes.items()}
    beyond = [name for _, end, name in spans if end > available and sum(sizes.values()) <= available]
    if beyond:
        raise HeaderError(f"lying safetensors header: {beyond[0]} is said to end beyond the file's {available} bytes")
    position = 0
    for begin, end, name in spans:
        if begin != position or end - begin != sizes[name]:
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


def load_bin(path: Path) -> "dict[str, torch.Tensor]":
    """A PyTorch `.bin` state dict, weights only, memory-mapped where its format (zip, since torch 1.6) allows it."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch raises many types for damaged or unsafe files; all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HeaderError(f"not a readable weights-only PyTorch file ({reason[:200]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise HeaderError("not a state dict: expected a mapping of names to tensors")
    try:
        "".join(state).encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        raise HeaderError("not a state dict: a name in it is no text; save it again with names of text") from error
    odd = [name for name, value in state.items() if value.layout != torch.strided or value.is_meta]
    if odd:
        raise HeaderError(f"{shown(odd[0])} is no dense tensor with values; save it again as one")
    return state
