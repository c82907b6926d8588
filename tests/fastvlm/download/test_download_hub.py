"""Hub repositories, from a local server that answers as a hub's API does."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from download_server import (
    HUB_CONTENT,
    LISTING,
    ONCE,
    QUICK,
    REPOSITORY,
    SHA,
    WEIGHTS,
    Act,
    Server,
    assert_whole,
    fetched,
    flip,
    get,
    publish,
)
from safetensors.numpy import save

from fastvlm.common.errors import UserError

pytest_plugins = ["download_server"]


def test_hub_download(hub: Server, tmp_path: Path, cli: Callable[..., Any]) -> None:
    weights = f"/{REPOSITORY}/resolve/{SHA}/model.safetensors"
    hub.acts[weights] = [Act(drop=100_000), Act()]
    answer = cli("download", REPOSITORY, "--output-dir", tmp_path, "--json")
    (result,) = answer.document["checkpoints"]
    assert result["revision"] == SHA and "apple-amlr: research only" in answer.err
    assert result["files"]["model.safetensors"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert hub.ranges(weights) == ["", "bytes=100000-"]
    assert set(fetched(hub)) == set(HUB_CONTENT), "no pickle, no code, no sub-folder"
    assert {request.get("authorization") for request in hub.requests} == {"Bearer hf_test"}
    assert_whole(tmp_path, REPOSITORY, HUB_CONTENT)
    hub.requests.clear()
    assert "already complete" in cli("download", REPOSITORY, "--output-dir", tmp_path).out and hub.requests == []


def test_hub_repository_of_an_artefact(hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {
        "config.json": b'{"model_type": "llava_qwen2"}',
        "model.safetensors": save({"language_model.model.norm.weight": np.ones(4, np.float16)}),
        "fastvithd.mlpackage/Manifest.json": b"{}",
        "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin": WEIGHTS,
    }
    publish(hub, {**held, "images/logo.png": b"png"})
    get(tmp_path, name=REPOSITORY)
    assert_whole(tmp_path, REPOSITORY, held)
    assert "an artefact exported elsewhere" in capsys.readouterr().err
    publish(hub, {**held, "fastvithd.mlpackage/../../x": b"x"})
    with pytest.raises(UserError, match="outside the folder"):
        get(tmp_path / "other", name=REPOSITORY)


def test_hub_goes_on_in_the_next_run(hub: Server, tmp_path: Path) -> None:
    weights = f"/{REPOSITORY}/resolve/{SHA}/model.safetensors"
    hub.acts[weights] = [Act(drop=100_000)]
    with pytest.raises(UserError, match="connection lost"):
        get(tmp_path, ONCE, REPOSITORY)
    hub.acts[weights] = []
    hub.requests.clear()
    get(tmp_path, QUICK, REPOSITORY)
    assert fetched(hub) == ["model.safetensors"] and hub.ranges(weights) == ["bytes=100000-"]
    assert_whole(tmp_path, REPOSITORY, HUB_CONTENT)


def test_hub_repository_that_moves_on_between_runs(hub: Server, tmp_path: Path) -> None:
    hub.acts[f"/{REPOSITORY}/resolve/{SHA}/model.safetensors"] = [Act(drop=100_000)]
    with pytest.raises(UserError):
        get(tmp_path, ONCE, REPOSITORY)
    newer = {"config.json": b"[]", "model.safetensors": WEIGHTS[::-1]}
    publish(hub, newer, sha="f" * 40)
    assert get(tmp_path, QUICK, REPOSITORY)["revision"] == "f" * 40
    assert_whole(tmp_path, REPOSITORY, newer)


def test_hub_offline(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        get(tmp_path, name=REPOSITORY)
    assert hub.requests == []


def test_hub_revision(hub: Server, tmp_path: Path) -> None:
    hub.files[LISTING.replace("main", "v1")] = hub.files[LISTING]
    assert get(tmp_path, name=f"{REPOSITORY}@v1")["requested"] == "v1"
    assert get(tmp_path, name=f"{REPOSITORY}@{SHA}")["status"] == "already complete"
    with pytest.raises(UserError, match=f"holds revision {SHA}, not v2; --overwrite"):
        get(tmp_path, name=f"{REPOSITORY}@v2")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_hub_content_that_differs_from_its_hash(hub: Server, tmp_path: Path, file: str) -> None:
    path = f"/{REPOSITORY}/resolve/{SHA}/{file}"
    good = hub.files[path]
    hub.files[path] = flip(good, len(good) // 2)
    with pytest.raises(UserError, match="differs from the hash"):
        get(tmp_path, name=REPOSITORY)
    hub.files[path] = good
    get(tmp_path, name=REPOSITORY)
    assert_whole(tmp_path, REPOSITORY, HUB_CONTENT)


def test_hub_length_that_differs_from_the_listing(hub: Server, tmp_path: Path) -> None:
    hub.files[f"/{REPOSITORY}/resolve/{SHA}/config.json"] = b"{} "
    with pytest.raises(UserError, match="announces 3 bytes, expected 2"):
        get(tmp_path, name=REPOSITORY)


@pytest.mark.parametrize("path", [LISTING, f"/{REPOSITORY}/resolve/{SHA}/config.json"], ids=["listing", "file"])
@pytest.mark.parametrize(("act", "message"), [
    (Act(status=404, headers={"X-Error-Code": "RepoNotFound"}), "no such repository"),
    (Act(status=403, headers={"X-Error-Code": "GatedRepo"}), "gated; accept its terms"),
    (Act(status=404, headers={"X-Error-Code": "RevisionNotFound"}), "no such revision"),
    (Act(status=503), r"HTTP 503 .*\(4 fruitless attempts"),
])  # fmt: skip
def test_hub_refusals(hub: Server, tmp_path: Path, act: Act, message: str, path: str) -> None:
    hub.acts[path] = [act]
    with pytest.raises(UserError, match=message):
        get(tmp_path, name=REPOSITORY)
    assert not (tmp_path / REPOSITORY).exists()


def test_hub_listing_after_server_errors(hub: Server, tmp_path: Path) -> None:
    hub.acts[LISTING] = [Act(status=500), Act(drop=20), Act()]
    hub.acts[f"/{REPOSITORY}/resolve/{SHA}/config.json"] = [Act(length=False)]  # the listing's size serves
    get(tmp_path, name=REPOSITORY)
    assert_whole(tmp_path, REPOSITORY, HUB_CONTENT)


FILE_LIST = b'{"id": "%s", "sha": "%s", "siblings": [{"rfilename": "%s"}]}'


@pytest.mark.parametrize(("listing", "message"), [
    (b"<html>", "no usable listing"),
    (b"{}", "no usable listing"),
    (FILE_LIST % (b"a/b", b"0" * 40, b"pytorch_model.bin"), "pickles are not downloaded"),
    (FILE_LIST % (b"a/b", b"main", rb"..\\x.safetensors"), r"no repository at a commit.*forbidden.*without size"),
    (FILE_LIST % (b"../b", b"0" * 40, b"x.safetensors"), r"no repository at a commit.*without size"),
    (FILE_LIST % (b"a/b", b"0" * 40, b'x.safetensors", "size": 1, "lfs": "'), "without size or hash"),
    (FILE_LIST % (b"a/b", b"0" * 40, b'x.safetensors", "size": 1, "lfs": "x'), "no usable listing"),
])  # fmt: skip
def test_hub_unusable_listings(hub: Server, tmp_path: Path, listing: bytes, message: str) -> None:
    hub.files[LISTING] = listing
    with pytest.raises(UserError, match=message):
        get(tmp_path, name=REPOSITORY)
    assert fetched(hub) == []


def test_hub_dry_run(hub: Server, tmp_path: Path) -> None:
    assert get(tmp_path, name=REPOSITORY, dry_run=True)["bytes"] == sum(map(len, HUB_CONTENT.values()))
    assert fetched(hub) == [] and list(tmp_path.iterdir()) == []
