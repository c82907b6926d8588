"""Quality against torch's and Transformers' own losses; equal models are equal, worse ones are worse."""

import copy
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from benchmarks.parity import compare as parity
from benchmarks.quality import quality
from benchmarks.quality.text_model import TextModel
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data.conversations import Sample, demo_samples
from tests.benchmarks.conftest import perturb_embedding, perturb_head, perturb_projector, perturb_vision

COUNT = 20
TEXT = quality.Text("shapes", "Where is the red circle? The red circle is at the top left. How many stars? " * 40)


@pytest.fixture
def samples():
    """For the fakes: three with a picture, one without; one right answer is known."""
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (80, 80, 3)).astype(np.uint8)) for _ in range(3)]
    asked = [Sample(f"{n}", lambda image=image: image, f"What is {n}?", None) for n, image in enumerate(images)]
    return [*asked, Sample("alone", None, "Who are you?", "nobody")]


@pytest.fixture
def compare(tmp_path, reference, samples):
    """Hold a fake candidate against the fake reference."""

    def run(candidate, text=TEXT, asked=samples, held=None):
        quality.reference_results(reference, asked, text, tmp_path / "results.zip")
        return quality.quality(candidate, held or asked, tmp_path / "results.zip")

    return run


def test_the_same_model_keeps_everything(compare, candidate):
    result = compare(candidate)
    for name, value in result["figures"].items():
        if "_kl_" in name:
            assert value == 0, name
        if name.endswith("_top1") or name in ("same_answers", "perplexity_ratio"):
            assert value == 1, name
    assert [answer["same"] for answer in result["answers"]] == [True] * 4
    assert result["figures"]["perplexity"] == result["figures"]["reference_perplexity"] > 1
    assert result["figures"]["exact"] == result["figures"]["reference_exact"] == 0
    assert set(result["timings"]) == {"encode_s", "prefill_tokens_per_s", "decode_tokens_per_s"}


@pytest.mark.parametrize("perturb", [perturb_head, perturb_embedding, perturb_vision, perturb_projector])
def test_one_perturbed_weight_shows(compare, candidate, perturb):
    perturb(candidate)
    figures = compare(candidate)["figures"]
    sees = perturb in (perturb_vision, perturb_projector)
    assert figures["answer_kl_mean"] > 1e-4
    assert figures["prompt_kl_p99"] >= figures["prompt_kl_mean"] > 1e-4
    assert min(figures["answer_top1"], figures["prompt_top1"]) < 1
    assert (figures["text_kl_mean"] == 0) == sees  # a text has no pictures
    assert (figures["perplexity_ratio"] == 1) == sees


def test_the_document_is_json_and_the_same_twice(compare, candidate):
    perturb_head(candidate)
    first, second = (json.dumps(compare(candidate) | {"timings": 0}, allow_nan=False) for _ in range(2))
    assert first == second


