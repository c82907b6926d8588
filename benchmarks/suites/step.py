"""A function in a process of its own: `python -m benchmarks.suites.step MODULE:FUNCTION ARGUMENTS`, a JSON list.

The last line of stdout is {"result": what it returned}, as JSON.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvlm.common.cli import quiet_libraries


def command(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The command that calls a module's function; paths become text."""
    name = f"{function.__module__}:{function.__qualname__}"
    plain = [str(one) if isinstance(one, Path) else one for one in arguments]
    return [sys.executable, "-m", "benchmarks.suites.step", name, json.dumps(plain, default=str)]


def run(name: str, arguments: str) -> Any:
    """Call MODULE:FUNCTION with a JSON list of arguments."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(*json.loads(arguments))


if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps({"result": run(*sys.argv[1:])}))
