"""Tables of checks: commands as JSON data, what each needs, what its result must hold, and the figures in it.

`mac-report` and the benchmarks with bars run such tables.
"""

import itertools
import json
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_PYTEST = re.compile(r"((?:\d+ \w+(?:, )?)+) in [\d.]+s(?: \([\d:]+\))?")  # its last line


@dataclass(frozen=True)
class Check:
    """A row of a table.

    Attributes:
        command: has places in braces; it is not run where what it `makes` is there.
        turns: instead, commands by name that write `{work}/turn`, run in turns, `rounds` times each.
        steps: instead, what a person does.
        needs: what it can't do without.
        after: the checks that make what it reads.
        may_fail: whether exit code 1, a check of the command's own that failed, is a result like 0.
        seconds: when it is stopped.
        require: [path, operator, value] in the command's JSON document.
        figures: `mac-report`: [label, path, unit]; a benchmark: [key, label, amount, unit, sense, bar], the last three
            where there are any.
    """

    name: str
    part: str
    title: str
    establishes: str = ""
    passes: str = ""
    command: str = ""
    turns: Mapping[str, str] = field(default_factory=dict)
    rounds: int = 1
    steps: Sequence[str] = ()
    needs: Sequence[str] = ()
    after: Sequence[str] = ()
    makes: str = ""
    may_fail: bool = False
    seconds: float = 900
    require: Sequence[tuple[str, str, Any]] = ()
    figures: Sequence[Sequence[Any]] = ()


def load(table: Path) -> list[Check]:
    """The checks in order; a row with `each` stands for one with each combination of its places' values. TypeError or
    ValueError for a fault in the table: a mistake of ours."""
    checks = []
    for row in json.loads(table.read_text(encoding="utf-8")):
        each = row.pop("each", {})
        for values in itertools.product(*each.values()):
            text = json.dumps(row)
            for place, value in zip(each, values, strict=True):
                text = text.replace(f"{{{place}}}", value)
            checks.append(Check(**json.loads(text)))
    names = [check.name for check in checks]
    for number, check in enumerate(checks):
        if names.count(check.name) > 1 or not {*check.after} <= {*names[:number]}:
            raise ValueError(f"{check.name}: its name is another's, or of {check.after} one does not come before it")
        if bool(check.command) + bool(check.turns) + bool(check.steps) != 1:
            raise ValueError(f"{check.name}: either a command, turns or steps")
    return checks


def chosen(checks: Sequence[Check], names: Collection[str]) -> list[Check]:
    """The named checks, and those that make what they read."""
    wanted = set(names)
    for check in reversed(checks):
        wanted |= {*check.after} if check.name in wanted else set()
    return [check for check in checks if check.name in wanted]


def filled(text: str, places: Mapping[str, str]) -> str:
    """The text with what stands for its places."""
    return re.sub(r"{(\w+)}", lambda match: places[match[1]], text)


def words(command: str, places: Mapping[str, str]) -> list[str]:
    """A command, word by word; `python` is this one."""
    first, *rest = (filled(word, places) for word in shlex.split(command))
    return [sys.executable if first == "python" else first, *rest]


def is_made(check: Check, places: Mapping[str, str]) -> bool:
    """Whether what the check makes is there already."""
    return bool(check.makes) and Path(filled(check.makes, places)).exists()


def result_in(stdout: str) -> tuple[dict[str, Any] | None, str]:
    """The last line that is a JSON object (Core ML's compiler may print behind it), and the rest; of pytest, its
    counts as {"tests": {outcome: count}}."""
    lines = stdout.splitlines()
    for number in reversed(range(len(lines))):
        if lines[number].startswith("{"):
            with suppress(ValueError, RecursionError):
                document: dict[str, Any] = json.loads(lines[number])
                return document, "\n".join([*lines[:number], *lines[number + 1 :]])
        if counted := _PYTEST.fullmatch(lines[number].strip(" =")):
            counts = {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", counted[1])}
            return {"tests": {word: count for word, count in counts.items() if not word.startswith("warning")}}, stdout
    return None, stdout


def values_at(document: Any, path: Sequence[str]) -> Iterator[Any]:
    """The values at a path in a document: keys of an object, where `*` stands for any letters, or the numbers of a
    list's items, where it stands for all of them; `#` is how many there are."""
    if not path:
        yield document
    elif path[0] == "#" and isinstance(document, (dict, list)):
        yield len(document)
    elif isinstance(document, (dict, list)):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            if fnmatchcase(str(key), path[0]):
                yield from values_at(value, path[1:])
