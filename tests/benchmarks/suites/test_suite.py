"""The benchmarks with bars: bars and the table, rows run in order or in turns, and every figure has its value."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import checks, environment
from benchmarks.quality.evaluate import LABELS
from benchmarks.suites import steps, suite
from fastvlm.common.children import Finished
from fastvlm.common.errors import CheckFailed

PLACES = {"demo": "/demo", "store": "/store", "FASTVLM_MLX_VLM_PYTHON": "/peer", "FASTVLM_CHECKPOINT": "/checkpoint"}
EXPORTED = {
    "parity": {
        "metrics": {name: {"value": value} for name, value in (
            ("greedy_answers", 1.0), ("encoder_snr", 50.0), ("prefill_snr", 50.0),
        )},
        "exact": {"reference": 1, "candidate": 1, "questions": 1},
    },
}  # fmt: skip
DOCUMENTS = {
    "all": EXPORTED,
    "coreai": EXPORTED,
    "float32_twin": {"embeddings": 130.0, "logits": 130.0},
    "beside": {"seconds": 1.0},
    "executor": {"plain": 4.0, "float32": 2.0, "typed": 3.0},
    "load": {"warm": 0.8, "cold": 1.5, "cpu": 1.2, "imports": 3.0, "mb": 246.0},
    "peak": {"ratio": 1.2, "peak": 0.9},
    "measure": {"float32": 0.9, "typed": 1.1, "rows": 48, "error": 1e-5, "snr": 40.0},
    "snr": {"picture": {"typed": 60.0, "float32": 120.0}},
    "schemes": {"different": 0, "compared": 9},
    "same_tensors": {"different": 0, "compared": 9},
    "gains": {
        "int8_agreement": 1.0, "recovered_prefill": 0.6, "recovered_answers": 0.6,
        "line": {"int3-mixed": 0.5, "mixed-4-8": 0.5, "fit:5bpw": 0.5},
    },
    "killed": {"differences": 0, "between": 3},
    "dask": {"differences": 0},
    "evaluate": {"candidates": [{"figures": dict.fromkeys(LABELS, 0.5)}] * 4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "bar", "passed", "shown"),
    [
        (0.69, ("<=", 0.7), True, 0.69),
        (0.71, ("<=", 0.7), False, 0.71),
        (49.9, (">=", 50), False, 49.9),
        (0.1, (), None, 0.1),
        (math.nan, (">=", 50), False, None),
        (math.nan, (), None, None),
        (9.9, ("<", 10), True, 9.9),
        (10.0, ("<", 10), False, 10.0),
        (-math.inf, ("<", 10), True, None),  # JSON has no infinity
        (1.00025, ("<=", 1), False, 1.00025),  # just beyond its bar it does not look as if on it
        (1.00025, ("<=", 2), True, 1.0),
    ],
)
def test_bars(value, bar, passed, shown):
    figure = suite.judge("a figure", value, "x", *bar)
    assert (figure["passed"], figure["value"]) == (passed, shown)


@pytest.mark.parametrize(
    ("amount", "value"),
    [
        ("one.seconds", 3),
        ("one.seconds / two.seconds", 0.75),
        ("one.seconds - two.seconds / two.seconds", -0.25),  # from left to right
        ("one.seconds | two.seconds", 3),
        ("one.a.*.n + two.seconds", 9),
        ("one.missing", None),
        ("one.null / two.seconds", None),
    ],
)
def test_amounts(amount, value):
    results = {"one": {"seconds": 3, "a": [{"n": 2}, {"n": 3}], "null": None}, "two": {"seconds": 4}}
    result = suite.amount_of(results, amount)
    assert math.isnan(result) if value is None else result == value


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> Callable[..., Any]:
    """`bench(*rows) -> the answer` of `bench-encoder --json` with these rows, each of part "p"."""
    monkeypatch.setattr(suite, "table", lambda name: tmp_path / "table.json")

    def run(*rows: dict[str, Any], json_too: bool = True) -> Any:
        (tmp_path / "table.json").write_text(json.dumps([{"part": "p", "title": "a row", **row} for row in rows]))
        words = ["bench-encoder", "--work-dir", tmp_path / "store", *(["--json"] if json_too else [])]
        return cli(*words)

    return run


def says(document: str, code: int = 0) -> str:
    return f"python -S -c 'print(\"{document}\"); raise SystemExit({code})'"


@pytest.mark.parametrize(("bound", "code"), [(0.5, 1), (3, 0)])
def test_a_missed_bar_is_exit_1(bench, bound, code):
    figures = [["x", "an x", "x.x", "", "<=", bound], ["none", "none", "x.y"], ["s", "time", "x.seconds", "s"]]
    row = {"name": "x", "command": says('{\\"x\\": 2}', 1), "may_fail": True, "figures": figures}
    done = bench(row)
    assert done.code == code and done.document["passed"] is (code == 0)
    figures = done.document["figures"]
    assert figures["x"]["value"] == 2 and figures["none"]["value"] is None and figures["s"]["value"] < 5
    printed = bench(row, json_too=False).out
    assert ("✗" if code else "✓") in printed and f"≤ {bound:g}" in printed and "not finite" in printed
    assert environment.describe()["cpu"] in printed


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"command": says("no", 1)}, "ended with exit code 1"),
        ({"command": says("no", 2), "may_fail": True}, "ended with exit code 2"),  # a usage error is no measurement
        ({"turns": {"x": says("no", 1)}}, "a row, x, round 1 of 1"),
    ],
)
def test_a_command_that_fails_ends_the_run(bench, row, said):
    done = bench({"name": "x", **row})
    assert done.code == 1 and said in done.document["error"]


def test_what_is_made_is_not_made_again_and_what_is_not_set_is_skipped(bench, tmp_path):
    made = {"name": "made", "makes": str(tmp_path / "table.json"), "command": "false"}
    peer = {"name": "peer", "needs": ["FASTVLM_NO_SUCH"], "command": "{FASTVLM_NO_SUCH}",
            "figures": [["x", "x", "peer.seconds", "s", "<=", 0]]}  # fmt: skip
    done = bench(made, peer)
    assert done.code == 0 and not done.document["figures"] and "FASTVLM_NO_SUCH is not set" in done.err


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run. Each ends well and writes its target; ours takes 1 s and 0.2 GB, the peers 4 s and
    1 GB; its document is that of its verb or step in DOCUMENTS."""
    commands: list[list[str]] = []

    def run(command: list[str], say: Any = None) -> Finished:
        commands.append(command)
        for flag in {"--output-dir", "--mlx-path"} & {*command}:
            Path(command[command.index(flag) + 1]).mkdir(parents=True)
        cost = (1.0, 2 * 10**8) if "model_export" in command else (4.0, 10**9)
        return Finished(0, *cost, json.dumps(DOCUMENTS.get(command[3].rpartition(":")[2], {})))

    monkeypatch.setattr(suite.children, "run", run)
    return commands


