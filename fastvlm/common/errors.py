"""The two ways a command ends badly; `fastvlm.common.cli.run` turns them into exit codes."""

from typing import Any


class UserError(Exception):
    """Unusable input: one line saying what failed, where, got, expected, what to do (exit 2).

    Args:
        message: that line.
        document: what `--json` prints beside the line, such as the report of a checkpoint with faults.
    """

    def __init__(self, message: object = "", document: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.document = document


class CheckFailed(Exception):
    """A check ran and failed: one line saying which (exit 1)."""
