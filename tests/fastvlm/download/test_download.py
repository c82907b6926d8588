"""The verb `download`: its states on the disk, kills at any moment, and a real checkpoint, all from a local server."""

import hashlib
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from download_server import (
    CONTENT,
    FILE,
    HUB_CONTENT,
    NAME,
    ONCE,
    REPOSITORY,
    Act,
    Server,
    assert_whole,
    content_of,
    get,
    make_zip,
)
from safetensors.numpy import save

from fastvlm.common import cli as command_line
from fastvlm.common.errors import UserError
from fastvlm.common.staging import held
from fastvlm.common.units import format_bytes
from fastvlm.download import download
from tests.killing import stopper

pytest_plugins = ["download_server"]
Cli = Callable[..., Any]


def test_zoo_lists_the_six_published_checkpoints() -> None:
    kinds = [f"{size}_stage{stage}" for size in ("0.5b", "1.5b", "7b") for stage in (2, 3)]
    assert download.ZOO["checkpoints"] == {f"fastvlm_{kind}": f"llava-fastvithd_{kind}.zip" for kind in kinds}
    assert download.ZOO["base_url"] == "https://ml-site.cdn-apple.com/datasets/fastvlm"
    assert "research" in download.ZOO["licence"]["notice"]
    names = {"0.5B": NAME, "FastVLM-7b": "fastvlm_7b_stage3", "org/0.5b": "org/0.5b", "3b": "3b"}
    assert {name: download.full_name(name) for name in names} == names


ARTEFACT = {  # what Apple's ready-made models are, in little
    "config.json": b'{"model_type": "llava_qwen2"}',
    "model.safetensors": save({"language_model.model.norm.weight": np.ones(4, np.float16)}),
    "fastvithd.mlpackage/Manifest.json": b"{}",
    "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin": b"weights" * 1000,
}


@pytest.mark.parametrize("name", sorted(download.ZOO["artefacts"]))
def test_apples_ready_made_models_go_on_and_are_taken_for_what_they_are(
    zoo: Server, tmp_path: Path, cli: Cli, name: str
) -> None:
    zoo.files[f"/{name}.zip"] = make_zip(ARTEFACT, f"{name}/")
    zoo.acts[f"/{name}.zip"] = [Act(drop=300), Act()]
    answer = cli("download", name, "--output-dir", tmp_path, "--json")
    assert answer.code == 0 and answer.document["checkpoints"][0]["warnings"] == []
    assert "an artefact exported elsewhere, not a checkpoint" in answer.err and "research purposes only" in answer.err
    assert zoo.ranges(f"/{name}.zip") == ["", "bytes=300-"]
    assert_whole(tmp_path, name, ARTEFACT)


def test_command_downloads_then_does_nothing(
    zoo: Server, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "LONG", 0.0)
    answer = cli("download", NAME, "--output-dir", tmp_path, "--json")
    (result,) = answer.document["checkpoints"]
    assert result["status"] == "downloaded" and result["warnings"] == ["a warning of the checkpoint's"]
    assert result["files"]["config.json"]["sha256"] == hashlib.sha256(CONTENT["config.json"]).hexdigest()
    assert "research purposes only" in answer.err and "a warning of the checkpoint's" in answer.err
    size = re.escape(format_bytes(len(zoo.files[FILE])))
    assert re.search(rf"^{NAME}: {size} of {size}, [\d.,]+ [MkB]+/s, 0 s\n{NAME}: unpacking: ", answer.err, re.M)
    assert_whole(tmp_path)
    zoo.requests.clear()
    again = cli("download", NAME, "--output-dir", tmp_path)
    assert "already complete" in again.out and len(again.out.splitlines()) == 1
    assert again.err == "" and zoo.requests == []


def test_dry_run_writes_nothing_and_asks_a_dead_network_once(zoo: Server, tmp_path: Path, cli: Cli) -> None:
    words = ("download", NAME, "--output-dir", tmp_path / "new", "--dry-run", "--json")
    (result,) = cli(*words).document["checkpoints"]
    assert (result["status"], result["bytes"]) == ("would download", len(zoo.files[FILE]))
    zoo.acts[FILE] = [Act(status=503)] * 2
    answer = cli(*words)
    assert answer.code == 2 and "trying again" not in answer.err
    assert list(tmp_path.iterdir()) == [] and [request["method"] for request in zoo.requests] == ["HEAD"] * 2


@pytest.mark.parametrize("argv", [[], [NAME, "--all"], ["what"], ["../x"], ["../../x/y"], ["a/b/c"], [NAME + "@main"]])
def test_unusable_names_are_one_line(argv: list[str], tmp_path: Path, cli: Cli) -> None:
    answer = cli("download", *argv, "--output-dir", tmp_path)
    assert answer.code == 2 and answer.err.startswith("error: ") and NAME in answer.err
    assert len(answer.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_all_goes_on_after_a_failure(zoo: Server, tmp_path: Path, cli: Cli) -> None:
    for file in download.ZOO["checkpoints"].values():
        zoo.files["/" + file] = make_zip()
    del zoo.files[FILE]
    zoo.files["/llava-fastvithd_7b_stage2.zip"] = b"<!DOCTYPE html>"
    answer = cli("download", "--all", "--output-dir", tmp_path, "--json")
    results = {result["name"]: result["status"] for result in answer.document["checkpoints"]}
    assert answer.code == 2 and "2 of 6 downloads failed" in answer.err and "404" in answer.err
    assert [name for name, status in results.items() if status == "failed"] == [NAME, "fastvlm_7b_stage2"]
    assert list(results.values()).count("downloaded") == 4 and len(results) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [n for n, s in results.items() if s == "downloaded"]


def test_full_disk_is_known_before_the_first_byte(zoo: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=int(1.5 * len(zoo.files[FILE])))  # room for the archive, not for its files
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"disk too full: .* needs .* are free"):
            get(tmp_path, dry_run=dry_run)
    assert list(tmp_path.rglob("part")) == []
    usage.free *= 2
    get(tmp_path)
    assert_whole(tmp_path)


