"""A check's process, and how what it did is judged."""

import sys
from typing import Any

import pytest

from benchmarks.checks import Check
from benchmarks.mac import check as mac_check
from benchmarks.mac.check import Outcome
from fastvlm.common.children import Finished

JSON = "print('{\"passed\": true}', flush=True)"


def check(*require: Any) -> Check:
    return Check("one", "p", "t", command="python -m x", require=require)


def test_a_comparison_is_judged() -> None:
    document = {"a": {"b": [{"c": 1, "t": "MLX GPU"}, {"c": 3, "t": "MLX CPU"}]}, "n": None}

    def fault(*required: Any) -> str | None:
        return mac_check.judge(check(*required), Outcome(Finished(0, 1.0, 0, ""), document))

    assert fault(["a.b.*.c", ">=", 1], ["a.b.*.c", "<=", 3], ["a.b.#", "is", 2], ["x.*.y", "absent", ""]) is None
    assert fault(["a.b.*.t", "contains", "GPU"]) == "a.b.*.t: got MLX GPU, MLX CPU, expected contains GPU"
    assert fault(["a.b.*.c", ">=", 2]) == "a.b.*.c: got 1, 3, expected >= 2"
    assert fault(["a.b.*.missing", ">=", 0]) == "a.b.*.missing: got nothing, expected >= 0"
    assert fault(["n", "<=", 5]) and fault(["n.#", "<=", 5]) and fault(["a.b.*.c", "absent", ""])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (JSON, None),
        (f"{JSON}; print('coremlcompiler says something behind it')", None),
        ("print('{\"passed\": false}'); raise SystemExit(1)", "passed: got False, expected True"),
        (f"{JSON}; raise SystemExit(3)", "ended with exit code 3"),
        ("import sys; sys.exit('error: no such device')", "ended with exit code 1: error: no such device"),
        (f"import os; {JSON}; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("import os, sys; print('libc++abi: x', file=sys.stderr, flush=True); os.abort()", "SIGABRT: libc++abi: x"),
        (f"import time; {JSON}; time.sleep(600)", "was stopped after"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)) * 9)", "ended well, but printed no JSON document"),
        ("print('[1]'); print('{' * 100000)", "ended well, but printed no JSON document"),
        ("print('{\"passed\": NaN}')", "passed: got None, expected True"),
    ],
)
def test_whatever_a_process_does_is_an_outcome(code: str, reason: str | None) -> None:
    outcome = mac_check.run([sys.executable, "-S", "-c", code], 2 if "sleep" in code else 60)
    fault = mac_check.judge(check(["passed", "is", True]), outcome)
    assert fault is None if reason is None else reason in str(fault)


def test_ends_of_what_it_printed_are_kept() -> None:
    code = f"import sys; print('x' * 9999, '\\x1b[31mred'); {JSON}; sys.stderr.write('1 %\\r2 %\\nerror: last\\n')"
    outcome = mac_check.run([sys.executable, "-S", "-c", code], 60)
    assert outcome.document == {"passed": True} and outcome.stderr == "2 %\nerror: last"
    assert len(outcome.stdout) == 4000 and outcome.stdout.endswith("x red")


def test_a_command_that_is_not_there() -> None:
    assert "no such program" in str(mac_check.judge(check(), mac_check.run(["/no/such/program"], 1)))
