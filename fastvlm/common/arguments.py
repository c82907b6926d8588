"""The parser of every verb's command line: it reports all faults at once, and names the nearest known word.

Flags take argparse types that check one value: `whole_number`, `number`, `positive`, `share`, `size`, `Path` for a path
that is read and `files.Output` for one that is written. `Parser.check` adds a check of several flags together.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastvlm.common.errors import UserError
from fastvlm.common.files import flag_faults, some_path
from fastvlm.common.units import SIZE_UNITS

# What people type who come from other tools, in a verb that has no flag of that name.
ALIASES = {
    "--checkpoint": ("--model-path", "--hf-path"),  # Apple's predict.py; mlx_lm.convert
    "--model-path": ("--checkpoint", "--model"),
    "--image-file": ("--image", "--images"),  # mlx_vlm.generate
    "--max-new-tokens": ("--max-tokens",),  # mlx_lm.generate
    "--output-dir": ("--mlx-path", "-o"),  # mlx_lm.convert
    "--prompt": ("-p",),
    "--quant": ("-q", "--recipe"),
    "--recipe": ("--quant", "-q"),
    "--candidate": ("--model",),
    "--reference": ("--checkpoint",),
    "--resolution": ("--resolutions",),
    "--resolutions": ("--resolution",),
    "--temperature": ("--temp",),  # mlx_lm.generate
}
# Flags of some verbs that people give to others, too: what such a one says.
ELSEWHERE = {
    "--adapter": "not here: it goes with a checkpoint (export, predict, sweep, the --reference of parity and evaluate),"
    " and an artefact that was exported with it has it inside",
}
_UNITS = {unit.lower(): factor for unit, factor in SIZE_UNITS.items()}
_SIZE = re.compile(rf"(\d{{1,9}}(?:\.\d{{1,9}})?) ?({'|'.join(_UNITS)})", re.IGNORECASE)
# argparse's words for missing arguments
_REQUIRED = re.compile(
    r"the following arguments are required: (?P<all>.+)|one of the arguments (?P<one>.+) is required"
)
_REFUSED = object()  # stands for a value that a type refused
Check = Callable[[argparse.Namespace], Iterable[str]]


def nonempty(text: str) -> str:
    """The type of a text of which something has to be there, and of every flag that says no type."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def whole_number(least: int | None = 1, multiple: int = 1, most: int | None = None) -> Callable[[str], int]:
    """The type of a whole number from `least` to `most` that is a multiple of `multiple`."""
    expected = f"a whole number{_span(least, most)}" + (f", a multiple of {multiple}" if multiple > 1 else "")

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value % multiple or not _within(value, least, most):
            raise argparse.ArgumentTypeError(f"got {text}, expected {expected}")
        return value

    return convert


def number(least: float | None = None, most: float | None = None) -> Callable[[str], float]:
    """The type of a finite number from `least` to `most`."""

    def convert(text: str) -> float:
        value = _finite(text)
        if value is None or not _within(value, least, most):
            raise argparse.ArgumentTypeError(f"got {text}, expected a number{_span(least, most)}")
        return value

    return convert


def positive(text: str) -> float:
    """The type of a finite number above 0."""
    value = _finite(text)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")
    return value


def share(text: str) -> float:
    """The type of a share, written as 0.99 or 99%; returns it from 0 to 1."""
    digits, percent, rest = text.partition("%")
    value = _finite(digits)
    if rest or value is None or not 0 <= value <= (100 if percent else 1):
        raise argparse.ArgumentTypeError(f"got {text}, expected a share from 0 to 1, such as 0.99 or 99%")
    return value / 100 if percent else value


