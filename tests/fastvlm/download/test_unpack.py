"""Zip archives that would escape, link, explode, clash or lie; and safe ones."""

import io
import random
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from download_server import CONTENT, FILE, Server, assert_whole, content_of, flip, get, make_zip

from fastvlm.common.errors import UserError
from fastvlm.download import unpack

pytest_plugins = ["download_server"]


def entry(name: str, mode: int = stat.S_IFREG | 0o644, **fields: Any) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("placeholder")
    info.filename, info.external_attr = name, mode << 16
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def zip_with(*entries: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO(make_zip(top=""))
    with zipfile.ZipFile(buffer, "a") as archive:
        for info, data in entries:
            archive.writestr(info, data)
    return buffer.getvalue()


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data and len(old) == len(new)
    return data.replace(old, new)


def overlapping() -> bytes:
    """Two central directory entries for one local file."""
    data = bytearray(make_zip({"a.txt": b"a" * 100, "b.txt": b"b" * 100}, top=""))
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = bytes(4)  # its header's offset: 0, the first file's
    return bytes(data)


def lying_size() -> bytes:
    """A central directory that announces ten bytes less than the entry holds."""
    data = bytearray(make_zip({"config.json": b"{" + b" " * 4000 + b"}"}, top=""))
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<I", struct.unpack("<I", data[at : at + 4])[0] - 10)
    return bytes(data)


EVIL: dict[str, tuple[Callable[[], bytes], str]] = {
    "parent": (lambda: zip_with((entry("../evil"), b"x")), r"'../evil' is outside the folder"),
    "two faults": (lambda: zip_with((entry("../evil"), b"x"), (entry("link", stat.S_IFLNK), b"y")),
                   r"'../evil' is outside.*'link' is a symbolic link"),
    "deep parent": (lambda: zip_with((entry("a/../../evil"), b"x")), "outside the folder"),
    "absolute": (lambda: zip_with((entry("/tmp/evil"), b"x")), "an absolute path"),
    "backslash": (lambda: zip_with((entry("..\\evil"), b"x")), "forbidden characters"),
    "drive": (lambda: zip_with((entry("C:evil"), b"x")), "forbidden characters"),
    "NUL": (lambda: replaced(zip_with((entry("evil@.txt"), b"x")), b"evil@", b"evil\0"), "forbidden characters"),
    "long": (lambda: zip_with((entry("e" * 300), b"x")), "too long a name"),
    "symlink": (lambda: zip_with((entry("link", stat.S_IFLNK | 0o777), b"/etc")), "'link' is a symbolic link"),
    "device": (lambda: zip_with((entry("null", stat.S_IFCHR | 0o666), b"")), "device or other special file"),
    "case": (lambda: zip_with((entry("CONFIG.json"), b"x")), "more than once"),
    "file and folder": (lambda: zip_with((entry("config.json/x"), b"x")), "both a file and a folder"),
    "bomb": (lambda: make_zip({"config.json": b"{}", "bomb.json": bytes(70 << 20)}), "a zip bomb"),
    "overlap": (overlapping, "broken archive: (Overlapped entries|File name in directory)"),
    "lying size": (lying_size, "broken archive"),
    "bad CRC": (lambda: flip(make_zip(), 150_000), "broken archive"),
    "empty": (lambda: make_zip({}), "holds 0 files"),
    "no zip": (lambda: b"<!DOCTYPE html><p>Sign in", r"not a zip file \(it begins with b'<!DOCTYPE"),
    "no directory": (lambda: make_zip()[:-200], "broken archive"),
}  # fmt: skip


@pytest.mark.parametrize("kind", EVIL)
def test_unsafe_archives_leave_nothing(zoo: Server, tmp_path: Path, kind: str) -> None:
    build, message = EVIL[kind]
    zoo.files[FILE] = build()
    with pytest.raises(UserError, match=message):
        get(tmp_path / "sub")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [] and not Path("/tmp/evil").exists()


def test_safe_archives_of_any_cut(zoo: Server, tmp_path: Path) -> None:
    """The negative control of the refusals above: no top folder, Finder's leavings, odd files (named in a warning)."""
    junk = {"__MACOSX/._config.json": b"x", ".DS_Store": b"x"}
    zoo.files[FILE] = make_zip({**CONTENT, **junk, "training_args.bin": b"never unpickled"}, top="")
    record = get(tmp_path)
    assert any("training_args.bin" in warning for warning in record["warnings"])
    assert_whole(tmp_path, content={**CONTENT, "training_args.bin": b"never unpickled"})


def test_any_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    chance = random.Random(7)
    content = {"config.json": b'{"a": 1}' * 20, "model.safetensors": chance.randbytes(300)}
    good, refused = make_zip(content), 0
    for trial in range(200):
        path, folder = tmp_path / "a.zip", tmp_path / f"out{trial}"
        path.write_bytes(flip(good, chance.randrange(len(good)), chance.randrange(1, 256)))
        try:
            unpack.unpack(path, folder)
            assert sorted(content_of(folder).values()) == sorted(content.values())  # names and dates have no checksum
        except UserError:
            refused += 1
            assert not folder.exists()
    assert 100 < refused < 200
