"""A loopback hub that repositories are published to, and that misbehaves on request: a pytest plugin.

Its answers are what huggingface_hub 2.4.0 asks for (hf_api.py, _commit_api.py, lfs.py): repositories and branches,
preupload, the LFS batch with one PUT or several parts, the commit as lines of JSON, the listing, the files.
The tests import it too, before pytest would load it (PYTEST_DONT_REWRITE).
"""

import argparse
import base64
import hashlib
import json
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from app_bridge.publishing import publish
from fastvlm.common import cli
from fastvlm.common.arguments import Parser
from model_export import artefact as exported

TOKEN = "hf_test"
PIECE = 16384
LARGE_FROM = 1000  # bytes from which a file is kept by LFS


@dataclass
class Fault:
    """What goes wrong with the requests whose "METHOD /path" begins with `where`, `times` of them after `skip`."""

    where: str
    status: int = 0  # answered, after the request was read; 0: the connection is cut
    after: int = 0  # bytes of the request's body that are read before the cut
    silent: bool = False  # nothing is said before the cut until the client hangs up
    done: bool = False  # the request is obeyed first, and only its answer is lost
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    skip: int = 0
    times: int = 1 << 30


@dataclass
class Repository:
    """Files by branch, in a list of commits; a file is its bytes, kept by LFS or not."""

    private: bool
    head: dict[str, str] = field(default_factory=dict)  # branch -> commit
    trees: dict[str, dict[str, tuple[bool, bytes]]] = field(default_factory=dict)  # commit -> path -> (LFS, bytes)

    def commit(self, branch: str, tree: dict[str, tuple[bool, bytes]]) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.trees)}".encode()).hexdigest()
        self.head[branch], self.trees[oid] = oid, tree
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """What a clone would hold."""
        return {path: content for path, (_, content) in self.trees[self.head[branch]].items()}


class Refused(Exception):
    """An answer that is no success: status, X-Error-Code, text."""


