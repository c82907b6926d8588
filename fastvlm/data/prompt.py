"""A question as token ids: Qwen2's chat template with the image tokens in front of the question."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastvlm.common.errors import UserError
from fastvlm.common.findings import Finding

IMAGE = "<image>"
SYSTEM = "You are a helpful assistant."
CONV_MODES = ("qwen_2", "plain")
END_OF_TURN = "<|im_end|>"
ANSWER = "<|im_start|>assistant\n"  # what an answer comes behind
# Qwen2's ChatML with its default system line; the same text as LLaVA's conversation template "qwen_2".
# Contents may be strings or Transformers' lists of parts; a list's pictures come first, as in `render_prompt`.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompt_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield findings about config.json's settings for prompts that neither this project nor the demo app builds.

    `mm_use_im_start_end` is the one setting by which Apple's predict.py builds another prompt: `mm_use_im_patch_token`
    adds a token that no prompt has, `tune_mm_mlp_adapter` is for training, and the template is a flag's choice.
    """
    if config.get("mm_use_im_start_end"):
        got = "true: prompts with <im_start> and <im_end> around the picture"
        remedy = "fine-tune without it, or set it to false in a copy if the model was trained without these tokens"
        yield Finding("prompt-unsupported", "config.json: mm_use_im_start_end", got, "false, as the app builds", remedy)


def render_prompt(prompt: str, images: int = 1, conv_mode: str = "qwen_2") -> str:
    """The text that the model reads, with one `<image>` for each picture.

    Args:
        prompt: the question. Where it has `<image>`, these are the pictures' places; else they come before it.
        images: the number of pictures.
        conv_mode: "qwen_2" for ChatML as in Apple's predict.py, "plain" for the pictures and the prompt alone.

    Raises:
        UserError: unknown `conv_mode`, or a prompt with another number of `<image>` than there are pictures.
    """
    if conv_mode not in CONV_MODES:
        raise UserError(f"--conv-mode: unknown: got {conv_mode!r}, expected one of {', '.join(CONV_MODES)}")
    named = prompt.count(IMAGE)
    if named and named != images:
        raise UserError(f"prompt: {named} {IMAGE} for {images} picture(s): name each picture once, or none")
    text = prompt if named else images_first(prompt, images)
    if conv_mode == "plain":
        return text
    return render_turn("system", SYSTEM) + render_turn("user", text) + ANSWER


def images_first(text: str, images: int) -> str:
    """`text` with the places of its pictures in front."""
    return (IMAGE + "\n") * images + text


def render_turn(role: str, text: str) -> str:
    """A turn of a conversation in ChatML; `role` is "system", "user" or "assistant"."""
    return f"<|im_start|>{role}\n{text}{END_OF_TURN}\n"


def encode_prompt(
    tokenizer: Any, prompt: str, image_token_id: int, tokens_per_image: int, images: int = 1, conv_mode: str = "qwen_2"
) -> np.ndarray:
    """Tokenize a prompt, with `tokens_per_image` copies of the image token for each picture.

    Args:
        tokenizer: the checkpoint's tokenizer, of Transformers.
        images, conv_mode: as in `render_prompt`.

    Returns:
        The token ids (1, T) int64.
    """
    text = render_prompt(prompt, images, conv_mode)
    return np.array([encode_text(tokenizer, text, image_token_id, tokens_per_image)], dtype=np.int64)


def encode_text(tokenizer: Any, text: str, image_token_id: int, tokens_per_image: int) -> list[int]:
    """The token ids of a rendered text, with `tokens_per_image` copies of the image token for each `<image>`.

    The text around the pictures is tokenized piece by piece, as the original implementation does.
    """
    ids: list[int] = []
    for index, piece in enumerate(text.split(IMAGE)):
        if index:
            ids += [image_token_id] * tokens_per_image
        if piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def eos_ids(tokenizer: Any, configured: int | Sequence[int] | None) -> set[int]:
    """The ids that end an answer: the configuration's, the tokenizer's, and the template's `<|im_end|>`."""
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    ids |= {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)}
    return {token for token in ids if token is not None}
