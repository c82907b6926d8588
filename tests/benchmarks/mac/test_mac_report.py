"""The Mac report without a Mac: its table, the command, and the page."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from html_page import Page

from benchmarks import checks
from benchmarks.__main__ import build_parser
from benchmarks.checks import Check
from benchmarks.mac import check as mac_check
from benchmarks.mac import report as mac_report
from fastvlm.common.children import ROOT, Finished

FIELDS = {"part": "p", "title": "t", "establishes": "that <b>it</b> works", "needs": ["Core ML"], "passes": "it is so"}
JSON = "print('{\"passed\": true}', flush=True)"


@pytest.fixture(scope="module")
def table() -> dict[str, Check]:
    return {one.name: one for one in checks.load(mac_report.TABLE)}


def test_the_table_names_every_test_that_is_skipped_off_a_mac(table: dict[str, Check]) -> None:
    marked = re.compile(r"^@pytest\.mark\.skipif\(sys\.platform != \"darwin\".*\n(?:@.*\n)*def (\w+)", re.M)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    expected = {f"{path.relative_to(ROOT)}::{name}" for path in files for name in marked.findall(path.read_text())}
    words = [word for one in table.values() for word in shlex.split(one.command)]
    assert expected and {word.removeprefix("{root}/") for word in words if "::" in word} == expected
    assert table["tests-coreml"].require == [["tests", "is", {"passed": len(expected)}]]  # a skipped one is no pass


def test_every_compute_unit_has_its_rows_and_nothing_runs_off_a_mac(table: dict[str, Check]) -> None:
    from model_export.config import COMPUTE_UNITS, COREAI_UNITS, INTERPRETER

    assert {f"{kind}-{unit}" for kind in ("coreml", "real") for unit in COMPUTE_UNITS} <= table.keys()
    assert {f"coreai-{unit}" for unit in COREAI_UNITS if unit != INTERPRETER} <= table.keys()
    known = {*mac_report.MAC, "no --model", "checkpoint", "device"}
    for one in table.values():
        assert {*one.needs} & {*mac_report.MAC} and {*one.needs} <= known and one.establishes and one.passes


@pytest.mark.skipif(sys.platform == "darwin", reason="says what happens elsewhere")
def test_elsewhere_every_check_is_skipped_and_says_why(tmp_path: Path, cli: Any, table: dict[str, Check]) -> None:
    page = tmp_path / "page.html"
    done = cli("mac-report", "--output", page, "--json")
    assert done.code == 0 and done.document["passed"] is None
    told = {row["name"]: (row["outcome"], row["reason"]) for row in done.document["checks"]}
    assert told == {
        one.name: ("skipped", f"needs a Mac ({one.needs[0]}), this is {sys.platform}") for one in table.values()
    }
    read = Page(page.read_text())
    text = " ".join("".join(read.texts).split())
    assert all(one.establishes in text for one in table.values()) and "No check ran here" in text
    assert not [value for _, name, value in read.attributes if name in ("src", "href")]
    assert list(tmp_path.iterdir()) == [page]
    printed = cli("mac-report", "--output", page).out  # a line a part, not a row a check
    assert len(printed.splitlines()) < len(table) and "No check ran here" in printed


@pytest.fixture
def on_a_mac(tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`report(rows, *argv) -> (the answer, rows of the document, page)` on a Mac whose commands are these."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mac_report, "output_of", lambda *words: "")
    monkeypatch.setattr(mac_report, "TABLE", tmp_path / "table.json")

    def report(rows: list[dict], *argv: str) -> tuple[Any, dict[str, dict], str]:
        mac_report.TABLE.write_text(json.dumps([{**FIELDS, **row} for row in rows]))
        done = cli("mac-report", "--output", tmp_path / "page.html", *argv)
        text = (tmp_path / "page.html").read_text()
        document = json.loads(re.findall(r'id="report">(.*?)</script>', text, re.S)[0])
        return done, {row["name"]: row for row in document["checks"]}, text

    return report


PASSED = [["passed", "is", True]]
GOOD = {
    "name": "good",
    "command": f"python -S -c {shlex.quote(JSON)}",
    "require": PASSED,
    "figures": [["it", "passed", ""]],
}
CRASH = {"name": "crash", "command": "python -S -c 'import os; os.abort()'", "require": PASSED}


def test_a_crash_is_a_row_and_the_rest_goes_on(on_a_mac: Any) -> None:
    rows = [
        CRASH,
        {**GOOD, "name": "reads-it", "after": ["crash"]},
        GOOD,
        {**GOOD, "name": "xcode", "needs": ["Xcode"]},
        {"name": "person", "steps": ["copy {artefact}"]},
        {**GOOD, "name": "there", "makes": "{checkpoint}"},
        {"name": "evil", "command": "python -S -c 'print(\"</script><script>alert(1)</script> \\x1b[31mred\")'"},
    ]
    done, found, page = on_a_mac(rows)
    assert done.code == 1 and {name: row["outcome"] for name, row in found.items()} == {
        "crash": "failed", "reads-it": "skipped", "good": "passed", "xcode": "skipped", "person": "by hand",
        "there": "skipped", "evil": "passed",
    }  # fmt: skip
    assert "SIGABRT" in found["crash"]["reason"] and "crash failed" in found["reads-it"]["reason"]
    assert "needs Xcode" in found["xcode"]["reason"] and "earlier run" in found["there"]["reason"]
    assert found["good"]["document"] == {"passed": True} and found["person"]["steps"][0].endswith("page/artefact")
    assert found["evil"]["stdout"] == "</script><script>alert(1)</script> red"
    assert "<script>alert" not in page and "<b>it</b>" not in page and page.count("<script") == 1
    assert "2 passed, 1 failed, 3 skipped, 1 by hand" in done.out


def test_exit_code_is_0_when_all_that_ran_passed(on_a_mac: Any) -> None:
    done, found, _ = on_a_mac([GOOD, CRASH], "--check", "good")
    assert done.code == 0 and list(found) == ["good"] and "1 passed" in done.out
    done, found, _ = on_a_mac([CRASH, {**GOOD, "after": ["crash"]}], "--check", "good")
    assert done.code == 1 and list(found) == ["crash", "good"]


def test_the_users_folder_is_not_in_the_page(on_a_mac: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, found, page = on_a_mac([{**GOOD, "command": "python -S -c 'print(\"{work}\")'", "require": []}])
    assert found["good"]["stdout"] == "~/page" and str(tmp_path) not in page


def test_an_interrupted_run_leaves_the_old_page(on_a_mac: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_a_mac([GOOD])
    old = (tmp_path / "page.html").read_bytes()

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mac_check, "run", interrupted)
    assert on_a_mac([CRASH])[0].code == 130 and (tmp_path / "page.html").read_bytes() == old
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--check", "speed"], "--check: got speed, expected some of export, "),
        (["--checkpoint", "/no/such"], "--checkpoint /no/such: no config.json there"),
        (["--model", "/no/such"], "/no/such"),
        (["--output", "/"], "--output /: is a folder"),
    ],
)
def test_unusable_input_is_one_line(tmp_path: Path, argv: list[str], said: str, cli: Any) -> None:
    done = cli("mac-report", "--output", tmp_path / "page.html", *argv)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("chip", "key"), [("M1 Max", "m1-max"), ("M1", "m1"), ("A16", None), ("Intel Core i9", None)])
def test_what_a_mac_lacks(monkeypatch: pytest.MonkeyPatch, chip: str, key: str | None) -> None:
    """A device's estimate needs its chip in the table; an artefact of yours needs its checkpoint named."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mac_report, "output_of", lambda *words: "yes")
    monkeypatch.setattr(mac_report.environment, "describe", lambda: {"cpu": f"Apple {chip}"})
    assert mac_report.known_device() == key
    chips = {"Core AI"} if key else {"Core AI", "device"}  # this system says that it is no macOS 27
    for flags, missing in (
        ([], set()),
        (["--model", "a"], {"no --model", "checkpoint"}),
        (["--model", "a", "--checkpoint", "c"], {"no --model"}),
    ):
        assert mac_report.absent(build_parser().parse_args(["mac-report", *flags])).keys() == missing | chips


