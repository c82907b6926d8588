"""One file over HTTP: resumable, with bounded retries and every length checked."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastvlm.common.cli import log
from fastvlm.common.documents import object_or_empty
from fastvlm.common.errors import UserError
from fastvlm.common.staging import write_file
from fastvlm.common.units import format_bytes

if TYPE_CHECKING:
    from httpx2 import Client, Headers, Response

CHUNK = 1 << 20  # bytes
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses worth another try (RFC 9110, RFC 8470, RFC 6585)
HUB_ERRORS = {  # a Hugging Face hub's X-Error-Code (huggingface_hub's utils/_http.py)
    "RepoNotFound": "no such repository, or a private one; check the name, or `hf auth login`",
    "GatedRepo": "gated; accept its terms on its page, then `hf auth login`",
    "RevisionNotFound": "the repository has no such revision",
}
_LENGTH = re.compile(r"\d{1,15}", re.ASCII)
_RANGE = re.compile(r"bytes (?:(\d{1,15})-\d{1,15}|\*)/(\d{1,15})", re.ASCII)
T = TypeVar("T")
Report = Callable[[int, int], None]  # (bytes so far, bytes in all)


@dataclass(frozen=True)
class Retries:
    """Seconds to wait before each attempt that follows a fruitless one, and seconds that may pass without a byte."""

    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    timeout: float = 30.0


class Transient(Exception):
    """An attempt that failed in a way that the next one may not."""


class DiskFull(UserError):
    """Not enough room; what was received so far is good and stays."""


def silent(have: int, total: int) -> None:
    """A `Report` that shows nothing."""


def persist(action: Callable[[], T], retries: Retries, what: str, have: Callable[[], int] = lambda: 0) -> T:
    """action(), again after each `Transient` failure; it counts anew when `have()`, the bytes received, has grown."""
    best, failures = -1, 0
    while True:
        try:
            return action()
        except Transient as error:
            failures, best = (1, have()) if have() > best else (failures + 1, best)
            if failures > len(retries.waits):
                tally = f"{failures} fruitless attempts in a row, {format_bytes(have())} received"
                raise UserError(f"download failed: {what}: {error} ({tally}); run it again to go on") from error
            log(f"{what}: {error}; trying again in {retries.waits[failures - 1]:g} s")
            time.sleep(retries.waits[failures - 1])


def fetch(
    url: str,
    path: Path,
    retries: Retries,
    size: int | None = None,
    headers: Mapping[str, str] | None = None,
    unpacked: bool = False,
    report: Report = silent,
) -> str:
    """Download `url` into `path`, going on from the bytes that `path` already holds; returns the file's validator.

    `path` + ".json" remembers what those bytes are of: they count only while the server's strong ETag (lacking one,
    Last-Modified) and length stay the same (If-Range, RFC 9110 13.1.5).
    size: the bytes expected, when known from elsewhere. unpacked: the disk must have room for the file twice.
    UserError when the server refuses, contradicts itself about a length, or fails too often in a row; what was
    received stays for the next run.
    """
    state_path = path.with_name(path.name + ".json")

    def attempt() -> str:
        state = object_or_empty(state_path)
        validator = state.get("validator", "") if state.get("url") == url else ""
        have = path.stat().st_size if path.exists() and validator else 0
        ranged = {"Range": f"bytes={have}-", "If-Range": validator} if have else {}
        with request(url, retries.timeout, {**(headers or {}), **ranged}) as response:
            start, total = _extent(response, size)
            sent = _validator(response.headers) or ("" if response.status_code == 200 else validator)
            unchanged = bool(have) and (sent, total) == (validator, state.get("total"))
            if unchanged and have == total:
                return validator
            if not (unchanged and start == have):  # else a 206 as asked
                path.unlink(missing_ok=True)  # before the state, which must never describe another file's bytes
                if response.status_code != 200:
                    raise Transient(f"the file changed on the server (HTTP {response.status_code}); starting again")
                if have:
                    log(f"{url}: changed on the server, or it ignores ranges; starting again")
                have = 0
                write_json(state_path, {"url": url, "validator": sent, "total": total})
            need_disk(path.parent, total - have + (total if unpacked else 0))
            report(have, total)
            with open(path, "ab") as file:
                for chunk in response.iter_raw():
                    file.write(chunk[: total - have])
                    have = min(have + len(chunk), total)
                    report(have, total)
        if have < total:
            raise Transient(f"connection closed after {have} of {total} bytes")
        return sent

    return persist(attempt, retries, url, lambda: path.stat().st_size if path.exists() else 0)


def announced_size(url: str, timeout: float) -> int:
    """The file's length in bytes as the server announces it. UserError or Transient like `request`."""
    with request(url, timeout, method="HEAD") as response:
        return _extent(response, None)[1]


