"""A hub that breaks off, falls silent, refuses or lies: the repository holds what it held, or all; a rerun goes on."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import (
    CONTENT,
    FORMER,
    LARGE,
    PUT_WEIGHTS,
    REPO,
    TOKEN,
    WEIGHTS,
    Fault,
    Hub,
    Repository,
    assert_published,
    command,
    existing,
    last,
    refusal,
)

from app_bridge.publishing import hub as client

pytest_plugins = ["hub_server"]


# --- a connection that drops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_size", [0, 70_000])
def test_dropped_once_in_the_middle_of_a_file(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], part_size: int
) -> None:
    hub.part_size = part_size
    hub.faults = [Fault(PUT_WEIGHTS, after=50_000, skip=2 if part_size else 0, times=1)]
    assert command(artefact, "--upload", "--json") == 0
    out, err = capsys.readouterr()
    assert last(out)["again"] == 1 and "model.safetensors: not taken after" in err
    assert_published(hub, artefact)


def test_dropped_always_then_resumed(hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = existing(hub, FORMER)
    hub.faults = [Fault(PUT_WEIGHTS, after=50_000)]
    assert command(artefact, "--upload") == 2
    said = refusal(capsys)
    assert "upload failed at model.safetensors" in said and "what has arrived is not sent again" in said
    assert repository.files() == FORMER and len(repository.trees) == 1
    assert hub.requests.count(PUT_WEIGHTS) == 6  # as hub.py says
    hub.faults, first = [], dict(hub.received)
    hub.received.clear()
    assert command(artefact, "--upload") == 0
    assert_published(hub, artefact, kept=("plot.png",))
    before = hashlib.sha256(WEIGHTS[::-1]).hexdigest()
    assert first[before] == len(WEIGHTS) and before not in hub.received  # arrived in the first run: not sent again
    rest = {hashlib.sha256(LARGE[n]).hexdigest(): len(LARGE[n]) for n in LARGE if not n.startswith("fastvithd")}
    assert hub.received == rest


@pytest.mark.parametrize(
    "where", ["POST /api/repos/create", "POST /api/validate-yaml", "POST /api/models/acme/FastVLM-tiny/commit"]
)
@pytest.mark.parametrize("done", [False, True])
def test_dropped_at_what_the_client_tries_only_once(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], where: str, done: bool
) -> None:
    hub.faults = [Fault(where, done=done, times=2)]
    assert command(artefact, "--upload") == 0
    assert "trying again" in capsys.readouterr().err or (done and "commit" in where)
    assert_published(hub, artefact)
    assert len(hub.repositories[REPO].trees) == 2  # a commit whose answer was lost is not made twice


def test_a_hub_that_falls_silent(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waits its whole time only for the others: they may be slow here."""
    watch = client.Wire.watch

    def hurry(self: client.Wire, request: Any) -> None:
        limits = request.extensions["timeout"]
        assert limits["read"] == client.ANSWER_WITHIN
        if any(fault.times and f"{request.method} {request.url.path}".startswith(fault.where) for fault in hub.faults):
            limits["read"] = 0.5
        watch(self, request)

    monkeypatch.setattr(client.Wire, "watch", hurry)
    hub.faults = [Fault(PUT_WEIGHTS, after=len(WEIGHTS), silent=True, times=1)]
    assert command(artefact, "--upload") == 0
    assert "sending it again" in capsys.readouterr().err
    hub.faults = [Fault(f"GET /api/models/{REPO}", silent=True)]
    assert command(artefact, "--upload") == 2
    assert "ReadTimeout" in refusal(capsys)


@pytest.mark.parametrize("moment", range(0, 30, 3))
def test_dropped_for_good_at_any_request(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], moment: int
) -> None:
    """The repository holds what it held, or all; another run completes it."""
    repository = existing(hub, FORMER)
    hub.faults = [Fault("", after=100, skip=moment)]
    code = command(artefact, "--upload")
    assert code == 2 and refusal(capsys)
    if len(repository.trees) == 1:
        assert repository.files() == FORMER
    else:
        assert_published(hub, artefact, kept=("plot.png",))
    hub.faults = []
    assert command(artefact, "--upload") == 0
    assert_published(hub, artefact, kept=("plot.png",))


# --- a hub that refuses -----------------------------------------------------------------------------------------------

COMMIT = f"POST /api/models/{REPO}/commit"


