"""A hub's repository, by huggingface_hub: what it has, and one commit that adds to it; every failure is one line.

`create_commit`, because the repository must never hold half a model: where hf_xet is installed, `upload_folder` and
`upload_large_folder` (2.4.0) make several commits. Before the commit each large file is sent on its own; one that the
hub has already (by its sha256) is not sent again, so a second run goes on with what is missing.

Large files go by HTTP (Git LFS), which the hub takes from everybody (https://huggingface.co/docs/hub/xet/legacy-git-lfs)
and any server can stand in for; hf_xet needs a storage service of its own. HF_HUB_DISABLE_XET=0 asks for it.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm.common.cli import log, one_line, progress
from fastvlm.common.errors import UserError
from fastvlm.download.fetch import TRANSIENT
from quantization.catalogue import human

MAIN = "main"
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before another attempt at what huggingface_hub itself tries only once
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
_LATER = "run it again later"


@dataclass(frozen=True)
class Upload:
    """A file to publish: its name in the repository, its bytes or where they are, and their size and sha256."""

    name: str
    source: Path | bytes
    size: int
    sha256: str

    def content(self) -> bytes:
        """All of it."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class Held:
    """What a repository has at a commit: name -> (size, sha256 if it is kept by LFS, git's id of the blob).

    branch: whether the branch that was asked for is there; if not, this is what main has.
    """

    commit: str
    private: bool
    branch: bool
    files: Mapping[str, tuple[int, str | None, str]]

    def has(self, file: Upload) -> bool:
        """Whether it holds these very bytes under this name."""
        size, sha256, blob = self.files.get(file.name, (-1, None, ""))
        if size != file.size or sha256 is not None:
            return size == file.size and sha256 == file.sha256
        content = file.content()
        of_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return blob == of_git and hashlib.sha256(content).hexdigest() == file.sha256


@dataclass
class Wire:
    """Counts the bytes of large files as they go out."""

    file: str = ""
    sent: int = 0
    again: int = 0
    urls: dict[str, int] = field(default_factory=dict)  # bytes sent to each in its last attempt
    advance: Callable[[int], Any] = lambda n: None

    def begin(self, file: str, advance: Callable[[int], Any]) -> None:
        """From here on the bytes are of this file."""
        self.file, self.advance = file, advance
        self.urls.clear()

    def watch(self, request: Any) -> None:
        """A hook on requests. huggingface_hub tries a PUT six times, with 1, 2, 4, 8 and 8 s between."""
        if request.method != "PUT":
            return
        url = str(request.url)
        if url in self.urls:
            self.again += 1
            log(f"{self.file}: not taken after {human(self.urls[url])}; sending it again")
            self.advance(-self.urls[url])
        self.urls[url] = 0
        request.stream = _counted(request.stream, self, url)


