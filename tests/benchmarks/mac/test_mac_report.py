"""The Mac report without a Mac: its table against the real command lines, the command, and the page."""

import ast
import importlib
import json
import re
import shlex
import signal
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from html_page import Page

from benchmarks.__main__ import build_parser
from benchmarks.mac import check as mac_check
from benchmarks.mac import report as mac_report
from benchmarks.mac.check import Check, Done
from fastvlm.common.children import ROOT
from fastvlm.common.cli import run
from fastvlm.common.errors import UserError
from quantization.recipe import load_recipe

PLACES = {"work": "/w w", "artefact": "/a b", "checkpoint": "/c", "device": "Apple M9 Max"}
FIELDS = {"part": "p", "title": "t", "establishes": "that <b>it</b> works", "needs": ["Core ML"], "passes": "it is so"}


def check(**fields: Any) -> Check:
    return Check(**{"name": "one", **FIELDS, "command": "python -m x", **fields})


# The table


def fault_of(words: list[str]) -> str:
    """What the real parser, or the file system, has against a command; empty when it would start."""
    if words[0] == "xcrun":
        return "" if words[1] == "coremlcompiler" else words[1]
    flag, module, *rest = words[1:]
    assert flag == "-m"
    if module == "pytest":
        known = {"--color=no", "-rs"}
        return "".join(one for one in rest if one not in known and not is_a_test(one))
    if module == "benchmarks.suites.step":
        module, _, function = rest[0].partition(":")
        return (
            ""
            if callable(getattr(importlib.import_module(module), function, None)) and json.loads(rest[1])
            else rest[0]
        )
    parser = importlib.import_module(f"{module}.__main__").build_parser()
    try:
        args = parser.parse_args(rest)
        for recipe in getattr(args, "quant", ()) if module == "quantization" else ():
            load_recipe(recipe)
    except (SystemExit, UserError):
        return shlex.join(rest)
    return "" if "--json" in rest else "no --json"


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def is_a_test(node: str) -> bool:
    file, _, name = node.partition("::")
    return (ROOT / file).is_file() and (not name or name in functions_of(ROOT / file))


@pytest.mark.parametrize("one", [one for one in mac_report.load() if one.command], ids=lambda one: one.name)
def test_every_command_of_the_table_is_one_that_starts(one: Check) -> None:
    words = mac_report.command(one, PLACES)
    assert not any("{" in word for word in words) and fault_of(words) == ""


@pytest.mark.parametrize(
    "command",
    [
        "python -m model_export mac --model {artefact} --unit ALL --json",
        "python -m model_export mac --model {artefact} --units GPU --json",
        "python -m model_export audit --json",
        "python -m benchmarks parity --reference {checkpoint} --candidate {artefact}",
        "python -m quantization sweep --checkpoint {checkpoint} --quant fp16 int17 --json",
        "python -m pytest --color=no -rs tests/model_export/test_mac.py::test_core_ml",
    ],
)
def test_a_command_that_would_not_start_is_seen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fault_of(mac_report.command(check(command=command), PLACES))


def test_the_table_names_every_test_that_is_skipped_off_a_mac() -> None:
    marked = re.compile(r"^@pytest\.mark\.skipif\(sys\.platform != \"darwin\".*\n(?:@.*\n)*def (\w+)", re.M)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    expected = {f"{path.relative_to(ROOT)}::{name}" for path in files for name in marked.findall(path.read_text())}
    named = [word for one in mac_report.load() for word in shlex.split(one.command) if "::" in word]
    assert expected and set(named) == expected
    [counts] = [one.require for one in mac_report.load() if one.name == "tests-coreml"]
    assert counts == [["tests", "is", {"passed": len(expected)}]]


def test_every_compute_unit_has_its_rows_and_nothing_runs_off_a_mac() -> None:
    from model_export.config import COMPUTE_UNITS

    checks = mac_report.load()
    names = {one.name for one in checks}
    assert {f"{kind}-{unit}" for kind in ("coreml", "real") for unit in COMPUTE_UNITS} <= names
    assert all(set(one.needs) & set(mac_report.MAC) for one in checks)
    known = {*mac_report.MAC, "no --model", "checkpoint", "device"}
    assert all(set(one.needs) <= known and one.establishes and one.passes for one in checks)


