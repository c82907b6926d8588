"""What has to go along with the weights: each thing that is missing is named, and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app_bridge import licence
from model_export.artefact import carry_licences, read_manifest, write_manifest

# Text of our own with what matters in Apple's: the name, broken over two lines as there.
RESEARCH = """This Apple Machine Learning
Research Model is provided to You for Research Purposes. Pass on: "Apple Machine Learning Research Model is licensed
under the Apple Machine Learning Research Model License Agreement." The Apple Machine Learning Research Model ...
"""
CODE = "IMPORTANT:  This Apple software is supplied to you by Apple\nInc. in consideration of your agreement"
OTHER = "Do what you like with these weights."
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """An artefact whose licence files the export carried from a checkpoint with these."""

    def artefact(**files: str) -> Path:
        checkpoint, folder = tmp_path / "checkpoint", tmp_path / "artefact"
        checkpoint.mkdir()
        folder.mkdir()
        for name, text in files.items():
            (checkpoint / name).write_text(text)
        carry_licences(checkpoint, folder, ["Weights are stored in 4 bits."])
        return again(folder)

    return artefact


def again(folder: Path) -> Path:
    """As if the export had written it so."""
    write_manifest(folder, {"parts": ["vision", "llm"]})
    return folder


def findings(folder: Path) -> list[tuple[str, str, str]]:
    """(rule, where, got) of each finding."""
    found = licence.check(folder, read_manifest(folder))
    assert all(finding.severity == "error" and finding.remedy for finding in found)
    return sorted((finding.rule, finding.where, finding.got) for finding in found)


def rules(folder: Path) -> list[str]:
    return [rule for rule, _, _ in findings(folder)]


@pytest.mark.parametrize(
    ("files", "name", "missing"),
    [
        ({"LICENSE_MODEL": RESEARCH}, "LICENSE_MODEL", None),
        ({"LICENSE": OTHER}, "LICENSE", None),
        ({"Licence.txt": OTHER}, "Licence.txt", None),
        ({"LICENSE": CODE, "LICENSE_MODEL": RESEARCH}, "LICENSE_MODEL", None),
        ({"LICENSE": CODE, "LICENSE_MODEL": OTHER}, "LICENSE_MODEL", None),
        ({"LICENCE.txt": OTHER, "LICENSE": RESEARCH}, "LICENSE", None),
        ({"LICENCE.txt": OTHER, "License": OTHER}, "LICENCE.txt", None),
        ({}, None, "none"),
        ({"ACKNOWLEDGEMENTS": "thanks", "README.md": "the licence is somewhere"}, None, "none"),
        ({"LICENSE": " \n"}, "LICENSE", "LICENSE without a text"),
        ({"LICENSE": CODE}, "LICENSE", "LICENSE: Apple's licence of its code, not of weights"),
    ],
)
def test_the_weights_licence(make: Make, files: dict[str, str], name: str | None, missing: str | None) -> None:
    folder = make(**files)
    assert findings(folder) == ([("licence-missing", "LICENSE*", missing)] if missing else [])
    (folder / "licences").mkdir()
    assert licence.licence_file(folder) == name
    assert licence.research_only(folder) == (RESEARCH in files.values())


def test_a_licence_put_in_afterwards_is_none(make: Make) -> None:
    folder = make()
    (folder / "LICENSE_MODEL").write_text(RESEARCH)
    assert findings(folder) == [("licence-missing", "LICENSE*", "LICENSE_MODEL, which the export did not write")]


def test_the_attribution_is_asked_for_where_the_licence_asks(make: Make) -> None:
    folder = make(LICENSE_MODEL=RESEARCH)
    notice = folder / "NOTICE"
    notice.write_text(notice.read_text().replace("is licensed under", "was licenced by"))
    assert rules(again(folder)) == ["licence-attribution-missing"]
    (folder / "LICENSE_MODEL").write_bytes(b"\xff\xfe\x00no text, and so not Apple's")
    assert rules(again(folder)) == []
    (folder / "LICENSE_MODEL").write_text(RESEARCH)
    notice.unlink()
    assert rules(again(folder)) == ["licence-attribution-missing", "licence-change-record-missing"]


@pytest.mark.parametrize("notice", ["What was changed:\n", "Made from a checkpoint.\n", "- Weights in 4 bits.\n"])
def test_a_notice_without_changes(make: Make, notice: str) -> None:
    folder = make(LICENSE=OTHER)
    (folder / "NOTICE").write_text(notice)
    assert rules(again(folder)) == ["licence-change-record-missing"]


@pytest.mark.parametrize("name", ["LICENSE_MODEL", "NOTICE"])
def test_a_text_changed_since_the_export(make: Make, name: str) -> None:
    folder = make(LICENSE_MODEL=RESEARCH)
    for text in ("and for commercial use, too\n", " \n"):  # that it has no text now is the same fault
        (folder / name).write_text(text)
        assert [(rule, where) for rule, where, _ in findings(folder)] == [("licence-changed", name)]


def test_the_research_term_is_by_the_text_not_the_name(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(LICENSE=RESEARCH)
    licence.log_research_term(folder)
    err = capsys.readouterr().err
    assert "research only" in err and "License Agreement" in err and "LICENSE " in err and err.count("\n") == 2
    (folder / "LICENSE").write_text(OTHER)
    assert licence.research_term(folder) is None
    licence.log_research_term(folder)
    assert capsys.readouterr().err == ""


def test_nothing_overrides_it(app_artefact: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """For real, through the command line: the same artefact with and without its licence."""
    assert cli("bundle", app_artefact, "--output-dir", tmp_path / "with").code == 0
    bare = shutil.copytree(app_artefact, tmp_path / "bare")
    (bare / "LICENSE").unlink()
    document = {key: value for key, value in read_manifest(bare).items() if key not in ("files", "manifest_sha256")}
    write_manifest(bare, document)
    for flags in ([], ["--overwrite"], ["--dry-run"]):
        answer = cli("bundle", bare, "--output-dir", tmp_path / "without", *flags)
        assert answer.code == 1 and "licence-missing" in answer.err
    assert not (tmp_path / "without").exists()
