"""Runs of a suite whose steps are not processes."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suites import export, quantization, quantization_sweep, suite
from fastvlm.common.children import Finished


class Found(defaultdict):
    """What a step is taken to have returned: 1.0 under every name, at every depth that is asked for."""

    def __init__(self) -> None:
        super().__init__(lambda: 1.0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that sections run; each ends well and leaves its target: ours in 1 s, the peers' in 4."""
    commands: list[list[str]] = []

    def run_step(description: str, command: list[str], check: bool = True) -> Finished:
        commands.append(command)
        for flag in ("--output-dir", "--mlx-path"):
            if flag in command:
                Path(command[command.index(flag) + 1], "x.mlpackage").mkdir(parents=True)
        return Finished(0, 1.0 if "model_export" in command else 4.0, 2 * 10**9, "")

    def call(description: str, function: Any, *arguments: Any) -> Any:
        commands.append(["call", function.__name__])
        if function.__name__ == "answers":
            return {"same": Found(), "exact": {"reference": 1.0}}
        return [60.0, 120.0] if function.__name__ == "encoder_parity" else Found()

    for module in (export, quantization, quantization_sweep, suite):
        monkeypatch.setattr(module, "run_step", run_step)
        monkeypatch.setattr(module, "call", call)
    return commands


@pytest.fixture
def run(tmp_path: Path) -> suite.Run:
    (tmp_path / "work").mkdir()
    return suite.Run(tmp_path, tmp_path / "work")
