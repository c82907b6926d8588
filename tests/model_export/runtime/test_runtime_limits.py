"""An artefact's answers are finite or an error; its prompts are those that were meant, and keep to its positions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastvlm
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data.prompt import render_prompt
from model_export import contract, runtime, stored
from model_export.artefact import read_manifest, write_manifest

pytestmark = pytest.mark.slow

RUNNERS = ["--vision", "executor", "--compute", "as-typed"]
PROMPT = 32  # tokens of the prompt below, 4 of them for the picture


def configured(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / contract.CONFIG).read_text())
    (target / contract.CONFIG).write_text(json.dumps(config | changes))
    return target


@pytest.fixture
def generate(tmp_path: Path, cli: Any) -> Callable[..., tuple[int, str, str]]:
    Image.linear_gradient("L").save(tmp_path / "picture.png")
    shown = ["--image-file", tmp_path / "picture.png", "--prompt", "Describe the image."]

    def ask(artefact: Path, *flags: str) -> tuple[int, str, str]:
        answer = cli("generate", artefact, *shown, *RUNNERS, *flags)
        return answer.code, answer.out, answer.err

    return ask


# --- prompts


def test_a_setting_that_makes_another_prompt_is_refused_by_every_verb(tiny_llava, tiny_artefact, tmp_path, cli):
    folder, target = configured(tiny_llava, tmp_path / "tuned", mm_use_im_start_end=True), tmp_path / "artefact"
    for command in (
        ("doctor", folder),
        ("predict", "--model-path", folder),
        ("export", "--checkpoint", folder, "--output-dir", target),
        ("export-llm", "--checkpoint", folder, "--output-dir", target, "--dry-run"),
    ):
        answer = cli(*command)
        assert answer.code == 2 and sum(line.startswith("error: ") for line in answer.err.splitlines()) == 1
        assert all(words in answer.out + answer.err for words in ("mm_use_im_start_end", "prompts with <im_start>"))
    assert not target.exists()
    with pytest.raises(UserError, match=r"config\.json: mm_use_im_start_end: got true: prompts with <im_start>"):
        stored.read_config(configured(tiny_artefact, tmp_path / "made elsewhere", mm_use_im_start_end=True))


@pytest.mark.parametrize(
    "setting",
    [{"mm_use_im_start_end": False}, {"mm_use_im_start_end": None}, {"mm_use_im_patch_token": True},
     {"tune_mm_mlp_adapter": True}, {"tokenizer_padding_side": "left"}, {"version": "v1"}],
)  # fmt: skip
def test_settings_that_leave_the_prompt_alone_are_none_of_its_business(tiny_llava, tmp_path, setting):
    """The prompt that Apple's predict.py builds whatever these say (its qwen_2 template is a flag's default)."""
    model = fastvlm.load(configured(tiny_llava, tmp_path / "same", **setting))
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render_prompt("What?") == expected
    ids = model.tokenize("What?")[0].tolist()
    assert model.tokenizer.decode(ids) == expected.replace("<image>", "<image>" * 4)


# --- not finite


@pytest.mark.parametrize("llm", ["torch", "mlx"])
def test_generate_fails_where_a_part_is_not_finite(tiny_artefact, generate, monkeypatch, llm) -> None:
    assert generate(tiny_artefact, "--llm", llm, "--max-new-tokens", "3")[0] == 0
    encode = runtime.ExecutorVision.encode
    kind = runtime.load(tiny_artefact, "executor", llm).language.__class__
    embed, steps = kind._embed, []

    def later(self: Any, ids: np.ndarray) -> np.ndarray:
        steps.append(ids.shape[1])
        return embed(self, ids) * (np.nan if len(steps) == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_embed", later)
        code, _, err = generate(tiny_artefact, "--llm", llm, "--max-new-tokens", "3")
    assert code == 1 and steps == [PROMPT, 1, 1]
    assert "error: language model: embeddings of tokens: 64 of 64 values are NaN or infinite (" in err
    assert "`fastvlm verify`" in err
    monkeypatch.setattr(runtime.ExecutorVision, "encode", lambda self, pixels: encode(self, pixels) / 0)
    with np.errstate(all="ignore"):
        code, out, err = generate(tiny_artefact, "--llm", llm)
    assert code == 1 and out == "" and "error: vision encoder: features: " in err
    assert "(MIL executor (as-typed)): the program leaves its range: export the checkpoint" in err


def test_parity_of_what_is_not_finite_fails(tiny_checkpoint, tiny_artefact, monkeypatch) -> None:
    from benchmarks.parity import compare

    monkeypatch.setattr(runtime.ExecutorVision, "encode", lambda self, pixels: np.full((1, 4, 256), np.nan, "f4"))
    with pytest.raises(CheckFailed, match="vision encoder: features: 1,024 of 1,024 values are NaN"):
        compare.compare(tiny_checkpoint, tiny_artefact)


# --- positions


@pytest.mark.parametrize("llm", ["torch", "mlx"])
def test_an_artefacts_prompts_and_answers_keep_to_its_positions(tiny_artefact, tmp_path, generate, llm) -> None:
    for positions, code in ((PROMPT + 2, 0), (PROMPT - 1, 2)):
        made = configured(tiny_artefact, tmp_path / f"{positions}.artefact", max_position_embeddings=positions)
        write_manifest(made, read_manifest(made) | {"files": None})
        got, out, err = generate(made, "--llm", llm, "--max-new-tokens", "8", "--json")
        assert got == code
        if code:
            assert f"error: --prompt 'Describe the image.': prompt: {PROMPT} tokens, 4 of them for pictures, but" in err
            continue
        assert f"the answer is cut off: the language model has {positions} positions" in err
        whole = runtime.load(made, "executor", llm).generate("Describe the image.", str(tmp_path / "picture.png"), 3)
        assert json.loads(out.splitlines()[-1])["answers"] == [whole]
