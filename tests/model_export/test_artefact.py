"""Publishing (staging, one rename, kills at any moment), the manifest and `verify`, and the licences."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fastvlm.common import staging
from fastvlm.common.errors import UserError
from fastvlm.common.staging import clean, exchange, own, staged
from model_export import artefact, contract
from model_export.artefact import carry_licences, check_target, check_whole, verify, write_manifest
from model_export.resume import kept, waiting

FILES = {"config.json": "{}", "fastvithd.mlpackage/Data/weight.bin": "weights", "model.safetensors": "tensors"}


def make(folder: Path, files: dict[str, str] = FILES) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_manifest(folder, {"parts": ["vision", "llm"]})
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


# --- publishing


def test_publishes_whole_or_not_at_all(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "model") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "model").exists()
    assert contents(tmp_path / "deep") == {"model/a": "1"}
    with pytest.raises(RuntimeError), staged(tmp_path / "other") as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["deep"]


def test_replaces_only_when_told(tmp_path: Path) -> None:
    for text, replace in (("old", False), ("new", True)):
        with staged(tmp_path / "model", replace) as folder:
            (folder / text).write_text(text)
    with pytest.raises(OSError), staged(tmp_path / "model") as folder:
        (folder / "third").write_text("third")
    assert contents(tmp_path) == {"model/new": "new"}


def test_permissions_are_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "model") as folder:
            (folder / "a").write_text("1")
            (folder / "a").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "model" / "a").stat().st_mode & 0o777 == 0o640


def test_exchange_swaps_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()


def test_without_exchange_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    for text in ("old", "new"):
        with staged(tmp_path / "model", replace=True) as folder:
            (folder / "a").write_text(text)
    assert contents(tmp_path) == {"model/a": "new"}


def test_half_a_replacement_is_undone(tmp_path: Path) -> None:
    """What a run leaves that died between the two renames."""
    for _ in range(2):  # the second time, the target is there
        left = tmp_path / ".model.staging-x1"
        own(left)
        (left / "old").mkdir()
        (left / "old" / "a").write_text("old")
        clean(tmp_path / "model")
        assert contents(tmp_path) == {"model/a": "old"} and not left.exists()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    """Whatever the names: a folder of the user's own, and links to one, to one of ours and to nothing."""
    mine, ours = tmp_path / ".model.staging-20240101", tmp_path / "ours"
    mine.mkdir()
    own(ours)
    for folder in (mine, ours):
        (folder / "old").write_text("mine")
    for name, target in (("a", mine), ("b", ours), ("c", tmp_path / "none")):
        (tmp_path / f".model.staging-{name}").symlink_to(target)
    for name in (".a.resume", ".b.resume"):
        (tmp_path / name).symlink_to(ours)
    (tmp_path / ".c.resume").mkdir()
    (tmp_path / ".c.resume" / "key.json").write_text("mine")
    before = contents(tmp_path)
    with staged(tmp_path / "model"):
        pass
    (tmp_path / "model").rmdir()
    for name, why in (("a", "a link"), ("b", "a link"), ("c", "somebody else")):
        with pytest.raises(UserError, match=why), kept(tmp_path / name, {}):
            pass
        assert waiting(tmp_path / name) == 0
    assert contents(tmp_path) == before