def test_without_a_text_the_answers_are_scored(compare, candidate, reference, samples):
    result = compare(candidate, text=None)
    assert "text_kl_mean" not in result["figures"] and "the answers" in result["about"]["text"]
    losses = []
    for sample in samples:
        embeds = reference.embed(sample.question, sample.image and sample.image())
        if sample.answer:
            ids = reference.tokenizer(sample.answer + "<|im_end|>")["input_ids"]
        else:  # its own answer and one more token
            ids = list(reference.language.stream(embeds, quality.MAX_NEW_TOKENS))
            fed = np.concatenate([embeds, reference.language.embed(np.array([ids], dtype=int))], axis=1)
            ids.append(int(reference.language.logits(fed)[0, -1].argmax()))
        fed = np.concatenate([embeds, reference.language.embed(np.array([ids[:-1]], dtype=int))], axis=1)
        rows = torch.from_numpy(reference.language.logits(fed)[0, embeds.shape[1] - 1 :])
        losses.append(functional.cross_entropy(rows, torch.tensor(ids), reduction="none"))
    assert result["figures"]["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-3)


def test_what_does_not_fit_is_refused(compare, candidate, samples, tmp_path, reference):
    with pytest.raises(UserError, match="other questions"):
        compare(candidate, held=samples[:2])
    with pytest.raises(UserError, match="nothing asked"):
        compare(candidate, asked=[])
    with pytest.raises(UserError, match="text tiny: 9 tokens, expected at least 64"):
        compare(candidate, text=quality.Text("tiny", "ninechars"))
    other = copy.deepcopy(candidate)
    other.language.matrix = other.language.matrix[:, :-1]
    with pytest.raises(UserError, match="vocabulary: candidate 39 tokens, reference 40"):
        compare(other)
    known = candidate.tokenizer.__class__.__call__
    candidate.tokenizer.__class__ = type("Other", (candidate.tokenizer.__class__,), {})
    candidate.tokenizer.__class__.__call__ = lambda self, text, **flags: {
        "input_ids": [(i + 1) % 36 for i in known(self, text)["input_ids"]]
    }
    with pytest.raises(UserError, match="other tokens"):
        compare(candidate)


def test_logits_that_are_not_finite_fail(compare, candidate):
    candidate.language.matrix[0, 0] = np.nan
    with pytest.raises(CheckFailed, match=r"language model: logits at position .* mend it"):
        compare(candidate)


def test_few_rows_are_kept_where_the_vocabulary_is_large(compare, candidate, monkeypatch):
    perturb_head(candidate)
    whole = compare(candidate)
    monkeypatch.setattr(quality, "_VALUES_KEPT", 4 * 40 * 10)  # ten rows a sample
    part = compare(candidate)
    assert part["about"]["rows_kept"] < part["about"]["rows"] == whole["about"]["rows_kept"]
    exact = ("first_kl_mean", "first_top1", "answer_top1", "text_top1", "perplexity", "same_answers")
    assert [part["figures"][name] for name in exact] == [whole["figures"][name] for name in exact]
    assert part["figures"]["text_kl_mean"] == pytest.approx(whole["figures"]["text_kl_mean"], rel=0.9)


@given(st.integers(1, 300), st.integers(0, 50), st.data())
def test_kept_rows_are_spread_over_all(count, most, data):
    always = data.draw(st.integers(0, count - 1))
    rows = quality._evenly(count, most, always)
    assert rows == sorted(set(rows)) and always in rows and rows[0] >= 0 and rows[-1] < count
    assert len(rows) <= max(most, 1)
    if most > 2 and count > most:
        assert np.diff(rows).max() <= (count - 1) / (most - 2) + 1


# The demo checkpoint


def shrunk(model, bits):
    """The demo model with its language model's matrices rounded by MLX, in groups of 32."""
    smaller = copy.deepcopy(model)
    for parameter in smaller.language.model.parameters():
        if parameter.ndim == 2:
            packed, scales, biases = mx.quantize(mx.array(parameter.detach().numpy()), 32, bits)
            rounded = np.array(mx.dequantize(packed, scales, biases, 32, bits))
            parameter.data = torch.from_numpy(rounded)
    return smaller


@pytest.fixture(scope="module")
def demo_reference(demo_model, tmp_path_factory):
    asked, target = demo_samples(COUNT), tmp_path_factory.mktemp("quality") / "demo.zip"
    quality.reference_results(demo_model, asked, TEXT, target)
    return asked, target


@pytest.fixture(scope="module")
def by_bits(demo_model, demo_reference):
    models = {bits: shrunk(demo_model, bits) for bits in (2, 4, 8)}
    return {bits: (model, quality.quality(model, *demo_reference)) for bits, model in models.items()}


def test_fewer_bits_are_worse(by_bits):
    figures = {bits: result["figures"] for bits, (_, result) in by_bits.items()}
    for name in ("prompt_kl_mean", "answer_kl_mean", "text_kl_mean"):
        assert figures[2][name] > 3 * figures[4][name] > 9 * figures[8][name], name
    for name in ("prompt_top1", "answer_top1", "text_top1", "same_answers"):
        assert figures[2][name] < figures[8][name], name
    assert figures[8]["same_answers"] == 1
    assert figures[2]["exact"] < figures[2]["reference_exact"]


def test_divergences_are_those_of_torch(demo_model, demo_reference, by_bits):
    """One sample at a time through the public surface; kl_div in float64."""
    asked, (candidate, result) = demo_reference[0], by_bits[2]

    def divergence(p, q):
        p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
        return functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)

    first, answer, last_same = [], [], []
    for sample in asked:
        a, b = (model.logits(sample.question, sample.image())[0] for model in (demo_model, candidate))
        first.append(divergence(a[-1], b[-1]))
        last_same.append(a[-1].argmax() == b[-1].argmax())
        embeds = [model.embed(sample.question, sample.image()) for model in (demo_model, candidate)]
        ids = np.array([list(demo_model.language.stream(embeds[0], quality.MAX_NEW_TOKENS))])
        fed = [np.concatenate([e, m.language.embed(ids)], axis=1) for e, m in zip(embeds, (demo_model, candidate))]
        rows = [m.language.logits(e)[0, a.shape[0] - 1 :] for e, m in zip(fed, (demo_model, candidate))]
        answer.append(divergence(*rows))
    figures = result["figures"]
    assert figures["first_kl_mean"] == pytest.approx(float(torch.stack(first).mean()), rel=1e-3)
    assert figures["first_top1"] == pytest.approx(np.mean(last_same), rel=1e-3)
    assert figures["answer_kl_mean"] == pytest.approx(float(torch.cat(answer).mean()), rel=1e-3)
    assert figures["answer_kl_p99"] == pytest.approx(np.quantile(torch.cat(answer), 0.99), rel=1e-3)


