"""What is wrong, in the five parts that every message of the project has."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`error`: the app will not work) or doubtful (`warning`: it may not).

    rule: a stable name in kebab-case, one for each kind of fault. where: a file, and the key or tensor in it.
    """

    rule: str
    where: str
    got: str
    expected: str
    remedy: str
    severity: Literal["error", "warning"] = "error"

    def line(self) -> str:
        """All of it in one line."""
        return f"{self.rule}: {self.where}: got {self.got}, expected {self.expected}: {self.remedy}"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def errors(found: Iterable[Finding]) -> list[Finding]:
    """Those that keep the app from working."""
    return [finding for finding in found if finding.severity == "error"]


def show(found: Iterable[Finding], say: Callable[[str], None] = print) -> None:
    """Say each over three lines."""
    for finding in found:
        say(f"{finding.severity}: {finding.rule}: {finding.where}")
        say(f"    got {finding.got}, expected {finding.expected}")
        say(f"    {finding.remedy}")


def count(found: Sequence[Finding]) -> str:
    """ "1 error, 0 warnings"."""
    of = {"error": len(errors(found)), "warning": len(found) - len(errors(found))}
    return ", ".join(f"{number} {what}{'s' * (number != 1)}" for what, number in of.items())
