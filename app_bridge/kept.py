"""An app's model folder, replaced in one step, and the model that was there before, kept.

Xcode makes a resource of every file below `app/FastVLM`, so what is not the model lies in `app/.fastvlm-bundle`:

    .gitignore       everything here
    model-folder     where the app has its model, for `restore`
    next/            a new model, whole (while it is written: .next.staging-*)
    swap-INODE/      the two change places: inside is the new model, or after the exchange the old one
    aside/           the old model, on a file system that can't exchange two folders in one step
    previous/        the model that was replaced, untouched
    kept-TIME/       an older one that no export can make again
    dropped-TIME/    an older one, being deleted

A folder keeps its inode number when it is renamed. So the name `swap-INODE`, given before the exchange, tells after a
kill at any moment which of the two is inside: its own inode number is that of its name, or the exchange has happened.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastvlm.common import staging
from fastvlm.common.cli import log
from fastvlm.common.errors import UserError
from fastvlm.common.files import read_small
from model_export import artefact as exported

HOME, _WHERE = ".fastvlm-bundle", "model-folder"
_FINDER = ".DS_Store"


@dataclass(frozen=True)
class Place:
    """Where an app (an absolute path) has its model, `folder` below it, and where the rest is kept."""

    app: Path
    folder: str

    @property
    def model(self) -> Path:
        path = self.app / self.folder
        return real(path.parent) / path.name

    @property
    def home(self) -> Path:
        return self.app / HOME

    @property
    def previous(self) -> Path:
        return self.home / "previous"

    @property
    def next(self) -> Path:
        return self.home / "next"

    def occupied(self) -> bool:
        """Whether there is a model (or whatever else) where the app looks; a folder that Finder shows empty is none."""
        if self.model.is_symlink() or not self.model.is_dir():
            return os.path.lexists(self.model)
        return any(path.name != _FINDER for path in self.model.iterdir())

    def install(self, new: Path) -> Path | None:
        """Exchange `next` or `previous` for the app's model; where the old one is kept now, None if there was none."""
        occupied = self.occupied()
        if new != self.previous:
            swap = self.home / f"swap-{_inode(new)}"
            os.rename(new, swap)
            new = swap
        if not occupied:
            (self.model / _FINDER).unlink(missing_ok=True)  # or else the folder is not empty for `rename`
            os.rename(new, self.model)
            return None
        old = new if staging.exchange(new, self.model) else self._in_two_steps(new)
        if old != self.previous:
            self._keep(old)
        return self.previous

    def recover(self) -> None:
        """Finish or undo what a stopped run left; says so."""
        staging.clean(self.next)
        for path in (self.next, *self.home.glob("dropped-*"), *self.home.glob(staging.PARTIAL)):
            _remove(path)
        aside = self.home / "aside"
        if os.path.lexists(aside) and not self.occupied():
            os.rename(aside, self.model)
            log(f"{self.model}: put back what a run that was stopped had moved away")
        for path in (aside, *sorted(self.home.glob("swap-*"))):
            if not os.path.lexists(path):
                continue
            if path.name == f"swap-{_inode(path)}":
                _remove(path)  # it never got into the app
            else:
                self._keep(path)
                log(f"{self.previous}: kept the model that a run had replaced when it was stopped")

    def _in_two_steps(self, new: Path) -> Path:
        aside = self.home / "aside"
        os.rename(self.model, aside)
        try:
            os.rename(new, self.model)
        except BaseException:
            os.rename(aside, self.model)
            raise
        return aside

    def _keep(self, old: Path) -> None:
        """`old` is the previous model now. What was it until now is deleted if it is an export, as it was exported."""
        dropped = None
        if os.path.lexists(self.previous):
            now = time.time_ns()
            if unchanged(self.previous):
                dropped = self.home / f"dropped-{now}"
                os.rename(self.previous, dropped)
            else:
                older = self.home / f"kept-{time.strftime('%Y%m%d-%H%M%S')}-{now % 10**9:09}"
                os.rename(self.previous, older)
                log(f"{older}: an older model that no export wrote as it is: delete it when you need it no more")
        os.rename(old, self.previous)
        if dropped is not None:
            _remove(dropped)


@contextmanager
def opened(place: Place) -> Iterator[None]:
    """Nothing half done in the place, and nobody else at work there. UserError if somebody is."""
    home, model = place.home, place.model
    if not model.parent.is_dir():
        raise UserError(f"{model.parent}: no such folder: expected the app's")
    if home.is_symlink() or (os.path.lexists(home) and not home.is_dir()):
        raise UserError(f"{home}: got a file or a link, expected a folder of ours: move it away")
    if home.is_dir() and not (home / _WHERE).is_file():
        begun = {".gitignore", *(path.name for path in home.glob(staging.PARTIAL))}  # a first run, stopped
        if others := sorted({path.name for path in home.iterdir()} - begun):
            raise UserError(f"{home}: holds {', '.join(others)}, expected a folder of ours: move it away")
    for folder in (model.parent, home if home.exists() else place.app):
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder}: is not writable: expected a folder in which the model may be replaced")
    home.mkdir(exist_ok=True)
    lock = os.open(home, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{home}: another bundle or restore is at work there: wait until it ends") from None
        except OSError:  # no locks on this file system
            pass
        if home.lstat().st_dev != (model if os.path.lexists(model) else model.parent).lstat().st_dev:
            raise UserError(f"{model}: is on another file system than {home}: expected the same one, move it there")
        for name, content in ((".gitignore", b"*\n"), (_WHERE, place.folder.encode())):
            if not (home / name).is_file() or read_small(home / name) != content:
                staging.write_file(home / name, content)
        place.recover()
        try:
            yield
        finally:
            with suppress(OSError):  # what stopped it is said already, and the next run tries again
                place.recover()
    finally:
        os.close(lock)


def found(app: Path) -> Place:
    """The place that `bundle` used in this app, whatever its sources say by now. UserError if it used none."""
    path = app / HOME / _WHERE
    try:
        folder = read_small(path).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        if not app.is_dir():
            raise UserError(f"{app}: no such folder: expected app/ of a checkout of apple/ml-fastvlm") from None
        raise UserError(f"{app}: nothing to restore: `bundle` has put no model into it") from None
    if not folder or os.path.isabs(folder) or ".." in Path(folder).parts or not folder.isprintable():
        raise UserError(f"{path}: got {folder!r}, expected a folder inside the app: `bundle` writes it anew")
    return Place(app, folder)


def holds(folder: Path, sha256: Mapping[str, str]) -> bool:
    """Whether `folder` has exactly these plain files, name -> sha256 (Finder's own doesn't count)."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.name != _FINDER}
    return names.keys() == sha256.keys() and all(
        path.is_file() and not path.is_symlink() and exported.hash_file(path)["sha256"] == sha256[name]
        for name, path in names.items()
    )


def unchanged(folder: Path) -> bool:
    """Whether `folder` is an artefact as it was exported, with no other file in it (Finder's own doesn't count).

    `verify` alone passes over what a hub adds, which here may be the user's own README.md.
    """
    try:
        listed = exported.read_manifest(folder)["files"]
        differing = [line for line in exported.verify(folder) if Path(line.split(": ")[0]).name != _FINDER]
    except (UserError, OSError):
        return False
    return not differing and all(name in listed or Path(name).name == _FINDER for name in exported.files_in(folder))


def real(path: Path) -> Path:
    """Absolute, without links; a loop of links stays what it is (`resolve` would raise)."""
    return Path(os.path.realpath(path.expanduser()))


def _inode(path: Path) -> int:
    return path.lstat().st_ino


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
