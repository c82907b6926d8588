"""The artefact's tokenizer files: where an answer ends."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.checkpoint.checkpoint import open_checkpoint
from model_export.language.tokenizer import write_tokenizer

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("named", "template", "end"),
    [
        ("<|endoftext|>", None, "<|im_end|>"),  # as in Qwen2's base models
        ("<|im_end|>", None, "<|im_end|>"),
        ("<|endoftext|>", PLAIN, "<|endoftext|>"),
    ],
)
def test_a_turn_ends_where_the_template_ends_it(
    make_checkpoint: Callable[..., Path], tmp_path: Path, named: str, template: str | None, end: str
) -> None:
    folder = Path(shutil.copytree(make_checkpoint(layout="llava_qwen2"), tmp_path / "checkpoint"))
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text()) | {"eos_token": named}
    if template is not None:
        document["chat_template"] = template
    path.write_text(json.dumps(document))
    write_tokenizer(open_checkpoint(folder), tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["eos_token"] == end and (template is None or written["chat_template"] == template)
