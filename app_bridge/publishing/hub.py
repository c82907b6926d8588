"""A hub's repository by huggingface_hub: its contents, and one commit that changes it; every failure is one UserError.

`create_commit`, because the repository must never hold half a model: where hf_xet is installed, `upload_folder` and
`upload_large_folder` (huggingface_hub 2.4.0) make several commits. Large files are sent before the commit; the hub
takes none twice, so a second run goes on with what is missing.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.common.cli import one_line, progress
from fastvlm.common.errors import UserError

MAIN = "main"
ANSWER_WITHIN, BYTE_WITHIN = 120.0, 60.0  # seconds for an answer, and without a byte going out
_MESSAGE = "Publish a FastVLM artefact"
_HINTS = {
    401: "it does not know this token: `hf auth login`, or set HF_TOKEN to one that may write",
    403: "the token may not do this: it needs the role `write`, and you access to the organization",
    404: "there is none, or the token may not see it: check the name and the token",
    409: "the repository changed meanwhile: run it again",
    412: "the repository changed meanwhile: run it again",
    413: "a file is larger than it takes",
    429: "too many requests: wait some minutes and run it again",
}


@dataclass(frozen=True)
class Upload:
    """A file to publish: its name in the repository, its bytes or where they are, their size and sha256."""

    name: str
    source: Path | bytes
    size: int
    sha256: str


@dataclass(frozen=True)
class Contents:
    """What a repository has at a commit: name -> (size, sha256 of a file kept by LFS or Xet, git's id of the blob).

    branch: whether the branch exists; if not, these are the contents of main.
    """

    commit: str
    private: bool
    branch: bool
    files: Mapping[str, tuple[int, str | None, str]]

    def has(self, file: Upload) -> bool:
        """Return whether these very bytes are there under this name."""
        size, sha256, blob = self.files.get(file.name, (-1, None, ""))
        if size != file.size or sha256 is not None:
            return size == file.size and sha256 == file.sha256
        content = file.source if isinstance(file.source, bytes) else file.source.read_bytes()
        of_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return blob == of_git and hashlib.sha256(content).hexdigest() == file.sha256


class Hub:
    """A branch of the repository `name` at the hub in HF_ENDPOINT. Raises UserError for no address."""

    def __init__(self, name: str, revision: str, debug: bool = False) -> None:
        import huggingface_hub
        from httpx2 import Timeout
        from huggingface_hub import constants
        from huggingface_hub.utils._http import default_client_factory  # private; the version is pinned

        def client() -> Any:
            made = default_client_factory()
            made.timeout = Timeout(BYTE_WITHIN, read=ANSWER_WITHIN)  # its own waits for ever
            return made

        self.name, self.revision = name, revision
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        if not self.endpoint.startswith(("https://", "http://")):
            raise UserError(f"HF_ENDPOINT: got {self.endpoint!r}, expected an address that begins with https://")
        huggingface_hub.set_client_factory(client)
        if not debug:
            huggingface_hub.logging.set_verbosity_error()
            huggingface_hub.utils.disable_progress_bars()  # ours is shown
        self.token = huggingface_hub.get_token()
        self.api = huggingface_hub.HfApi(endpoint=self.endpoint, token=self.token, library_name="fastvlm")

    def contents(self, commit: str | None = None) -> Contents | None:
        """Return what the branch (or a commit) holds; None when there is no repository that we may see."""
        from huggingface_hub import constants
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{self.endpoint}/{self.name} is out of reach: HF_HUB_OFFLINE is set; unset it to publish")
        with self._refusals(f"can't be asked what {f'commit {commit}' if commit else 'it'} has"):
            try:
                return self._contents(commit or self.revision)
            except RepositoryNotFoundError:
                return None
            except RevisionNotFoundError:
                if commit or self.revision == MAIN:
                    raise
                return self._contents(MAIN, branch=False)

    def create(self, private: bool) -> Contents:
        """Make the repository."""
        with self._refusals("can't be made"):
            self.api.create_repo(self.name, private=private or None, exist_ok=True)
        made = self.contents()
        if made is None or (private and not made.private):
            raise UserError(f"{self.endpoint}/{self.name}: made, but it {'is public' if made else 'is not there'}")
        return made

    def commit(self, files: Sequence[Upload], stale: Sequence[str], before: Contents) -> str:
        """Add the files and delete the stale ones by one commit on top of `before`; returns its id."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        later = "run it again: what has arrived is not sent again"
        with progress(f"upload to {self.name}", sum(file.size for file in files), sized=True) as advance:
            if not before.branch:
                with self._refusals(f"branch {self.revision} can't be made"):
                    self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
            for file in files:
                source = file.source if isinstance(file.source, bytes) else str(file.source)
                add = CommitOperationAdd(file.name, source)
                add.upload_info.sha256 = bytes.fromhex(file.sha256)  # the hub refuses other bytes
                with self._refusals(f"upload failed at {file.name}", later):
                    self.api.preupload_lfs_files(self.name, additions=[add], revision=self.revision)
                operations.append(add)
                advance(file.size)
            with self._refusals("upload failed at the commit", later):
                done = self.api.create_commit(
                    self.name, operations, commit_message=_MESSAGE, revision=self.revision, parent_commit=before.commit
                )
        return str(done.oid)

    def _contents(self, revision: str, branch: bool = True) -> Contents:
        info: Any = self.api.model_info(self.name, revision=revision, files_metadata=True, timeout=ANSWER_WITHIN)
        files = {one.rfilename: (one.size, one.lfs.sha256 if one.lfs else None, one.blob_id) for one in info.siblings}
        if not all(isinstance(one, str) for one in (info.sha, *files)):
            raise TypeError("a commit or a file without a name")
        return Contents(info.sha, bool(info.private), branch, files)

    @contextmanager
    def _refusals(self, action: str, otherwise: str = "run it again later") -> Iterator[None]:
        """Turn every exception of huggingface_hub into one UserError with what to do.

        A failed lookup or a wrong type means an answer in another form than a hub's.
        """
        from httpx2 import HTTPError

        try:
            yield
        except (HTTPError, RuntimeError, ValueError, OSError) as error:
            cause: BaseException = error
            while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
                cause = cause.__cause__
            hint = _HINTS.get(_status(cause), otherwise)
            raise UserError(f"{self.endpoint}/{self.name}: {action}: {_message(cause)}; {hint}") from error
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.endpoint}/{self.name}: {action}: the answer is no repository's ({_message(error)}): expected a"
                " hub such as https://huggingface.co in HF_ENDPOINT"
            ) from error


def _status(error: BaseException) -> int:
    """The HTTP status behind an error, 0 if none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _message(error: BaseException) -> str:
    """What happened, without the client's addresses, request numbers and advice."""
    if not (status := _status(error)):
        return f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    message = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f"HTTP {status}" + (f" ({message})" if message else "")