def test_the_order_is_reversed_every_other_round(ran, tmp_path):
    turns = {name: f"{name} -m x y --mlx-path {{work}}/turn" for name in "abc"}
    row = checks.Check("row", "p", "t", turns=turns, rounds=2, figures=[["x", "x", "row.a.seconds"]])
    assert suite.measure([row], {"work": str(tmp_path)})["x"]["value"] == 4
    assert [command[0] for command in ran] == list("abccba")


def test_every_figure_of_the_tables_has_its_value(ran, tmp_path):
    """`test_encoder_steps` runs encoder.json."""
    bars = {}
    for name in ("export", "quantization"):
        places = PLACES | {"work": str(tmp_path / name)}
        figures = suite.measure(checks.load(suite.table(name)), places)
        assert [key for key, figure in figures.items() if figure["value"] is None] == []
        missed = [key for key, figure in figures.items() if figure["passed"] is False]
        assert missed == (["text_remaining"] if name == "quantization" else [])
        bars[name] = sum(figure["bound"] is not None for figure in figures.values())
    assert bars == {"export": 27, "quantization": 27}
    assert sum(command[0] == "/peer" for command in ran) == 3


def test_processes_beside_end_with_the_step():
    before = set(psutil.Process().children())
    assert steps.beside("2", "-c", "pass")["seconds"] > 0
    with pytest.raises(CheckFailed, match="exit code 3"):
        steps.beside("2", "-c", "raise SystemExit(3)")
    assert set(psutil.Process().children()) == before


def test_a_step_is_called_in_a_process_of_its_own():
    command = [sys.executable, "-m", "benchmarks.suites.step", "builtins:dict", "one=1", "two=x=y"]
    assert json.loads(suite.children.run(command).stdout) == {"one": 1, "two": "x=y"}


def test_the_machine_is_told_alike_each_time():
    first = environment.describe()
    assert first == environment.describe() and {"torch", "coremltools", "numpy", "transformers"} <= {*first["packages"]}
    assert first["cores"] >= 1 and first["memory_gib"] > 0
