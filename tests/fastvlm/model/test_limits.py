"""What isn't finite is no answer, a prompt and its answer keep to the model's positions, and so says every verb."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastvlm
from fastvlm.common import dtypes
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.limits import positions, warn_once
from fastvlm.model.session import Session
from tests.fastvlm.checkpoint.edits import edit_json, edit_tensors

pytestmark = pytest.mark.slow

SINGLE, BEAMS, BATCH = [], ["--num_beams", "2"], ["--prompt", "What is it?", "Describe the image."]
SAMPLED = ["--temperature", "1.5", "--top_p", "0.9"]
PROMPT = 32  # tokens of the default prompt, 4 of them for the picture


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    pixels = np.random.default_rng(5).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 220)).save(path)
    return path


@pytest.fixture
def predict(picture: Path, cli: Callable[..., Any]) -> Callable[..., tuple[int, str, str]]:
    def ask(checkpoint: Path, *flags: str) -> tuple[int, str, str]:
        warn_once.cache_clear()
        answer = cli("predict", "--model-path", checkpoint, "--image-file", picture, "--device", "cpu", *flags)
        return answer.code, answer.out, answer.err

    return ask


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(source, target)
    edit_tensors(target, change)
    return target


def configured(source: Path, target: Path, text: Mapping[str, Any], **tokenizer: Any) -> Path:
    """A copy of a checkpoint with other values in its text configuration and its tokenizer's."""
    shutil.copytree(source, target)
    edit_json(
        target / "config.json", text_config=json.loads((target / "config.json").read_text())["text_config"] | text
    )
    edit_json(target / "tokenizer_config.json", **tokenizer)
    return target


def scaled(pattern: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        matching = [name for name in tensors if re.fullmatch(pattern, name)]
        assert matching
        for name in matching:
            tensors[name] = tensors[name] * factor

    return change


# --- not finite: a hot checkpoint in float16, its answer in bfloat16

STAGES = {
    r".*final_conv\.reparam_conv\.weight": "vision encoder: features: ",
    r".*multi_modal_projector\.linear_1\.weight": "projector: embeddings of a picture: ",
    r".*embed_tokens\.weight": "language model: embeddings of tokens: ",
    r"lm_head\.weight": "language model: logits ",
}


@pytest.mark.parametrize(("hot", "stage"), STAGES.items())
@pytest.mark.parametrize("flags", [SINGLE, BEAMS, BATCH, SAMPLED])
def test_a_hot_checkpoint_in_float16_is_no_answer(tiny_fast_vlm, tmp_path, predict, hot, stage, flags) -> None:
    checkpoint = changed(tiny_fast_vlm, tmp_path / "hot", scaled(hot, 1e7))
    code, out, err = predict(checkpoint, "--dtype", "float16", "--max-new-tokens", "3", *flags)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and out == "" and len(errors) == 1
    assert errors[0].startswith(f"error: {stage}") and "NaN or infinite (PyTorch" in errors[0]
    assert errors[0].endswith("float16 ends at 65504: run the checkpoint with --dtype bfloat16 or float32")
    code, _, err = predict(checkpoint, "--dtype", "bfloat16", "--max-new-tokens", "3", *flags)  # the remedy
    assert code == 0 and "error" not in err


@pytest.mark.parametrize(("flags", "said"), [(SINGLE, "embeddings of tokens"), (BEAMS, "logits of token 2 of the an")])
def test_a_later_step_of_the_answer_is_looked_at_too(tiny_fast_vlm, tmp_path, predict, cli, flags, said) -> None:
    """Damaged are only tokens that no prompt has, and that the first step may choose."""
    asked = fastvlm.load(tiny_fast_vlm)
    prompt = set(asked.tokenize("Describe the image.")[0].tolist())

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        rows = [row for row in range(len(tensors["lm_head.weight"])) if row not in prompt]
        name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors[name][rows] = torch.nan

    checkpoint = changed(tiny_fast_vlm, tmp_path / "damaged", damage)
    code, out, err = predict(checkpoint, *flags)
    assert code == 1 and f"error: language model: {said}" in err
    assert f"`fastvlm doctor {checkpoint}` reads them all" in err and "!" not in out
    assert cli("doctor", checkpoint).code == 2  # the remedy finds it


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_session_keeps_nothing_of_what_was_not_finite(demo_model, monkeypatch, value) -> None:
    session, white = Session(demo_model), Image.new("RGB", (64, 64), "white")
    expected = demo_model.generate("What is it?", white, 8)
    head = type(demo_model.language)._head

    def broken(self: Any, hidden: np.ndarray) -> np.ndarray:
        logits = head(self, hidden)
        return np.where(np.arange(logits.shape[-1]) == 3, value, logits)

    with monkeypatch.context() as patch:
        patch.setattr(type(demo_model.language), "_head", broken)
        count = demo_model.tokenize("What is it?").shape[1]
        with pytest.raises(CheckFailed, match=f"logits at position {count - 1}: 1 of 448 values"):
            session.generate("What is it?", white, 8)
    with monkeypatch.context() as patch:
        patch.setattr(demo_model.vision, "encode", lambda pixels: np.full((1, 16, 384), value, np.float32))
        with pytest.raises(CheckFailed, match="vision encoder: features: 6,144 of 6,144 values"):
            session.generate("What is it?", Image.new("RGB", (64, 64), "black"), 8)
    assert session.generate("What is it?", white, 8) == expected


def test_every_row_of_logits_counts(demo_model, monkeypatch) -> None:
    head = type(demo_model.language)._head

    def broken(self: Any, hidden: np.ndarray) -> np.ndarray:
        found = head(self, hidden).copy()
        found[0, 5, 7] = -np.inf
        return found

    monkeypatch.setattr(type(demo_model.language), "_head", broken)
    with pytest.raises(CheckFailed, match="language model: logits at position 5: 1 of "):
        demo_model.logits("What is it?")


# --- --dtype auto


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("capable", [True, False])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_auto_holds_the_encoder_on_every_device(monkeypatch, stored, device, capable) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: capable)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: capable)
    vision, language = dtypes.computed_in(stored, device)
    wide = "bfloat16" if capable and device != "cpu" else "float32"
    assert vision == {"bfloat16": wide}.get(stored, "float32")
    assert language == ("float32" if device == "cpu" else {"bfloat16": wide}.get(stored, stored))