def test_live_staging_is_left_alone_and_dead_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".model.staging-dead"
    dead.mkdir()
    (tmp_path / ".other.staging-x").mkdir()
    with staged(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
        assert not dead.exists()
        with staged(tmp_path / "model", replace=True) as second:  # cleans at its start
            (second / "a").write_text("2")
        assert contents(folder) == {"a": "1"}
        clean(tmp_path / "model")
        assert contents(folder) == {"a": "1"}
        for path in (tmp_path / "model").iterdir():
            path.unlink()
    assert contents(tmp_path) == {"model/a": "1"} and (tmp_path / ".other.staging-x").exists()


# For each (n, text) read, a child writes the target and kills itself before the nth line of ours, or of shutil's.
WRITER = """
import os, shutil, signal, sys
from pathlib import Path
from fastvlm.common import staging
def child(moment, text):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename not in ("<string>", staging.__file__, shutil.__file__):
            return None
        if event == "line":
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    with staging.staged(Path(sys.argv[1]), replace=True) as folder:
        for i in range(3):
            (folder / f"{i}").write_text(text)
    os._exit(0)
if sys.argv[2] == "two-renames":
    staging.exchange = lambda a, b: False
if sys.argv[2] == "copy":
    staging._publish = lambda folder, target, replace: shutil.copytree(folder, target, dirs_exist_ok=True)
for line in sys.stdin:
    moment, text = line.split()
    pid = os.fork() or child(int(moment), text)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def swaps(folder: Path) -> bool:
    """Whether the file system can exchange names."""
    with TemporaryDirectory(dir=folder) as a, TemporaryDirectory(dir=folder) as b:
        return exchange(Path(a), Path(b))


def published(target: Path, how: str) -> list[bool]:
    """Kill a writer at each moment in turn; for each whether the new folder was there, whole, and not the old one."""
    found, code = [], -int(signal.SIGKILL)
    in_steps = how == "two-renames" or not swaps(target.parent)
    if how != "new":
        with staged(target) as folder:
            for name in "012":
                (folder / name).write_text("old")
    command = [sys.executable, "-c", WRITER, str(target), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        while code == -signal.SIGKILL:
            if how == "new":
                shutil.rmtree(target, ignore_errors=True)
            print(len(found) + 1, f"text{len(found)}", file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            if in_steps:
                clean(target)  # what the next run does first: the old folder may be waiting under its other name
            if target.exists() or how != "new":
                assert set(contents(target)) == set("012") and len(set(contents(target).values())) == 1, "torn"
            found.append(f"text{len(found)}" in contents(target).values())
    assert code == 0
    return found


@pytest.mark.parametrize("how", ["new", "exchange", "two-renames"])
def test_killed_at_any_moment_leaves_old_or_new_whole(tmp_path: Path, how: str) -> None:
    target = tmp_path / "model"
    outcomes = published(target, how)
    assert outcomes.count(False) > 20 and outcomes.count(True) > 5
    with staged(target, replace=True) as folder:
        (folder / "last").touch()
    assert os.listdir(tmp_path) == ["model"], "remains of killed runs"


def test_the_kill_test_sees_what_is_not_atomic(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="torn"):
        published(tmp_path / "model", "copy")


# --- what may be replaced


def test_target_is_refused_before_any_work(tmp_path: Path) -> None:
    check_target(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_target(tmp_path / "file", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="no artefact"):
        check_target(tmp_path / "photos", overwrite=True)
    model = make(tmp_path / "model")
    with pytest.raises(UserError, match="--overwrite"):
        check_target(model, overwrite=False)
    for name in (".DS_Store", "._config.json"):
        (model / name).touch()
    check_target(model, overwrite=True)
    assert verify(model) == []
    (model / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt"):
        check_target(model, overwrite=True)
    (model / contract.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="remove it yourself"):
        check_target(model, overwrite=True)


# --- manifest and verify


def test_untouched_artefact_verifies(tmp_path: Path) -> None:
    assert verify(make(tmp_path)) == []
    assert check_whole(tmp_path)["parts"] == ["vision", "llm"]


@pytest.mark.parametrize("name", [*FILES, contract.MANIFEST])
def test_one_flipped_byte_is_named(tmp_path: Path, name: str) -> None:
    path = make(tmp_path) / name
    data = bytearray(path.read_bytes())
    at = data.index(b'"parts"') + 2 if name == contract.MANIFEST else 0
    data[at] ^= 1
    path.write_bytes(data)
    (finding,) = verify(tmp_path)
    assert finding.startswith(f"{name}: changed")


def test_manifest_with_other_spaces_or_another_hash_is_changed(tmp_path: Path) -> None:
    path = make(tmp_path) / contract.MANIFEST
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document))
    assert verify(tmp_path) == ["export.json: changed since the export"]
    entry = document["files"]["config.json"]
    (tmp_path / "config.json").write_text("[]")
    entry["sha256"] = artefact.hash_files(tmp_path, ["config.json"])["config.json"]["sha256"]
    path.write_bytes(artefact._canonical(document))  # a forger who forgets the manifest's own hash
    assert verify(tmp_path) == ["export.json: changed since the export"]


def test_missing_extra_resized_and_linked_files_are_named(tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    (model / "config.json").unlink()
    (model / "model.safetensors").write_text("tensors, and more")
    weight = model / "fastvithd.mlpackage" / "Data" / "weight.bin"
    weight.rename(tmp_path / "weight.bin")
    weight.symlink_to(tmp_path / "weight.bin")
    (model / "fastvithd.mlpackage" / "extra").touch()
    (model / "empty").mkdir()
    (model / "README.md").touch()  # as a hub's repository has them: no finding
    (model / ".cache" / "huggingface").mkdir(parents=True)
    findings = verify(model)
    assert [finding.partition(": ")[0] for finding in findings] == [
        "config.json", "empty", "fastvithd.mlpackage/Data/weight.bin", "fastvithd.mlpackage/extra", "model.safetensors"
    ]  # fmt: skip
    assert [word for finding in findings for word in ("missing", "extra", "plain", "changed") if f": {word}" in finding
            or f"a {word} file" in finding] == ["missing", "extra", "plain", "extra", "changed"]  # fmt: skip
    with pytest.raises(UserError, match=r"config\.json: missing"):
        check_whole(model)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no artefact"),
        ("{", "not-json"),
        ('{"format": "\\ud800"}', "not-json"),
        ("[" * 100_000, "not-json"),
        ("[]", "not the manifest"),
        ('{"format": "fastvlm-artefact", "format_version": 99}', "version 99"),
        ('{"format": "fastvlm-artefact", "format_version": 3, "files": {"../x": {"sha256": "", "size": 1}}}', "inside"),
        (
            '{"format": "fastvlm-artefact", "format_version": 3, "files": {"/etc/x": {"sha256": "", "size": 1}}}',
            "inside",
        ),
        ('{"format": "fastvlm-artefact", "format_version": 3, "files": {"x": {"size": true}}}', "inside"),
    ],
)
def test_unusable_manifests_are_refused(tmp_path: Path, text: str | None, match: str) -> None:
    if text is not None:
        (tmp_path / contract.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=match):
        verify(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "nothing")


# --- licences


def test_licences_are_carried_and_changes_told(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    (source / "LICENSE_MODEL").write_text("the licence")
    (source / "NOTICE").write_text("their notice")
    (source / "README.md").write_text("not a licence")
    assert carry_licences(source, folder, ["weights halved"]) == ["LICENSE_MODEL", "NOTICE"]
    assert (folder / "LICENSE_MODEL").read_text() == "the licence"
    notice = (folder / "NOTICE").read_text()
    assert notice.startswith("their notice") and "- weights halved" in notice and "Apple" not in notice
    assert (source / "NOTICE").read_text() == "their notice"


def test_apples_licence_brings_its_attribution(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "LICENSE_MODEL").write_text("This Apple Machine Learning Research Model is for research.")
    carry_licences(tmp_path / "source", tmp_path, ["weights halved"])
    attribution = "Apple Machine Learning Research Model License Agreement"  # LICENSE_MODEL's own sentence
    assert f"Apple Machine Learning Research Model is licensed under the {attribution}." in (
        (tmp_path / "NOTICE").read_text()
    )
    assert "came without a licence" not in (tmp_path / "NOTICE").read_text()


def test_without_a_licence_the_notice_says_research_only(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    assert carry_licences(tmp_path / "source", tmp_path, ["weights halved"]) == []
    notice = (tmp_path / "NOTICE").read_text()
    assert "research purposes only" in notice and "- weights halved" in notice
    (tmp_path / "source" / "LICENSE").write_bytes(b"x" * (artefact._LICENCE_BYTES + 1))
    with pytest.raises(UserError, match="expected at most 1048576: no licence"):
        carry_licences(tmp_path / "source", tmp_path, [])


def test_an_artefact_of_an_older_format_can_be_replaced_but_not_read(tiny_artefact: Path, tmp_path: Path) -> None:
    older = shutil.copytree(tiny_artefact, tmp_path / "older")
    artefact.write_manifest(older, artefact.read_manifest(older) | {"format_version": 1})
    artefact.check_target(older, overwrite=True)
    with pytest.raises(UserError, match="export again"):
        artefact.read_manifest(older)
    (older / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt"):  # the control: what no export wrote is still not deleted
        artefact.check_target(older, overwrite=True)


def test_a_licence_that_is_a_link_is_followed_inside_the_checkpoint_or_the_hubs_cache_only(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    source, out = cache / "snapshots" / "0123abcd", tmp_path / "out"
    for folder in (source, cache / "blobs", out):
        folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (cache / "blobs" / "ab12").write_text("blob")
    (source / "text").write_text("inside")
    for name, target in (("LICENSE", "../../blobs/ab12"), ("NOTICE", "text")):
        (source / name).symlink_to(target)
    assert carry_licences(source, out, ["nothing"]) == ["LICENSE", "NOTICE"]
    assert (out / "LICENSE").read_text() == "blob" and (out / "NOTICE").read_text().startswith("inside")
    (source / "LICENSE2").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"a link to .*secret, outside its folder"):
        carry_licences(source, out, ["nothing"])
    (source / "LICENSE2").unlink()
    os.mkfifo(source / "LICENSE2")
    with pytest.raises(UserError, match="a pipe, expected a plain file: no licence"):
        carry_licences(source, out, ["nothing"])