@pytest.mark.parametrize(
    "rows, match",
    [
        ([{"command": "x"}, {"command": "x"}], "another's"),
        ([{"command": "x", "after": "later"}], "'later' does not come before"),
        ([{}], "either a command or steps"),
    ],
)
def test_a_fault_in_the_table_is_refused(rows: list[dict], match: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps([{"name": "one", **FIELDS, **row} for row in rows]))
    with pytest.raises(ValueError, match=match):
        mac_report.load(tmp_path / "table.json")


def test_an_unknown_field_of_the_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps([{"name": "one", **FIELDS, "comand": "x"}]))
    with pytest.raises(TypeError, match="comand"):
        mac_report.load(tmp_path / "table.json")


def judged(one: Check, document: dict | None, ended: str | None = None, stderr: str = "") -> str | None:
    return mac_check.judge(one, Done(1.0, ended, "", stderr, document))


JSON = "print('{\"passed\": true}', flush=True)"


# The whole command


class Embedded(HTMLParser):
    """The JSON document that a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside, self.document = False, {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.inside = dict(attrs).get("id") == "report"

    def handle_data(self, data: str) -> None:
        if self.inside and data.strip():
            self.document = json.loads(data)


def report_to(tmp_path: Path, *argv: str) -> int:
    return run(build_parser, ["mac-report", "--output", str(tmp_path / "page.html"), *argv])


@pytest.mark.skipif(sys.platform == "darwin", reason="says what happens elsewhere")
def test_elsewhere_every_check_is_skipped_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_to(tmp_path, "--json") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    checks = mac_report.load()
    assert document["passed"] is None and [row["name"] for row in document["checks"]] == [one.name for one in checks]
    assert {row["outcome"] for row in document["checks"]} == {"skipped"}
    assert all(
        row["reason"] == f"needs a Mac ({one.needs[0]}), this is {sys.platform}"
        for row, one in zip(document["checks"], checks)
    )
    page = Page((tmp_path / "page.html").read_text())
    text = " ".join("".join(page.texts).split())
    assert all(one.establishes in text for one in checks) and "No check ran here" in text
    assert not [value for _, name, value in page.attributes if name in ("src", "href")]
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


@pytest.fixture
def on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`report(rows, *argv) -> (exit code, rows of the document, page)` on a Mac whose commands are these."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mac_report, "_says", lambda *words: "")

    def report(rows: list[dict], *argv: str) -> tuple[int, dict[str, dict], str]:
        table = [{**FIELDS, **row} for row in rows]
        (tmp_path / "table.json").write_text(json.dumps(table))
        monkeypatch.setattr(mac_report, "TABLE", tmp_path / "table.json")
        code = report_to(tmp_path, *argv)
        text = (tmp_path / "page.html").read_text()
        return code, {row["name"]: row for row in Embedded(text).document["checks"]}, text

    return report


PASSED = [["passed", "is", True]]
GOOD = {
    "name": "good",
    "command": f"python -S -c {shlex.quote(JSON)}",
    "require": PASSED,
    "figures": [["it", "passed", ""]],
}
CRASH = {"name": "crash", "command": "python -S -c 'import os; os.abort()'", "require": PASSED}


def test_a_crash_is_a_row_and_the_rest_goes_on(on_a_mac: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        CRASH,
        {**GOOD, "name": "reads-it", "after": "crash"},
        GOOD,
        {**GOOD, "name": "xcode", "needs": ["Xcode"]},
        {"name": "person", "steps": ["copy {artefact}"]},
        {**GOOD, "name": "there", "makes": "{checkpoint}"},
        {"name": "evil", "command": "python -S -c 'print(\"</script><script>alert(1)</script> \\x1b[31mred\")'"},
    ]
    code, found, page = on_a_mac(rows)
    outcomes = {name: row["outcome"] for name, row in found.items()}
    assert code == 1 and outcomes == {
        "crash": "failed", "reads-it": "skipped", "good": "passed", "xcode": "skipped", "person": "by hand",
        "there": "skipped", "evil": "passed",
    }  # fmt: skip
    assert (
        f"signal {signal.SIGABRT.value}" in found["crash"]["reason"] and "crash failed" in found["reads-it"]["reason"]
    )
    assert "needs Xcode" in found["xcode"]["reason"] and "earlier run" in found["there"]["reason"]
    assert found["good"]["document"] == {"passed": True} and found["person"]["steps"][0].endswith("page/artefact")
    assert found["evil"]["stdout"] == "</script><script>alert(1)</script> red"
    assert "<script>alert" not in page and "<b>it</b>" not in page and page.count("<script") == 1
    assert "2 passed, 1 failed, 3 skipped, 1 by hand" in capsys.readouterr().out


def test_exit_code_is_0_when_all_that_ran_passed(on_a_mac: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = on_a_mac([GOOD, CRASH], "--check", "good")
    assert code == 0 and list(found) == ["good"] and "1 passed" in capsys.readouterr().out
    code, found, _ = on_a_mac([CRASH, {**GOOD, "after": "crash"}], "--check", "good")
    assert code == 1 and list(found) == ["crash", "good"]


def test_the_users_folder_is_not_in_the_page(on_a_mac: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, found, page = on_a_mac([{**GOOD, "command": "python -S -c 'print(\"{work}\")'", "require": []}])
    assert found["good"]["stdout"] == "~/page" and str(tmp_path) not in page


def test_an_interrupted_run_leaves_the_old_page_and_no_process(
    on_a_mac: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_a_mac([GOOD])
    old, ended = (tmp_path / "page.html").read_bytes(), []

    def interrupted(self: Any, timeout: float | None = None) -> int:
        if not ended and "time.sleep" in str(self.args):
            ended.append(self)
            raise KeyboardInterrupt
        return original(self, timeout)

    original = mac_check.subprocess.Popen.wait
    monkeypatch.setattr(mac_check.subprocess.Popen, "wait", interrupted)
    sleeping = {"name": "long", "command": "python -S -c 'import time; time.sleep(600)'"}
    code, found, _ = on_a_mac([sleeping])
    assert code == 130 and list(found) == ["good"] and (tmp_path / "page.html").read_bytes() == old
    assert ended[0].returncode == -signal.SIGTERM and not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--check", "speed"], "--check: got speed, expected some of export, "),
        (["--checkpoint", "/no/such"], "--checkpoint /no/such: no config.json there"),
        (["--model", "/no/such"], "/no/such"),
        (["--output", "/"], "--output /: is a folder"),
    ],
)
def test_unusable_input_is_one_line(
    tmp_path: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_to(tmp_path, *argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_this_mac_is_found_among_the_devices_by_its_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mac_report, "_says", lambda *words: "yes")
    args = build_parser().parse_args(["mac-report"])
    for chip, key in (("Apple M1 Max", "m1-max"), ("Apple M1", "m1"), ("Apple A16", None), ("Intel Core i9", None)):
        monkeypatch.setattr(mac_report.environment, "describe", lambda: {"cpu": chip})  # noqa: B023
        assert mac_report.known_device() == key and ("device" in mac_report.absent(args)) == (key is None)


def test_an_artefact_of_yours_needs_its_checkpoint_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mac_report, "_says", lambda *words: "yes")
    monkeypatch.setattr(mac_report, "known_device", lambda: "m1")
    args = build_parser().parse_args(["mac-report", "--model", "a"])
    assert set(mac_report.absent(args)) == {"no --model", "checkpoint"}
    args = build_parser().parse_args(["mac-report", "--model", "a", "--checkpoint", "c"])
    assert set(mac_report.absent(args)) == {"no --model"}
    assert mac_report.absent(build_parser().parse_args(["mac-report"])) == {}


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
    assert compared["ttft_paper"]["measured"] == pytest.approx(0.3) and compared["ttft_paper"][
        "error"
    ] == pytest.approx(0.5)
    assert compared["decode_rate"]["measured"] == pytest.approx(10) and compared["decode_rate"]["inside"]
    assert mac_report.beside([row for row in rows if row["name"] != "ttft-real"]) == []


def test_the_real_estimate_has_what_is_compared() -> None:
    from benchmarks.estimate import estimate

    document = estimate.estimate("0.5b", "m1-max", resolution=256)
    known = {one.name: one for one in mac_report.load()}
    assert judged(known["estimate-256"], document) is None and judged(known["estimate-256"], {"total": {"low": 1}})
    assert document["label"] == "estimate" and {"encode", "project", "prefill"} == set(document["stages"])
    assert {"low", "high"} <= set(document["total"]) and document["decode"]["unit"] == "tokens/s"
