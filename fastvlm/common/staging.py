"""Write a folder so that, whenever the process dies, its target holds what it held before or the whole new folder.

The work is done in `.NAME.staging-XXXX/new` beside the target. Publishing is one rename; over an existing folder it is
one atomic exchange of the two names (renameat2 on Linux, renamex_np on macOS). A file system that has no exchange gets
two renames; when a run dies between them, the old folder waits as `.NAME.staging-XXXX/old`, and the next run puts it
back.

A staging folder is locked (flock) for as long as its process lives, so a later run can tell the remains of a dead one,
which it removes, from the work of a live one. On a network file system without locks it removes nothing. Nor does it
touch a link, or a folder without our marker: whatever its name, it is somebody else's.
"""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastvlm.common.errors import UserError

MARKER = ".made-by-fastvlm"  # in each folder that we may empty
PARTIAL = ".*.partial"  # what a `write_file` leaves in its folder when it is killed in the middle
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h; RENAME_SWAP of macOS's stdio.h has the same value
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def staged(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well it becomes `target`, otherwise it is removed.

    An existing `target` (not empty) is replaced only with `replace`. OSError when it cannot be published.
    """
    target = target.expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    clean(target)
    folder, lock = _locked_folder(target)
    try:
        new = folder / "new"
        new.mkdir()
        yield new
        _settle(new)
        publish(new, target, replace)
    finally:
        remove(folder)  # what failed, or what was replaced
        os.close(lock)


def own(folder: Path) -> None:
    """Make a folder that may be emptied later, or take over one that was made so. UserError for any other."""
    if folder.is_symlink():
        raise UserError(f"{folder}: got a link, expected a folder of ours: move it away")
    folder.mkdir(parents=True, exist_ok=True)
    if not is_ours(folder):
        if any(folder.iterdir()) and not is_ours(folder):  # asked again: the marker is always the first file
            raise UserError(f"{folder}: holds files of somebody else (it has no {MARKER}): move it away")
        (folder / MARKER).touch()


def is_ours(folder: Path) -> bool:
    """Whether `own` has made the folder."""
    return not folder.is_symlink() and (folder / MARKER).is_file()


def empty(folder: Path) -> None:
    """Remove everything in one of our folders but its marker."""
    with suppress(FileNotFoundError):
        for path in [path for path in folder.iterdir() if path.name != MARKER]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove one of our folders, its marker last: killed meanwhile, it is still ours."""
    empty(folder)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def held(folder: Path, busy: str) -> Iterator[None]:
    """Make one of our folders, or take it over, and hold its lock. UserError `busy` while another process holds it."""
    while True:
        own(folder)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:  # the run before has just removed it
            continue
        try:
            if not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise UserError(busy)
            if _is_at(folder, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def once(target: Path, make: Callable[[Path], object]) -> Path:
    """A file or folder that several processes need: the first has `make` make it, whole or not at all; others wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("a") as lock:
        _flock(lock.fileno(), fcntl.LOCK_EX)
        if not target.exists():
            make(target)
    return target


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`: what is written there becomes `target` when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_file(target: Path, content: bytes) -> None:
    """Write a file whole or not at all; makes its folder."""
    with replaced(target) as partial:
        partial.write_bytes(content)


def clean(target: Path) -> None:
    """Remove what dead runs left beside `target`, and undo the first half of a replacement that stopped half-way."""
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.staging-*")):
        if not is_ours(path) and not _is_empty(path):
            continue
        with _if_abandoned(path) as abandoned:
            if abandoned:
                put_back(path, target)
                remove(path)


def publish(folder: Path, target: Path, replace: bool) -> None:
    """Make `folder` the target in one step. An old target takes its place; or its parent has it as `old` meanwhile."""
    if replace and target.exists():
        if not exchange(folder, target):
            _replace_in_two_steps(folder, target)
    else:
        os.rename(folder, target)  # refuses a folder that has appeared meanwhile, unless it is empty
    _sync(target.parent)


def put_back(staging: Path, target: Path) -> None:
    """Undo the first half of a replacement that stopped half-way."""
    if (staging / "old").exists() and not target.exists():
        os.rename(staging / "old", target)


def exchange(a: Path, b: Path) -> bool:
    """Swap the names of two folders in one step; False where the system or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(os.fsencode(a), os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE))
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in _UNSUPPORTED:
        raise OSError(code, os.strerror(code), str(b))
    return not failed


def _is_empty(path: Path) -> bool:
    """Whether it is a folder without anything in it: one of ours at its very beginning or end, or nobody's loss."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _replace_in_two_steps(folder: Path, target: Path) -> None:
    aside = folder.with_name("old")
    os.rename(target, aside)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(aside, target)
        raise


def _locked_folder(target: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.staging-", dir=target.parent))
        with suppress(FileNotFoundError):  # another run took it for abandoned before it was locked
            descriptor = os.open(folder, os.O_RDONLY)
            _flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                own(folder)
                return folder, descriptor
            os.close(descriptor)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Whether the open folder is still there by this name."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _flock(descriptor: int, operation: int, without: bool = True) -> bool:
    """Whether nobody else holds the lock now; `without` where this file system has no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:
        return without
    return True


@contextmanager
def _if_abandoned(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; False: a live process has it, the folder is gone, or there are no locks here."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, without=False)
    finally:
        os.close(descriptor)


def _settle(folder: Path) -> None:
    """Give files the permissions that the user's umask says (temporary ones are private) and put them on the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for directory, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(directory, name)
            path.chmod(0o666 & ~mask)
            _sync(path)
        Path(directory).chmod(0o777 & ~mask)
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
