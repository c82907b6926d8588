"""Files that are read whole, and paths that are written: what is refused before any work.

A small file (JSON, a recipe, a licence, a model specification) may come from anybody: it has to be a plain file of a
bounded size, since reading a pipe may never begin and reading a device never end. An output flag may name anything by
mistake: never what the same command reads.
"""

import argparse
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fastvlm.common.findings import Finding

SMALL = 64 << 20  # bytes; the largest small file of a checkpoint, Qwen2's tokenizer.json, has 11 MB
# A checkpoint's files beside its weights that decide what it is. Other libraries open some: we look at them before.
BESIDE_WEIGHTS = ("*.json", "merges.txt", "*.jinja", "tokenizer.model")
LICENCES = ("license", "licence")  # how a licence's name begins, in lower case
_CARRIED = (*LICENCES, "notice", "acknowledgements")


def read_small(path: str | os.PathLike[str], limit: int = SMALL) -> bytes:
    """The content of a plain file of at most `limit` bytes; OSError, with the reason, for any other."""
    path = os.fspath(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))  # a pipe would wait
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if why := _not_small(os.fstat(descriptor), limit):
            raise OSError(errno.EINVAL, why, path)
        content = b""
        while len(content) <= limit and (piece := os.read(descriptor, limit + 1 - len(content))):
            content = content + piece if content else piece  # a plain file's whole content comes in one piece or two
    finally:
        os.close(descriptor)
    if len(content) > limit:  # it has grown meanwhile
        raise OSError(errno.EINVAL, f"more than {limit} bytes", path)
    return content


def read_text(path: str | os.PathLike[str], limit: int = SMALL, encoding: str = "utf-8") -> str:
    """`read_small`, decoded; UnicodeDecodeError as usual."""
    return read_small(path, limit).decode(encoding)


def is_macs(name: str) -> bool:
    """Whether macOS put a file of this name there: Finder's view settings, or another file's resource fork."""
    return name == ".DS_Store" or name.startswith("._")


def small_files(folder: Path) -> list[Path]:
    """The files of a checkpoint beside its weights that decide what it is, sorted."""
    return [
        path
        for path in sorted(folder.iterdir())
        if any(fnmatchcase(path.name, pattern) for pattern in BESIDE_WEIGHTS)
        and not is_macs(path.name)
        and not path.is_dir()
    ]


def licence_files(folder: Path) -> list[Path]:
    """The licences and notices in a folder, sorted: they go along with every copy."""
    return sorted(path for path in folder.iterdir() if path.name.lower().startswith(_CARRIED) and not path.is_dir())


def check_small_files(folder: Path) -> Iterator[Finding]:
    """Yield findings about `small_files` that are pipes, devices, too large, or links that leave the folder: an
    export copies their content into the artefact, and with that perhaps to a hub."""
    for path in small_files(folder):
        if path.is_symlink() and not stays_inside(path):
            yield Finding("link-leaves-folder", path.name, leaving(path))
        elif path.exists() and (why := _not_small(path.stat(), SMALL)):
            yield Finding("file-unreadable", path.name, why)


def stays_inside(path: Path) -> bool:
    """Whether a link ends below its own folder, or in the blobs of the hub's cache that the folder is a snapshot of."""
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    # models--ORG--NAME/snapshots/COMMIT/FILE is a link to models--ORG--NAME/blobs/HASH
    caches = [
        above.parent
        for above in folder.parents
        if above.name == "snapshots" and above.parent.name.startswith("models--")
    ]
    return any(target.is_relative_to(place) for place in (folder, *(cache / "blobs" for cache in caches)))


def leaving(path: Path) -> str:
    """The message about a link for which `stays_inside` is False."""
    return f"a link to {os.path.realpath(path)}, outside its folder: put the file itself there"


def _not_small(status: os.stat_result, limit: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(status.st_mode):
        return f"{kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, expected a plain file"
    return f"{status.st_size} bytes, expected at most {limit}" if status.st_size > limit else ""


@dataclass(frozen=True)
class Output:
    """The argparse type of a path that is written: a file or a working folder; or with `whole` a folder that is
    replaced with everything in it; or a folder that gets `files`. `file`: a file, so that a folder is refused."""

    whole: bool = False
    files: tuple[str, ...] = ()
    file: bool = False

    def __call__(self, text: str) -> Path:
        path = some_path(text)
        if self.file and path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder, expected the name of a file")
        return path


def some_path(text: str) -> Path:
    """Path's own "" is the current folder, which nobody meant who gave an empty variable."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: expected a path")
    return Path(text)


def present(text: str) -> Path:
    """The argparse type of a path that is read whatever it is, and has to be there."""
    path = some_path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return path


def flag_faults(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[str]:
    """`output_faults` of a command line: outputs are the flags of type Output, inputs all others that name a file or
    folder that is there."""
    outputs, inputs = {}, []
    for action in {action.dest: action for action in reversed(parser._actions)}.values():
        value, flag = getattr(given, action.dest, None), "/".join(action.option_strings[:1]) or str(action.metavar)
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(action.type, Output) and isinstance(path, Path):
                outputs[flag] = (path, action.type)
            elif isinstance(path, (str, Path)):
                inputs.append((flag, Path(path)))
    return output_faults(outputs, inputs)


def output_faults(outputs: Mapping[str, tuple[Path, Output]], inputs: list[tuple[str, Path]]) -> list[str]:
    """A fault for each output that is an input, is inside one, or would replace a folder that holds one; and for each
    that is another output, or is inside one that is replaced. Files are compared by device and inode."""
    faults = []
    places = [(flag, path, identity) for flag, path in inputs if (identity := _identity(path.expanduser()))]
    for flag, (path, output) in outputs.items():
        written = [path.expanduser() / name for name in output.files] or [path.expanduser()]
        above = [_identity(parent) for file in written for parent in _with_parents(file)]
        for name, place, identity in places:
            if identity in above:
                where = "is" if identity in map(_identity, written) else "is inside"
                faults.append(f"{flag} {path}: {where} {name} {place}, which is only read: choose another")
            elif output.whole and _identity(path.expanduser()) in map(_identity, _with_parents(place.expanduser())):
                faults.append(f"{flag} {path}: holds {name} {place}, and would be replaced: choose another")
            elif any(_linked(file, place.expanduser()) for file in written):
                faults.append(f"{flag} {path}: is a file of {name} {place} by another name: choose another")
        for other, (second, kind) in outputs.items():
            inside = kind.whole and real_path(second) in _with_parents(written[0])
            if (other != flag and inside) or (other < flag and real_path(second) == real_path(written[0])):
                faults.append(f"{flag} {path}: is {other} {second} or inside it: choose another")
    return faults


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # not there, or no name at all
        return None
    return status.st_dev, status.st_ino


def real_path(path: Path) -> Path:
    """The absolute path without links; unlike `resolve` it does not raise for a loop of links."""
    return Path(os.path.realpath(path.expanduser()))


def _with_parents(path: Path) -> list[Path]:
    real = real_path(path)
    return [real, *real.parents]


def _linked(written: Path, place: Path) -> bool:
    """Whether the file is a second hard link to one below the folder."""
    try:
        status = written.stat()
    except OSError:
        return False
    if status.st_nlink < 2 or not stat.S_ISREG(status.st_mode) or not place.is_dir():
        return False
    return any(file.stat().st_ino == status.st_ino and os.path.samefile(file, written) for file in _files(place))


def _files(folder: Path) -> Iterator[Path]:
    return (
        Path(parent, name) for parent, _, names in os.walk(folder) for name in names if _identity(Path(parent, name))
    )
