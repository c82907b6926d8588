"""Publishing: what arrives, byte for byte; what a dry run says; what is refused; a hub that refuses or lies."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from model_export import artefact as exported
from tests.app_bridge.publishing.hub_server import TOKEN, FakeApi, HubServer, Repository, refused
from tests.helpers import contents

pytestmark = pytest.mark.slow

Cli = Callable[..., Any]
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
FORMER = {".gitattributes": b"", "README.md": b"mine", "plot.png": b"\x89PNG", "export.json": b"{}"}


@pytest.fixture
def publish(cli: Cli, artefact: Path) -> Cli:
    """`publish(*flags, folder=the artefact, repo=REPO) -> Answer`; an error is one line without the token."""

    def call(*flags: object, folder: Path = artefact, repo: str = REPO) -> Any:
        answer = cli("publish", folder, "--repo", repo, *flags)
        errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
        assert errors == (answer.err.splitlines()[-1:] if answer.code else []) and TOKEN not in answer.out + answer.err
        return answer

    return call


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


def assert_published(repository: Repository, folder: Path, branch: str = "main", kept: tuple[str, ...] = ()) -> None:
    """Every byte of the artefact, a card, the hub's own file, and nothing else."""
    found, wanted = repository.files(branch), contents(folder)
    assert {name: found.get(name) for name in wanted} == wanted
    assert set(found) - set(wanted) == {"README.md", ".gitattributes", *kept}


# --- what it does


def test_all_of_it_by_one_commit_to_a_real_server(
    artefact: Path, publish: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import _detect_agent, close_session

    monkeypatch.setattr(_detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}})  # asks a hub otherwise
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    before = contents(artefact)
    document = publish("--upload", "--json").document
    repository = server.repositories[REPO]
    assert_published(repository, artefact)
    assert len(repository.trees) == 2  # the hub's own first commit, and this one
    card = repository.files()["README.md"]
    assert document["commit"] == repository.head["main"] and document["card"].encode() == card
    assert document["sent"] == len(card) + sum(map(len, before.values()))
    assert contents(artefact) == before and not repository.private
    assert publish("--upload", "--json").document["sent"] == 0
    assert len(repository.trees) == 2
    close_session()
    server.httpd.shutdown()
    server.httpd.server_close()
    answer = publish("--upload")  # nobody is there
    assert answer.code == 2 and "can't be asked" in answer.err


def test_a_dry_run_says_what_would_change(api: FakeApi, publish: Cli) -> None:
    out = publish().out
    assert all(name in out for name in (*CONTENT, "README.md", "export.json"))
    assert "licence: LICENSE" in out and "--upload" in out and "there is none" in out
    former = {**FORMER, "config.json": b"old", "model.safetensors": WEIGHTS, "model-2.safetensors": b"",
              "LICENSE": b"Free for everybody?\n", "NOTICE": CONTENT["NOTICE"],
              "original/tokenizer.json": b"{}"}  # fmt: skip
    repository = api.existing(REPO, former)
    document = publish("--json").document
    names: dict[str, list[str]] = {}
    for file in document["files"]:
        names.setdefault(file["status"], []).append(file["name"])
    assert names["same"] == ["NOTICE", "model.safetensors"]  # one by git's id, one by its sha256
    assert names["changed"] == ["LICENSE", "README.md", "config.json", "export.json"]
    assert document["deleted"] == ["model-2.safetensors"]  # no loader looks into original/
    assert repository.files() == former and api.calls == []