@pytest.mark.parametrize(
    "where, status, said",
    [
        (COMMIT, 403, "role `write`"), (COMMIT, 400, "HTTP 400 (no thanks)"), (COMMIT, 412, "changed meanwhile"),
        (COMMIT, 503, "run it again later"), ("POST /api/repos/create", 401, "does not know this token"),
        ("POST /api/repos/create", 403, "role `write`"), ("POST /api/models", 429, "too many requests"),
        ("PUT ", 403, "role `write`"), ("PUT ", 500, "run it again later"), (f"POST /{REPO}.git", 413, "larger than"),
        (f"GET /api/models/{REPO}", 500, "can't be asked"), (f"POST /api/models/{REPO}/pre", 404, "check the name"),
    ],
)  # fmt: skip
def test_one_line_each(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], where: str, status: int, said: str
) -> None:
    hub.faults = [Fault(where, status, body={"error": "no thanks"})]
    assert command(artefact, "--upload") == 2
    line = refusal(capsys)
    assert said in line and f"HTTP {status}" in line and TOKEN not in line
    assert all(set(repository.files()) == {".gitattributes"} for repository in hub.repositories.values())


@pytest.mark.parametrize(
    "answer",
    [[], {}, [[1]], {"id": "x"}, {"id": "x", "siblings": []}, {"id": "x", "sha": "1", "siblings": [{"size": 1}]},
     {"id": "x", "sha": "1", "siblings": [{"rfilename": 3}]}, {"id": "x", "sha": "1", "siblings": [[]]}, 7],
)  # fmt: skip
def test_an_answer_that_is_no_repository(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    hub.faults = [Fault(f"GET /api/models/{REPO}", 200, body=json.dumps(answer).encode())]
    assert command(artefact, "--upload") == 2
    assert "it answered what is no repository" in (said := refusal(capsys)) and "HF_ENDPOINT" in said
    assert command(artefact) == 0  # a dry run says so and goes on
    assert "answered what is no repository" in capsys.readouterr().out
    assert hub.writes() == []


def test_an_answer_to_the_clients_own_question(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import _detect_agent

    monkeypatch.setattr(_detect_agent, "_registry", [])  # as a hub might answer /api/agent-harnesses
    assert command(artefact, "--upload") == 2
    assert "it answered what is no repository" in refusal(capsys) and hub.writes() == []


def test_a_wrong_token(hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.token = "hf_other"
    assert command(artefact, "--upload") == 2
    assert "HTTP 401" in (said := refusal(capsys)) and "hf auth login" in said and hub.repositories == {}


def test_somebody_else_commits_meanwhile(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commit = existing(hub, FORMER), Hub._commit

    def first(self: Hub, found: Repository, *rest: Any) -> Any:
        monkeypatch.setattr(Hub, "_commit", commit)
        found.commit("main", {"theirs.txt": (False, b"")})
        return commit(self, found, *rest)

    monkeypatch.setattr(Hub, "_commit", first)
    assert command(artefact, "--upload") == 2
    assert "changed meanwhile" in refusal(capsys) and repository.files() == {"theirs.txt": b""}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_listing_that_differs_is_seen(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    commit = Repository.commit

    def wrong(self: Repository, branch: str, tree: dict[str, tuple[bool, bytes]]) -> str:
        if name in tree:
            large, content = tree.pop(name)
            if how == "changed":
                tree[name] = (large, content[:-1] + bytes([content[-1] ^ 1]))
        return commit(self, branch, tree)

    monkeypatch.setattr(Repository, "commit", wrong)
    assert command(artefact, "--upload") == 1
    said = refusal(capsys)
    assert f"({name})" in said and "do not use that commit" in said


def test_a_file_that_changes_under_way(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model.safetensors", "config.json"):
        ask = client.Hub.ask

        def change(self: client.Hub, name: str = name, ask: Callable[..., Any] = ask) -> Any:
            (artefact / name).write_bytes(b"!" + CONTENT[name][1:])
            return ask(self)

        with monkeypatch.context() as patch:
            patch.setattr(client.Hub, "ask", change)
            assert command(artefact, "--upload") in (1, 2)
        assert name in refusal(capsys)
        (artefact / name).write_bytes(CONTENT[name])
        hub.repositories.clear()


def test_xet_is_not_used_unless_asked_for(
    hub: Hub, artefact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert command(artefact, "--upload") == 0
    assert constants.HF_HUB_DISABLE_XET is False and not any("xet" in request for request in hub.requests)
