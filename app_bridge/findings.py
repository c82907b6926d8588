"""What is wrong, in the five parts that every message of the project has."""

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
