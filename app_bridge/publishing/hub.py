"""A hub's repository by huggingface_hub: its contents, and one commit that changes it; every failure is one UserError.

`create_commit`, because the repository must never hold half a model: where hf_xet is installed, `upload_folder` and
`upload_large_folder` (huggingface_hub 2.4.0) make several commits. Large files are sent before the commit; the hub
takes none twice, so a second run sends only what is missing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.sha import git_hash

from fastvlm.common.cli import one_line, progress
from fastvlm.common.errors import UserError

MAIN = "main"
ANSWER_WITHIN = 120.0  # seconds for the answer about a repository's contents
_MESSAGE = "Publish a FastVLM artefact"


@dataclass(frozen=True)
class Upload:
    """A file to publish: its name in the repository, its bytes or where they are, their size and sha256."""

    name: str
    source: Path | bytes
    size: int
    sha256: str

    def is_in(self, contents: ModelInfo) -> bool:
        """Return whether a repository has these very bytes under this name."""
        entry = next((file for file in contents.siblings or () if file.rfilename == self.name), None)
        if entry is None or entry.size != self.size:
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == self.sha256
        return entry.blob_id == git_hash(self.source if isinstance(self.source, bytes) else self.source.read_bytes())


class Hub:
    """A branch of the repository `name` at the hub in HF_ENDPOINT. Raises UserError where that is no address."""

    def __init__(self, name: str, revision: str, debug: bool = False) -> None:
        self.name, self.revision = name, revision
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        if not self.endpoint.startswith(("https://", "http://")):
            raise UserError(f"HF_ENDPOINT: got {self.endpoint!r}, expected an address that begins with https://")
        if not debug:
            huggingface_hub.logging.set_verbosity_error()
            huggingface_hub.utils.disable_progress_bars()  # ours is shown
        self.token = huggingface_hub.get_token()
        self.api = HfApi(endpoint=self.endpoint, token=self.token, library_name="fastvlm")

    def contents(self, commit: str | None = None) -> ModelInfo | None:
        """Return what the branch (else main) or a commit holds; None when there is no repository that we may see."""
        with self._refusals(f"can't be asked what {f'commit {commit}' if commit else 'it'} has"):
            try:
                return self._contents(commit or self.revision)
            except RepositoryNotFoundError:
                return None
            except RevisionNotFoundError:
                if commit or self.revision == MAIN:
                    raise
                return self._contents(MAIN)

    def create(self, private: bool) -> ModelInfo:
        """Make the repository."""
        with self._refusals("can't be made"):
            self.api.create_repo(self.name, private=private or None, exist_ok=True)
        made = self.contents()
        if made is None or (private and not made.private):
            raise UserError(f"{self.endpoint}/{self.name}: made, but it {'is public' if made else 'is not there'}")
        return made

    def commit(self, files: Sequence[Upload], stale: Sequence[str], parent: str) -> str:
        """Add the files and delete the stale ones by one commit on top of `parent`; returns its id."""
        adds = [CommitOperationAdd(f.name, f.source if isinstance(f.source, bytes) else str(f.source)) for f in files]
        for file, add in zip(files, adds, strict=True):
            if add.upload_info.sha256.hex() != file.sha256:
                raise UserError(f"{file.name}: changed since it was checked: leave it alone, and run it again")
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*map(CommitOperationDelete, stale), *adds]
        action = "upload failed (run it again: what has arrived is not sent again)"
        with progress(f"upload to {self.name}"), self._refusals(action):
            if self.revision != MAIN:
                self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
            made = self.api.create_commit(
                self.name, operations, commit_message=_MESSAGE, revision=self.revision, parent_commit=parent
            )
        return str(made.oid)

    def _contents(self, revision: str) -> ModelInfo:
        info = self.api.model_info(self.name, revision=revision, files_metadata=True, timeout=ANSWER_WITHIN)
        if not all(isinstance(text, str) for text in (info.sha, *(file.rfilename for file in info.siblings or ()))):
            raise TypeError("the answer is no repository's: expected a hub in HF_ENDPOINT")
        return info

    @contextmanager
    def _refusals(self, action: str) -> Iterator[None]:
        """Turn every exception of huggingface_hub into one UserError; a failed lookup or a wrong type means an answer
        in another form than a hub's."""
        try:
            yield
        except (HTTPError, RuntimeError, ValueError, OSError, LookupError, TypeError, AttributeError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            reason = f"{type(cause).__name__}: {one_line(cause)}"
            raise UserError(f"{self.endpoint}/{self.name}: {action}: {reason}") from error