class Hub:
    """`repositories` by name, `objects` by sha256, `faults`, `requests` seen, bytes `received` by object."""

    part_size = 0  # bytes of a part of a multipart upload; 0: one PUT
    large = LARGE_FROM

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received: dict[str, int] = {}
        self.token = TOKEN
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with suppress(OSError):
                    hub.serve(self)
                self.close_connection = True

            do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True).start()

    def writes(self) -> list[str]:
        """The requests that ask for a change."""
        return [request for request in self.requests if not request.startswith("GET ")]

    def serve(self, http: BaseHTTPRequestHandler) -> None:
        """One request, in order: its fault if it has one, the token, the answer."""
        path, asked = unquote(urlsplit(http.path).path), f"{http.command} {unquote(urlsplit(http.path).path)}"
        self.requests.append(asked)
        fault, length = self._fault(asked), int(http.headers.get("Content-Length", 0))
        if fault and not fault.status and not fault.done:
            self._count(asked, len(self._read(http, min(length, fault.after))))
            if fault.silent:
                http.rfile.read(1)
            return _cut(http)
        body = self._read(http, length)
        self._count(asked, len(body))
        if len(body) < length:
            return None
        if fault and fault.status:
            return _answer(http, fault.status, fault.body, **fault.headers)
        try:
            if not path.startswith("/objects/") and http.headers.get("Authorization") != f"Bearer {self.token}":
                if http.headers.get("Authorization"):
                    raise Refused(401, "", "Invalid user token.")
                if http.command != "GET":
                    raise Refused(401, "", "Unauthorized")
            answer = self._route(http, path, body)
        except Refused as refused:
            status, code, text = refused.args
            error = {"error": text, "url": f"{self.url}/a/b"}  # a 409 has one
            return _answer(http, status, error, **({"X-Error-Code": code} if code else {}))
        if fault and fault.done:
            return _cut(http)
        headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"'} if http.command == "PUT" else {}
        return _answer(http, 200, answer, **headers)

    def _fault(self, asked: str) -> Fault | None:
        for fault in self.faults:
            if asked.startswith(fault.where) and fault.times > 0:
                fault.skip -= 1
                if fault.skip < 0:
                    fault.times -= 1
                    return fault
        return None

    def _read(self, http: BaseHTTPRequestHandler, length: int) -> bytes:
        pieces, left = [], length
        while left and (piece := http.rfile.read(min(PIECE, left))):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _count(self, asked: str, size: int) -> None:
        if asked.startswith("PUT /objects/"):
            oid = asked.split("/")[2]
            self.received[oid] = self.received.get(oid, 0) + size

    def _route(self, http: BaseHTTPRequestHandler, path: str, body: bytes) -> Any:
        words = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if words[0] == "objects":
            return self._store(words, body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return {"objects": [self._action(one) for one in json.loads(body)["objects"]]}
        if words[:2] == ["api", "models"]:
            words += ["revision", "main"][len(words) - 4 :]
            verbs: dict[str, Callable[..., Any]] = {
                "revision": self._info, "preupload": self._preupload, "commit": self._commit, "branch": self._branch,
            }  # fmt: skip
            if words[4] not in verbs:
                raise Refused(404, "", f"no such route: {path}")
            return verbs[words[4]](self._known(http, "/".join(words[2:4])), "/".join(words[2:4]), words[5], body)
        if words[2:3] == ["resolve"]:
            return self._known(http, "/".join(words[:2])).trees[words[3]]["/".join(words[4:])][1]
        raise Refused(404, "", f"no such route: {path}")

    def _known(self, http: BaseHTTPRequestHandler, name: str) -> Repository:
        found = self.repositories.get(name)
        if found is None or (found.private and not http.headers.get("Authorization")):
            raise Refused(404, "RepoNotFound", "Repository not found")
        return found

    def _create(self, asked: dict[str, Any]) -> dict[str, str]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            raise Refused(409, "", "You already created this model repo")
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        self.repositories[name].commit("main", {".gitattributes": (False, b"*.safetensors filter=lfs\n")})
        return {"url": f"{self.url}/{name}"}

    def _info(self, found: Repository, name: str, revision: str, body: bytes) -> dict[str, Any]:
        oid = found.head.get(revision, revision)
        if oid not in found.trees:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        siblings = [_sibling(path, *kept) for path, kept in sorted(found.trees[oid].items())]
        return {"id": name, "sha": oid, "private": found.private, "siblings": siblings, "tags": []}

    def _preupload(self, found: Repository, name: str, revision: str, body: bytes) -> dict[str, Any]:
        modes = []
        for one in json.loads(body)["files"]:
            mode = "lfs" if one["size"] >= self.large else "regular"
            kept = found.trees[found.head[revision]].get(one["path"])
            oid = None if kept is None else (_sha256 if kept[0] else _blob)(kept[1])
            modes.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": modes}

    def _action(self, one: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.url}/objects/{one['oid']}"
        if one["oid"] in self.objects:
            return one
        header = {}
        if self.part_size:
            count = -(-one["size"] // self.part_size)
            header = {"chunk_size": str(self.part_size)} | {f"{n:05}": f"{href}/{n}" for n in range(1, count + 1)}
        return one | {"actions": {"upload": {"href": href, "header": header}, "verify": {"href": f"{href}/verify"}}}

    def _store(self, words: list[str], body: bytes) -> dict[str, str]:
        """A whole object, one of its parts, the end of its parts, or the question whether it is there."""
        oid, last = words[1], words[-1]
        if last == "verify":
            if len(self.objects.get(oid, b"")) != json.loads(body)["size"]:
                raise Refused(404, "", "no such object")
            return {}
        if last.isdigit() and len(words) == 3:
            self.parts[oid, int(last)] = body
            return {}
        if self.part_size:
            body = b"".join(self.parts[oid, part["partNumber"]] for part in json.loads(body)["parts"])
        if _sha256(body) != oid:
            raise Refused(400, "", "the content is not that of its oid")
        self.objects[oid] = body
        return {}

    def _commit(self, found: Repository, name: str, revision: str, body: bytes) -> dict[str, str]:
        """All of it or nothing, as git does."""
        lines = [json.loads(line) for line in body.splitlines()]
        tree = dict(found.trees[found.head[revision]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", found.head[revision]) != found.head[revision]:
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                tree[value["path"]] = (False, base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, "", f"LFS object missing: {value['path']}")
                tree[value["path"]] = (True, self.objects[value["oid"]])
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        oid = found.commit(revision, tree)
        return {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}

    def _branch(self, found: Repository, name: str, branch: str, body: bytes) -> dict[str, str]:
        found.head[branch] = found.head["main"]
        return {}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(path: str, large: bool, content: bytes) -> dict[str, Any]:
    lfs = {"sha256": _sha256(content), "size": len(content), "pointerSize": 130}
    return {"rfilename": path, "size": len(content), "blobId": _blob(content)} | ({"lfs": lfs} if large else {})


def _answer(http: BaseHTTPRequestHandler, status: int, answer: Any, **headers: str) -> None:
    body = answer if isinstance(answer, bytes) else json.dumps(answer or {}).encode()
    http.send_response(status)
    for key, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
        http.send_header(key, value)
    http.end_headers()
    http.wfile.write(body)


def _cut(http: BaseHTTPRequestHandler) -> None:
    """A TCP reset."""
    http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    http.connection.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server as the user's hub, with a token; the client's waits between attempts are none."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _detect_agent, _http, close_session

    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}})  # asks a hub otherwise
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    yield server
    close_session()
    server.httpd.shutdown()
    server.httpd.server_close()


# --- what the tests share ---------------------------------------------------------------------------------------------

REPO = "acme/FastVLM-tiny"
WEIGHTS = random.Random(0).randbytes(300_000)
CONTENT = {
    "LICENSE": b"Free for everybody.\n",
    "NOTICE": b"This was made from a checkpoint. What was changed:\n- all of it\n",
    "config.json": b'{"model_type": "llava_qwen2"}',
    "fastvithd.mlpackage/Manifest.json": b"{}",
    "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin": WEIGHTS[::-1],
    "model.safetensors": WEIGHTS,
    "multi_modal_projector.safetensors": WEIGHTS[:5000],
    "tokenizer.json": b"[" + b"1, " * 999 + b"1]",
}
LARGE = {name: content for name, content in CONTENT.items() if len(content) >= LARGE_FROM}
PUT_WEIGHTS = f"PUT /objects/{hashlib.sha256(WEIGHTS).hexdigest()}"
FORMER = {".gitattributes": b"", "README.md": b"mine", "plot.png": b"\x89PNG", "export.json": b"{}"}


@pytest.fixture
def artefact(app_artefact: Path, tmp_path: Path) -> Path:
    """A small one: files of our own under the manifest of a real export."""
    return make(tmp_path / "artefact", app_artefact)


def make(folder: Path, of: Path, content: dict[str, bytes] = CONTENT, **changed: Any) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    manifest = exported.read_manifest(of) | {"files": None, **changed}
    exported.write_manifest(folder, {key: value for key, value in manifest.items() if key != "manifest_sha256"})
    return folder


def command(folder: Path, *argv: str | Path, repo: str = REPO) -> int:
    def build() -> argparse.ArgumentParser:
        parser = Parser()
        publish.add_parser(parser.add_subparsers(required=True))
        return parser

    return cli.run(build, ["publish", str(folder), "--repo", repo, *map(str, argv)])


def last(text: str) -> Any:
    """The JSON document that ends a command's output."""
    return json.loads(text.splitlines()[-1])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error line, without a traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1 and lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def held_by(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_published(hub: Hub, folder: Path, branch: str = "main", kept: tuple[str, ...] = ()) -> None:
    """Every byte of the artefact, a card, the hub's own file, and nothing else."""
    found = hub.repositories[REPO].files(branch)
    wanted = held_by(folder)
    assert {name: found.get(name) for name in wanted} == wanted
    assert set(found) - set(wanted) == {"README.md", ".gitattributes", *kept}


def existing(hub: Hub, files: dict[str, bytes], private: bool = False) -> Repository:
    repository = hub.repositories[REPO] = Repository(private)
    repository.commit("main", {name: (len(content) >= hub.large, content) for name, content in files.items()})
    return repository
