"""What a command says and returns when it is stopped, or started where it can't work: one line and an exit code."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.common import cli, start, threads
from fastvlm.common.errors import UserError

ROOT = Path(__file__).parents[2]
PACKAGES = ("fastvlm", "quantization", "model_export", "benchmarks", "app_bridge")
STOP = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
# Python 3.11 makes a RuntimeError of whatever is raised in here
STOP_IN_A_CLASS = "class Name:\n    def __set_name__(self, *_):\n        os.kill(os.getpid(), signal.SIGINT)\n"
STOP_IN_A_CLASS = f"import os, signal\n{STOP_IN_A_CLASS}class Field:\n    name = Name()\n"


@pytest.fixture(autouse=True)
def handlers():
    """`run` sets them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def swallowed(*_):
    try:
        stopped()
    except KeyboardInterrupt:
        raise RuntimeError("a library's own words") from None


def told(*_):
    raise UserError("no such file")


@pytest.mark.parametrize("parser", [stopped, argparse.ArgumentParser], ids=["while it starts", "at work"])
@pytest.mark.parametrize("verb", [stopped, swallowed])
def test_a_kill_is_one_line(parser, verb, capsys, monkeypatch):
    def build():
        built = parser()
        built.set_defaults(run=verb)
        return built

    assert cli.run(build, []) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, _: argparse.Namespace(**self._defaults))
    assert cli.run(build, ["--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {"error": "interrupted", "exit_code": 130}


def test_a_kill_before_has_no_part_in_the_next(capsys):
    for verb, code, line in ((stopped, 130, "interrupted\n"), (told, 2, "error: no such file\n")):

        def build(verb=verb):
            built = argparse.ArgumentParser()
            built.set_defaults(run=verb)
            return built

        assert (cli.run(build, []), capsys.readouterr().err) == (code, line)


def started(
    *words: str, path: Path | None = None, before: Callable[[], None] | None = None, **options
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m words`, with the modules in `path` before all others."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts the tests in the background ignores it
        if before is not None:
            before()

    places = os.pathsep.join(str(place) for place in (path, ROOT) if place is not None)
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False, preexec_fn=prepare,
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
        **{"cwd": ROOT, **options},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_an_interrupted_import_is_one_line(package, tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text(STOP)
    assert started(package, "--help", path=tmp_path) == (130, "", "interrupted\n")


@pytest.mark.parametrize("module", [STOP, STOP_IN_A_CLASS], ids=["plain", "as another exception"])
def test_an_interrupted_import_of_a_verb_is_one_line(module, tmp_path):
    (tmp_path / "torch.py").write_text(module)
    code, out, err = started("fastvlm", "demo", "--count", "1", path=tmp_path)
    assert (code, out, err.splitlines()[-1]) == (130, "", "interrupted") and "Traceback" not in err


@pytest.mark.parametrize("package", PACKAGES)
def test_no_stdout_and_no_current_folder(package, tmp_path):
    code, _, err = started(package, "--help", before=lambda: os.close(1))
    assert (code, err) == (2, "error: stdout is closed: redirect it to a file, or to /dev/null\n")

    def leave() -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    code, out, err = started(package, "--help", before=leave, cwd=tmp_path)
    assert (code, out) == (2, "") and err.startswith("error: the current folder can't be used") and err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [("fastvlm", "doctor", "/"), ("quantization", "recipes"), ("fastvlm", "recipes", "--help")]
)
def test_a_reader_that_left_is_silence(words):
    def leave() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)

    code, _, err = started(*words, before=leave)
    assert code == 141 and not [word for word in ("reader", "pipe", "Traceback", "Exception") if word in err]


def test_no_stderr_keeps_stdout_a_document():
    code, out, _ = started("benchmarks", "estimate", "--list", "--json", before=lambda: os.close(2))
    assert code == 0 and out.startswith('{"devices"') and out.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_that_wait_hardly_spin_unless_the_user_says_so(given, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(threads, "_QUOTA", "/no container")
    start.begin()
    assert os.environ == expected