def test_changed_or_foreign_targets_are_not_touched(zoo: Server, tmp_path: Path) -> None:
    get(tmp_path)
    (tmp_path / NAME / "config.json").unlink()
    with pytest.raises(UserError, match=r"changed since its download: config.json; --overwrite"):
        get(tmp_path)
    get(tmp_path, overwrite=True)
    assert_whole(tmp_path)
    (tmp_path / NAME / download.RECORD).unlink()
    for record in ("", "{}", "[" * 100_000, '{"files": [1]}', '{"files": {"a": 5}}', '{"files": {"a": {}}}'):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="exists and isn't from this command"):
                get(tmp_path, overwrite=overwrite)
        assert content_of(tmp_path / NAME) == CONTENT
        (tmp_path / NAME / download.RECORD).write_text(record)


def test_overwrite_replaces_only_by_a_whole_one(zoo: Server, tmp_path: Path) -> None:
    get(tmp_path)
    zoo.files[FILE] = make_zip({**CONTENT, "config.json": b"{}"})
    zoo.acts[FILE] = [Act(drop=1000)]
    with pytest.raises(UserError):
        get(tmp_path, ONCE, overwrite=True)
    assert content_of(tmp_path / NAME) == CONTENT
    zoo.acts[FILE] = []
    get(tmp_path, overwrite=True)
    assert_whole(tmp_path, content={**CONTENT, "config.json": b"{}"})


@pytest.mark.parametrize("linked", [False, True], ids=["a folder", "a link"])
def test_a_folder_of_the_users_own_is_not_worked_in(zoo: Server, tmp_path: Path, linked: bool) -> None:
    place = tmp_path / "elsewhere" if linked else tmp_path / f"{NAME}.partial"
    place.mkdir()
    for name in ("lock", "part", "old"):
        (place / name).write_text("mine")
    if linked:
        (tmp_path / f"{NAME}.partial").symlink_to(place)
    with pytest.raises(UserError, match="a link" if linked else "somebody else"):
        get(tmp_path, overwrite=True)
    assert {path.name: path.read_text() for path in place.iterdir()} == dict.fromkeys(("lock", "part", "old"), "mine")


@pytest.mark.parametrize("own_name", [".download.json", ".Download.JSON"])
def test_an_archive_with_a_record_of_its_own(zoo: Server, tmp_path: Path, own_name: str) -> None:
    """It is not the download's: ours takes its place, and the folder stays as it was downloaded."""
    zoo.files[FILE] = make_zip({**CONTENT, own_name: b'{"files": []}'})
    get(tmp_path)
    assert_whole(tmp_path)
    assert get(tmp_path)["status"] == "already complete"


def test_one_download_at_a_time(zoo: Server, tmp_path: Path) -> None:
    with held(tmp_path / f"{NAME}.partial", ""), pytest.raises(UserError, match="another download is at work"):
        get(tmp_path)
    get(tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    "kind", ["new", pytest.param("overwrite", marks=pytest.mark.slow), pytest.param("hub", marks=pytest.mark.slow)]
)
def test_killed_at_any_change_of_the_disk(hub: Server, tmp_path: Path, kind: str) -> None:
    """Each time the target is the old or the new folder, whole, and the next run ends well."""
    name, content = (REPOSITORY, HUB_CONTENT) if kind == "hub" else (NAME, {**CONTENT, "more.txt": b""})
    old, folder, step, going_on = tmp_path / "old", tmp_path / "new", 0, True
    if kind == "overwrite":
        get(old)
    hub.files[FILE] = make_zip(content)
    with stopper("tests.fastvlm.download.killed:get") as stopped:
        while going_on:
            step += 1
            if old.exists():
                shutil.copytree(old, folder)
            going_on = stopped(name, folder, old.exists(), step=step)
            if (folder / name).exists() or old.exists():
                assert content_of(folder / name) in (content, CONTENT if old.exists() else content), f"torn at {step}"
            assert not stopped(name, folder, old.exists(), step=0)
            assert_whole(folder, name, content)
            shutil.rmtree(folder)
    assert 20 < step < 100


def test_real_checkpoint_opens(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llava: Path
) -> None:
    made = content_of(tiny_llava)
    monkeypatch.setenv("FASTVLM_ZOO_URL", server.url)
    server.files[FILE] = make_zip({name: data for name, data in made.items() if not name.endswith(".safetensors")})
    with pytest.raises(UserError, match="no usable checkpoint"):  # the negative control
        get(tmp_path)
    assert not (tmp_path / NAME).exists()
    server.files[FILE] = make_zip(made)
    assert get(tmp_path)["warnings"] == []
    assert_whole(tmp_path, content=made)
