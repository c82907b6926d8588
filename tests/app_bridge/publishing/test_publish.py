"""Publishing to a local hub: what arrives, byte for byte; what a dry run says; what is refused; what interrupts it."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app_bridge.__main__ import build_parser
from app_bridge.publishing import hub, verbs
from fastvlm.common import cli
from model_export import artefact as exported
from tests.app_bridge.publishing.hub_server import LARGE_FROM, TOKEN, Fault, HubServer, Repository

pytestmark = pytest.mark.slow

Captured = pytest.CaptureFixture[str]

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
PUT_WEIGHTS = f"PUT /objects/{hashlib.sha256(WEIGHTS).hexdigest()}"
COMMIT = f"POST /api/models/{REPO}/commit"
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
    return cli.run(build_parser, ["publish", str(folder), "--repo", repo, *map(str, argv)])


def refusal(capsys: Captured) -> str:
    """The one error line, without a traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1 and lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines) and TOKEN not in lines[-1]
    return lines[-1]


def held_by(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_published(server: HubServer, folder: Path, branch: str = "main", kept: tuple[str, ...] = ()) -> None:
    """Every byte of the artefact, a card, the hub's own file, and nothing else."""
    found, wanted = server.repositories[REPO].files(branch), held_by(folder)
    assert {name: found.get(name) for name in wanted} == wanted
    assert set(found) - set(wanted) == {"README.md", ".gitattributes", *kept}


def existing(server: HubServer, files: dict[str, bytes]) -> Repository:
    repository = server.repositories[REPO] = Repository()
    repository.commit("main", files)
    return repository


# --- what it does


def test_all_of_it_by_one_commit(server: HubServer, artefact: Path, capsys: Captured) -> None:
    before = held_by(artefact)
    assert command(artefact, "--upload", "--json") == 0
    document, repository = json.loads(capsys.readouterr().out.splitlines()[-1]), server.repositories[REPO]
    assert_published(server, artefact)
    assert len(repository.trees) == 2  # the hub's own first commit, and this one
    card = repository.files()["README.md"]
    assert document["commit"] == repository.head["main"] and document["card"].encode() == card
    assert document["sent"] == len(card) + sum(map(len, before.values()))
    assert held_by(artefact) == before and not repository.private
    server.requests.clear()
    assert command(artefact, "--upload", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sent"] == 0
    assert server.writes() == [] and len(repository.trees) == 2


def test_a_dry_run_says_what_would_change(server: HubServer, artefact: Path, capsys: Captured) -> None:
    assert command(artefact) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*CONTENT, "README.md", "export.json"))
    assert "licence: LICENSE" in out and "--upload" in out and TOKEN not in out and "there is none" in out
    former = {**FORMER, "config.json": b"old", "model.safetensors": WEIGHTS, "model-2.safetensors": b"",
              "LICENSE": b"Free for everybody?\n", "NOTICE": CONTENT["NOTICE"],
              "original/tokenizer.json": b"{}"}  # fmt: skip
    repository = existing(server, former)
    assert command(artefact, "--json") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    names: dict[str, list[str]] = {}
    for file in document["files"]:
        names.setdefault(file["status"], []).append(file["name"])
    assert names["same"] == ["NOTICE", "model.safetensors"]  # one by git's id, one by its sha256
    assert names["changed"] == ["LICENSE", "README.md", "config.json", "export.json"]
    assert document["deleted"] == ["model-2.safetensors"]  # no loader looks into original/
    assert repository.files() == former and server.writes() == []


