"""A check of `mac-report`: its command in a process of its own, and what that process did, judged.

Whatever the process does is a result: a crash, a time-out, garbage, an endless output.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from fastvlm.common.children import ROOT

_READ = 32 << 20  # bytes at the end of an output that are looked at
_TAIL = 4000  # characters of it that are kept
_GRACE = 10.0  # seconds between asking a process to end and ending it
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x00-\x08\x0b-\x1f\x7f]")
_PYTEST = re.compile(r"((?:\d+ \w+(?:, )?)+) in [\d.]+s(?: \([\d:]+\))?")  # its last line


@dataclass(frozen=True)
class Check:
    """A row of the table. `command` has places in braces, and is not run when what it `makes` is there; `needs` says
    what it can't do without; `after` names the check that makes what it reads; `require` is [path, operator, value],
    `figures` [label, path, unit] in the command's JSON document; `steps` are for a person, instead of a command."""

    name: str
    part: str
    title: str
    establishes: str
    needs: Sequence[str]
    passes: str
    command: str = ""
    seconds: float = 900
    after: str = ""
    makes: str = ""
    require: Sequence[tuple[str, str, Any]] = ()
    figures: Sequence[tuple[str, str, str]] = ()
    steps: Sequence[str] = ()


@dataclass(frozen=True)
class Done:
    """What a process did: wall time in s, how it ended in words (None: with exit code 0), the ends of what it printed,
    and the last JSON document (or pytest's counts) among it."""

    seconds: float
    ended: str | None
    stdout: str
    stderr: str
    document: dict[str, Any] | None


def run(words: Sequence[str], seconds: float) -> Done:
    """Run a command in a process group of its own, from the repository's root. Never raises for what it does."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start, ended = time.perf_counter(), None
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            return Done(0.0, f"the command did not start: {error.strerror}", "", "", None)
        try:
            code = process.wait(seconds)
            ended = f"ended with exit code {code}" if code > 0 else None
            if code < 0:
                ended = f"ended by signal {-code} ({signal.strsignal(-code)})"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:g} s"
        finally:
            _end(process)
        spent, (document, stdout), stderr = time.perf_counter() - start, _document(_read(out)), _read(err)
    return Done(spent, ended, stdout[-_TAIL:], stderr[-_TAIL:], document)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of the process group."""
    for number, grace in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)


def _read(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _READ))
    text = file.read().decode(errors="replace").replace("\r", "\n")  # progress bars draw over themselves
    return _CONTROL.sub("", text).strip()


def _document(stdout: str) -> tuple[dict[str, Any] | None, str]:
    """The last line that is a JSON object (Core ML's compiler may print behind it), and the rest. Of pytest, its
    counts."""
    lines = stdout.splitlines()
    for number in reversed(range(len(lines))):
        if lines[number].startswith("{"):
            with suppress(ValueError, RecursionError):
                found: dict[str, Any] = json.loads(lines[number], parse_constant=lambda name: None)  # NaN is no JSON
                return found, "\n".join([*lines[:number], *lines[number + 1 :]])
        if counted := _PYTEST.fullmatch(lines[number].strip(" =")):
            counts = {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", counted[1])}
            return {"tests": {word: count for word, count in counts.items() if not word.startswith("warning")}}, stdout
    return None, stdout


# Judging


def judge(check: Check, done: Done) -> str | None:
    """What is wrong with what the command did; None when it passed. A comparison that did not happen did not pass."""
    if done.ended is not None and (done.document is None or not done.ended.startswith("ended with exit code")):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return done.ended + (f": {said[-1].strip()[:300]}" if said else "")
    if done.document is None and check.require:
        return "ended well, but printed no JSON document"
    faults = []
    for path, operator, value in check.require:
        values = list(values_at(done.document, path.split(".")))
        if (not values) != (operator == "absent") or not all(_holds(one, operator, value) for one in values):
            shown = ", ".join(map(str, values)) if values else "nothing"
            expected = {"is": f"{value}", "absent": "none"}.get(operator, f"{operator} {value}")
            faults.append(f"{path}: got {shown[:200]}, expected {expected}")
    return "; ".join(faults) or done.ended


def _holds(found: Any, operator: str, value: Any) -> bool:
    if operator in ("<=", ">="):
        return isinstance(found, (int, float)) and (found <= value if operator == "<=" else found >= value)
    return {"is": found == value, "contains": str(value) in str(found), "absent": False}[operator]


def values_at(found: Any, path: Sequence[str]) -> Iterator[Any]:
    """What is at a path in a document; `*` is each of a list or an object, `#` how many there are."""
    if not path:
        yield found
    elif path[0] == "#" and isinstance(found, (dict, list)):
        yield len(found)
    elif path[0] == "*" and isinstance(found, (dict, list)):
        for one in found.values() if isinstance(found, dict) else found:
            yield from values_at(one, path[1:])
    elif isinstance(found, dict) and path[0] in found:
        yield from values_at(found[path[0]], path[1:])


def shown(document: Any, path: str, unit: str) -> str:
    """The values at a path for people; empty when there are none."""
    from benchmarks.parity.report import figure  # matplotlib comes with it

    values = [one for one in values_at(document, path.split(".")) if one is not None]
    pairs = [f"{key} {value}" for one in values if isinstance(one, dict) for key, value in one.items()]
    texts = [one for one in values if isinstance(one, str)]
    numbers = [figure(one, unit) for one in values if isinstance(one, (int, float))]
    return ", ".join([*pairs, *dict.fromkeys(texts), *numbers])
