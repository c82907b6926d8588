"""A file put somewhere else: by the system's clone, or else by a copy. (Real clones were made on btrfs and XFS.)"""

import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path

import pytest

from app_bridge.install.clone import clone_or_copy


class MacLibrary:
    """clonefile(2) as its manual page says: 0, or -1 with errno; times are the source's."""

    def __init__(self, works: bool) -> None:
        self.works = works

    def clonefile(self, source: bytes, target: bytes, flags: ctypes.c_uint32) -> int:
        assert flags.value == 1  # CLONE_NOFOLLOW
        if not self.works:
            return -1
        Path(os.fsdecode(target)).write_bytes(Path(os.fsdecode(source)).read_bytes())
        os.utime(target, (1, 1))
        return 0


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("works", [True, False])
def test_a_clone_or_a_copy(tmp_path: Path, system: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(made: int, request: int, origin: int) -> None:
        assert request == 0x40049409  # _IOW(0x94, 9, int) in linux/fs.h
        if not works:
            raise OSError(errno.ENOTSUP, "no clones here")
        os.write(made, os.pread(origin, 1 << 20, 0))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: MacLibrary(works))
    monkeypatch.setattr(sys, "platform", system)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(100_000))
    os.utime(source, (1, 1))
    assert clone_or_copy(source, target) is works
    assert target.read_bytes() == source.read_bytes() and target.stat().st_nlink == 1
    assert target.stat().st_mtime > 1  # a build sees that the file is new