def test_a_dry_run_needs_neither_token_nor_hub(
    server: HubServer, artefact: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert command(artefact) == 0
    assert "hf auth login" in capsys.readouterr().out
    assert command(artefact, "--upload") == 2
    assert "wants a token" in refusal(capsys) and server.writes() == []
    server.httpd.shutdown()
    server.httpd.server_close()
    assert command(artefact) == 0
    assert "what it has is not known" in capsys.readouterr().out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert command(artefact) == 0
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().out
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert command(artefact) == 2
    assert "'nonsense', expected an address" in refusal(capsys)


def test_another_model_replaces_it_whole(server: HubServer, artefact: Path, app_artefact: Path) -> None:
    shards = {"model-00001-of-00002.safetensors": WEIGHTS, "model-00002-of-00002.safetensors": WEIGHTS[:9999]}
    others = {name: content for name, content in CONTENT.items() if name != "model.safetensors"}
    first = make(artefact.parent / "first", app_artefact, {**others, **shards, "chat_template.jinja": b"old"})
    existing(server, FORMER)
    assert command(first, "--upload") == 0
    assert_published(server, first, kept=("plot.png",))
    server.received.clear()
    assert command(artefact, "--upload") == 0
    assert_published(server, artefact, kept=("plot.png",))
    assert hashlib.sha256(WEIGHTS).hexdigest() not in server.received  # the bytes of a shard before


def test_private_and_branch(server: HubServer, artefact: Path) -> None:
    for _ in range(2):
        flags = ("--revision", "int4") if server.repositories else ("--private", "--revision", "int4")
        assert command(artefact, "--upload", *flags) == 0
        assert_published(server, artefact, "int4")
    assert server.repositories[REPO].private and server.repositories[REPO].files().keys() == {".gitattributes"}
    assert [request for request in server.requests if "/branch/" in request] == [f"POST /api/models/{REPO}/branch/int4"]
    for name in ("", "a..b", "../..", "a//b", ".a", "a/.b", "a.lock", "a.lock/b", "a/", "a.", "-a", "a b", "a~1"):
        assert command(artefact, f"--revision={name}") == 2, name
    assert verbs._BRANCH.fullmatch("releases/v1.0-int4_x")


def test_a_card_of_ones_own(
    server: HubServer, artefact: Path, app_artefact: Path, tmp_path: Path, capsys: Captured
) -> None:
    own = tmp_path / "card.md"
    own.write_text("---\nlicense: mit\n---\n# Mine, äöü\n")
    assert command(artefact, "--upload", "--card", own) == 0
    assert server.repositories[REPO].files()["README.md"] == own.read_bytes()
    capsys.readouterr()
    front = b"---\nlicense: mit\n---\n"
    for content in (b"# no front matter", b"\xff", b"---\na: [\n---\n", front + b"hf download ORG/NAME"):
        own.write_bytes(content)
        assert command(artefact, "--card", own) == 2
        assert f"--card {own}" in refusal(capsys)
    for missing in (tmp_path / "none.md", tmp_path):
        assert command(artefact, "--card", missing) == 2
        assert f"--card {missing}" in refusal(capsys)
    model = "Apple Machine Learning Research Model"  # whose licence a card may not hide
    text = f"{model} is licensed under the {model} License Agreement.\n".encode()
    apples = make(tmp_path / "x", app_artefact, CONTENT | {"LICENSE": text, "NOTICE": CONTENT["NOTICE"] + text})
    own.write_bytes(front)
    assert command(apples, "--card", own) == 2
    assert "`license: apple-amlr`" in refusal(capsys)
    own.write_bytes(front.replace(b"mit", b"apple-amlr"))
    assert command(apples, "--card", own) == 0
    assert "licence: LICENSE: for research only" in capsys.readouterr().out


def test_a_real_export_downloaded_again(server: HubServer, app_artefact: Path, tmp_path: Path) -> None:
    """By the project's own downloads, as a hub lists it: the artefact, byte for byte."""
    from fastvlm.download import download, fetch

    assert command(app_artefact, "--upload") == 0
    info, top = download._listing(REPO, "", fetch.Retries())
    assert {file["rfilename"] for file in top} > {"config.json", "model.safetensors", "README.md", "LICENSE"}
    for file in info["siblings"]:
        if file["rfilename"] not in ("README.md", ".gitattributes"):
            path = tmp_path / "model" / file["rfilename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            url = f"{server.url}/{REPO}/resolve/{info['sha']}/{file['rfilename']}"
            fetch.fetch(url, path, fetch.Retries(), file["size"])
            path.with_name(path.name + ".json").unlink()
            assert download._verified(path, file)
    assert held_by(tmp_path / "model") == held_by(app_artefact) and exported.verify(tmp_path / "model") == []


# --- what is refused before anything is sent


@pytest.mark.parametrize(
    "repo", ["tiny", "a/b/c", "acme/", "/tiny", "acme/ti ny", "acme/../x", "acme/x.git", "", "é/a"]
)
def test_names_of_no_repository(server: HubServer, artefact: Path, capsys: Captured, repo: str) -> None:
    assert command(artefact, "--upload", repo=repo) == 2
    assert refusal(capsys) and server.requests == []


def test_everything_that_is_wrong_at_once(server: HubServer, artefact: Path, capsys: Captured) -> None:
    (artefact / "model.safetensors").write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    (artefact / "config.json").unlink()
    (artefact / "notes.txt").write_text("mine")
    (artefact / "LICENSE").unlink()
    (artefact / "NOTICE").write_bytes(b"")
    assert command(artefact, "--upload", repo="tiny") == 2
    line = refusal(capsys)
    for part in ("'tiny'", "model.safetensors: changed", "config.json: missing", "notes.txt: extra", "licence-missing",
                 "licence-changed: NOTICE"):  # fmt: skip
        assert part in line
    assert server.requests == []


def test_an_artefact_that_may_not_be_published(
    server: HubServer, artefact: Path, app_artefact: Path, capsys: Captured, tmp_path: Path
) -> None:
    config = exported.read_manifest(app_artefact)["config"]
    told = {
        "quant": "/home/somebody/mine.json", "from": "made from /home/me/x in a hurry", "scratch": "/lustre7/x",
        "home": "see ~/x", "other": "of ~me/x", "windows": "C:\\Users\\me",
    }  # fmt: skip
    fine = {"about": "~5 GB, ~1/2 of https://a/tmp/b; and/or a/home/b", "what": "~"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"content": {n: c for n, c in CONTENT.items() if n != "LICENSE"}}, "licence-missing"),
        ({"content": {n: c for n, c in CONTENT.items() if n != "NOTICE"}}, "licence-change-record-missing"),
        ({"parts": ["llm"]}, "no vision"),
        ({"config": config | {"layout": "mlx-vlm"}}, "which the app can't load"),
        *(({"config": config | {key: text}}, f"config.{key} tells a path") for key, text in told.items()),
    ]
    for index, (changed, message) in enumerate(cases):
        assert command(make(tmp_path / str(index), app_artefact, **changed), "--upload") == 2
        assert message in refusal(capsys)
    for folder in (tmp_path / "none", artefact / "config.json", artefact.parent):
        assert command(folder, "--upload") == 2 and refusal(capsys)
    assert server.requests == []
    assert command(make(tmp_path / "fine", app_artefact, config=config | fine)) == 0


