"""One file over HTTP: resumable, with bounded retries and every length checked. Standard library only."""

import http.client
import json
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rich.filesize import decimal

from fastvlm.common.cli import log
from fastvlm.common.documents import object_or_empty
from fastvlm.common.errors import UserError
from fastvlm.common.staging import write_file

CHUNK = 1 << 20  # bytes
MOST = 1 << 50  # bytes of a file; a server that announces more is lying
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
    """action(), again after each `Transient` failure; it counts anew when `have()`, the bytes kept, has grown."""
    best, failures = -1, 0
    while True:
        try:
            return action()
        except Transient as error:
            failures, best = (1, have()) if have() > best else (failures + 1, best)
            if failures > len(retries.waits):
                tally = f"{failures} fruitless attempts in a row, {decimal(have())} kept"
                raise UserError(f"download failed: {what}: {error} ({tally}); run it again to go on") from error
            log(f"{what}: {error}; trying again in {retries.waits[failures - 1]:g} s")
            time.sleep(retries.waits[failures - 1])


def fetch(
    url: str,
    path: Path,
    retries: Retries,
    size: int | None = None,
    secrets: Mapping[str, str] | None = None,
    unpacked: bool = False,
    report: Report = silent,
) -> str:
    """Download `url` into `path`, going on from the bytes that `path` already holds; returns the file's validator.

    `path` + ".json" remembers what those bytes are of: they count only while the server's strong ETag (lacking one,
    Last-Modified) and length stay the same (If-Range, RFC 9110 13.1.5).
    size: the bytes expected, when known from elsewhere. secrets: headers for the first host only. unpacked: the disk
    must have room for the file twice. UserError when the server refuses, contradicts itself about a length, or fails
    too often in a row; what was received stays for the next run.
    """

    def attempt() -> str:
        with _ask(url, path, secrets or {}, retries.timeout) as response:
            start, total = _accept(response, url, path, size)
            if start < total or not path.exists():
                need_disk(path.parent, total - start + (total if unpacked else 0))
                _append(response, path, start, total, report)
            return _read_state(path).get("validator", "")

    return persist(attempt, retries, url, lambda: path.stat().st_size if path.exists() else 0)


def remote_size(url: str, timeout: float) -> int:
    """The file's length in bytes as the server announces it. UserError or Transient like `fetch`."""
    with open_url(url, timeout=timeout, method="HEAD") as response:
        return _extent(response, None)[1]


def _ask(url: str, path: Path, secrets: Mapping[str, str], timeout: float) -> Any:
    """Request the whole file, or from where `path` ends if it holds a beginning that the server can vouch for."""
    state = _read_state(path)
    if path.exists() and (state.get("url") != url or not state.get("validator")):
        log(f"{url}: the bytes kept are another address's, or came without an ETag; starting again")
        path.unlink()
    have = path.stat().st_size if path.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": state["validator"]} if have else {}
    return open_url(url, headers, secrets, timeout)


def _accept(response: Any, url: str, path: Path, size: int | None) -> tuple[int, int]:
    """(bytes of `path` that stay, bytes in all), after setting `path` and its state straight for this response."""
    state, have = _read_state(path), path.stat().st_size if path.exists() else 0
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"download refused: {url}: sent compressed although asked not to; use another mirror")
    start, total = _extent(response, size)
    validator = _validator(response.headers) or (state.get("validator", "") if response.status in (206, 416) else "")
    unchanged = bool(validator) and (validator, total) == (state.get("validator"), state.get("total"))
    if have and unchanged and (have == total or start == have):
        return have, total  # 206 as asked; or 416, or 200 from a server without ranges, when all of it is here
    if response.status != 200:
        path.unlink(missing_ok=True)
        raise Transient(f"the file changed on the server (HTTP {response.status}); starting again")
    if have:
        log(f"{url}: " + ("the server ignores ranges" if unchanged else "changed on the server") + "; starting again")
    path.unlink(missing_ok=True)  # before the state, which must never describe another file's bytes
    write_json(_state_path(path), {"url": url, "validator": validator, "total": total})
    return 0, total


