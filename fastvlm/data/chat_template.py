"""Render a chat template, which is a program that came with a checkpoint: in a child process with limits.

The sandbox of Jinja2 keeps a template from everything but time and memory: two nested loops over 100,000 numbers are
allowed. So this file also runs as a script that renders one template, and imports nothing of ours.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

CPU_SECONDS = 2  # a template takes 0.1
MEMORY = 1 << 30
LONGEST = 1 << 20  # characters
WALL_SECONDS = 120  # for a child that waits, on whatever busy machine
_FAULT = 200  # characters of a template's own message that are shown


class TemplateFault(ValueError):
    """A template that doesn't give text; the message is one line."""


def render(template: Any, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, Any]) -> str:
    """The prompt for `messages` with the turn of the answer begun, as Transformers' `apply_chat_template` gives it.

    `template` is text, or Transformers' templates by name, of which "default" counts. `special_tokens` are the
    tokenizer's by name (`bos_token`). Raises TemplateFault.
    """
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str):
        raise TemplateFault("no template by the name default")
    texts = {name: token for name, token in special_tokens.items() if isinstance(token, str)}
    task = {"template": template, "messages": list(messages), "tokens": texts}
    limits = [str(limit) for limit in (CPU_SECONDS, MEMORY, LONGEST)]
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__, *limits], input=json.dumps(task).encode(), capture_output=True,
            timeout=WALL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TemplateFault(f"it did not end within {WALL_SECONDS} s") from None
    if done.returncode < 0:
        raise TemplateFault(
            f"it did not end within {CPU_SECONDS} s of computing, or crashed (signal {-done.returncode})"
        )
    if done.returncode:
        raise TemplateFault(" ".join(done.stderr.decode(errors="replace").split())[-_FAULT:])
    answer = json.loads(done.stdout)
    if "fault" in answer:
        raise TemplateFault(" ".join(answer["fault"].split())[:_FAULT])
    return str(answer["text"])


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