def test_repositories_of_others(server: HubServer, artefact: Path, capsys: Captured) -> None:
    theirs = {".gitattributes": b"", "config.json": b"theirs", "model.safetensors": WEIGHTS[1:], "README.md": b"theirs"}
    for files, named in (
        ({"model-00001-of-00002.safetensors": b""}, "(model-00001-of-00002.safetensors)"),
        (theirs, "(config.json, model.safetensors)"),
    ):
        for flags in ((), ("--upload",)):
            repository = existing(server, dict(files))
            assert command(artefact, *flags) == 2
            assert "holds another model" in (line := refusal(capsys)) and named in line
            assert repository.files() == files
    existing(server, {"README.md": b"made on the page", "model.safetensors": WEIGHTS})  # nothing that would be lost
    assert command(artefact) == 0
    capsys.readouterr()
    existing(server, FORMER)
    assert command(artefact, "--upload", "--private") == 2
    assert "is public" in refusal(capsys) and server.writes() == []


# --- a hub that breaks off, falls silent, refuses or lies


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("moment", range(0, 27, 3))
def test_cut_off_for_good_at_any_request(
    server: HubServer, artefact: Path, capsys: Captured, moment: int, done: bool
) -> None:
    """The repository holds what it held, or all; another run completes it and sends nothing twice."""
    repository = existing(server, FORMER)
    server.faults = [Fault("", skip=moment, done=done)]
    assert command(artefact, "--upload") == 2 and refusal(capsys)
    if len(repository.trees) == 1:
        assert repository.files() == FORMER
    server.faults = []
    assert command(artefact, "--upload") == 0
    assert_published(server, artefact, kept=("plot.png",))
    assert len(repository.trees) == 2  # a commit whose answer was lost is not made again
    assert done or len(server.received) == len(set(server.received))


def test_cut_off_once_in_a_large_file(server: HubServer, artefact: Path) -> None:
    server.faults = [Fault(PUT_WEIGHTS, times=1)]
    assert command(artefact, "--upload") == 0
    assert_published(server, artefact)