def _counted(stream: Any, wire: Wire, url: str) -> Any:
    from httpx2 import SyncByteStream

    class Counted(SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for piece in stream:
                wire.sent += len(piece)
                wire.urls[url] += len(piece)
                wire.advance(len(piece))
                yield piece

    return Counted()


@contextmanager
def client(debug: bool) -> Iterator[Wire]:
    """huggingface_hub's client with a limit to every wait, its bytes counted, its own words kept to --debug."""
    import huggingface_hub
    from httpx2 import Timeout
    from huggingface_hub import constants
    from huggingface_hub.utils import _http  # private: as it is in 2.4.0, which requirements.txt pins

    wire, xet = Wire(), constants.HF_HUB_DISABLE_XET
    level = huggingface_hub.logging.get_verbosity()

    def make() -> Any:
        made = _http.default_client_factory()
        made.timeout = Timeout(BYTE_WITHIN, read=ANSWER_WITHIN)
        made.event_hooks = {"request": [*made.event_hooks["request"], wire.watch]}
        return made

    if not debug:
        huggingface_hub.logging.set_verbosity_error()
    constants.HF_HUB_DISABLE_XET = os.environ.get("HF_HUB_DISABLE_XET", "1").lower() not in ("0", "false", "no", "off")
    huggingface_hub.set_client_factory(make)
    try:
        with nullcontext() if debug else huggingface_hub.utils.disable_progress_bars():  # ours are shown
            yield wire
    finally:
        huggingface_hub.set_client_factory(_http.default_client_factory)
        constants.HF_HUB_DISABLE_XET = xet
        huggingface_hub.logging.set_verbosity(level)


class Hub:
    """A branch of the repository `name` at the hub that HF_ENDPOINT says."""

    def __init__(self, name: str, revision: str, wire: Wire) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.name, self.revision, self.wire = name, revision, wire
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        if not self.endpoint.startswith(("https://", "http://")):
            raise UserError(f"HF_ENDPOINT: got {self.endpoint!r}, expected an address that begins with https://")
        self.api = HfApi(endpoint=self.endpoint, token=get_token(), library_name="fastvlm")

    def ask(self) -> Held | None:
        """What the branch holds; None when there is no repository that we may see."""
        from huggingface_hub import constants
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{self.endpoint}/{self.name} is out of reach: HF_HUB_OFFLINE is set; unset it to publish")
        with self._refusals("can't be asked what it has"):
            try:
                return self._held(self.revision)
            except RepositoryNotFoundError:
                return None
            except RevisionNotFoundError:
                if self.revision == MAIN:
                    raise
                return self._held(MAIN, branch=False)

    def ask_at(self, commit: str) -> Held:
        """What a commit holds."""
        with self._refusals(f"has a new commit {commit}, but can't be asked what is in it"):
            held: Held = self._steadily(lambda: self._held(commit))
            return held

    def make(self, private: bool) -> Held:
        """Make the repository."""
        with self._refusals("can't be made"):
            self._steadily(lambda: self.api.create_repo(self.name, private=private or None, exist_ok=True))
        held = self.ask()
        if held is None or (private and not held.private):
            raise UserError(f"{self.endpoint}/{self.name}: made, but it {'is public' if held else 'is not there'}")
        return held

    def commit(self, files: Sequence[Upload], stale: Sequence[str], held: Held) -> str:
        """Send the files, then add them and delete the stale ones by one commit on `held`; returns the commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._refusals("upload failed", f"{_LATER}: what has arrived is not sent again"):
            if not held.branch:
                self._steadily(lambda: self.api.create_branch(self.name, branch=self.revision, exist_ok=True))
            added = []
            with progress(f"upload to {self.name}", sum(file.size for file in files), sized=True) as advance:
                for file in files:
                    self.wire.begin(file.name, advance)
                    one = CommitOperationAdd(
                        file.name, file.source if isinstance(file.source, bytes) else str(file.source)
                    )
                    one.upload_info.sha256 = bytes.fromhex(file.sha256)  # known, so it isn't read for it once more
                    self.api.preupload_lfs_files(self.name, additions=[one], revision=self.revision, num_threads=1)
                    advance(file.size - sum(self.wire.urls.values()))  # what goes with the commit, or was there
                    added.append(one)
            operations: list[Any] = [*(CommitOperationDelete(name) for name in stale), *added]

            def send() -> str:
                done = self.api.create_commit(
                    self.name, operations, commit_message=_MESSAGE, revision=self.revision, parent_commit=held.commit
                )
                return str(done.oid)

            return str(self._steadily(send, lambda: self._arrived(files, stale, held.commit)))

    def _held(self, revision: str, branch: bool = True) -> Held:
        info: Any = self.api.model_info(self.name, revision=revision, files_metadata=True, timeout=ANSWER_WITHIN)
        files = {one.rfilename: (one.size, one.lfs.sha256 if one.lfs else None, one.blob_id) for one in info.siblings}
        if not all(isinstance(one, str) for one in (info.sha, *files)):
            raise TypeError("a commit or a file without a name")
        return Held(info.sha, bool(info.private), branch, files)

    def _arrived(self, files: Sequence[Upload], stale: Sequence[str], parent: str) -> str | None:
        """The branch's commit, if it is one that holds it all: a commit may arrive and its answer be lost."""
        try:
            now = self.ask()
        except UserError:
            return None
        if now is None or now.commit == parent or any(name in now.files for name in stale):
            return None
        return now.commit if all(now.has(file) for file in files) else None

    def _steadily(self, action: Callable[[], Any], arrived: Callable[[], Any] = lambda: None) -> Any:
        """action(), which huggingface_hub tries only once, again after what may pass; or what `arrived` finds."""
        from httpx2 import TransportError
        from huggingface_hub.errors import HfHubHTTPError

        for wait in (*WAITS, None):
            try:
                return action()
            except (TransportError, HfHubHTTPError) as error:
                status = _status(error)
                if status in (0, 412, *TRANSIENT) and (found := arrived()):
                    return found
                if wait is None or status not in (0, *TRANSIENT):
                    raise
                log(f"{self.name}: {_said(error)}; trying again in {wait:g} s")
                time.sleep(wait)

    @contextmanager
    def _refusals(self, what: str, otherwise: str = _LATER) -> Iterator[None]:
        """Everything that huggingface_hub raises as one UserError that says what to do.

        A lookup or type that fails in it is an answer in another form than a hub's.
        """
        from httpx2 import HTTPError

        try:
            yield
        except (HTTPError, RuntimeError, ValueError, OSError) as error:
            cause: BaseException = error
            while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
                cause = cause.__cause__
            where = f" at {self.wire.file}" if isinstance(error, RuntimeError) else ""
            hint = _HINTS.get(_status(cause), otherwise)
            raise UserError(f"{self.endpoint}/{self.name}: {what}{where}: {_said(cause)}; {hint}") from error
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.endpoint}/{self.name}: {what}: it answered what is no repository ({_said(error)}): expected a"
                " hub such as https://huggingface.co in HF_ENDPOINT"
            ) from error


def _status(error: BaseException) -> int:
    """The HTTP status that is behind an error, 0 if none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _said(error: BaseException) -> str:
    """What happened, without the client's addresses, request numbers and advice."""
    status = _status(error)
    if not status:
        return f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f"HTTP {status}" + (f" ({said})" if said else "")