def test_a_dry_run_needs_neither_token_nor_hub(
    api: FakeApi, publish: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in publish().out
    answer = publish("--upload")
    assert answer.code == 2 and "wants a token" in answer.err and api.calls == []
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    answer = publish()
    assert answer.code == 0 and "what it has is not known" in answer.out and "HF_HUB_OFFLINE" in answer.out
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    answer = publish()
    assert answer.code == 2 and "'nonsense', expected an address" in answer.err


def test_another_model_replaces_it_whole(api: FakeApi, publish: Cli, artefact: Path, app_artefact: Path) -> None:
    shards = {"model-00001-of-00002.safetensors": WEIGHTS, "model-00002-of-00002.safetensors": WEIGHTS[:9999]}
    others = {name: content for name, content in CONTENT.items() if name != "model.safetensors"}
    first = make(artefact.parent / "first", app_artefact, {**others, **shards, "chat_template.jinja": b"old"})
    repository = api.existing(REPO, FORMER)
    for folder in (first, artefact):
        assert publish("--upload", folder=folder).code == 0
        assert_published(repository, folder, kept=("plot.png",))


def test_private_and_branch(api: FakeApi, publish: Cli, artefact: Path) -> None:
    for flags in (("--private",), ()):
        assert publish("--upload", "--revision", "int4", *flags).code == 0
        assert_published(api.repositories[REPO], artefact, "int4")
    assert api.repositories[REPO].private and api.repositories[REPO].files().keys() == {".gitattributes"}
    assert api.calls == ["create_repo", "create_branch", "create_commit"]


def test_a_card_of_ones_own(api: FakeApi, publish: Cli, app_artefact: Path, tmp_path: Path) -> None:
    own = tmp_path / "card.md"
    own.write_text("---\nlicense: mit\n---\n# Mine, äöü\n")
    assert publish("--upload", "--card", own).code == 0
    assert api.repositories[REPO].files()["README.md"] == own.read_bytes()
    front = b"---\nlicense: mit\n---\n"
    for content in (b"# no front matter", b"\xff", b"---\na: [\n---\n", front + b"hf download ORG/NAME"):
        own.write_bytes(content)
        answer = publish("--card", own)
        assert answer.code == 2 and f"--card {own}" in answer.err
    for missing in (tmp_path / "none.md", tmp_path):
        answer = publish("--card", missing)
        assert answer.code == 2 and f"--card {missing}" in answer.err
    model = "Apple Machine Learning Research Model"  # whose licence a card may not hide
    text = f"{model} is licensed under the {model} License Agreement.\n".encode()
    apples = make(tmp_path / "x", app_artefact, CONTENT | {"LICENSE": text, "NOTICE": CONTENT["NOTICE"] + text})
    own.write_bytes(front)
    answer = publish("--card", own, folder=apples)
    assert answer.code == 2 and "`license: apple-amlr`" in answer.err
    own.write_bytes(front.replace(b"mit", b"apple-amlr"))
    assert "licence: LICENSE: for research only" in publish("--card", own, folder=apples).out


# --- what is refused before anything is sent


def test_names_of_no_repository(api: FakeApi, publish: Cli) -> None:
    for repo in ("tiny", "a/b/c", "acme/", "acme/ti ny", "acme/../x", "acme/x.git", "", "é/a"):
        assert publish("--upload", repo=repo).code == 2 and api.calls == [], repo


def test_everything_that_is_wrong_at_once(api: FakeApi, publish: Cli, artefact: Path) -> None:
    (artefact / "model.safetensors").write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    (artefact / "config.json").unlink()
    (artefact / "notes.txt").write_text("mine")
    (artefact / "LICENSE").unlink()
    (artefact / "NOTICE").write_bytes(b"")
    answer = publish("--upload")
    for part in ("model.safetensors: changed", "config.json: missing", "notes.txt: extra", "licence-missing",
                 "licence-changed: NOTICE"):  # fmt: skip
        assert part in answer.err
    assert answer.code == 2 and api.calls == []


def test_an_artefact_that_may_not_be_published(
    api: FakeApi, publish: Cli, artefact: Path, app_artefact: Path, tmp_path: Path
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
        answer = publish("--upload", folder=make(tmp_path / str(index), app_artefact, **changed))
        assert answer.code == 2 and message in answer.err
    for folder in (tmp_path / "none", artefact / "config.json", artefact.parent):
        assert publish("--upload", folder=folder).code == 2
    assert api.calls == []
    assert publish(folder=make(tmp_path / "fine", app_artefact, config=config | fine)).code == 0


def test_repositories_of_others(api: FakeApi, publish: Cli) -> None:
    theirs = {".gitattributes": b"", "config.json": b"theirs", "model.safetensors": WEIGHTS[1:], "README.md": b"theirs"}
    for files, named in (
        ({"model-00001-of-00002.safetensors": b""}, "(model-00001-of-00002.safetensors)"),
        (theirs, "(config.json, model.safetensors)"),
    ):
        for flags in ((), ("--upload",)):
            repository = api.existing(REPO, dict(files))
            answer = publish(*flags)
            assert answer.code == 2 and "holds another model" in answer.err and named in answer.err
            assert repository.files() == files
    api.existing(REPO, {"README.md": b"made on the page", "model.safetensors": WEIGHTS})  # nothing that would be lost
    assert publish().code == 0
    api.existing(REPO, FORMER)
    answer = publish("--upload", "--private")
    assert answer.code == 2 and "is public" in answer.err and api.calls == []


# --- a hub that breaks off, refuses or lies


@pytest.mark.parametrize("method", ["model_info", "create_repo", "create_branch", "create_commit"])
@pytest.mark.parametrize(
    "failure", [refused(HfHubHTTPError, 403), RuntimeError("cut off"), ValueError("no"), KeyError("sha")]
)
def test_a_failure_is_one_line_and_another_run_completes_it(
    api: FakeApi, publish: Cli, artefact: Path, method: str, failure: Exception
) -> None:
    api.fail = {method: failure}
    answer = publish("--upload", "--revision", "int4")
    assert answer.code == 2 and type(failure).__name__ in answer.err and str(failure).splitlines()[0] in answer.err
    assert all(len(repository.trees) == 1 for repository in api.repositories.values())
    api.fail = {}
    assert publish("--upload", "--revision", "int4").code == 0
    assert_published(api.repositories[REPO], artefact, "int4")


def test_an_answer_that_is_no_repository(api: FakeApi, publish: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    api.existing(REPO, FORMER)
    monkeypatch.setattr(Repository, "info", lambda self, name, revision: {"id": "x", "siblings": [{"rfilename": 3}]})
    answer = publish("--upload")
    assert answer.code == 2 and "HF_ENDPOINT" in answer.err
    assert "HF_ENDPOINT" in publish().out and api.calls == []  # a dry run says so and goes on


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["changed", "missing", "extra"])
def test_a_listing_that_differs_is_seen(
    api: FakeApi, publish: Cli, monkeypatch: pytest.MonkeyPatch, name: str, how: str
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
    answer = publish("--upload")
    assert answer.code == 1 and f"({'model-2.safetensors' if how == 'extra' else name})" in answer.err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_changes_under_way(
    api: FakeApi, publish: Cli, artefact: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ask = api.model_info

    def change(*words: Any, **named: Any) -> Any:
        (artefact / name).write_bytes(b"!" + CONTENT[name][1:])
        return ask(*words, **named)

    monkeypatch.setattr(api, "model_info", change)
    answer = publish("--upload")
    assert answer.code == 2 and f"{name}: changed" in answer.err and "create_commit" not in api.calls
