"""What may be replaced, the manifest and `verify`, and the licences."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastvlm.common.errors import UserError
from fastvlm.common.staging import own, staged
from model_export import artefact, contract
from model_export.artefact import carry_licences, check_target, check_whole, verify, write_manifest
from tests.helpers import contents

FILES = {"config.json": "{}", "fastvithd.mlpackage/Data/weight.bin": "weights", "model.safetensors": "tensors"}


def make(folder: Path, files: dict[str, str] = FILES) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_manifest(folder, {"parts": ["vision", "llm"]})
    return folder


# --- what is not ours


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    """Whatever the names: a folder of the user's own, and links to one, to one of ours and to nothing."""
    mine, ours = tmp_path / ".model.staging-20240101", tmp_path / "ours"
    mine.mkdir()
    own(ours)
    for folder in (mine, ours):
        (folder / "old").write_text("mine")
    for name, target in (("a", mine), ("b", ours), ("c", tmp_path / "none")):
        (tmp_path / f".model.staging-{name}").symlink_to(target)
    before = contents(tmp_path)
    with staged(tmp_path / "model"):
        pass
    (tmp_path / "model").rmdir()
    assert contents(tmp_path) == before


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


@pytest.mark.parametrize("name", [*FILES, contract.MANIFEST])
def test_one_flipped_byte_is_named(tmp_path: Path, name: str) -> None:
    path = make(tmp_path) / name
    assert verify(tmp_path) == [] and check_whole(tmp_path)["parts"] == ["vision", "llm"]  # the control
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
    kinds = [next(word for word in ("missing", "extra", "plain", "changed") if word in one) for one in findings]
    assert kinds == ["missing", "extra", "plain", "extra", "changed"]
    with pytest.raises(UserError, match=r"config\.json: missing"):
        check_whole(model)


def listing(files: dict[str, Any]) -> str:
    return json.dumps({"format": "fastvlm-artefact", "format_version": 3, "files": files})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "expected an artefact: a folder with config.json"),
        ("{", "not-json"),
        ('{"format": "\\ud800"}', "not-json"),
        ("[" * 100_000, "not-json"),
        ("[]", "not the manifest"),
        ('{"format": "fastvlm-artefact", "format_version": 99}', "version 99"),
        (listing({"../x": {"sha256": "", "size": 1}}), "inside"),
        (listing({"/etc/x": {"sha256": "", "size": 1}}), "inside"),
        (listing({"x": {"size": True}}), "inside"),
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


APPLES = "Apple Machine Learning Research Model"


@pytest.mark.parametrize(
    ("files", "told", "not_told"),
    [
        ({"LICENSE_MODEL": "the licence", "NOTICE": "their notice", "README.md": "none"}, "their notice", "Apple"),
        ({"LICENSE_MODEL": f"This {APPLES} is for research."},  # with the licence's own sentence
         f"{APPLES} is licensed under the {APPLES} License Agreement.", "came without a licence"),
        ({}, "research purposes only", "their notice"),
    ],
)  # fmt: skip
def test_licences_are_carried_and_changes_told(tmp_path: Path, files: dict[str, str], told: str, not_told: str) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    carried = sorted(files.keys() - {"README.md"})
    assert carry_licences(source, folder, ["weights halved"]) == carried
    assert all((folder / name).read_text() == files[name] for name in carried if name != "NOTICE")
    notice = (folder / "NOTICE").read_text()
    assert told in notice and not_told not in notice and "- weights halved" in notice
    assert {path.name: path.read_text() for path in source.iterdir()} == files
    (source / "LICENSE").write_bytes(b"x" * (artefact._LICENCE_BYTES + 1))
    with pytest.raises(UserError, match="expected at most 1048576: no licence"):
        carry_licences(source, folder, [])


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
