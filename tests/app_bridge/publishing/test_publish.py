"""Publishing to a local hub: what arrives, byte for byte; what a dry run says; what is refused."""

import hashlib
from pathlib import Path

import pytest
from hub_server import (
    CONTENT,
    FORMER,
    LARGE,
    REPO,
    TOKEN,
    WEIGHTS,
    Hub,
    assert_published,
    command,
    existing,
    held_by,
    last,
    make,
    refusal,
)

from model_export import artefact as exported

pytest_plugins = ["hub_server"]


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_size", [0, 70_000])
def test_all_of_it_by_one_commit(hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], part_size: int) -> None:
    hub.part_size, before = part_size, held_by(artefact)
    assert command(artefact, "--upload", "--json") == 0
    document = last(capsys.readouterr().out)
    assert_published(hub, artefact)
    assert len(hub.repositories[REPO].trees) == 2  # the hub's own first commit, and this one
    assert document["commit"] == hub.repositories[REPO].head["main"] and document["again"] == 0
    card = hub.repositories[REPO].files()["README.md"].decode()
    assert card == document["card"] and f"hf download {REPO}" in card
    assert (
        document["sent"]
        == sum(hub.received.values())
        == sum(map(len, LARGE.values()))
        + sum(
            len(content)
            for content in (card.encode(), (artefact / "export.json").read_bytes())
            if len(content) >= hub.large
        )
    )
    assert held_by(artefact) == before and not hub.repositories[REPO].private


