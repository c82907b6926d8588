"""A hub in this process: `FakeApi` stands for huggingface_hub's HfApi, `HubServer` answers the real one on a port.

The server's answers are what huggingface_hub 2.4.0 asks for without Xet (hf_api.py, _commit_api.py, lfs.py).
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

from httpx2 import Request, Response
from huggingface_hub import CommitOperationDelete, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

TOKEN = "hf_test"
LARGE_FROM = 1000  # bytes from which a file is kept by LFS
Tree = dict[str, bytes]


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

    def info(self, name: str, revision: str) -> dict[str, Any]:
        """What the hub says of a commit. KeyError for none."""
        oid = self.head.get(revision, revision)
        siblings = [_sibling(path, content) for path, content in sorted(self.trees[oid].items())]
        return {"id": name, "sha": oid, "private": self.private, "siblings": siblings, "tags": []}


class FakeApi:
    """`repositories` by name; `calls` of what changes something; `fail`: name of a method -> what it raises."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.calls: list[str] = []
        self.fail: dict[str, Exception] = {}

    def existing(self, name: str, files: Tree) -> Repository:
        """Make a repository with these files."""
        self.repositories[name] = Repository()
        self.repositories[name].commit("main", files)
        return self.repositories[name]

    def model_info(self, name: str, revision: str, **_: Any) -> ModelInfo:
        self._called("model_info", change=False)
        if name not in self.repositories:
            raise refused(RepositoryNotFoundError, 404)
        try:
            return ModelInfo(**self.repositories[name].info(name, revision))
        except KeyError:
            raise refused(RevisionNotFoundError, 404) from None

    def create_repo(self, name: str, private: bool | None, exist_ok: bool) -> None:
        self._called("create_repo")
        self.repositories[name] = Repository(bool(private))
        self.repositories[name].commit("main", {".gitattributes": b""})

    def create_branch(self, name: str, branch: str, exist_ok: bool) -> None:
        self._called("create_branch")
        head = self.repositories[name].head
        head.setdefault(branch, head["main"])

    def create_commit(
        self, name: str, operations: list[Any], revision: str, parent_commit: str, commit_message: str
    ) -> Any:
        self._called("create_commit")
        repository = self.repositories[name]
        if repository.head[revision] != parent_commit:
            raise refused(HfHubHTTPError, 412)
        tree = dict(repository.files(revision))
        for one in operations:
            if isinstance(one, CommitOperationDelete):
                del tree[one.path_in_repo]
            else:
                source = one.path_or_fileobj
                tree[one.path_in_repo] = source if isinstance(source, bytes) else Path(source).read_bytes()
        return SimpleNamespace(oid=repository.commit(revision, tree))

    def _called(self, method: str, change: bool = True) -> None:
        if method in self.fail:
            raise self.fail[method]
        self.calls += [method] * change


class HubServer:
    """`repositories` by name, `objects` by sha256."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                assert self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.command == "PUT"
                try:
                    status, answer = 200, hub.route(unquote(urlsplit(self.path).path), body)
                except KeyError:
                    status, answer = 404, {"error": "Repository not found"}
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PUT = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True).start()

    def route(self, path: str, body: bytes) -> Any:
        """The answer to a request. KeyError for no repository."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = Repository(asked.get("visibility") == "private")
            self.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            return {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if match := re.fullmatch(r"/objects/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.objects[match[1]] = body
            return {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"objects": [one | {"actions": self._actions(one["oid"])} for one in objects]}
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path)
        assert match, path
        repository, verb, revision = self.repositories[match[1]], match[2], match[3] or "main"
        if verb == "preupload":
            files = json.loads(body)["files"]
            modes = ["lfs" if one["size"] >= LARGE_FROM else "regular" for one in files]
            made = zip(files, modes, strict=True)
            return {"files": [one | {"uploadMode": mode, "shouldIgnore": False, "oid": None} for one, mode in made]}
        if verb == "commit":
            return {"commitOid": self._commit(repository, revision, body), "commitUrl": f"{self.url}/a/b/commit/1"}
        return repository.info(match[1], revision)

    def _actions(self, oid: str) -> dict[str, Any]:
        return {"upload": {"href": f"{self.url}/objects/{oid}", "header": {}}}

    def _commit(self, repository: Repository, branch: str, body: bytes) -> str:
        tree = dict(repository.files(branch))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                assert value["parentCommit"] == repository.head[branch]
            elif line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                tree[value["path"]] = self.objects[value["oid"]]
        return repository.commit(branch, tree)


def refused(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """An exception as huggingface_hub raises it for an answer of this status."""
    return kind(f"HTTP {status}\n\nno thanks", response=Response(status, request=Request("GET", "http://hub")))


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    plain = {"rfilename": path, "size": len(content), "blobId": blob}
    return plain | {"lfs": lfs} if len(content) >= LARGE_FROM else plain
