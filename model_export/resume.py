"""Finished weight files of an interrupted export, kept for the next run of the same command.

They wait in `.NAME.resume` beside the target, as hard links `FILE.SHA256` to files of the run's staging folder, so only
whole files on the disk ever get there; `key.json` says what they were made from. The folder is locked (flock) while a
run lives, which keeps a second export from the same target, and removed once the artefact is published or refused.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastvlm.common.cli import log
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.staging import MARKER, empty, held, is_ours, remove, write_file
from model_export.artefact import hash_file

_KEY = "key.json"


class Kept:
    """The files of one run: `hashes` has sha256 and size of each that was kept or taken over. Without a folder, only
    that."""

    def __init__(self, folder: Path | None = None) -> None:
        self.hashes: dict[str, dict[str, Any]] = {}
        self._folder = folder

    def take(self, file: Path) -> bool:
        """Whether an earlier run has finished `file`: it is there now. One that its hash does not fit is dropped."""
        for path in self._folder.glob(f"{file.name}.*") if self._folder else ():
            entry = hash_file(path)
            if entry["sha256"] == path.name.removeprefix(f"{file.name}."):
                os.link(path, file)
                self.hashes[file.name] = entry
                return True
            path.unlink()
        return False

    def keep(self, file: Path) -> None:
        """Put a finished file on the disk, hash it, and keep it for a later run."""
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.hashes[file.name] = entry = hash_file(file)
        if self._folder:
            try:
                os.link(file, self._folder / f"{file.name}.{entry['sha256']}")
            except OSError as error:
                log(f"an interrupted run will not be resumed: no hard links here ({error.strerror})")


@contextmanager
def kept(target: Path, key: Mapping[str, Any]) -> Iterator[Kept]:
    """Yield what an interrupted run with this very `key` has finished; an end by UserError or CheckFailed forgets it.

    Raises UserError while another run writes to `target`.
    """
    target = target.expanduser().resolve()
    folder, going_on = _folder(target), False
    with held(folder, f"--output-dir {target}: another export is writing it: wait for its end"):
        try:
            wanted = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest().encode()
            if not (folder / _KEY).is_file() or (folder / _KEY).read_bytes() != wanted:
                empty(folder)
                write_file(folder / _KEY, wanted)
            yield Kept(folder)
        except (UserError, CheckFailed):
            raise
        except BaseException:
            files = [path for path in folder.iterdir() if path.name not in (_KEY, MARKER)]
            if going_on := bool(files):
                log(f"{len(files)} finished files wait in {folder}: the same command goes on from there")
            raise
        finally:
            if not going_on:
                remove(folder)


def waiting(target: Path) -> int:
    """Bytes of what an interrupted export to `target` has left: taken over by the next one, or removed."""
    folder = _folder(target.expanduser().resolve())
    return sum(path.stat().st_size for path in folder.glob("*")) if is_ours(folder) else 0


def _folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.resume")
