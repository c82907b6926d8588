"""The parser of every verb's command line: it reports all faults at once, and names the nearest known word.

Flags take argparse types that check one value: `Whole`, `Number`, `share`, `size`, `Path` for what is read and
`files.Output` for what is written. `Parser.check` adds a check that looks at several flags together.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastvlm.common.errors import UserError
from fastvlm.common.files import flag_faults, some_path

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
    "--resolution": ("--resolutions",),
    "--resolutions": ("--resolution",),
    "--temperature": ("--temp",),  # mlx_lm.generate
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(kB|MB|GB)", re.IGNORECASE)
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
Check = Callable[[argparse.Namespace], Iterable[str]]


@dataclass(frozen=True)
class Whole:
    """The type of a whole number from `least` to `most` that `multiple` divides."""

    least: int | None = None
    most: int | None = None
    multiple: int = 1

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise self._refused(text) from None
        low, high = self.least is not None and value < self.least, self.most is not None and value > self.most
        if low or high or value % self.multiple:
            raise self._refused(text)
        return value

    def _refused(self, text: str) -> argparse.ArgumentTypeError:
        kind = "a whole number" if self.multiple == 1 else f"a multiple of {self.multiple}"
        return argparse.ArgumentTypeError(f"got {text}, expected {kind}{_span(self.least, self.most)}")


@dataclass(frozen=True)
class Number:
    """The type of a finite number from `least` to `most`; with `above`, of one that is larger than that."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)
        if not math.isfinite(value) or low or (self.most is not None and value > self.most):
            above = "" if self.above is None else f" above {self.above:g}"
            raise argparse.ArgumentTypeError(
                f"got {text}, expected a number{above}{_span(self.least, self.most, 'and ' if above else '')}"
            )
        return value


def share(text: str) -> float:
    """The type of a share, written as 0.99 or 99%; returns it from 0 to 1."""
    number, _, rest = text.partition("%")
    try:
        value = float(number) / (100 if "%" in text else 1)
    except ValueError:
        value = math.nan
    if rest or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a share from 0 to 1, such as 0.99 or 99%")
    return value


def size(text: str) -> int:
    """The type of a size, written as 500MB or 1.2GB (decimal units); returns bytes."""
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
        if isinstance(values, list) and option_string and self.dest in parser.given:
            values = [*getattr(namespace, self.dest), *values]
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises one UserError with every fault of a command line and the name of its help.

    Values of `choices` are matched without regard to case. Nothing is abbreviated, since that would change meaning
    when a flag is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.register("type", Path, some_path)
        self.register("type", int, Whole())
        self.register("type", float, Number())
        self.register("action", None, _Store)
        self.register("action", "store", _Store)
        self.given: set[str] = set()
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
        self._faults, self._broken, self.given = [], False, set()
        for flag, aliases in ALIASES.items():
            if action := self._option_string_actions.get(flag):
                for alias in aliases:
                    self._option_string_actions.setdefault(alias, action)
        parsed, rest = super().parse_known_args(args, namespace)
        if not self._broken:
            self._faults += [f"{word}: unknown{self._meant(word)}" for word in rest]
        self._faults += [
            f"{metavar}: is missing" for flag, metavar, required in self._places if required and _absent(parsed, flag)
        ]
        self._faults += flag_faults(self, parsed)
        if not self._faults:
            self._faults += [fault for check in self._checks for fault in check(parsed)]
        if self._faults:
            raise UserError(f"{'; '.join(dict.fromkeys(self._faults))} (see `{self.prog} --help`)")
        return parsed, []

    def error(self, message: str) -> Any:
        """Note the fault: argparse goes on, or returns to `parse_known_args`."""
        self._broken = self._broken or not message.startswith("the following arguments are required")
        self._faults.append(message.removeprefix("argument "))

    def _meant(self, word: str) -> str:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        return nearest(word.partition("=")[0], flags) if word.startswith("-") else ""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        try:
            return super()._get_values(action, arg_strings)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            if isinstance(action, argparse._SubParsersAction):
                raise
            self._faults.append(str(error).removeprefix("argument "))
            return argparse.SUPPRESS  # which argparse doesn't store

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        lowered = arg_string.lower()
        if action.choices is not None and arg_string not in action.choices and lowered in action.choices:
            arg_string = lowered
        return super()._get_value(action, arg_string)  # type: ignore[misc]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        words = [str(choice) for choice in action.choices]
        known, meant = ", ".join(words), nearest(str(value), words)
        if isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(None, f"{value}: unknown verb{meant or f', expected one of {known}'}")
        raise argparse.ArgumentError(action, f"got {value}, expected one of {known}{meant}")


def _absent(parsed: argparse.Namespace, flag: str) -> bool:
    return getattr(parsed, flag.lstrip("-").replace("-", "_"), None) is None


def _span(least: float | None, most: float | None, joint: str = "") -> str:
    if least is not None:
        return f" from {least:g} to {most:g}" if most is not None else f" of {least:g} or more"
    return f" {joint}of {most:g} at most" if most is not None else ""
