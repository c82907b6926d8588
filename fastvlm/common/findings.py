"""A finding: one thing that is wrong or doubtful in what a command was given, in the parts that every message has."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

_LISTED = 20  # details on one line
_FAULTS = 10  # faults of a file that its error names; a long file may have thousands


@dataclass(frozen=True)
class Finding:
    """One fault (`error`: the input can't be used) or doubt (`warning`: it may not do what is expected of it).

    Args:
        rule: a stable code in kebab-case, one for each kind of finding.
        where: a file, and the key or tensor in it.
        got: what is there. expected: what should be, "" where `got` says it all. remedy: what to do, or "".
        details: the names that it concerns, where they are many.

    Texts may come from untrusted files: what a terminal would not print as it is, is escaped.
    """

    rule: str
    where: str
    got: str
    expected: str = ""
    remedy: str = ""
    severity: Literal["error", "warning"] = "error"
    details: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("where", "got", "expected", "remedy"):
            object.__setattr__(self, name, printable(getattr(self, name)))
        object.__setattr__(self, "details", tuple(map(printable, self.details)))

    @property
    def message(self) -> str:
        """The finding without its details: rule, where, got, expected, remedy."""
        expected = f", expected {self.expected}" if self.expected else ""
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.rule}: {self.where}: got {self.got}{expected}{remedy}"

    def line(self) -> str:
        """The finding on one line, with the first of its details."""
        if not self.details:
            return self.message
        more = f" and {len(self.details) - _LISTED} more" if len(self.details) > _LISTED else ""
        return f"{self.message}: {', '.join(self.details[:_LISTED])}{more}"

    __str__ = line

    def document(self) -> dict[str, Any]:
        """The finding as JSON-ready data; "details" only where there are any."""
        document = asdict(self) | {"details": list(self.details)}
        return document if self.details else {key: value for key, value in document.items() if key != "details"}


Value = TypeVar("Value")
# What reads something untrusted: yields what is wrong with it and returns what can be used all the same.
Steps = Generator[Finding, None, Value]


def collect(steps: Steps[Value]) -> tuple[Value, list[Finding]]:
    """The value that `steps` return, and every finding that they yield."""
    findings: list[Finding] = []
    while True:
        try:
            findings.append(next(steps))
        except StopIteration as end:
            return end.value, findings


def printable(text: str) -> str:
    """`text`, escaped where it holds what a terminal would not print."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def several(faults: Sequence[str]) -> str:
    """The faults of one file on one line: the first ten, and how many more there are."""
    more = f"; and {len(faults) - _FAULTS} more" if len(faults) > _FAULTS else ""
    return "; ".join(map(printable, faults[:_FAULTS])) + more


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """The findings of severity `error`."""
    return [finding for finding in findings if finding.severity == "error"]


def show(findings: Iterable[Finding], say: Callable[[str], None] = print) -> None:
    """Print each finding on three lines, and each of its details on one more."""
    for finding in findings:
        expected = f", expected {finding.expected}" if finding.expected else ""
        say(f"{finding.severity}: {finding.rule}: {finding.where}")
        say(f"    got {finding.got}{expected}")
        for text in (finding.remedy, *finding.details):
            if text:
                say(f"    {text}")


def count(findings: Sequence[Finding]) -> str:
    """How many there are of each severity: "1 error, 0 warnings"."""
    numbers = {"error": len(errors(findings)), "warning": len(findings) - len(errors(findings))}
    return ", ".join(f"{number} {name}{'s' * (number != 1)}" for name, number in numbers.items())
