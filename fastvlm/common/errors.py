"""The two ways a command ends badly; `fastvlm.common.cli.run` turns them into exit codes."""


class UserError(Exception):
    """Unusable input: one line saying what failed, where, got, expected, what to do (exit 2)."""


class CheckFailed(Exception):
    """A check ran and failed: one line saying which (exit 1)."""
