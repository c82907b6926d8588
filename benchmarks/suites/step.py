"""A function in a process of its own: `python -m benchmarks.suites.step MODULE:FUNCTION [WORD...] [NAME=VALUE...]`.

Words are text, values JSON where they are any. The last line of stdout is what the function returned, as JSON.
"""

import importlib
import json
import sys
from contextlib import suppress
from typing import Any

from fastvlm.common.cli import quiet_libraries


def run(target: str, *words: str) -> dict[str, Any]:
    """Call MODULE:FUNCTION; what isn't a dictionary is {"result": ...}."""
    module, _, function = target.partition(":")
    options: dict[str, Any] = {}
    positional = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name.isidentifier():
            options[name] = value
            with suppress(ValueError):
                options[name] = json.loads(value)
        else:
            positional.append(word)
    result = getattr(importlib.import_module(module), function)(*positional, **options)
    return result if isinstance(result, dict) else {"result": result}


if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps(run(*sys.argv[1:]), default=str))
