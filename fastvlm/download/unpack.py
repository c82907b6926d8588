"""Unpack a zip archive from outside: only plain files, only below the folder, no bombs, sizes and CRCs checked."""

import hashlib
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from fastvlm.common.errors import UserError
from fastvlm.common.files import is_macs
from fastvlm.common.units import format_bytes
from fastvlm.download.fetch import CHUNK, Report, need_disk, silent

MAX_ENTRIES = 10_000
MAX_RATIO = 10  # unpacked/archive bytes: weights deflate to 0.5-0.95 of their size, so ten times is no checkpoint
SMALL = 64 << 20  # bytes that may be unpacked whatever the ratio
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError, ValueError)


def unpack(path: Path, folder: Path, report: Report = silent) -> dict[str, dict[str, Any]]:
    """Unpack the zip at `path` into the new folder `folder`; returns {file: {"size": bytes, "sha256": hex}}.

    One top folder around everything is taken off. UserError for a broken or unsafe archive, with nothing left behind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = plan(archive, path.stat().st_size)
            _check_count(path, len(archive.infolist()))
            return _extract(archive, wanted, folder, report)
    except BROKEN as error:
        shutil.rmtree(folder, ignore_errors=True)
        with open(path, "rb") as file:
            start = file.read(12)
        begins = "" if start.startswith(b"PK") else f" (it begins with {start!r})"
        raise UserError(f"broken archive: {error}{begins}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def plan(archive: zipfile.ZipFile, archive_size: int) -> dict[str, zipfile.ZipInfo]:
    """The files to unpack as {path below the target: entry}; UserError with its faults (the first 20 of them)."""
    entries = [entry for entry in archive.infolist() if not _finder_junk(entry)]
    names = [entry.filename for entry in entries if not entry.is_dir()]
    faults = [f"{entry.orig_filename!r} is {fault}" for entry in entries for fault in _entry_faults(entry)]
    faults += _clashes([entry.filename for entry in entries], names)
    total = sum(entry.file_size for entry in entries)
    if total > max(SMALL, MAX_RATIO * archive_size):
        faults.append(f"{format_bytes(archive_size)} unpack to {format_bytes(total)}, a zip bomb")
    if not 1 <= len(names) <= MAX_ENTRIES or len(entries) > MAX_ENTRIES:
        faults.append(f"it holds {len(names)} files, expected 1 to {MAX_ENTRIES}")
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(f"unsafe archive, nothing unpacked: {'; '.join(faults[:20])}{more}")
    nested = len({name.split("/")[0] for name in names}) == 1 and all("/" in name for name in names)
    return {e.filename.split("/", 1)[1] if nested else e.filename: e for e in entries if not e.is_dir()}


def name_faults(name: str) -> list[str]:
    """The faults of a '/'-separated file name from outside, which is to be used below a folder of ours."""
    parts = name.removesuffix("/").split("/")
    checks = {
        "an absolute path": name.startswith("/"),
        "outside the folder": ".." in parts,
        "an irregular path": "." in parts or "" in parts[1:] or name in ("", "/"),
        "a name with forbidden characters": any(ord(c) < 32 or c in '\\:*?"<>|\x7f' for c in name),
        "too long a name": len(name) > 400 or any(len(part.encode(errors="replace")) > 200 for part in parts),
    }
    return [fault for fault, applies in checks.items() if applies]


def _entry_faults(entry: zipfile.ZipInfo) -> list[str]:
    faults, mode = name_faults(entry.orig_filename), entry.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        faults.append("a symbolic link" if stat.S_ISLNK(mode) else "a device or other special file")
    return faults


def _clashes(names: list[str], files: list[str]) -> list[str]:
    """Names that would become one path on a Mac, whose file system ignores case and Unicode form."""

    def key(name: str) -> str:
        return unicodedata.normalize("NFC", name.rstrip("/")).casefold()

    parents = {str(parent) for name in names for parent in PurePosixPath(key(name)).parents}
    twice = [f"{name!r} is there more than once" for name, n in Counter(map(key, names)).items() if n > 1]
    return twice + [f"{name!r} is both a file and a folder" for name in files if key(name) in parents]


def _check_count(path: Path, count: int) -> None:
    """The number of entries against the end record's, which zipfile ignores: a damaged directory can hide a file."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (22 + 0xFFFF)))  # the record and its longest comment (APPNOTE 4.3.16)
        tail = file.read()
    announced = int.from_bytes(tail[tail.rindex(b"PK\x05\x06") :][10:12], "little")
    if announced not in (count, 0xFFFF):  # 0xFFFF: more than fit, or the number is in the zip64 record
        raise zipfile.BadZipFile(f"its directory lists {count} entries, its end record {announced}")


def _finder_junk(entry: zipfile.ZipInfo) -> bool:
    """Whether a Mac's Finder put it there: resource forks and view settings."""
    parts = entry.filename.split("/")
    return parts[0] == "__MACOSX" or is_macs(parts[-1])


def _extract(
    archive: zipfile.ZipFile, wanted: dict[str, zipfile.ZipInfo], folder: Path, report: Report
) -> dict[str, dict[str, Any]]:
    done, total = 0, sum(entry.file_size for entry in wanted.values())
    need_disk(folder.parent, total)
    files = {}
    for name, entry in wanted.items():
        path, digest, size = folder / name, hashlib.sha256(), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, open(path, "xb") as file:
            while chunk := source.read(CHUNK):  # raises at the end if the CRC is wrong
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
                report(done + size, total)
        if size != entry.file_size:
            raise zipfile.BadZipFile(f"{name} has {size} bytes, announced {entry.file_size}")
        done += size
        files[name] = {"size": size, "sha256": digest.hexdigest()}
    return files
