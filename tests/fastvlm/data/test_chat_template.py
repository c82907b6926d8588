"""A chat template gives the text that Transformers gives, or a fault within its limits of time and memory."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.checkpoint.doctor import diagnose
from fastvlm.data import chat_template
from fastvlm.data.chat_template import TemplateFault, render
from fastvlm.data.prompt import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": "What is <this> & “that”?"}]
TEMPLATES = [
    CHAT_TEMPLATE,
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}",
    "{{ bos_token }}{{ eos_token }}{{ messages | tojson }}{{ tools is none }}\n  {% if true %}\nx\n{% endif %}",
    "{% set ns = namespace(a='') %}{% for m in messages %}{% set ns.a = m.role %}{% endfor %}{{ ns.a | upper }}",
]
HOSTILE = {
    "nested ranges": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not end"),
    "too much text": ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "characters"),
    "memory": ("{% set a = 'x' * 99999999999 %}{{ a }}", "memory"),
    "memory in steps": (
        "{% set n = namespace(a='xxxxxxxx') %}{% for a in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "memory"
    ),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "refusal": ("{{ raise_exception('no\nroles') }}", "TemplateError: no roles"),
    "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "surrogate": ("{{ '\ud800' }}\ud800{{ 1 / 0 }}", "ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_same_text_as_transformers(tiny_llava: Path, template: str) -> None:
    tokenizer: Any = open_checkpoint(tiny_llava).tokenizer()
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert expected and render(template, MESSAGES, tokenizer.special_tokens_map) == expected
    assert render({"default": template, "other": "x"}, MESSAGES, tokenizer.special_tokens_map) == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, words = HOSTILE[name]
    # The endless one is to be short; on a busy machine the others take longer to come to their own limit.
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1 if words == "did not end" else 60)
    with pytest.raises(TemplateFault) as error:
        render(template, MESSAGES, {})
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


def test_doctor_names_a_template_that_never_ends(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    folder = shutil.copytree(tiny_llava, tmp_path / "given")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": HOSTILE["nested ranges"][0]}))
    (fault,) = diagnose(folder).faults
    assert fault.rule == "chat-template-fails" and "it did not end" in fault.got