def test_a_hub_that_falls_silent(
    server: HubServer, artefact: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ANSWER_WITHIN", 0.3)
    server.faults = [Fault(f"GET /api/models/{REPO}", silent=True)]
    assert command(artefact, "--upload") == 2
    assert "ReadTimeout" in refusal(capsys)


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        (COMMIT, 403, "role `write`"), (COMMIT, 400, "HTTP 400 (no thanks)"), (COMMIT, 412, "changed meanwhile"),
        (COMMIT, 503, "is not sent again"), ("POST /api/repos/create", 401, "does not know this token"),
        ("POST /api/repos/create", 500, "run it again later"), ("POST /api/models", 429, "too many requests"),
        ("PUT ", 403, "role `write`"), ("PUT ", 500, "is not sent again"), (f"POST /{REPO}.git", 413, "larger than"),
        (f"GET /api/models/{REPO}", 500, "can't be asked"), (f"POST /api/models/{REPO}/pre", 404, "check the name"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line(
    server: HubServer, artefact: Path, capsys: Captured, where: str, status: int, message: str
) -> None:
    server.faults = [Fault(where, status, body={"error": "no thanks"})]
    assert command(artefact, "--upload") == 2
    line = refusal(capsys)
    assert message in line and f"HTTP {status}" in line
    assert all(set(repository.files()) == {".gitattributes"} for repository in server.repositories.values())


@pytest.mark.parametrize(
    "answer",
    [[], {}, [[1]], {"id": "x"}, {"id": "x", "siblings": []}, {"id": "x", "sha": "1", "siblings": [{"size": 1}]},
     {"id": "x", "sha": "1", "siblings": [{"rfilename": 3}]}, {"id": "x", "sha": "1", "siblings": [[]]}, 7],
)  # fmt: skip
def test_an_answer_that_is_no_repository(server: HubServer, artefact: Path, capsys: Captured, answer: Any) -> None:
    server.faults = [Fault(f"GET /api/models/{REPO}", 200, body=json.dumps(answer).encode())]
    assert command(artefact, "--upload") == 2
    assert "HF_ENDPOINT" in refusal(capsys)
    assert command(artefact) == 0  # a dry run says so and goes on
    assert "HF_ENDPOINT" in capsys.readouterr().out and server.writes() == []


def test_a_wrong_token(server: HubServer, artefact: Path, capsys: Captured) -> None:
    server.token = "hf_other"
    assert command(artefact, "--upload") == 2
    assert "HTTP 401" in (line := refusal(capsys)) and "hf auth login" in line and server.repositories == {}


def test_somebody_else_commits_meanwhile(
    server: HubServer, artefact: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commit = existing(server, FORMER), HubServer._commit

    def second(self: HubServer, found: Repository, *rest: Any) -> Any:
        found.commit("main", {"theirs.txt": b""})
        return commit(self, found, *rest)

    monkeypatch.setattr(HubServer, "_commit", second)
    assert command(artefact, "--upload") == 2
    assert "changed meanwhile" in refusal(capsys) and repository.files() == {"theirs.txt": b""}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["changed", "missing", "extra"])
def test_a_listing_that_differs_is_seen(
    server: HubServer, artefact: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    commit = Repository.commit

    def wrong(self: Repository, branch: str, tree: dict[str, bytes]) -> str:
        if name in tree and how == "extra":
            tree["model-2.safetensors"] = b""
        elif name in tree:
            content = tree.pop(name)
            if how == "changed":
                tree[name] = content[:-1] + bytes([content[-1] ^ 1])
        return commit(self, branch, tree)

    monkeypatch.setattr(Repository, "commit", wrong)
    assert command(artefact, "--upload") == 1
    assert f"({'model-2.safetensors' if how == 'extra' else name})" in refusal(capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_changes_under_way(
    server: HubServer, artefact: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    contents: Callable[..., Any] = hub.Hub.contents

    def change(self: hub.Hub, *rest: Any) -> Any:
        (artefact / name).write_bytes(b"!" + CONTENT[name][1:])
        return contents(self, *rest)

    monkeypatch.setattr(hub.Hub, "contents", change)
    assert command(artefact, "--upload") == (2 if len(CONTENT[name]) >= LARGE_FROM else 1)  # large: before the commit
    assert name in refusal(capsys)