def _append(response: Any, path: Path, start: int, total: int, report: Report) -> None:
    have = start
    report(have, total)
    with open(path, "ab") as file:
        for chunk in body(response, total - start):
            file.write(chunk)
            have += len(chunk)
            report(have, total)
    if have < total:
        raise Transient(f"connection closed after {have} of {total} bytes")


def body(response: Any, left: int) -> Iterator[bytes]:
    """Up to `left` bytes as they come in. A lost connection is `Transient`; an error of our own disk stays one."""
    try:
        while left and (chunk := response.read1(min(CHUNK, left))[:left]):  # a chunk of negative size gives more
            left -= len(chunk)
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise Transient(f"connection lost ({error or type(error).__name__})") from error


def _extent(response: Any, size: int | None) -> tuple[int, int]:
    """(first byte, bytes in all) of a 200, 206 or 416 response; UserError when it doesn't say or contradicts `size`."""
    start, total, length = 0, size, response.headers.get("Content-Length", "")
    if response.status == 200 and _LENGTH.fullmatch(length):
        total = int(length)
    elif response.status != 200:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        start, total = (int(match[1] or 0), int(match[2])) if match else (0, -1)
    if total is None:
        raise UserError(f"download refused: {response.url}: the server gives no length, so the file can't be checked")
    if size is not None and total not in (size, -1):
        raise UserError(f"download refused: {response.url}: the server announces {total} bytes, expected {size}")
    return start, total


def _validator(headers: Any) -> str:
    """The header that identifies these very bytes; a weak ETag doesn't (RFC 9110 8.8.1). It is sent back: text only."""
    etag = headers.get("ETag", "")
    found = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    return found if found.isascii() and found.isprintable() and len(found) < 1000 else ""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http(s) only and never from https down to http; secrets stay with their host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise UserError(f"download refused: {req.full_url} redirects to {newurl}; expected an https address")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            request.unredirected_hdrs.update(req.unredirected_hdrs)
        return request


def open_url(
    url: str,
    headers: Mapping[str, str] | None = None,
    secrets: Mapping[str, str] | None = None,
    timeout: float = 30.0,
    method: str = "GET",
) -> Any:
    """The response with status 200, 206 or 416; anything else is Transient or a UserError that says why."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"cannot download {url}: expected an address that begins with https://")
    plain = {"User-Agent": "fastvlm", "Accept-Encoding": "identity", **(headers or {})}
    request = urllib.request.Request(url, headers=plain, method=method)
    for key, value in (secrets or {}).items():
        request.add_unredirected_header(key, value)
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        if error.code in TRANSIENT:
            raise Transient(f"HTTP {error.code} {error.reason}") from error
        why = HUB_ERRORS.get(error.headers.get("X-Error-Code", ""), "check the name and your access")
        raise UserError(f"download failed: {url}: HTTP {error.code} {error.reason}: {why}") from error
    except ValueError as error:  # of a redirect to what is no address at all
        raise UserError(f"download refused: {url}: redirects to an unusable address ({error})") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            hint = "set SSL_CERT_FILE, or on a Mac's python.org Python run its `Install Certificates.command`"
            raise UserError(f"download failed: {url}: {reason}; {hint}") from error
        raise Transient(str(reason) or type(reason).__name__) from error


def need_disk(folder: Path, size: int) -> None:
    """DiskFull unless the disk of `folder` (which need not exist yet) has `size` bytes free."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        hint = "free some, or choose another --output-dir"
        raise DiskFull(f"disk too full: {folder} needs {decimal(size)} more, {decimal(free)} are free; {hint}")


def write_json(path: Path, document: Any) -> None:
    """Write `document` in one piece: a reader finds the old file or the new one."""
    write_file(path, (json.dumps(document, indent=1) + "\n").encode())


def _state_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_state(path: Path) -> dict[str, Any]:
    return object_or_empty(_state_path(path))
