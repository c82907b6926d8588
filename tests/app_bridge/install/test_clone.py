"""A file put somewhere else: by the system's clone, or else by a copy. (Real clones were made on btrfs and XFS.)"""

import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path

import pytest

from app_bridge.install.clone import clone_or_copy as place

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's ioctl")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(100_000))
    os.utime(path, (1, 1))
    return path


def clone_by_copying(made: int, request: int, origin: int) -> int:
    assert request == 0x40049409  # _IOW(0x94, 9, int) in linux/fs.h
    os.write(made, os.pread(origin, 1 << 20, 0))
    return 0


@linux
def test_a_clone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", clone_by_copying)
    assert place(source, tmp_path / "target") is True
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


@linux
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EINVAL, errno.ENOSPC, errno.EIO])
def test_no_clone(source: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are none it is a copy; what is no lack of clones is an error."""

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    if code in (errno.ENOSPC, errno.EIO):
        with pytest.raises(OSError, match=os.strerror(code)):
            place(source, tmp_path / "target")
        return
    assert place(source, tmp_path / "target") is False
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_here_and_now_whatever_the_file_system(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    place(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_ino != source.stat().st_ino and target.stat().st_nlink == 1  # no hard link
    assert target.stat().st_mtime > 1  # a build sees that the file is new
    target.write_bytes(b"changed")
    assert source.stat().st_size == 100_000


class MacLibrary:
    """clonefile(2) as its manual page says: 0, or -1 with errno; times are the source's."""

    def __init__(self, code: int) -> None:
        self.code = code

    def clonefile(self, source: bytes, target: bytes, flags: ctypes.c_uint32) -> int:
        assert flags.value == 1  # CLONE_NOFOLLOW
        if self.code:
            ctypes.set_errno(self.code)
            return -1
        Path(os.fsdecode(target)).write_bytes(Path(os.fsdecode(source)).read_bytes())
        os.utime(target, (1, 1))
        return 0


@pytest.mark.parametrize(("code", "cloned"), [(0, True), (errno.ENOTSUP, False), (errno.EXDEV, False)])
def test_on_a_mac(source: Path, tmp_path: Path, code: int, cloned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: MacLibrary(code))
    assert place(source, tmp_path / "target") is cloned
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert (tmp_path / "target").stat().st_mtime > 1


def test_another_error_on_a_mac(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: MacLibrary(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        place(source, tmp_path / "target")
