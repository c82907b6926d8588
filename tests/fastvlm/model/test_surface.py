import numpy as np
import pytest
import torch

import fastvlm
from fastvlm.common.errors import UserError
from fastvlm.data import scenes
from fastvlm.model.language import Sampler


@pytest.fixture(scope="module")
def question():
    return next(iter(scenes.questions(1, seed=21)))


def test_shapes_and_types(demo_model, question):
    pixels = demo_model.preprocess(question.image)
    features = demo_model.encode_image(pixels)
    embeddings = demo_model.project(features)
    logits = demo_model.logits(question.question, question.image)
    assert pixels.shape == (1, 3, 256, 256) and features.shape == (1, 16, 384) and embeddings.shape == (1, 16, 128)
    assert logits.ndim == 3 and logits.shape[0] == 1 and logits.shape[2] == 448
    assert {array.dtype for array in (pixels, features, embeddings, logits)} == {np.dtype(np.float32)}


def test_it_equals_transformers_own_forward(demo_model, question):
    """Oracle: FastVlmForConditionalGeneration.from_pretrained over the same folder, its own merge of the image."""
    from transformers import AutoTokenizer, FastVlmForConditionalGeneration

    reference = FastVlmForConditionalGeneration.from_pretrained(scenes.CHECKPOINT, dtype=torch.float32).eval()
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    asked = f"<|im_start|>user\n{'<image>' * 16}\n{question.question}<|im_end|>\n<|im_start|>assistant\n"
    ids = AutoTokenizer.from_pretrained(scenes.CHECKPOINT)(system + asked, return_tensors="pt").input_ids
    pixels = torch.from_numpy(np.array(question.image)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        expected = reference(input_ids=ids, pixel_values=pixels).logits.numpy()
        brighter = reference(input_ids=ids, pixel_values=pixels * 1.02).logits.numpy()
    got = demo_model.logits(question.question, question.image)
    scale = np.abs(expected).max()
    assert np.abs(got - expected).max() < 1e-4 * scale
    assert np.abs(got - brighter).max() > 1e-4 * scale  # negative control: pixels 2 % brighter


def test_stream_pieces_make_the_answer(demo_model, question):
    pieces = list(demo_model.stream(question.question, question.image, max_new_tokens=40))
    assert len(pieces) > 1
    assert "".join(pieces) == demo_model.generate(question.question, question.image, max_new_tokens=40)


def test_a_character_of_several_bytes_is_held_back_until_whole(demo_model):
    ids = demo_model.tokenizer("naïve 🦊!", add_special_tokens=False)["input_ids"]
    pieces = list(demo_model.decode(iter(ids)))
    assert "".join(pieces) == "naïve 🦊!" and not any("\ufffd" in piece for piece in pieces)


def test_wrong_shapes_are_refused(demo_model):
    with pytest.raises(UserError, match="pixel_values"):
        demo_model.encode_image(np.zeros((1, 3, 128, 128), np.float32))
    with pytest.raises(UserError, match="features"):
        demo_model.project(np.zeros((1, 15, 384), np.float32))


def test_load_is_the_public_name(question):
    model = fastvlm.load(scenes.CHECKPOINT, dtype="bfloat16")
    assert "bfloat16" in model.runners["language"]
    assert model.preprocess(question.image).shape == (1, 3, 256, 256)


def test_the_sampler():
    logits = np.array([0.0, 3.0, 2.9, -5.0])
    assert Sampler()(logits) == 1
    draws = {Sampler(1.0, 0.9, seed)(logits) for seed in range(50)}
    assert draws == {1, 2}  # the nucleus
    assert {Sampler(1.0, 0.3, seed)(logits) for seed in range(20)} == {1}
    assert Sampler(2.0, None, 7)(logits) == Sampler(2.0, None, 7)(logits)
    for bad in ((-1.0, None), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(UserError):
            Sampler(*bad)
