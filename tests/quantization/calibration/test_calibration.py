"""Calibration data, and what is calibrated on it: against mlx-lm's own code, and by what it is for."""

import copy

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx import nn as mlx_nn
from mlx_lm.quant import awq as mlx_awq
from mlx_lm.quant import gptq as mlx_gptq
from torch import nn

from fastvlm.common.errors import UserError
from fastvlm.data.conversations import Sample, demo_samples
from quantization.calibration import awq, budget, decoder, dwq, gptq
from quantization.calibration.data import Calibration, collect
from quantization.calibration.sensitivity import sensitivities
from quantization.calibration.tensors import as_stored, decode, encode
from quantization.recipe import recipe_from_json
from quantization.schemes import Affine, Cast, nbytes

pytestmark = pytest.mark.slow

INT4 = Affine(4, 64, "float32")
SCHEMES = [Affine(bits, 64, "float32") for bits in (3, 4, 8)]
TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def data(demo_model):
    return collect(demo_model, 448, demo_samples(40, "train"))


def divergence(model, changed, data):
    """Mean KL a token, by PyTorch's own function."""
    total = 0.0
    with torch.no_grad():
        for ids in data.sequences:
            expected, got = (
                torch.log_softmax(m(inputs_embeds=decoder.embed(m, data, ids[None])).logits[0].double(), -1)
                for m in (model, changed)
            )
            total += float(nn.functional.kl_div(got, expected, reduction="sum", log_target=True))
    return total / sum(map(len, data.sequences))


def with_parts(model, stored, scheme=INT4):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parts in stored.items():
            changed.get_parameter(name).copy_(decode(scheme, parts) if "scales" in parts else parts["weight"])
    return changed


def rounded(model, names, scheme=INT4):
    return {name: encode(scheme, model.get_parameter(name)) for name in names}


def matrices(model):
    return [name for name, _ in model.named_parameters() if name.endswith("_proj.weight")]


def test_pictures_become_rows_behind_the_vocabulary(demo_model, data):
    sample = demo_samples(1, "train")[0]
    picture = demo_model.project(demo_model.encode_image(demo_model.preprocess(sample.image())))
    first = data.sequences[0]
    places = np.flatnonzero(first >= 448)
    assert list(first[places]) == list(range(448, 448 + 16)) and first[-1] == demo_model.tokenizer.eos_token_id
    np.testing.assert_array_equal(data.images[:16], picture[0])
    embeds = decoder.embed(demo_model.language.model, data, first[None]).numpy()
    prompt = demo_model.merge(sample.question, [picture])
    np.testing.assert_allclose(embeds[:, : prompt.shape[1]], prompt, atol=1e-6)
    assert demo_model.tokenizer.decode(first[prompt.shape[1] : -1]) == sample.answer
    assert sorted(data.sequences[1][data.sequences[1] >= 448])[0] == 448 + 16  # the next picture's are others


def test_who_has_no_answer_gets_the_models_own(demo_model):
    samples = demo_samples(2, "train")
    unanswered = [Sample(s.name, s.image, s.question, None) for s in samples] + [Sample("text", None, "Hello", "there")]
    collected = collect(demo_model, 448, unanswered)
    own = demo_model.generate(samples[0].question, samples[0].image())
    assert demo_model.tokenizer.decode(collected.sequences[0][collected.sequences[0] < 448]).endswith(
        own + "<|im_end|>"
    )
    assert max(collected.sequences[2]) < 448
    assert collected.sha256 != collect(demo_model, 448, unanswered[:2]).sha256


def test_rows_and_batches_hold_every_token(data):
    packed = data.packed(64)
    joined = np.concatenate(data.sequences)
    np.testing.assert_array_equal(packed.ravel(), joined[: packed.size])
    assert len(joined) - packed.size < 64
    batches = list(data.batches(300))
    assert len(batches) > 2 and all(ids.size <= 300 for ids, _ in batches)
    assert sorted(np.concatenate([ids[real] for ids, real in batches])) == sorted(joined)


