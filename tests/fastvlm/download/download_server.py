"""A loopback HTTP server that misbehaves on request, as model zoo and as hub: a pytest plugin for the download tests.

They import it too, before pytest would load it (PYTEST_DONT_REWRITE).
"""

import contextlib
import hashlib
import io
import json
import random
import sys
import threading
import types
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastvlm.common.errors import UserError
from fastvlm.download import download, fetch
from tests.helpers import contents

NAME = "fastvlm_0.5b_stage3"
FILE = "/llava-fastvithd_0.5b_stage3.zip"
QUICK = fetch.Retries(waits=(0.01, 0.01, 0.01), timeout=60.0)
ONCE = fetch.Retries(waits=(), timeout=60.0)
WEIGHTS = random.Random(0).randbytes(300_000)
CONTENT = {
    "config.json": b'{"model_type": "llava_qwen2"}',
    "model.safetensors": WEIGHTS,
    "tokenizer/vocab.json": b"{}" * 500,
    "empty.txt": b"",
}
REPOSITORY, SHA = "acme/FastVLM-tiny", "0123456789abcdef0123456789abcdef01234567"
HUB_CONTENT = {"config.json": b"{}", "model.safetensors": WEIGHTS, "LICENSE": b"free", "merges.txt": b"x"}
LISTING = f"/api/models/{REPOSITORY}/revision/main"


@dataclass
class Act:
    """How the server misbehaves for one request."""

    status: int = 200
    drop: int | None = None  # bytes of the body after which the connection ends
    stall: float = 0.0  # seconds to wait there first, at most until the server is closed
    ranges: bool = True
    if_range: bool = True
    announce: int = 0  # added to the true length in Content-Length
    length: bool = True
    etag: bool = True
    location: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Server:
    """A loopback HTTP server: `files` by path, `acts` by path (one taken per request, the last one stays)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.acts: dict[str, list[Act]] = defaultdict(list)
        self.requests: list[dict[str, str]] = []
        self.closed = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    server.answer(self)
                self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        path = http.path.split("?")[0]
        self.requests.append({"method": http.command, "path": path, **{k.lower(): v for k, v in http.headers.items()}})
        acts = self.acts[path]
        act = (acts.pop(0) if len(acts) > 1 else acts[0]) if acts else Act()
        if act.status != 200 or path not in self.files:
            http.send_response(act.status if act.status != 200 else 404)
            for key, value in {
                "Location": act.location,
                "Content-Length": "0",
                "Connection": "close",
                **act.headers,
            }.items():
                if value:
                    http.send_header(key, value)
            http.end_headers()
            return
        body = self.files[path]
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        wanted, condition, start = http.headers.get("Range"), http.headers.get("If-Range"), 0
        if wanted and act.ranges and (condition == etag or not act.if_range):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(body):
            http.send_response(416)
            http.send_header("Content-Range", f"bytes */{len(body)}")
        elif start:
            http.send_response(206)
            http.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            http.send_response(200)
        part = body[start:]
        for key, value in {"ETag": etag if act.etag else "", **act.headers}.items():
            if value:
                http.send_header(key, value)
        if act.length:
            http.send_header("Content-Length", str(len(part) + act.announce))
        http.send_header("Connection", "close")
        http.end_headers()
        if http.command == "HEAD":
            return
        http.wfile.write(part if act.drop is None else part[: act.drop])
        self.closed.wait(act.stall)

    def close(self) -> None:
        self.closed.set()
        self.httpd.shutdown()
        self.httpd.server_close()

    def ranges(self, path: str = FILE) -> list[str]:
        """The Range header of each request for `path` ('' where there was none)."""
        return [request.get("range", "") for request in self.requests if request["path"] == path]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def make_zip(content: dict[str, bytes] = CONTENT, top: str = "llava-fastvithd_0.5b_stage3/", **extra: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**content, **extra}.items():
            archive.writestr(top + name, data)
    return buffer.getvalue()


@pytest.fixture
def zoo(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server as the model zoo, and an `open_checkpoint` that only wants a config.json."""
    server.files[FILE] = make_zip()
    monkeypatch.setenv("FASTVLM_ZOO_URL", server.url)
    monkeypatch.setattr(download, "RETRIES", QUICK)
    monkeypatch.setitem(sys.modules, "fastvlm.checkpoint.checkpoint", lenient_checkpoint())
    return server


def lenient_checkpoint() -> types.ModuleType:
    module: Any = types.ModuleType("fastvlm.checkpoint.checkpoint")

    def open_checkpoint(path: Path) -> Any:
        if not (path / "config.json").exists():
            raise UserError(f"{path}: no config.json")
        return types.SimpleNamespace(warnings=("a warning of the checkpoint's",))

    module.open_checkpoint = open_checkpoint
    return module


def content_of(folder: Path) -> dict[str, bytes]:
    """All files but the record of the download."""
    return {name: data for name, data in contents(folder).items() if name != download.RECORD}


def get(folder: Path, retries: fetch.Retries = QUICK, name: str = NAME, **options: Any) -> dict[str, Any]:
    return download.download(name, folder, retries=retries, **options)


def assert_whole(folder: Path, name: str = NAME, content: dict[str, bytes] = CONTENT) -> None:
    found, beside = content_of(folder / name), [path.name for path in (folder / name).parent.iterdir()]
    assert found == content, f"found {sorted(found)}"
    assert beside == [Path(name).name], f"left over: {beside}"


def flip(data: bytes, at: int, mask: int = 1) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


@pytest.fixture
def hub(zoo: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server as a hub with one repository; also files that must not be fetched."""
    monkeypatch.setenv("HF_ENDPOINT", zoo.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    publish(zoo, {**HUB_CONTENT, "pytorch_model.bin": b"pickle", "modeling.py": b"code", "onnx/model.json": b"{}"})
    return zoo


def publish(hub: Server, content: dict[str, bytes], sha: str = SHA, **card: str) -> None:
    siblings: list[dict[str, Any]] = []
    for name, data in content.items():
        hub.files[f"/{REPOSITORY}/resolve/{sha}/{name}"] = data
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        lfs = {"lfs": large} if len(data) > 999 else {}
        siblings.append({"rfilename": name, "size": len(data), "blobId": blob, **lfs})
    listing = {"id": REPOSITORY, "sha": sha, "siblings": siblings, "cardData": {"license": "apple-amlr", **card}}
    hub.files[LISTING] = json.dumps(listing).encode()


def fetched(hub: Server) -> list[str]:
    return [request["path"].rsplit("/", 1)[1] for request in hub.requests if "/resolve/" in request["path"]]
