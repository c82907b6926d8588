"""Render a chat template, which is a program that came with a checkpoint: in a child process with limits.

The sandbox of Jinja2 keeps a template from everything but time and memory: two nested loops over 100,000 numbers are
allowed.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlm.common import children
from fastvlm.common.errors import CheckFailed, UserError

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
        command = [sys.executable, "-I", str(Path(__file__).with_name("template_child.py")), *limits]
        done = children.run(command, stdin=json.dumps(task).encode(), timeout=WALL_SECONDS)
        answer = done.document(f"it did not end well within {CPU_SECONDS} s of processor time: its process")
    except (UserError, CheckFailed) as error:
        raise TemplateFault(" ".join(str(error).split())[-_FAULT:]) from None
    if "fault" in answer:
        raise TemplateFault(" ".join(answer["fault"].split())[:_FAULT])
    return str(answer["text"])