def test_layer_by_layer_is_the_model(demo_model, data):
    model = demo_model.language.model
    embeds = decoder.embed(model, data, data.packed(64)[:2])
    with torch.no_grad():
        expected = model.model(inputs_embeds=embeds).last_hidden_state
    for _, layer, calls in decoder.layers(model, [embeds]):
        hidden = calls[0].run(layer)
    torch.testing.assert_close(model.model.norm(hidden), expected)


def test_gptq_rounds_as_mlx_lm_does():
    torch.manual_seed(0)
    weight, x = torch.randn(24, 128), torch.randn(1, 200, 128) @ torch.randn(128, 128)

    class One(mlx_nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = mlx_nn.Linear(128, 24, bias=False)
            self.linear.weight = mx.array(weight.numpy())

        def __call__(self, x):
            return self.linear(x)

    model, _ = mlx_gptq.gptq_quantize(One(), mx.array(x.numpy()), 4, 64, 4, 64)
    ours = gptq.round_matrix(weight, x[0].T @ x[0], INT4)
    theirs = {name: torch.from_numpy(np.array(getattr(model.linear, name))) for name in ours}
    a, b = decode(INT4, ours), decode(INT4, theirs)
    assert (ours["weight"].view(torch.uint8) == theirs["weight"].view(torch.uint8)).float().mean() > 0.97
    loss = [float(((x[0] @ (w - weight).T) ** 2).sum()) for w in (a, b, as_stored(INT4, weight))]
    assert loss[0] == pytest.approx(loss[1], rel=0.01) and loss[0] < 0.5 * loss[2]


def test_awq_clips_and_scales_as_mlx_lm_does():
    torch.manual_seed(0)
    weight, x = torch.randn(40, 128), torch.randn(1, 200, 128) * torch.rand(128).mul(4).exp()
    weight[:, 5] *= 6
    module = mlx_nn.Linear(128, 40, bias=False)
    module.weight, module.input_feat = mx.array(weight.numpy()), mx.array(x.numpy())

    def quantize(w):
        return mx.dequantize(*mx.quantize(w, bits=4, group_size=64), bits=4, group_size=64)

    theirs = np.array(mlx_awq.search_best_clip(module, quantize, 64, 20))
    ours = awq.best_clip(weight, x[0], INT4).numpy()
    assert (np.abs(ours - theirs) < 1e-6).mean() > 0.99 and (ours != weight.numpy()).any()

    scales = np.array(mlx_awq.search_best_scale([module], quantize, None, {}, 20))
    layer = nn.Module()
    layer.mlp = nn.Module()
    layer.mlp.down_proj = nn.Linear(128, 40, bias=False)
    layer.mlp.down_proj.weight.data.copy_(weight)
    with torch.no_grad():
        ours = awq._best_scales(layer, ["mlp.down_proj"], "mlp.up_proj", [], x[0], INT4)
    np.testing.assert_allclose(ours, scales, rtol=1e-5)
    assert ours.std() > 0.01  # it has chosen something
    assert torch.equal(layer.mlp.down_proj.weight, weight)


def test_awq_changes_nothing_but_the_rounding(demo_model, data, monkeypatch):
    model = copy.deepcopy(demo_model.language.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(awq, "best_clip", lambda weight, x, scheme: weight)
    stored = awq.quantize(model, [decoder.embed(model, data, data.packed(64)[:4])], Affine(8, 32, "float32"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    norm = "model.layers.0.input_layernorm.weight"
    assert (stored[norm]["weight"] - before[norm]).abs().max() > 0.01  # it has scaled
    assert divergence(demo_model.language.model, with_parts(model, stored, Affine(8, 32, "float32")), data) < 1e-3


@pytest.mark.parametrize("method", ["gptq", "dwq"])
def test_calibration_loses_less_than_rounding(demo_model, data, method):
    model, held = demo_model.language.model, collect(demo_model, 448, demo_samples(20, "test"))
    names = matrices(model)
    plain = rounded(model, names)
    embeds = [decoder.embed(model, data, data.packed(256))]
    if method == "dwq":
        calibrated = dwq.quantize(model, data, dict.fromkeys(names, INT4), steps=40)
        assert all(torch.equal(calibrated[name]["weight"], plain[name]["weight"]) for name in names)  # the codes stay
    else:
        calibrated = gptq.quantize(copy.deepcopy(model), embeds, INT4)
    losses = [divergence(model, with_parts(model, stored), held) for stored in (calibrated, plain)]
    assert losses[0] < 0.9 * losses[1]


def test_awq_lowers_each_layers_error(demo_model, data):
    """Not the model's: on the demo checkpoint the sum of better layers is no better model (docs/LOG.md)."""
    gains = []
    for _, layer, calls in decoder.layers(
        demo_model.language.model, [decoder.embed(demo_model.language.model, data, data.packed(256))]
    ):
        expected = [call.run(layer) for call in calls]
        losses = [awq._loss(one, expected, calls, INT4) for one in (awq._searched(layer, calls, INT4), layer)]
        gains.append(losses[0] / losses[1])
    assert max(gains) <= 1 and min(gains) < 0.8


def test_sensitivities_are_what_is_measured(demo_model, data):
    model = copy.deepcopy(demo_model.language.model)
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight", TABLE]
    costs = sensitivities(model, data, dict.fromkeys(names, SCHEMES))
    for name in names:
        for predicted, scheme in zip(costs[name][1:], SCHEMES[1:]):
            measured = divergence(model, with_parts(model, rounded(model, [name], scheme), scheme), data)
            assert measured / 2.5 < predicted < measured * 2.5
        assert costs[name][0] > costs[name][1] > costs[name][2]


def test_sensitivities_of_an_untied_head(demo_model, data):
    model = copy.deepcopy(demo_model.language.model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    tied = sensitivities(copy.deepcopy(demo_model.language.model), data, {TABLE: SCHEMES})[TABLE]
    apart = sensitivities(model, data, {TABLE: SCHEMES, "lm_head.weight": SCHEMES})
    assert 0 < apart[TABLE][0] < tied[0] and 0 < apart["lm_head.weight"][0] < tied[0]
    with pytest.raises(KeyError, match=r"no matrix of this model: model\.norm\.weight"):
        sensitivities(model, data, {"model.norm.weight": SCHEMES})


SHAPES = {f"language_model.model.layers.{i}.mlp.up_proj.weight": (64, 64) for i in range(4)} | {"norm": (64,)}
CHOICES = [{"mode": "affine", "bits": bits, "group_size": 64, "dtype": "float16"} for bits in (2, 4, 8)]


def budgeted(size):
    rules = [{"pattern": "*_proj.weight", "choices": CHOICES}, {"pattern": "*", "scheme": {"dtype": "float16"}}]
    return recipe_from_json({"name": "fit", "version": 2, "budget": {"bytes": size}, "rules": rules})


def test_a_budget_is_spent_where_it_counts():
    names = list(SHAPES)[:4]
    nats = {name: [4.0 * weight, 1.0 * weight, 0.1 * weight] for name, weight in zip(names, (1, 2, 100, 0.01))}
    least = sum(nbytes(Affine(2, 64, "float16"), SHAPES[name]) for name in names) + 128
    costs = []
    for size in range(least, least + 8000, 500):
        plan = budget.decide(budgeted(size), SHAPES, nats).plan(SHAPES)
        assert sum(nbytes(scheme, SHAPES[name]) for name, scheme in plan.items()) <= size
        assert plan["norm"] == Cast("float16")
        costs.append(sum(nats[name][(2, 4, 8).index(plan[name].bits)] for name in names))
        bits = [plan[name].bits for name in names]
        assert bits[2] == max(bits) and bits[3] == min(bits)
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    with pytest.raises(
        UserError, match=r"recipe fit: 5\.25 kB is less than the 5\.25 kB \(\d.* that the smallest choices"
    ):
        budget.within_reach(budgeted(least - 1), SHAPES)
    budget.within_reach(budgeted(least), SHAPES)


def test_the_hash_knows_every_token_and_row():
    def data(sequences, images):
        return Calibration(9, tuple(np.array(s, np.int32) for s in sequences), np.array(images, np.float32))

    hashes = {
        data(s, i).sha256
        for s, i in (([[1, 2], [3]], [[1.0]]), ([[1], [2, 3]], [[1.0]]), ([[1, 2], [3]], [[2.0]]), ([[1, 2]], [[1.0]]))
    }
    assert len(hashes) == 4
