"""The verb `download`: its states on the disk, kills at any moment, and a real checkpoint, all from a local server."""

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
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
    command,
    contents,
    get,
    make_zip,
)
from rich.filesize import decimal
from safetensors.numpy import save

from fastvlm.common import cli
from fastvlm.common.errors import UserError
from fastvlm.common.staging import held
from fastvlm.download import download

pytest_plugins = ["download_server"]


def test_zoo_lists_the_six_published_checkpoints() -> None:
    kinds = [f"{size}_stage{stage}" for size in ("0.5b", "1.5b", "7b") for stage in (2, 3)]
    assert download.ZOO["checkpoints"] == {f"fastvlm_{kind}": f"llava-fastvithd_{kind}.zip" for kind in kinds}
    assert download.ZOO["base_url"] == "https://ml-site.cdn-apple.com/datasets/fastvlm"
    assert "research" in download.ZOO["licence"]["notice"]


ARTEFACT = {  # what Apple's ready-made models are, in little
    "config.json": b'{"model_type": "llava_qwen2"}',
    "model.safetensors": save({"language_model.model.norm.weight": np.ones(4, np.float16)}),
    "fastvithd.mlpackage/Manifest.json": b"{}",
    "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin": b"weights" * 1000,
}


@pytest.mark.parametrize("kind", ["0.5b_stage3_llm.fp16", "1.5b_stage3_llm.int8", "7b_stage3_llm.int4"])
def test_apples_ready_made_models_go_on_and_are_taken_for_what_they_are(
    zoo: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    name = f"llava-fastvithd_{kind}"
    zoo.files[f"/{name}.zip"] = make_zip(ARTEFACT, f"{name}/")
    zoo.acts[f"/{name}.zip"] = [Act(drop=300), Act()]
    assert command(name, "--output-dir", tmp_path, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["checkpoints"][0]["warnings"] == []
    assert "an artefact exported elsewhere, not a checkpoint" in err and "research purposes only" in err
    assert zoo.ranges(f"/{name}.zip") == ["", "bytes=300-"]
    assert_whole(tmp_path, name, ARTEFACT)


def test_command_downloads_then_does_nothing(zoo: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(NAME, "--output-dir", tmp_path, "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])["checkpoints"][0]
    assert result["status"] == "downloaded" and result["warnings"] == ["a warning of the checkpoint's"]
    assert result["files"]["config.json"]["sha256"] == hashlib.sha256(CONTENT["config.json"]).hexdigest()
    assert "research purposes only" in err and "a warning of the checkpoint's" in err
    assert_whole(tmp_path)
    zoo.requests.clear()
    assert command(NAME, "--output-dir", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "already complete" in out and len(out.splitlines()) == 1 and err == "" and zoo.requests == []


def test_progress_in_bytes(
    zoo: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "LONG", 0.0)
    size = re.escape(decimal(len(zoo.files[FILE])))
    get(tmp_path)
    out, err = capsys.readouterr()
    assert re.search(rf"^{NAME}: {size} of {size}, [\d.,]+ [MkB]+/s, 0 s\n{NAME}: unpacking: ", err, re.M) and out == ""


def test_dry_run_writes_nothing(zoo: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(NAME, "--output-dir", tmp_path / "new", "--dry-run", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoints"][0]
    assert (result["status"], result["bytes"]) == ("would download", len(zoo.files[FILE]))
    assert list(tmp_path.iterdir()) == [] and [request["method"] for request in zoo.requests] == ["HEAD"]


def test_a_dry_run_asks_a_dead_network_once(zoo: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.acts[FILE] = [Act(status=503)] * 2
    assert command(NAME, "--output-dir", tmp_path / "new", "--dry-run") == 2
    assert "trying again" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [] and len(zoo.requests) == 1


@pytest.mark.parametrize("argv", [[], [NAME, "--all"], ["what"], ["../x"], ["../../x/y"], ["a/b/c"], [NAME + "@main"]])
def test_unusable_names_are_one_line(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*argv, "--output-dir", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and NAME in err and len(err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_all_goes_on_after_a_failure(zoo: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in download.ZOO["checkpoints"].values():
        zoo.files["/" + file] = make_zip()
    del zoo.files[FILE]
    zoo.files["/llava-fastvithd_7b_stage2.zip"] = b"<!DOCTYPE html>"
    assert command("--all", "--output-dir", tmp_path, "--json") == 2
    out, err = capsys.readouterr()
    results = {result["name"]: result["status"] for result in json.loads(out.splitlines()[-1])["checkpoints"]}
    assert [name for name, status in results.items() if status == "failed"] == [NAME, "fastvlm_7b_stage2"]
    assert list(results.values()).count("downloaded") == 4 and len(results) == 6
    assert "2 of 6 downloads failed" in err.splitlines()[-1] and "404" in err.splitlines()[-1]
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
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists and isn't from this command"):
            get(tmp_path, overwrite=overwrite)
    assert contents(tmp_path / NAME) == CONTENT


def test_overwrite_replaces_only_by_a_whole_one(zoo: Server, tmp_path: Path) -> None:
    get(tmp_path)
    zoo.files[FILE] = make_zip({**CONTENT, "config.json": b"{}"})
    zoo.acts[FILE] = [Act(drop=1000)]
    with pytest.raises(UserError):
        get(tmp_path, ONCE, overwrite=True)
    assert contents(tmp_path / NAME) == CONTENT
    zoo.acts[FILE] = []
    get(tmp_path, overwrite=True)
    assert_whole(tmp_path, content={**CONTENT, "config.json": b"{}"})


@pytest.mark.parametrize("linked", [False, True], ids=["a folder", "a link"])
def test_a_folder_of_the_users_own_is_not_worked_in(zoo: Server, tmp_path: Path, linked: bool) -> None:
    place = tmp_path / "elsewhere" if linked else tmp_path / f"{NAME}.partial"
    place.mkdir()
    for name in ("lock", "part", "replaced"):
        (place / name).write_text("mine")
    if linked:
        (tmp_path / f"{NAME}.partial").symlink_to(place)
    with pytest.raises(UserError, match="a link" if linked else "somebody else"):
        download.download(NAME, tmp_path, overwrite=True)
    assert {path.name: path.read_text() for path in place.iterdir()} == dict.fromkeys(
        ("lock", "part", "replaced"), "mine"
    )


@pytest.mark.parametrize("own_name", [".download.json", ".Download.JSON"])
def test_an_archive_with_a_record_of_its_own(zoo: Server, tmp_path: Path, own_name: str) -> None:
    """It is not the download's: ours takes its place, and the folder stays as it was downloaded."""
    zoo.files[FILE] = make_zip({**CONTENT, own_name: b'{"files": []}'})
    get(tmp_path)
    assert_whole(tmp_path)
    assert get(tmp_path)["status"] == "already complete"


@pytest.mark.parametrize(
    "record", ["{}", "[" * 100_000, '{"files": [1]}', '{"files": {"a": 5}}', '{"files": {"a": {}}}']
)
def test_a_folder_with_somebody_elses_record_is_left_alone(zoo: Server, tmp_path: Path, record: str) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / ".download.json").write_text(record)
    with pytest.raises(UserError, match="isn't from this command"):
        get(tmp_path)
    assert [path.name for path in (tmp_path / NAME).iterdir()] == [".download.json"]


def test_one_download_at_a_time(zoo: Server, tmp_path: Path) -> None:
    with held(tmp_path / f"{NAME}.partial", ""), pytest.raises(UserError, match="another download is at work"):
        get(tmp_path)
    get(tmp_path)
    assert_whole(tmp_path)


def test_what_does_not_open_is_not_published(zoo: Server, tmp_path: Path) -> None:
    zoo.files[FILE] = make_zip({"model.safetensors": b"x"})
    with pytest.raises(UserError, match=r"no usable checkpoint .*no config.json"):
        get(tmp_path)
    assert not (tmp_path / NAME).exists()
    zoo.files[FILE] = make_zip()
    get(tmp_path)
    assert_whole(tmp_path)


# --- kills -----------------------------------------------------------------------------------------------------------

DRIVER = """
    import os, shutil, signal, sys, types
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from fastvlm.download import download, fetch
    from huggingface_hub import constants, get_token
    checkpoint = types.ModuleType("fastvlm.checkpoint.checkpoint")
    checkpoint.open_checkpoint = lambda path: types.SimpleNamespace(warnings=())
    sys.modules["fastvlm.checkpoint.checkpoint"] = checkpoint
    def get(overwrite):
        retries = fetch.Retries(waits=(0.01, 0.01), timeout=60.0)
        download.download({name!r}, Path({folder!r}), overwrite=overwrite, retries=retries)
"""

# For each (n, overwrite) read, a child kills itself just before its nth change of the file system (never for n = 0).
KILL_EVERYWHERE = """
    CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
    def child(moment, overwrite):
        seen = 0
        def hook(event, args):
            nonlocal seen
            if event in CHANGES and (event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            get(overwrite)
            os._exit(0)
        except BaseException:
            os._exit(3)
    for line in sys.stdin:
        moment, overwrite = map(int, line.split())
        pid = os.fork() or child(moment, overwrite)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def driver(code: str, folder: Path, name: str = NAME) -> subprocess.Popen[str]:
    setup = DRIVER.format(root=str(Path(__file__).parents[3]), name=name, folder=str(folder))
    program = textwrap.dedent(setup) + textwrap.dedent(code)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)


def kill_everywhere(folder: Path, name: str, content: dict[str, bytes], old: Path | None, code: str = "") -> list[int]:
    """Kill a download at each change of the disk in turn, look, and run it again; returns the exit codes."""
    statuses: list[int] = []
    with driver(textwrap.dedent(code) + textwrap.dedent(KILL_EVERYWHERE), folder, name) as process:

        def run(moment: int) -> int:
            assert process.stdin and process.stdout
            print(moment, int(old is not None), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        while not statuses or statuses[-1] != 0:
            if old:
                shutil.copytree(old, folder)
            statuses.append(run(len(statuses) + 1))
            if (folder / name).exists():
                whole = contents(folder / name)
                assert whole == content or (old and whole == contents(old / name)), f"torn at {len(statuses)}"
            assert run(0) == 0, f"not usable after {len(statuses)}"
            assert_whole(folder, name, content)
            shutil.rmtree(folder)
            assert len(statuses) < 100
    return statuses


@pytest.mark.parametrize("kind", ["new", "overwrite", "hub"])
def test_killed_before_any_change_of_the_disk(hub: Server, tmp_path: Path, kind: str) -> None:
    hosted, old = (REPOSITORY, HUB_CONTENT), None
    name, content = hosted if kind == "hub" else (NAME, {**CONTENT, "more.txt": b""})
    if kind == "overwrite":
        old = tmp_path / "old"
        get(old)
    hub.files[FILE] = make_zip(content)
    *killed, last = kill_everywhere(tmp_path / "new", name, content, old)
    assert last == 0 and killed == [-signal.SIGKILL] * len(killed) and len(killed) > 20


def test_the_kill_test_sees_what_is_not_atomic(zoo: Server, tmp_path: Path) -> None:
    code = """
        def publish(work, target):
            shutil.copytree(work / "files", target)
            shutil.rmtree(work)
        download._publish = publish
    """
    with pytest.raises(AssertionError, match="torn"):
        kill_everywhere(tmp_path, NAME, CONTENT, None, code)


def test_killed_while_bytes_come_in(zoo: Server, tmp_path: Path) -> None:
    part, chance, kept = tmp_path / f"{NAME}.partial" / "part", random.Random(3), [0]
    for _ in range(4):  # each gets some bytes, never all: the server stops in the middle
        zoo.acts[FILE] = [Act(drop=chance.randrange(20_000, 70_000), pace=0.02, stall=600.0)]
        with driver("get(False)", tmp_path) as process:
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                if part.exists() and part.stat().st_size > kept[-1]:
                    break
                time.sleep(0.005)
            time.sleep(chance.uniform(0.0, 0.1))
            process.kill()
        kept.append(part.stat().st_size)
        assert not (tmp_path / NAME).exists() and kept[-1] > kept[-2]
    zoo.acts[FILE] = []
    get(tmp_path)
    assert zoo.ranges()[-1] == f"bytes={kept[-1]}-"
    assert_whole(tmp_path)


def test_real_checkpoint_opens(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic = pytest.importorskip("fastvlm.synthetic.checkpoint")
    made = contents(synthetic.write_checkpoint(tmp_path / "made", layout="llava_qwen2", dtype="float16"))
    monkeypatch.setenv("FASTVLM_ZOO_URL", server.url)
    server.files[FILE] = make_zip({name: data for name, data in made.items() if not name.endswith(".safetensors")})
    with pytest.raises(UserError, match="no usable checkpoint"):  # the negative control
        get(tmp_path / "got")
    server.files[FILE] = make_zip(made)
    assert get(tmp_path / "got")["warnings"] == []
    assert_whole(tmp_path / "got", content=made)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("0.5B", "fastvlm_0.5b_stage3"), ("FastVLM-7b", "fastvlm_7b_stage3"), ("org/0.5b", "org/0.5b"), ("3b", "3b")],
)
def test_a_size_is_a_name(name: str, expected: str) -> None:
    assert download.full_name(name) == expected
