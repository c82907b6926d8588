"""Put a file somewhere else: as a clone, which shares the disk's blocks until either is written, or else as a copy."""

import ctypes
import fcntl
import os
import shutil
import sys
from pathlib import Path

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_CLONE_NOFOLLOW = 1  # macOS's sys/clonefile.h


def clone_or_copy(source: Path, target: Path) -> bool:
    """Make `target`, a new file with the bytes of `source` and times of its own. Returns whether it is a clone."""
    try:
        if sys.platform == "darwin":
            libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(source), os.fsencode(target))
            if libc.clonefile(*names, ctypes.c_uint32(_CLONE_NOFOLLOW)):
                raise OSError(ctypes.get_errno(), "clonefile")
        else:
            with source.open("rb") as origin, target.open("xb") as made:
                fcntl.ioctl(made.fileno(), _FICLONE, origin.fileno())
    except OSError:  # this file system has no clones; a disk that is full says so again
        shutil.copyfile(source, target)
        return False
    os.utime(target)  # macOS clones the times, too: a build must see that the file is new
    return True
