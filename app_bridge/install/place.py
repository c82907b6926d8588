"""An app's model folder, replaced in one step, and the one model that was there before.

Xcode makes a resource of every file below `app/FastVLM`, so what is not the model lies in `app/.fastvlm-bundle`:

    .gitignore       everything here
    model-folder     where the app has its model, for `restore`
    previous/        the model that was replaced
    aside/           the app's model, on a file system that cannot exchange two folders in one step
    kept-TIME/       an earlier previous model that no export can make again

A new model is written as `previous`, whole; then `previous` and the app's model change places. A process that dies
leaves both models whole, one of them in the app. `restore` is the same exchange.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from app_bridge.app.resources import model_path
from fastvlm.common import staging
from fastvlm.common.cli import log
from fastvlm.common.errors import UserError
from fastvlm.common.files import read_small
from model_export import artefact as exported

_HOME, _FOLDER_NOTE = ".fastvlm-bundle", "model-folder"
_FINDER = ".DS_Store"


@dataclass(frozen=True)
class Place:
    """The model of an app: `app` is an absolute path, `folder` where the app looks for its model, relative to it."""

    app: Path
    folder: str

    @property
    def model(self) -> Path:
        return model_path(self.app, self.folder)

    @property
    def home(self) -> Path:
        return self.app / _HOME

    @property
    def previous(self) -> Path:
        return self.home / "previous"

    @property
    def _aside(self) -> Path:
        return self.home / "aside"

    def occupied(self) -> bool:
        """Return whether anything is where the app looks; a folder that Finder shows empty does not count."""
        if self.model.is_symlink() or not self.model.is_dir():
            return os.path.lexists(self.model)
        return any(path.name != _FINDER for path in self.model.iterdir())

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """Yield an empty folder that becomes the app's model when the block ends well; the old model is `previous`.

        An earlier previous model is removed, unless no export can make it again.
        """
        if self.previous.is_symlink():  # the app's model was a link; `staged` would write to its end
            self._keep_previous()
        with staging.staged(self.previous, replace=True) as folder:
            yield folder
            if os.path.lexists(self.previous) and not _is_unchanged_export(self.previous):
                self._keep_previous()
        self.exchange()

    def exchange(self) -> None:
        """Put `previous` where the app looks; the model that is there becomes `previous`."""
        if not self.occupied():
            (self.model / _FINDER).unlink(missing_ok=True)  # `rename` takes only an empty folder
            os.rename(self.previous, self.model)
        elif not staging.exchange(self.previous, self.model):
            os.rename(self.model, self._aside)
            os.rename(self.previous, self.model)
            self.recover()

    def recover(self) -> None:
        """Finish or undo what a process that died has begun."""
        staging.clean(self.previous)
        for partial in self.home.glob(staging.PARTIAL):
            partial.unlink()
        if os.path.lexists(self._aside) and not self.occupied():
            os.rename(self._aside, self.model)
            log(f"{self.model}: put back the model that an interrupted run had moved away")
        elif os.path.lexists(self._aside):
            if os.path.lexists(self.previous):
                self._keep_previous()
            os.rename(self._aside, self.previous)

    def _keep_previous(self) -> None:
        older = self.home / f"kept-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}"
        os.rename(self.previous, older)
        log(f"{older}: a model that no export can make again: delete it when you need it no more")


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """Hold the lock of an app's model; nothing is half done when the block begins.

    Raises UserError where another process holds it, or where the model cannot be replaced.
    """
    home, model = place.home, place.model
    if not model.parent.is_dir():
        raise UserError(f"{model.parent}: no such folder: expected the app's")
    for folder in (model.parent, home if home.exists() else place.app):
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder}: is not writable: expected a folder in which the model may be replaced")
    with staging.held(home, f"{home}: another bundle or restore is at work there: wait until it ends"):
        if home.lstat().st_dev != (model if os.path.lexists(model) else model.parent).lstat().st_dev:
            raise UserError(f"{model}: is on another file system than {home}: expected the same one, move it there")
        for name, content in ((".gitignore", b"*\n"), (_FOLDER_NOTE, place.folder.encode())):
            if not (home / name).is_file() or read_small(home / name) != content:
                staging.write_file(home / name, content)
        place.recover()
        try:
            yield
        finally:
            with suppress(OSError):  # the error that ended the block is reported; the next run tries again
                place.recover()


def used_by_bundle(app: Path) -> Place:
    """Return the place that `bundle` used in an app, whatever its sources say by now. UserError if it used none."""
    path = app / _HOME / _FOLDER_NOTE
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
    """Return whether `folder` has exactly these plain files (name -> sha256), Finder's own aside."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.name != _FINDER}
    return names.keys() == sha256.keys() and all(
        path.is_file() and not path.is_symlink() and exported.hash_file(path)["sha256"] == sha256[name]
        for name, path in names.items()
    )


def _is_unchanged_export(folder: Path) -> bool:
    """Whether a folder is an artefact as it was exported, and nothing else: `verify` passes over a README.md."""
    try:
        files = exported.read_manifest(folder)["files"]
        if any(": extra: " not in line for line in exported.verify(folder)):
            return False
    except (UserError, OSError):
        return False
    return {name for name in exported.files_in(folder) if Path(name).name != _FINDER} == set(files)