def test_perplexity_is_that_of_transformers(by_bits):
    model, result = by_bits[4]
    ids = torch.tensor([model.tokenizer(TEXT.content, add_special_tokens=False)["input_ids"][: quality.TEXT_TOKENS]])
    total, count = 0.0, 0
    for start in range(0, ids.shape[1], quality.CONTEXT):
        window = ids[:, start : start + quality.CONTEXT]
        with torch.inference_mode():
            total += float(model.language.model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
        count += window.shape[1] - 1
    assert result["figures"]["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-3)
    assert f"{count} tokens" in result["about"]["text"]


@pytest.mark.parametrize("bits", [2, 4])
def test_answers_are_what_the_model_generates(demo_reference, by_bits, bits):
    """Also those that were not decoded because every likeliest token was the reference's."""
    model, result = by_bits[bits]
    for sample, answer in zip(demo_reference[0], result["answers"]):
        told = model.generate(sample.question, sample.image(), max_new_tokens=quality.MAX_NEW_TOKENS)
        assert answer["candidate"] == told
        assert (answer["same"], answer["expected"]) == (told == answer["reference"], sample.answer)


def test_a_candidate_may_see_at_another_resolution(demo_model, demo_reference):
    figures = quality.quality(parity.at_size(demo_model, 320), *demo_reference)["figures"]
    assert figures["answer_kl_mean"] > 0 and figures["text_kl_mean"] == 0


def test_a_text_model_continues_the_text(demo_model, tmp_path, by_bits):
    models = [TextModel(model.tokenizer, model.language) for model in (demo_model, by_bits[2][0])]
    asked = quality.continuations(demo_model.tokenizer, TEXT)
    quality.reference_results(models[0], asked, TEXT, tmp_path / "text.zip")
    result = quality.quality(models[1], asked, tmp_path / "text.zip")
    assert result["figures"]["text_kl_mean"] > 0 and "exact" not in result["figures"]
    assert result["figures"]["text_kl_mean"] == by_bits[2][1]["figures"]["text_kl_mean"]
    assert "encode_s" not in result["timings"] and len(result["answers"]) == len(asked) >= 1