def test_encoder_and_language_model_run_in_dtypes_of_their_own(make_checkpoint, predict, monkeypatch) -> None:
    """What a float16 checkpoint gets off the CPU: a hot encoder answers, its language model stays as it is stored."""
    checkpoint = make_checkpoint(dtype="float16")
    monkeypatch.setattr(
        "fastvlm.model.torch_parts.computed_in", lambda stored, device: dtypes.computed_in(stored, "cuda")
    )
    code, _, err = predict(checkpoint, "--max-new-tokens", "2")
    assert code == 0 and "cpu float32, PyTorch" in err and "cpu float16, 128" in err
    model = fastvlm.load(checkpoint, dtype="auto")
    parts = model.vision, model.projector, model.language
    assert [part.like.dtype for part in parts] == [torch.float32, torch.float32, torch.float16]
    pixels = np.random.default_rng(0).random((1, 3, 128, 128), dtype=np.float32)
    np.testing.assert_array_equal(model.encode_image(pixels), fastvlm.load(checkpoint).encode_image(pixels))


# --- positions


@pytest.mark.parametrize("flags", [SINGLE, BEAMS, BATCH])
@pytest.mark.parametrize("room", [-1, 0, 1, 5, 100])
def test_prompt_and_answer_keep_to_the_positions(tiny_fast_vlm, tmp_path, predict, flags, room) -> None:
    """The answer's last token needs no position, so an answer may have one more token than there is room."""
    checkpoint = configured(tiny_fast_vlm, tmp_path / "short", {"max_position_embeddings": PROMPT + room})
    code, out, err = predict(checkpoint, "--max-new-tokens", "8", "--json", *flags)
    cut = f"the answer is cut off: the language model has {PROMPT + room} positions (max_position_embeddings)"
    if room < 0:
        told = (
            f"image.': prompt: {PROMPT} tokens, 4 of them for pictures, but the language model has {PROMPT - 1} posit"
        )
        assert code == 2 and told in err and told in json.loads(out)["error"]
        return
    assert code == 0 and (cut in err) == (room + 1 < 8)
    answer = json.loads(out.splitlines()[-1])["answers"][-1]["answer"]
    _, out, _ = predict(tiny_fast_vlm, "--max-new-tokens", str(min(room + 1, 8)), "--json", *flags)
    assert json.loads(out.splitlines()[-1])["answers"][-1]["answer"] == answer


def test_too_long_prompts_are_refused_at_once_and_before_any_picture(tiny_fast_vlm, tmp_path, predict, monkeypatch):
    checkpoint = configured(tiny_fast_vlm, tmp_path / "short", {"max_position_embeddings": PROMPT})
    monkeypatch.setattr("fastvlm.model.torch_parts.TorchVision.encode", None)  # not reached
    code, _, err = predict(checkpoint, "--prompt", "What " * 20, "fits", "Which " * 40)
    assert code == 2 and len(re.findall(r"--prompt 'Wh[^']+': prompt: \d+ tokens, 4 of them for pictures", err)) == 2
    code, _, err = predict(checkpoint, "--prompt", *("What " * count for count in range(20, 40)))
    assert code == 2 and err.count("prompt: ") == 5 and err.endswith("; and 15 more\n")


def test_the_tokenizers_length_is_warned_of_once_and_its_sentinel_is_none(tiny_fast_vlm, tmp_path, predict) -> None:
    said = f"warning: prompt: {PROMPT} tokens, 4 of them for pictures: more than the tokenizer's model_max_length"
    for most, times in ((PROMPT - 1, 1), (PROMPT, 0), (None, 0), (int(1e30), 0)):
        checkpoint = configured(tiny_fast_vlm, tmp_path / str(most), {}, model_max_length=most)
        code, _, err = predict(checkpoint, "--max-new-tokens", "1")
        assert code == 0 and err.count(said) == times, most


def test_a_session_refuses_and_goes_on(demo_model, monkeypatch, capsys) -> None:
    session, white = Session(demo_model), Image.new("RGB", (64, 64), "white")
    expected, count = demo_model.generate("What is it?", white, 8), demo_model.tokenize("What is it?").shape[1]
    monkeypatch.setattr(demo_model.language, "positions", count + 2)
    with pytest.raises(UserError, match=rf"prompt: \d+ tokens, 16 of them for pictures, .* {count + 2} positions"):
        session.generate("What is it? " * 5, white, 8)
    assert expected.startswith(cut := session.generate("What is it?", white, 8)) and len(cut) < len(expected)
    assert "the answer is cut off" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"prompt: {count + 3} tokens"):
        demo_model.language.logits(np.zeros((1, count + 3, 128), np.float32))
    with pytest.raises(UserError, match="prompt: empty"):
        demo_model.generate("", conv_mode="plain")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": 32768}, 32768),
        ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 32768),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
    ],
)
def test_a_scaled_rotary_encoding_reaches_further(config, expected) -> None:
    assert positions(config) == expected
