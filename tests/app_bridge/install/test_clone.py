"""A file put somewhere else: by the system's clone, or else by a copy. (Real clones were made on btrfs and XFS.)"""

import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path

import pytest

from app_bridge.install.clone import clone_or_copy

LACK = (errno.ENOTSUP, errno.EXDEV, errno.ENOTTY, errno.EINVAL)  # what a file system without clones answers


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(100_000))
    os.utime(path, (1, 1))
    return path


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


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("code", [0, *LACK, errno.ENOSPC, errno.EIO])
def test_a_clone_a_copy_or_an_error(
    source: Path, tmp_path: Path, system: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ioctl(made: int, request: int, origin: int) -> None:
        assert request == 0x40049409  # _IOW(0x94, 9, int) in linux/fs.h
        if code:
            raise OSError(code, os.strerror(code))
        os.write(made, os.pread(origin, 1 << 20, 0))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: MacLibrary(code))
    monkeypatch.setattr(sys, "platform", system)
    target = tmp_path / "target"
    if code in (0, *LACK):
        assert clone_or_copy(source, target) is (code == 0)
        assert target.read_bytes() == source.read_bytes()
        assert target.stat().st_mtime > 1  # a build sees that the file is new
        return
    with pytest.raises(OSError, match=os.strerror(code)):
        clone_or_copy(source, target)


def test_here_and_now_whatever_the_file_system(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    clone_or_copy(source, target)
    assert target.stat().st_ino != source.stat().st_ino and target.stat().st_nlink == 1  # no hard link
    target.write_bytes(b"changed")
    assert source.stat().st_size == 100_000