# Times


def launches(**stages: float) -> list[dict]:
    return [
        {
            "load_s": 1.0,
            "rounds": [{"stages": {name: factor * s for name, s in stages.items()}} for factor in (1, 2, 9)],
        }
    ]


def test_what_was_measured_stands_beside_the_estimate(tmp_path: Path) -> None:
    cold = {"dropped": False, "load_s": 1.0, "round": {"stages": {}}}
    stages = {"preprocess": 0.5, "encode": 0.1, "project": 0.01, "prefill": 0.04, "first_token": 0.001, "decode": 0.8}
    good = {"name": "fp16/coreml-CPU_AND_NE", "launches": launches(**stages), "cold": cold, "peak_bytes": 1e9}
    other = {**good, "name": "fp16/coreml-ALL", "launches": launches(**{**stages, "encode": 5.0})}
    killed = {"name": "fp16/coreml-CPU_ONLY", "error": "killed <by> the system"}
    run = {"benchmark": "ttft", "tokens": 16, "points": [{"resolution": 256, "runners": [killed, other, good]}]}
    estimate = {
        "label": "estimate", "resolution": 256, "total": {"low": 0.1, "high": 0.4}, "decode": {"low": 10, "high": 40},
        "stages": {"encode": {"low": 0.2, "high": 0.8}, "project": {"low": 0.1, "high": 0.1}},
    }  # fmt: skip
    documents = {
        "ttft-real": run,
        "estimate-256": estimate,
        "estimate-512": {**estimate, "resolution": 512},
        "app": None,
    }
    rows = [{"name": name, "document": document} for name, document in documents.items()]
    found = mac_report.times(rows)
    assert [one["runner"] for one in found] == ["fp16/coreml-CPU_AND_NE", "fp16/coreml-ALL", "fp16/coreml-CPU_ONLY"]
    assert found[0]["figures"]["encode"] == pytest.approx(0.2) and found[2]["error"] and not found[2]["figures"]
    compared = {one["stage"]: one for one in mac_report.beside(rows)}
    assert set(compared) == {"encode", "project", "ttft_paper", "decode_rate"}
    assert compared["encode"]["error"] == pytest.approx(-0.5) and compared["encode"]["inside"]
    assert compared["project"]["error"] == pytest.approx(-0.8) and not compared["project"]["inside"]
    assert compared["ttft_paper"]["measured"] == pytest.approx(0.3)
    assert compared["ttft_paper"]["error"] == pytest.approx(0.5)
    assert compared["decode_rate"]["measured"] == pytest.approx(10) and compared["decode_rate"]["inside"]
    assert mac_report.beside([row for row in rows if row["name"] != "ttft-real"]) == []


def test_the_real_estimate_has_what_is_compared(table: dict[str, Check]) -> None:
    from benchmarks.estimate import estimate

    def fault(document: dict) -> str | None:
        return mac_check.judge(table["estimate-256"], mac_check.Outcome(Finished(0, 1.0, 0, ""), document))

    document = estimate.estimate("0.5b", "m1-max", resolution=256)
    assert fault(document) is None and fault({"total": {"low": 1}})
    assert document["label"] == "estimate" and {"encode", "project", "prefill"} == set(document["stages"])
    assert {"low", "high"} <= set(document["total"]) and document["decode"]["unit"] == "tokens/s"