@contextmanager
def request(
    url: str, timeout: float, headers: Mapping[str, str] | None = None, method: str = "GET"
) -> "Iterator[Response]":
    """The response with status 200, 206 or 416, its body unread; anything else is Transient or a UserError.

    Redirects are followed, but not from https to http; an Authorization header stays with the first host.
    """
    import httpx2

    try:
        with client().stream(method, url, headers=headers, timeout=timeout) as response:
            code = f"HTTP {response.status_code} {response.reason_phrase}"
            if url.startswith("https:") and response.url.scheme != "https":
                raise UserError(f"download refused: {url} redirects to {response.url}; expected an https address")
            if response.status_code in TRANSIENT:
                raise Transient(code)
            if response.status_code not in (200, 206, 416):
                why = HUB_ERRORS.get(response.headers.get("X-Error-Code", ""), "check the name and your access")
                raise UserError(f"download failed: {url}: {code}: {why}")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise UserError(f"download refused: {url}: sent compressed although asked not to; use another mirror")
            yield response
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
        raise UserError(f"download refused: {url}: {error}; expected an https address") from error
    except httpx2.HTTPError as error:
        raise Transient(f"connection lost ({error or type(error).__name__})") from error


@cache
def client() -> "Client":
    """The HTTP client that all requests share: it reads the certificates once."""
    import httpx2

    return httpx2.Client(headers={"User-Agent": "fastvlm", "Accept-Encoding": "identity"}, follow_redirects=True)


def _extent(response: "Response", size: int | None) -> tuple[int, int]:
    """(first byte, bytes in all) of a 200, 206 or 416 response; UserError when it doesn't say or contradicts `size`."""
    start, total, length = 0, size, response.headers.get("Content-Length", "")
    if response.status_code == 200 and _LENGTH.fullmatch(length):
        total = int(length)
    elif response.status_code != 200:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        start, total = (int(match[1] or 0), int(match[2])) if match else (0, -1)
    if total is None:
        raise UserError(f"download refused: {response.url}: the server gives no length, so the file can't be checked")
    if size is not None and total not in (size, -1):
        raise UserError(f"download refused: {response.url}: the server announces {total} bytes, expected {size}")
    return start, total


def _validator(headers: "Headers") -> str:
    """The header that identifies these very bytes; a weak ETag doesn't (RFC 9110 8.8.1). It is sent back: text only."""
    etag = headers.get("ETag", "")
    value: str = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    return value if value.isascii() and value.isprintable() and len(value) < 1000 else ""


def need_disk(folder: Path, size: int) -> None:
    """DiskFull unless the disk of `folder` (which need not exist yet) has `size` bytes free."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise DiskFull(
            f"disk too full: {folder} needs {format_bytes(size)} more, {format_bytes(free)} are free; free some, or"
            " choose another --output-dir"
        )


def write_json(path: Path, document: object) -> None:
    """Write `document` in one piece: a reader finds the old file or the new one."""
    write_file(path, (json.dumps(document, indent=1) + "\n").encode())