def test_a_dry_run_writes_nothing(hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(artefact) == 0
    out = capsys.readouterr().out
    assert hub.writes() == [] and hub.repositories == {}
    for name in (*CONTENT, "README.md", "export.json"):
        assert name in out
    assert "300 kB  model.safetensors" in out and "license: other" in out and "licence: LICENSE" in out
    assert "--upload" in out and TOKEN not in out and "there is none" in out


def test_a_dry_run_says_what_changed(hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    former = {
        **FORMER,
        "config.json": b"old",
        "model.safetensors": WEIGHTS,
        "model-2.safetensors": b"",
        "LICENSE": b"Free for everybody?\n",
    }
    former["NOTICE"] = CONTENT["NOTICE"]
    former["original/tokenizer.json"] = b"{}"  # of nobody's model: no loader looks there
    repository = existing(hub, former)
    assert command(artefact, "--json") == 0
    document = last(capsys.readouterr().out)
    status = {file["name"]: file["status"] for file in document["files"]}
    assert document["deleted"] == ["model-2.safetensors"] and hub.writes() == []
    same = [name for name, one in status.items() if one == "same"]
    assert same == ["NOTICE", "model.safetensors"]  # one by git's id, one by its sha256
    assert [name for name, one in status.items() if one == "changed"] == [
        "LICENSE",
        "README.md",
        "config.json",
        "export.json",
    ]
    assert repository.files() == former


def test_a_dry_run_needs_neither_token_nor_hub(
    hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert command(artefact) == 0
    assert "hf auth login" in capsys.readouterr().out
    assert command(artefact, "--upload") == 2
    assert "wants a token" in refusal(capsys) and hub.writes() == []
    hub.httpd.shutdown()
    hub.httpd.server_close()
    assert command(artefact) == 0
    assert "what it has is not known" in capsys.readouterr().out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert command(artefact) == 0
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().out
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert command(artefact) == 2
    assert "'nonsense', expected an address" in refusal(capsys)


def test_again_is_nothing_to_do(hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(artefact, "--upload") == 0
    hub.requests.clear()
    assert command(artefact, "--upload") == 0
    assert "nothing to do" in capsys.readouterr().out and hub.writes() == []
    assert len(hub.repositories[REPO].trees) == 2


def test_another_model_replaces_it_whole(hub: Hub, artefact: Path, app_artefact: Path) -> None:
    shards = {"model-00001-of-00002.safetensors": WEIGHTS, "model-00002-of-00002.safetensors": WEIGHTS[:9999]}
    others = {name: content for name, content in CONTENT.items() if name != "model.safetensors"}
    first = make(artefact.parent / "first", app_artefact, {**others, **shards, "chat_template.jinja": b"old"})
    existing(hub, FORMER)
    assert command(first, "--upload") == 0
    assert_published(hub, first, kept=("plot.png",))
    hub.received.clear()
    assert command(artefact, "--upload") == 0
    assert_published(hub, artefact, kept=("plot.png",))
    assert not set(LARGE) - {"model.safetensors"} & {name for name in hub.received}
    assert hashlib.sha256(WEIGHTS).hexdigest() not in hub.received  # the bytes of a shard before


def test_private_and_branch(hub: Hub, artefact: Path) -> None:
    assert command(artefact, "--upload", "--private", "--revision", "int4") == 0
    assert hub.repositories[REPO].private
    assert_published(hub, artefact, "int4")
    assert command(artefact, "--upload", "--revision", "int4") == 0
    assert [request for request in hub.requests if "/branch/" in request] == [f"POST /api/models/{REPO}/branch/int4"]
    for name in ("", "a..b", "../..", "a//b", ".a", "a/.b", "a.lock", "a.lock/b", "a/", "a.", "-a", "a b", "a~1"):
        assert command(artefact, f"--revision={name}") == 2, name
    assert command(artefact, "--revision", "releases/v1.0-int4_x") == 0
    assert set(hub.repositories[REPO].files("main")) == {".gitattributes"}


def test_a_card_of_ones_own(hub: Hub, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "card.md"
    own.write_text("---\nlicense: mit\n---\n# Mine, äöü\n")
    assert command(artefact, "--upload", "--card", own) == 0
    assert hub.repositories[REPO].files()["README.md"] == own.read_bytes()
    capsys.readouterr()
    for content in (
        b"# no front matter",
        b"\xff",
        b"---\na: [\n---\n",
        b"---\nlicense: mit\n---\nhf download ORG/NAME",
    ):
        own.write_bytes(content)
        assert command(artefact, "--card", own) == 2
        assert f"--card {own}" in refusal(capsys)
    for missing in (tmp_path / "none.md", tmp_path):
        assert command(artefact, "--card", missing) == 2
        assert f"--card {missing}" in refusal(capsys)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo", ["tiny", "a/b/c", "acme/", "/tiny", "acme/ti ny", "acme/../x", "acme/x.git", "", "é/a"]
)
def test_names_of_no_repository(hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str], repo: str) -> None:
    assert command(artefact, "--upload", repo=repo) == 2
    assert refusal(capsys) and hub.requests == []


def test_everything_that_is_wrong_at_once(hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artefact / "model.safetensors").write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    (artefact / "config.json").unlink()
    (artefact / "notes.txt").write_text("mine")
    (artefact / "LICENSE").unlink()
    (artefact / "NOTICE").write_bytes(b"")
    assert command(artefact, "--upload", repo="tiny") == 2
    said = refusal(capsys)
    for part in ("'tiny'", "model.safetensors: changed", "config.json: missing", "notes.txt: extra", "licence-missing",
                 "licence-changed: NOTICE"):  # fmt: skip
        assert part in said
    assert hub.requests == []


def test_without_a_licence(hub: Hub, artefact: Path, app_artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for absent in ("LICENSE", "NOTICE"):
        folder = make(artefact.parent / absent, app_artefact, {n: c for n, c in CONTENT.items() if n != absent})
        for flags in ((), ("--upload",)):
            assert command(folder, *flags) == 2
            assert "licence-" in refusal(capsys) and hub.requests == []


def test_a_card_may_not_hide_the_research_licence(
    hub: Hub, artefact: Path, app_artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "Apple Machine Learning Research Model"
    text, own = f"{model} is licensed under the {model} License Agreement.\n".encode(), artefact.parent / "card.md"
    folder = make(artefact.parent / "x", app_artefact, CONTENT | {"LICENSE": text, "NOTICE": CONTENT["NOTICE"] + text})
    own.write_text("---\nlicense: mit\n---\n")
    assert command(folder, "--card", own) == 2
    assert "for research only: expected `license: apple-amlr`" in refusal(capsys)
    own.write_text("---\nlicense: apple-amlr\n---\n")
    assert command(folder, "--card", own) == 0
    out, err = capsys.readouterr()
    assert "licence: LICENSE: for research only" in out and "research" in err


def test_half_a_model(hub: Hub, artefact: Path, app_artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(artefact.parent / "half", app_artefact, parts=["llm"])
    assert command(folder, "--upload") == 2
    assert "no vision" in refusal(capsys) and hub.requests == []


def test_paths_in_the_manifest(
    hub: Hub, artefact: Path, app_artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "quant": "/home/somebody/mine.json", "from": "made from /home/me/x, in a hurry", "scratch": "/lustre7/x",
        "home": "see ~/x", "other": "of ~me/x", "windows": "C:\\Users\\me",
    }  # fmt: skip
    fine = {"about": "~5 GB, ~1/2 of https://a/tmp/b; and/or a/home/b", "what": "~"}
    config = exported.read_manifest(app_artefact)["config"]
    folder = make(artefact.parent / "told", app_artefact, config=config | told | fine)
    assert command(folder) == 2
    said = refusal(capsys)
    for where, path in (("quant", "/home/somebody/mine.json"), ("from", "/home/me/x,"), ("scratch", "/lustre7/x"),
                        ("home", "~/x"), ("other", "~me/x"), ("windows", "C:\\Users\\me")):  # fmt: skip
        assert f"config.{where} tells a path of this machine, {path}" in said
    assert not any(f"config.{where} " in said for where in fine)
    assert command(make(artefact.parent / "fine", app_artefact, config=config | fine)) == 0


def test_another_layout(hub: Hub, artefact: Path, app_artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = exported.read_manifest(app_artefact)["config"] | {"layout": "mlx-vlm"}
    folder = make(artefact.parent / "vlm", app_artefact, config=config)
    assert command(folder, "--upload") == 2
    assert "which the app can't load" in refusal(capsys) and hub.requests == []


def test_repositories_of_others(hub: Hub, artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    existing(hub, {".gitattributes": b"", "model-00001-of-00002.safetensors": b""})
    assert command(artefact, "--upload") == 2
    assert "holds another model" in refusal(capsys)
    theirs = {"config.json": b"theirs", "model.safetensors": WEIGHTS[1:], "README.md": b"theirs"}
    repository = existing(hub, {".gitattributes": b"", **theirs})
    for flags in ((), ("--upload",)):
        assert command(artefact, *flags) == 2
        assert "holds another model" in (said := refusal(capsys)) and "(config.json, model.safetensors)" in said
    assert theirs.items() <= repository.files().items() and hub.writes() == []
    existing(hub, {"README.md": b"made on the page", "model.safetensors": WEIGHTS})  # nothing that would be lost
    assert command(artefact) == 0
    capsys.readouterr()
    existing(hub, FORMER)
    assert command(artefact, "--upload", "--private") == 2
    assert "is public" in refusal(capsys) and hub.writes() == []
    hub.repositories.clear()
    for folder in (artefact.parent / "none", artefact / "config.json", artefact.parent):
        assert command(folder, "--upload") == 2
        assert refusal(capsys)


def test_a_real_export_downloaded_again(hub: Hub, app_artefact: Path, tmp_path: Path) -> None:
    """By the project's own downloads, as a hub lists it: the artefact, byte for byte."""
    from fastvlm.download import download, fetch

    assert command(app_artefact, "--upload") == 0
    info, top = download._listing(REPO, "", fetch.Retries())
    assert {file["rfilename"] for file in top} > {"config.json", "model.safetensors", "README.md", "LICENSE"}
    for file in info["siblings"]:
        if file["rfilename"] not in ("README.md", ".gitattributes"):
            path = tmp_path / "model" / file["rfilename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch.fetch(
                f"{hub.url}/{REPO}/resolve/{info['sha']}/{file['rfilename']}", path, fetch.Retries(), file["size"]
            )
            path.with_name(path.name + ".json").unlink()
            assert download._verified(path, file)
    assert held_by(tmp_path / "model") == held_by(app_artefact) and exported.verify(tmp_path / "model") == []
