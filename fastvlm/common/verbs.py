"""The verbs of all command lines as one table, verbs.json: a verb's module is imported when the verb is called."""

import argparse
import importlib
import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.common.arguments import Parser
from fastvlm.common.cli import add_common
from fastvlm.common.version import VERSION

_COLUMN = 22  # where the text beside a verb begins in the help


@dataclass(frozen=True)
class Verb:
    """A verb: `target` is "module:function"; the function adds the verb, its flags and what runs it to the subparsers
    that it is given."""

    name: str
    target: str
    help: str
    group: str
    front: str = ""  # its name behind the command `fastvlm`, where that differs

    def parser(self, prog: str) -> Parser:
        """Import the verb's module and return its parser."""
        module, _, function = self.target.partition(":")
        made = _Subparsers(prog)
        getattr(importlib.import_module(module), function)(made)
        add_common(made.parsers[self.name])
        return made.parsers[self.name]


class _Subparsers:
    """Stands for argparse's subparsers before a function that adds verbs to them."""

    def __init__(self, prog: str) -> None:
        self.parsers: dict[str, Parser] = {}
        self._prog = prog

    def add_parser(self, name: str, **options: Any) -> Parser:
        self.parsers[name] = Parser(prog=self._prog, **options)
        return self.parsers[name]


class _Parsers(Mapping[str, Parser]):
    """The parsers of verbs by name, each made when it is asked for."""

    def __init__(self, prog: str, verbs: Mapping[str, Verb]) -> None:
        self._prog, self._verbs, self._made = prog, verbs, dict[str, Parser]()

    def __getitem__(self, name: str) -> Parser:
        if name not in self._made:
            self._made[name] = self._verbs[name].parser(f"{self._prog} {name}")
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._verbs)

    def __len__(self) -> int:
        return len(self._verbs)

    def __contains__(self, name: object) -> bool:
        return name in self._verbs


class CommandLine(Parser):
    """The parser of a command whose verbs are `verbs`, by name."""

    def __init__(self, prog: str, description: str, verbs: Mapping[str, Verb]) -> None:
        super().__init__(prog=prog, description=description, usage=f"{prog} VERB [--help] ...")
        self._verbs = verbs
        self.add_argument("--version", action="version", version=f"{prog.split()[-1]} {VERSION}")
        action: Any = self.add_subparsers(dest="verb", required=True, metavar="VERB")
        action._name_parser_map = action.choices = _Parsers(prog, verbs)

    def format_help(self) -> str:
        """The verbs under the headings of their groups, each with its line."""
        width = max(min(shutil.get_terminal_size((100, 24)).columns, 100), 2 * _COLUMN)
        lines = [f"usage: {self.usage}", "", *textwrap.wrap(str(self.description), min(width, 80))]
        for group in dict.fromkeys(verb.group for verb in self._verbs.values()):
            lines += ["", f"{group}:"]
            for name, verb in self._verbs.items():
                if verb.group == group:
                    first, *more = textwrap.wrap(verb.help, width - _COLUMN)
                    lines += [f"  {name:<{_COLUMN - 2}}{first}", *(" " * _COLUMN + line for line in more)]
        last = f"`{self.prog} VERB --help` names a verb's flags; --version prints the version."
        return "\n".join([*lines, "", *textwrap.wrap(last, width), ""])


def table() -> dict[str, Any]:
    """verbs.json: by room, what it is about and its verbs, in the order of the help."""
    rooms: dict[str, Any] = json.loads(Path(__file__).with_name("verbs.json").read_text(encoding="utf-8"))
    return {name: entry | {"verbs": [Verb(**verb) for verb in entry["verbs"]]} for name, entry in rooms.items()}


def room(name: str) -> argparse.ArgumentParser:
    """The command line of one room, `python -m ROOM`."""
    own = table()[name]
    return CommandLine(f"python -m {name}", own["about"], {verb.name: verb for verb in own["verbs"]})


def front(prog: str) -> argparse.ArgumentParser:
    """The command line of all rooms."""
    return CommandLine(prog, table()["fastvlm"]["about"], verbs())


def verbs() -> dict[str, Verb]:
    """The verbs of all rooms by their names behind the command `fastvlm`."""
    return {verb.front or verb.name: verb for entry in table().values() for verb in entry["verbs"]}
