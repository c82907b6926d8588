"""Answers after a draft are greedy decoding's own, whatever the draft; logits in parts are the logits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import metrics
from benchmarks.parity import language
from fastvlm.model import streamed
from fastvlm.model.language import Language
from fastvlm.model.torch_parts import load_checkpoint

MOST = 12


def tell(count):
    assert count >= 0


PROMPTS = ("What is it?", "How many stars?", "Where is it?", "What is that?")


@pytest.fixture(scope="module")
def embeds(demo_model):
    """Prompts of two lengths, in no order, behind the same picture's features."""
    rng = np.random.default_rng(5)
    features = [rng.normal(size=(1, 16, 128)).astype(np.float32) for _ in PROMPTS]
    return [demo_model.merge(prompt, [own]) for prompt, own in zip(PROMPTS, features)]


@pytest.fixture(scope="module")
def greedy(demo_model, embeds):
    return [list(demo_model.language.stream(one, MOST)) for one in embeds]


def test_a_batch_answers_as_each_prompt_alone(demo_model, embeds, greedy):
    found = language.answers(demo_model.language, embeds, MOST, tell)
    assert [one.tokens for one in found] == greedy
    assert len({len(answer) for answer in greedy}) > 1  # they end at different steps
    for one, alone in zip(found, embeds):
        assert one.hidden == pytest.approx(demo_model.language.hidden(alone)[0][0], abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_draft_gives_the_same_answers(demo_model, embeds, greedy, data):
    drafts = []
    for own in greedy:
        draft = own[: data.draw(st.integers(0, len(own)))] + data.draw(st.lists(st.integers(0, 447), max_size=3))
        drafts.append(data.draw(st.sampled_from([draft, own]))[:MOST])
    found = language.answers_after(demo_model.language, embeds, drafts, MOST, tell)
    assert [one.tokens for one in found] == greedy
    for one, own, draft, prompt in zip(found, greedy, drafts, embeds):
        at = metrics.first_divergence(own, draft)
        if at is None or at == min(len(own), len(draft)):
            assert one.margin is None
            continue
        read = np.concatenate([prompt, demo_model.language.embed(np.array([own[:at]], np.int64))], axis=1)
        scores = metrics.log_softmax(demo_model.language.logits(read)[0, -1])
        assert one.margin == pytest.approx(scores[own[at]] - scores[draft[at]], abs=1e-3) and one.margin > 0


def test_positions_end_answers(demo_model, embeds, greedy, capsys, monkeypatch):
    monkeypatch.setattr(demo_model.language, "positions", embeds[0].shape[1] + 2)
    cut = language.answers(demo_model.language, embeds[:1], MOST, tell)
    assert cut[0].tokens == greedy[0][:3] == list(demo_model.language.stream(embeds[0], MOST))
    assert "the answer is cut off" in capsys.readouterr().err
    assert language.answers_after(demo_model.language, embeds[:1], greedy[:1], MOST, tell)[0].tokens == greedy[0][:3]


def test_logits_in_parts_are_the_logits(demo_model, embeds, monkeypatch):
    reference: Language = demo_model.language
    states = reference.hidden(embeds[0])[0][0]
    noisy = states + np.random.default_rng(0).normal(size=states.shape).astype(np.float32)
    expected = [reference.head(one[None])[0] for one in (states, noisy)]
    monkeypatch.setattr(language, "_POSITIONS_AT_ONCE", 7)
    figures = language.logits_figures(reference, reference, (states, noisy))
    kl, same, snr = (figures[f"prefill_{name}"] for name in ("kl", "top1", "snr"))
    assert kl == pytest.approx(metrics.kl_divergence(*expected)) and kl > 0
    assert same == pytest.approx(metrics.top1_agreement(*expected)) and same < 1
    assert snr == pytest.approx(metrics.snr_db(*expected), abs=1e-3)
    exact = {"prefill_snr": math.inf, "prefill_kl": 0, "prefill_top1": 1}
    assert language.logits_figures(reference, reference, (states, states)) == exact


@pytest.mark.parametrize("keeps", [0, 1 << 30])
def test_a_streamed_model_is_the_model(demo_model, embeds, greedy, keeps, monkeypatch):
    from fastvlm.data import scenes

    monkeypatch.setattr(streamed.Memory, "__init__", lambda self: setattr(self, "free", keeps))
    monkeypatch.setattr(streamed, "_AT_ONCE", 1 << 10)
    model = load_checkpoint(scenes.CHECKPOINT, streamed=True)
    expected = demo_model.language.logits(embeds[1])
    for _ in range(2):  # from new mappings, and from kept ones
        with streamed.workers():
            assert model.language.logits(embeds[1]) == pytest.approx(expected, abs=1e-4)
            assert [one.tokens for one in language.answers(model.language, embeds, MOST, tell)] == greedy
    layers = [layer for layer in model.language.model.modules() if isinstance(layer, streamed.StreamedLinear)]
    assert len(layers) == 4 * 7 + 1 and all((layer.stored is not None) == bool(keeps) for layer in layers)
    streamed.forget(model.language.model)
    assert not any(layer.stored for layer in layers)
