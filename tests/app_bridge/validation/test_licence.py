"""What has to go along with the weights: each thing that is missing is named, and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from app_bridge.__main__ import build_parser
from app_bridge.validation import licence
from fastvlm.common.cli import run
from model_export.artefact import carry_licences, read_manifest, write_manifest

# Text of our own with what matters in Apple's: the name, broken over two lines as there.
RESEARCH = """This Apple Machine Learning
Research Model is provided to You for Research Purposes. Pass on: "Apple Machine Learning Research Model is licensed
under the Apple Machine Learning Research Model License Agreement." The Apple Machine Learning Research Model ...
"""
CODE = "IMPORTANT:  This Apple software is supplied to you by Apple\nInc. in consideration of your agreement"
OTHER = "Do what you like with these weights."


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """An artefact whose licence files the export carried from a checkpoint with these."""

    def artefact(**files: str) -> Path:
        checkpoint, folder = tmp_path / "checkpoint", tmp_path / "artefact"
        checkpoint.mkdir()
        folder.mkdir()
        for name, text in files.items():
            (checkpoint / name).write_text(text)
        carry_licences(checkpoint, folder, ["Weights are stored in 4 bits."])
        write_manifest(folder, {"parts": ["vision", "llm"]})
        return folder

    return artefact


def again(folder: Path) -> Path:
    """As if the export had written it so."""
    write_manifest(folder, {"parts": ["vision", "llm"]})
    return folder


def rules(folder: Path) -> list[str]:
    findings = licence.check(folder, read_manifest(folder))
    assert all(finding.severity == "error" and finding.remedy for finding in findings)
    return sorted(finding.rule for finding in findings)


@pytest.mark.parametrize(
    "files",
    [
        {"LICENSE_MODEL": RESEARCH},
        {"LICENSE": OTHER},
        {"Licence.txt": OTHER},
        {"LICENSE": CODE, "LICENSE_MODEL": RESEARCH},
    ],
)
def test_what_the_export_carries_may_be_passed_on(make: Callable[..., Path], files: dict[str, str]) -> None:
    assert rules(make(**files)) == []


@pytest.mark.parametrize(
    ("files", "got"),
    [
        ({}, "none"),
        ({"ACKNOWLEDGEMENTS": "thanks", "README.md": "the licence is somewhere"}, "none"),
        ({"LICENSE": " \n"}, "LICENSE without a text"),
        ({"LICENSE": CODE}, "LICENSE: Apple's licence of its code, not of weights"),
    ],
)
def test_no_licence_of_the_weights(make: Callable[..., Path], files: dict[str, str], got: str) -> None:
    folder = make(**files)
    assert rules(folder) == ["licence-missing"]
    (finding,) = licence.check(folder, read_manifest(folder))
    assert finding.got == got and "LICENSE_MODEL from https://github.com/apple/ml-fastvlm" in finding.remedy


def test_a_licence_put_in_afterwards_is_none(make: Callable[..., Path]) -> None:
    folder = make()
    (folder / "LICENSE_MODEL").write_text(RESEARCH)
    (finding,) = licence.check(folder, read_manifest(folder))
    assert finding.rule == "licence-missing" and finding.got == "LICENSE_MODEL, which the export did not write"


def test_the_attribution_is_asked_for_where_the_licence_asks(make: Callable[..., Path]) -> None:
    folder = make(LICENSE_MODEL=RESEARCH)
    notice = folder / "NOTICE"
    notice.write_text(notice.read_text().replace("is licensed under", "was licenced by"))
    assert rules(again(folder)) == ["licence-attribution-missing"]
    (folder / "LICENSE_MODEL").write_text(OTHER)
    assert rules(again(folder)) == []


@pytest.mark.parametrize("notice", ["What was changed:\n", "Made from a checkpoint.\n", "- Weights in 4 bits.\n"])
def test_a_notice_without_changes(make: Callable[..., Path], notice: str) -> None:
    folder = make(LICENSE=OTHER)
    (folder / "NOTICE").write_text(notice)
    assert rules(again(folder)) == ["licence-change-record-missing"]


def test_no_notice_lacks_both(make: Callable[..., Path]) -> None:
    folder = make(LICENSE_MODEL=RESEARCH)
    (folder / "NOTICE").unlink()
    assert rules(again(folder)) == ["licence-attribution-missing", "licence-change-record-missing"]


@pytest.mark.parametrize("name", ["LICENSE_MODEL", "NOTICE"])
def test_a_text_changed_since_the_export(make: Callable[..., Path], name: str) -> None:
    folder = make(LICENSE_MODEL=RESEARCH)
    with (folder / name).open("a") as file:
        file.write("and for commercial use, too\n")
    (finding,) = licence.check(folder, read_manifest(folder))
    assert finding.rule == "licence-changed" and finding.where == name
    (folder / name).write_text(" \n")
    assert rules(folder) == ["licence-changed"]  # that it has no text now is the same fault


def test_a_text_that_is_no_text(make: Callable[..., Path]) -> None:
    folder = make(LICENSE=OTHER)
    (folder / "LICENSE").write_bytes(b"\xff\xfe\x00binary")
    assert rules(again(folder)) == []


def test_the_research_term_is_by_the_text_not_the_name(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(LICENSE=RESEARCH)
    assert licence.research_only(folder)
    licence.say(folder)
    said = capsys.readouterr().err
    assert "research only" in said and "License Agreement" in said and "LICENSE " in said and said.count("\n") == 2
    (folder / "LICENSE").write_text(OTHER)
    assert not licence.research_only(folder) and licence.term(folder) is None
    licence.say(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({}, None),
        ({"LICENSE": CODE, "LICENSE_MODEL": RESEARCH}, "LICENSE_MODEL"),
        ({"LICENSE": CODE, "LICENSE_MODEL": OTHER}, "LICENSE_MODEL"),
        ({"LICENCE.txt": OTHER, "LICENSE": RESEARCH}, "LICENSE"),  # though its name is broken over two lines
        ({"LICENCE.txt": OTHER, "License": OTHER}, "LICENCE.txt"),
    ],
)
def test_the_weights_licence_is_named(make: Callable[..., Path], files: dict[str, str], name: str | None) -> None:
    folder = make(**files)
    (folder / "licences").mkdir()
    assert licence.file(folder) == name


def test_nothing_overrides_it(app_artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For real, through the command line: the same artefact with and without its licence."""
    assert run(build_parser, ["bundle", str(app_artefact), "--output-dir", str(tmp_path / "with")]) == 0
    bare = tmp_path / "bare"
    shutil.copytree(app_artefact, bare)
    (bare / "LICENSE").unlink()
    document = {key: value for key, value in read_manifest(bare).items() if key not in ("files", "manifest_sha256")}
    write_manifest(bare, document)
    capsys.readouterr()
    target = str(tmp_path / "without")
    for flags in ([], ["--overwrite"], ["--dry-run"]):
        assert run(build_parser, ["bundle", str(bare), "--output-dir", target, *flags]) == 1
        assert "error: licence-missing" in capsys.readouterr().err
    assert not (tmp_path / "without").exists()