def size(text: str) -> int:
    """The type of a size, written as 500MB, 1.2GB or 3072MiB; returns bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"got {text}, expected a size such as 500MB or 1.2GB")
    return round(float(match[1]) * _UNITS[match[2].lower()])


def nearest(word: str, words: Iterable[str]) -> str:
    """ ", did you mean WORD?" for a known word that is close to this one, else nothing."""
    close = get_close_matches(word.lower(), list(words), 1, 0.7)
    return f", did you mean {close[0]}?" if close else ""


class _Store(argparse.Action):
    """argparse's own "store"; but a flag that takes several values and is given again gets more of them."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = parser.given.get(self.dest)
        if before not in (None, self):
            raise argparse.ArgumentError(None, f"{self.metavar}: given twice, by its flag and without")
        if isinstance(values, list) and option_string and before:
            values = [*getattr(namespace, self.dest), *values]
        parser.given[self.dest] = self
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises one UserError with every fault of a command line and the name of its help.

    Values of `choices` are matched without regard to case. Nothing is abbreviated, since that would change meaning
    when a flag is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.register("type", None, nonempty)
        self.register("type", str, nonempty)
        self.register("type", Path, some_path)
        self.register("type", int, whole_number(None))
        self.register("type", float, number())
        self.register("action", None, _Store)
        self.register("action", "store", _Store)
        self.given: dict[str, argparse.Action] = {}
        self._checks: list[Check] = []
        self._places: list[tuple[str, str, bool]] = []
        self._faults: list[str] = []
        self._broken = False

    def add_place(self, flag: str, *, metavar: str, help: str, required: bool = True, type: Any = Path) -> None:
        """Add a path or name that may be given as `flag VALUE` or as the positional argument."""
        dest = flag.lstrip("-").replace("-", "_")
        self.add_argument(flag, type=type, metavar=metavar, help=argparse.SUPPRESS)
        self.add_argument(dest, nargs="?", type=type, default=argparse.SUPPRESS, metavar=metavar, help=help)
        self._places.append((flag, metavar, required))

    def check(self, check: Check) -> None:
        """Add a check of flags that belong together: it yields a fault each."""
        self._checks.append(check)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._faults, self._broken, self.given = [], False, {}
        for flag, aliases in ALIASES.items():
            if action := self._option_string_actions.get(flag):
                for alias in aliases:
                    self._option_string_actions.setdefault(alias, action)
        parsed, rest = super().parse_known_args(self._without_elsewheres(args), namespace)
        if not self._broken:
            self._faults += [f"{word}: unknown{self._meant(word)}" for word in rest]
        self._faults += [
            f"{metavar}: is missing"
            for flag, metavar, required in self._places
            if required
            and _absent(parsed, flag)
            and not any(fault.startswith((f"{metavar}: ", f"{flag}: ")) for fault in self._faults)
        ]
        self._faults += flag_faults(self, parsed)
        if not self._faults:
            self._faults += [fault for check in self._checks for fault in check(parsed)]
        if self._faults:
            raise UserError(f"{'; '.join(dict.fromkeys(self._faults))} (see `{self.prog} --help`)")
        return parsed, []

    def _without_elsewheres(self, given: Any) -> list[str]:
        """The words without a flag that belongs to other verbs, and its value, which would be taken for another's."""
        words = list(sys.argv[1:] if given is None else given)
        for flag in ELSEWHERE if self._subparsers is None else ():
            if flag in words and flag not in self._option_string_actions:
                del words[words.index(flag) : words.index(flag) + 2]
                self._faults.append(f"{flag}: {ELSEWHERE[flag]}")
        return words

    def error(self, message: str) -> Any:
        """Note the fault: argparse goes on, or returns to `parse_known_args`."""
        if absent := _REQUIRED.fullmatch(message):
            names = absent["all"].split(", ") if absent["all"] else [absent["one"].replace(" ", " or ")]
            self._faults += [f"{name}: is missing" for name in names]
        else:
            self._broken = True
            self._faults.append(message.removeprefix("argument "))

    def _meant(self, word: str) -> str:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        return nearest(word.partition("=")[0], flags) if word.startswith("-") else ""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if not arg_strings and action.default is argparse.SUPPRESS and not action.option_strings:
            return argparse.SUPPRESS  # argparse would make a Path of it
        values = super()._get_values(action, arg_strings)  # type: ignore[misc]
        refused = _REFUSED in values if isinstance(values, list) else values is _REFUSED
        return argparse.SUPPRESS if refused else values  # which argparse doesn't store

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if isinstance(action, argparse._SubParsersAction):  # all words behind the verb, which are its own
            return arg_string
        lowered = arg_string.lower()
        if action.choices is not None and arg_string not in action.choices and lowered in action.choices:
            arg_string = lowered
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            self._faults.append(str(error).removeprefix("argument "))
        except UserError as error:
            self._faults.append(f"{'/'.join(action.option_strings) or action.metavar}: {error}")
        return _REFUSED

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value is _REFUSED or value in action.choices:
            return
        words = [str(choice) for choice in action.choices]
        known, meant = ", ".join(words), nearest(str(value), words)
        if isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(None, f"{value}: unknown verb{meant or f', expected one of {known}'}")
        name = "/".join(action.option_strings) or action.metavar
        self._faults.append(f"{name}: got {value}, expected one of {known}{meant}")


def _absent(parsed: argparse.Namespace, flag: str) -> bool:
    return getattr(parsed, flag.lstrip("-").replace("-", "_"), None) is None


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _within(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _span(least: float | None, most: float | None) -> str:
    return "".join(f" {word} {end:g}" for word, end in (("from", least), ("to", most)) if end is not None)
