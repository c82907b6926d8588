"""Tables of checks: every command of them starts, a fault in one is refused, and paths into documents."""

import importlib
import inspect
import json
import shlex
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks import checks
from benchmarks.mac import report
from benchmarks.suites import step, suite
from fastvlm.common.children import ROOT
from fastvlm.common.errors import UserError
from quantization.recipe import load_recipe

PLACES = defaultdict(lambda: "/a b", root=str(ROOT), device="m1")
TABLES = {"mac": report.TABLE, **{name: suite.table(name) for name in ("export", "encoder", "quantization")}}


def fault_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the real parser, the function's signature, or the file system has against a command; empty when it would
    start."""
    if words[0] in ("xcrun", "/a b") or words[1] == "-c" or words[2] == "mlx_lm":
        return ""
    flag, module, *rest = words[1:]
    assert flag == "-m"
    if module == "pytest":
        files = [Path(word.partition("::")[0]) for word in rest if word not in ("--color=no", "-rs")]
        return "".join(str(file) for file in files if not file.is_file())  # test_mac_report looks at their names
    if module == "benchmarks.suites.step":
        with monkeypatch.context() as patch:
            target, _, name = rest[0].partition(":")
            function = getattr(importlib.import_module(target), name, None)
            if function is None:
                return rest[0]
            called = inspect.signature(function)
            patch.setattr(importlib.import_module(target), name, called.bind)
            step.run(*rest)
        return ""
    try:
        args = importlib.import_module(f"{module}.__main__").build_parser().parse_args(rest)
        for recipe in getattr(args, "quant", ()) if module == "quantization" else ():
            load_recipe(recipe)
    except SystemExit:
        return shlex.join(rest)
    except UserError as error:  # the places of a run are not there yet
        return "; ".join(fault for fault in str(error).split("; ") if "path-missing" not in fault)
    return ""


@pytest.mark.parametrize("table", TABLES)
def test_every_command_of_a_table_is_one_that_starts(table, monkeypatch):
    for check in checks.load(TABLES[table]):
        reads = check.require if table == "mac" else [one for one in check.figures if one[2].count(".") > 1]
        for command in filter(None, (check.command, *check.turns.values())):
            words = checks.words(command, PLACES)
            assert not any("{" in word for word in words), check.name
            assert not fault_of(words, monkeypatch), check.name
            verb = words[1:3] in (["-m", "model_export"], ["-m", "benchmarks"], ["-m", "quantization"])
            assert "--json" in words or not (verb and reads) or check.turns, check.name


@pytest.mark.parametrize(
    "command",
    [
        "python -m model_export mac --model {artefact} --unit ALL --json",
        "python -m model_export mac --model {artefact} --units TPU --json",
        "python -m model_export audit --json",
        "python -m quantization sweep --checkpoint {checkpoint} --quant fp16 int17 --json",
        "python -m benchmarks.suites.step benchmarks.suites.steps:no_such_step",
        "python -m pytest --color=no -rs {root}/tests/model_export/test_mac.py::test_core_ml",
    ],
)
def test_a_command_that_would_not_start_is_seen(command, monkeypatch, capsys):
    assert fault_of(checks.words(command, PLACES), monkeypatch)
    with pytest.raises(TypeError):
        fault_of(["python", "-m", "benchmarks.suites.step", "benchmarks.suites.steps:executor", "one"], monkeypatch)


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        ([{"command": "x"}, {"command": "x"}], ValueError, "another's"),
        ([{"command": "x", "after": ["later"]}], ValueError, "does not come before"),
        ([{}], ValueError, "either a command, turns or steps"),
        ([{"comand": "x"}], TypeError, "comand"),
    ],
)
def test_a_fault_in_a_table_is_refused(rows, error, match, tmp_path):
    (tmp_path / "table.json").write_text(
        json.dumps([{"name": "one", "part": "p", "title": "t", **row} for row in rows])
    )
    with pytest.raises(error, match=match):
        checks.load(tmp_path / "table.json")


def test_rows_stand_for_several_and_bring_what_they_read(tmp_path):
    rows = [
        {"name": "first-{a}", "each": {"a": ["1", "2"]}, "part": "p", "title": "t", "command": "x {a} {work}"},
        {"name": "{b}-{a}", "each": {"a": ["1", "2"], "b": ["3", "4"]}, "part": "p", "title": "t", "command": "x",
         "after": ["first-{a}"]},
    ]  # fmt: skip
    (tmp_path / "table.json").write_text(json.dumps(rows))
    table = checks.load(tmp_path / "table.json")
    assert [one.name for one in table] == ["first-1", "first-2", "3-1", "4-1", "3-2", "4-2"]
    assert [one.name for one in checks.chosen(table, ["4-2"])] == ["first-2", "4-2"]
    assert checks.words(table[1].command, {"work": "/w w"}) == ["x", "2", "/w w"]


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("a.b.*.c", [1, 3]),
        ("a.b.#", [2]),
        ("a.b.1.c", [3]),
        ("a.*", [[{"c": 1}, {"c": 3}], None]),
        ("files.*bin.size", [5]),
        ("files.x*.size", [5, 6]),
        ("a.b.2.c", []),
        ("n.#", []),
        ("files.#", [3]),
    ],
)
def test_values_at_a_path(path, values):
    files = {"x/weight.bin": {"size": 5}, "x/model.json": {"size": 6}, "y": {"size": 7}}
    document = {"a": {"b": [{"c": 1}, {"c": 3}], "d": None}, "n": None, "files": files}
    assert list(checks.values_at(document, path.split("."))) == values


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("3 passed in 2.10s", {"passed": 3}),
        ("==== 1 failed, 12 passed, 2 skipped, 4 warnings in 75.00s (0:01:15) ====",
         {"failed": 1, "passed": 12, "skipped": 2}),
        ("no tests ran in 0.01s", None),
        ("finished in 3.00s", None),
    ],
)  # fmt: skip
def test_pytests_last_line(line, counts):
    assert checks.result_in(f"....\n{line}\n")[0] == (None if counts is None else {"tests": counts})
