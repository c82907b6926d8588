import numpy as np
import pytest

from fastvlm.common.errors import UserError
from fastvlm.data.prompt import encode_prompt, render_prompt


class Words:
    """A stand-in tokenizer: one id a character."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def test_the_template_is_qwens():
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_prompt("What is this?") == expected


def test_the_template_equals_the_tokenizers_own(demo_tokenizer):
    messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
    assert demo_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == render_prompt(
        "What is this?"
    )


def test_each_picture_becomes_its_image_tokens_in_place():
    ids = encode_prompt(Words(), "ab<image>c<image>", 9999, 3, images=2, conv_mode="plain")
    assert ids.dtype == np.int64
    assert ids.tolist() == [[97, 98, 9999, 9999, 9999, 99, 9999, 9999, 9999]]


def test_pictures_come_first_when_the_prompt_names_none():
    assert render_prompt("x", images=2, conv_mode="plain") == "<image>\n<image>\nx"
    assert render_prompt("x", images=0, conv_mode="plain") == "x"


@pytest.mark.parametrize(
    ("prompt", "images", "mode"), [("<image> a <image>", 1, "qwen_2"), ("<image>", 0, "qwen_2"), ("a", 1, "vicuna")]
)
def test_what_cannot_be_meant_is_refused(prompt, images, mode):
    with pytest.raises(UserError):
        render_prompt(prompt, images, mode)
