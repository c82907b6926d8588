"""A loopback hub that repositories are published to, and that misbehaves on request: a pytest plugin.

Its answers are what huggingface_hub 2.4.0 asks for without Xet (hf_api.py, _commit_api.py, lfs.py): repositories and
branches, preupload, the LFS batch with one PUT, the commit as lines of JSON, the listing, the files.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_test"
LARGE_FROM = 1000  # bytes from which a file is kept by LFS
Tree = dict[str, bytes]


@dataclass
class Fault:
    """What goes wrong with the requests whose "METHOD /path" begins with `where`, `times` of them after `skip`."""

    where: str
    status: int = 0  # answered, after the request was read; 0: the connection is cut
    silent: bool = False  # nothing is answered until the client hangs up
    done: bool = False  # the request is obeyed first, and only its answer is lost
    body: Any = None
    skip: int = 0
    times: int = 1 << 30


@dataclass
class Repository:
    """Commits, each with the files that a clone would hold."""

    private: bool = False
    head: dict[str, str] = field(default_factory=dict)  # branch -> commit
    trees: dict[str, Tree] = field(default_factory=dict)

    def commit(self, branch: str, tree: Tree) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.trees)}".encode()).hexdigest()
        self.head[branch], self.trees[oid] = oid, tree
        return oid

    def files(self, branch: str = "main") -> Tree:
        return self.trees[self.head[branch]]


class Refused(Exception):
    """An answer that is no success: status, X-Error-Code, text."""


class HubServer:
    """`repositories` by name, `objects` by sha256, `faults`, `requests` seen, sha256 `received` in whole."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received: list[str] = []
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
        path = unquote(urlsplit(http.path).path)
        request, authorization = f"{http.command} {path}", http.headers.get("Authorization")
        self.requests.append(request)
        fault = self._fault(request)
        if fault and not fault.status and not fault.done:
            if fault.silent:
                http.rfile.read(1 << 30)
            return _cut(http)
        body = http.rfile.read(int(http.headers.get("Content-Length", 0)))
        if fault and fault.status:
            return _answer(http, fault.status, fault.body)
        try:
            if authorization not in (None, f"Bearer {self.token}") or (not authorization and http.command == "POST"):
                raise Refused(401, "", "Invalid user token.")
            answer = self._route(path, body, bool(authorization))
        except Refused as refused:
            status, code, text = refused.args
            return _answer(http, status, {"error": text}, **({"X-Error-Code": code} if code else {}))
        return _cut(http) if fault and fault.done else _answer(http, 200, answer)

    def _fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if request.startswith(fault.where) and fault.times > 0:
                fault.skip -= 1
                if fault.skip < 0:
                    fault.times -= 1
                    return fault
        return None

    def _route(self, path: str, body: bytes, known: bool) -> Any:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if match := re.fullmatch(r"/objects/(\w+)", path):
            if _sha256(body) != match[1]:
                raise Refused(400, "", "the content is not that of its oid")
            self.objects[match[1]] = body
            self.received.append(match[1])
            return {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return {"objects": [self._action(one) for one in json.loads(body)["objects"]]}
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(\w+)/([^/]+))?(?:/(.+))?", path)
        repository = self.repositories.get(match[1]) if match else None
        if not match or repository is None or (repository.private and not known):
            raise Refused(404, "RepoNotFound", "Repository not found")
        verb, revision = match[2] or "revision", match[3] or "main"
        if verb == "branch":
            repository.head[revision] = repository.head["main"]
            return {}
        oid = repository.head.get(revision, revision)
        if oid not in repository.trees:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        if verb == "resolve":
            return repository.trees[oid][match[4]]
        if verb == "preupload":
            modes = {True: "lfs", False: "regular"}
            files = [{**one, "uploadMode": modes[one["size"] >= LARGE_FROM]} for one in json.loads(body)["files"]]
            return {"files": [{**one, "shouldIgnore": False, "oid": None} for one in files]}
        if verb == "commit":
            return self._commit(repository, revision, [json.loads(line) for line in body.splitlines()])
        siblings = [_sibling(name, content) for name, content in sorted(repository.trees[oid].items())]
        return {"id": match[1], "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}

    def _create(self, asked: dict[str, Any]) -> dict[str, str]:
        name = f"{asked['organization']}/{asked['name']}"
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        self.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.url}/{name}"}

    def _action(self, one: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.url}/objects/{one['oid']}"
        return one if one["oid"] in self.objects else one | {"actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, found: Repository, branch: str, lines: list[dict[str, Any]]) -> dict[str, str]:
        """All of it or nothing, as git does."""
        tree = dict(found.files(branch))
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header" and value.get("parentCommit", found.head[branch]) != found.head[branch]:
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            if key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, "", f"LFS object missing: {value['path']}")
                tree[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        oid = found.commit(branch, tree)
        return {"commitOid": oid, "commitUrl": f"{self.url}/a/b/commit/{oid}"}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    lfs = {"sha256": _sha256(content), "size": len(content), "pointerSize": 130}
    plain = {"rfilename": path, "size": len(content), "blobId": blob}
    return plain | {"lfs": lfs} if len(content) >= LARGE_FROM else plain


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
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The user's hub, with a token; the client's waits between attempts are none."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _detect_agent, _http, close_session

    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # it needs a storage service of its own
    monkeypatch.setattr(_detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}})  # asks a hub otherwise
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    yield server
    huggingface_hub.set_client_factory(_http.default_client_factory)
    huggingface_hub.logging.set_verbosity_warning()
    close_session()
    server.httpd.shutdown()
    server.httpd.server_close()
