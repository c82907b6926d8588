"""Put a file somewhere else: as a clone, which shares the disk's blocks until either is written, or else as a copy."""

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_CLONE_NOFOLLOW = 1  # macOS's sys/clonefile.h
# The errors of a file system that has no clones, or none from that one to this. (EPERM: a file system that forbids it.)
_UNSUPPORTED = {
    errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM
}  # fmt: skip


def clone_or_copy(source: Path, target: Path) -> bool:
    """Make `target`, a new file with the bytes of `source` and times of its own. Returns whether it is a clone.

    Raises OSError.
    """
    try:
        if sys.platform == "darwin":
            _clonefile(source, target)
        else:
            with source.open("rb") as origin, target.open("xb") as made:
                fcntl.ioctl(made.fileno(), _FICLONE, origin.fileno())
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        shutil.copyfile(source, target)
        return False
    os.utime(target)  # macOS clones the times, too: a build must see that the file is new
    return True


def _clonefile(source: Path, target: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.clonefile(os.fsencode(source), os.fsencode(target), ctypes.c_uint32(_CLONE_NOFOLLOW)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))
