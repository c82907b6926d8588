"""The child process of `chat_template`: render one template, which is a program of somebody else, within limits.

Imports the standard library and Jinja2 only. On stdin comes {"template", "messages", "tokens"}; {"text"} or {"fault"}
is printed. Arguments: seconds of processor time, bytes of memory, characters of text.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any


def _render(task: Mapping[str, Any], longest: int) -> dict[str, str]:
    """In the child: {"text"} or {"fault"}. The environment is that of Transformers' `apply_chat_template`."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an answer in training and changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    given = {"messages": task["messages"], "tools": None, "documents": None, "add_generation_prompt": True}
    try:
        text = ""
        for piece in environment.from_string(task["template"]).generate(**given, **task["tokens"]):
            text += piece
            if len(text) > longest:
                return {"fault": f"more than {longest} characters for one short question"}
        return {"text": text}
    except MemoryError:
        return {"fault": "it needs too much memory"}
    except Exception as error:  # a template is a program: it may fail in any way
        return {"fault": f"{type(error).__name__}: {error}"}


def _main() -> None:
    import resource

    seconds, memory, longest = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS knows the limit and doesn't keep it
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print(json.dumps(_render(json.loads(sys.stdin.buffer.read()), longest)))


if __name__ == "__main__":
    _main()
