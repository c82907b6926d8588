"""Range-safe float16: powers of two that change no value but its scale, chosen as small as the headroom allows."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from encoders import folded, outputs_of, pixels_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_export.encoder import fp16
from model_export.encoder.channel_first import channel_first
from model_export.encoder.ranges import measure_modules
from tests.helpers import relative

pytestmark = pytest.mark.slow

EXACT = 1e-12
LARGEST = 65504.0
DEPTHS, WIDTHS = (2, 1, 1, 2, 1), (2, 4, 4, 32, 64)


@dataclass
class Measured:
    """What `fp16` wants to know of a module."""

    largest: float
    square: float | None = None


@pytest.fixture(scope="module")
def fastvit() -> nn.Module:
    return folded(3, DEPTHS, WIDTHS)


def measured(model: nn.Module, size: int = 64) -> dict[str, Measured]:
    """The oracle of `measure_modules`: by hooks of our own, in float64."""
    outputs = outputs_of(model, pixels_of(size))
    found = {name: Measured(float(x.abs().max())) for name, x in outputs.items() if not name.endswith("<")}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            x = outputs[f"{name}<"]
            found[name].square = float((x - x.mean(1, keepdim=True)).square().max())
        if name.endswith(".mlp") and f"{name}<" in outputs:
            found[f"{name}:input"] = Measured(float(outputs[f"{name}<"].abs().max()))
        if hasattr(module, "qkv"):
            q, k, v = outputs[f"{name}.qkv"].unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
            parts = {"queries": q * module.scale, "keys": k, "values": v, "scores": q * module.scale @ k.mT}
            found |= {f"{name}:{part}": Measured(float(x.abs().max())) for part, x in parts.items()}
    return found


@pytest.fixture(scope="module")
def plain_ranges(fastvit: nn.Module) -> dict[str, Measured]:
    return measured(fastvit)


LAYERS = [
    "stem.0.reparam_conv", "stem.2.reparam_conv", "stages.0.blocks.1.token_mixer.reparam_conv",
    "stages.0.blocks.0.mlp.fc1", "stages.1.downsample.proj.0.reparam_conv", "stages.1.blocks.0.mlp.conv.conv",
    "stages.2.blocks.0.mlp.fc2", "stages.3.downsample.proj.1.reparam_conv", "stages.3.pos_emb.reparam_conv",
    "stages.3.blocks.0.token_mixer.qkv", "stages.3.blocks.1.token_mixer.proj", "stages.3.blocks.1.mlp.fc1",
    "stages.4.downsample.proj.1.reparam_conv", "stages.4.blocks.0.mlp.fc2", "final_conv.reparam_conv",
    "final_conv.se.fc1", "final_conv.se.fc2",
]  # fmt: skip


def scaled_by(model: nn.Module, factors: dict[str, float]) -> nn.Module:
    """A copy with these layers' weights and biases multiplied."""
    changed = copy.deepcopy(model)
    for name, factor in factors.items():
        layer: Any = changed.get_submodule(name)
        layer.weight.data.mul_(factor)
        if layer.bias is not None:
            layer.bias.data.mul_(factor)
    return changed


def rescaled(model: nn.Module, ranges: dict[str, Measured] | None = None) -> tuple[nn.Module, fp16.Flow]:
    """A channel-first copy that carries what `choose` says, and what that is."""
    made = channel_first(copy.deepcopy(model))
    found = fp16.choose(made, ranges or measured(model))
    return fp16.rescale(made, found), found


# --- the same function


@settings(max_examples=10)
@given(
    seed=st.integers(0, 99),
    depths=st.tuples(*[st.integers(1, 2)] * 5),
    heads=st.sampled_from([(8, 1), (6, 2)]),
    bias=st.booleans(),
    factors=st.dictionaries(st.sampled_from(LAYERS), st.floats(-3, 11), max_size=6),
)
def test_the_same_function_in_range(
    seed: int, depths: tuple[int, ...], heads: tuple[int, int], bias: bool, factors: dict[str, float]
) -> None:
    """Layers made up to 1e11 times as large, whatever follows from it: the same features to 1e-12, every layer carries
    its own power of two, and every value, square and weight is in float16's range."""
    channels = 2 * heads[0] * heads[1]
    plain = folded(seed, depths, (2, 4, 4, channels, channels), heads[0], bias)
    named = dict(plain.named_modules())
    original = scaled_by(plain, {name: 10.0**power for name, power in factors.items() if name in named})
    x, ranges = pixels_of(64, seed=0), measured(original)
    expected = outputs_of(channel_first(copy.deepcopy(original)), x)
    made, found = rescaled(original, ranges)
    actual = outputs_of(made, x)
    # A gate takes what is left of large values that cancel: float64's error of the largest is absolute there.
    limit = EXACT + 1e-15 * float(expected["final_conv.se.fc2"].abs().max())
    assert relative(actual["features"] * 2.0**found.features.exponent, expected["features"]) <= limit
    exponents = found.layer_exponents()
    for name, layer in original.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        assert float(made.get_submodule(name).weight.abs().max()) <= LARGEST, name
        if not name.endswith("qkv"):
            limit = 1e-9 if name.startswith("final_conv.se") else 1e-10  # after a saturated sigmoid nothing is left
            assert relative(actual[name] * 2.0 ** -exponents.get(name, 0), expected[name]) <= limit, name
            assert float(actual[name].abs().max()) <= LARGEST / 16, name
    after = found.headroom(ranges)
    assert after.least >= 16 and (after.squares or 16) >= 16
    for name, module in made.named_modules():
        if type(module).__name__ == "ChannelNorm":
            centred = actual[f"{name}<"] - actual[f"{name}<"].mean(1, keepdim=True)
            assert float(centred.square().max()) <= LARGEST / 16


@pytest.mark.parametrize("layer", LAYERS[2::4])
def test_a_factor_left_out_is_seen(fastvit: nn.Module, layer: str) -> None:
    """The control: the factor of every other channel forgotten."""
    original = scaled_by(fastvit, {layer: 1e7})
    x = pixels_of(64)
    expected = outputs_of(original, x)["features"]
    made, found = rescaled(original)
    assert relative(outputs_of(made, x)["features"] * 2.0**found.features.exponent, expected) <= EXACT
    assert found.layer_exponents() or found.activation_exponents()
    name = next(iter(found.layer_exponents()))
    wrong: Any = copy.deepcopy(made)
    wrong.get_submodule(name).weight.data[::2].mul_(2)
    assert relative(outputs_of(wrong, x)["features"] * 2.0**found.features.exponent, expected) > EXACT


def test_bit_for_bit_in_float32_where_only_streams_are_large() -> None:
    original = folded(1, DEPTHS, WIDTHS, dtype=torch.float32)
    x = pixels_of(64, dtype=torch.float32)
    made = channel_first(copy.deepcopy(original))
    expected = outputs_of(made, x)["features"]
    found = fp16.flow(made)
    for value, exponent in zip([one for one in found.values if not one.activations], [3, 1, 2, 9, 12] * 9):
        value.exponent = exponent if any("blocks" in place or "pos_emb" in place for place in value.places) else 0
    for link in found.links:
        if link.layer.endswith(("qkv", "mlp.conv.conv")):
            link.target.exponent = 0
        link.exponent = link.target.exponent
    assert any(value.exponent for value in found.values)
    assert torch.equal(outputs_of(fp16.rescale(copy.deepcopy(made), found), x)["features"], expected)
    made.stages[4].blocks[0].mlp.fc2.bias.data[0] *= 1 + 2**-20
    assert not torch.equal(outputs_of(fp16.rescale(made, found), x)["features"], expected)


def test_epsilon_follows_the_scale() -> None:
    """With a stream so small that eps decides; where eps does not follow, the features differ."""
    original, x = folded(5, DEPTHS, WIDTHS), pixels_of(64)
    for stage in (3, 4):
        for block in original.stages[stage].blocks:
            block.norm.eps = 3.0
    expected = outputs_of(original, x)["features"]
    made = channel_first(copy.deepcopy(original))
    ranges = measured(original)
    ranges["stages.4.pos_emb.reparam_conv"].largest = LARGEST / 16 * 2**6.5
    fp16.rescale(made, fp16.choose(made, ranges))
    assert made.stages[4].blocks[0].norm.eps == 3.0 / 4**7 and made.stages[3].blocks[0].norm.eps == 3.0
    assert relative(outputs_of(made, x)["features"], expected) <= EXACT
    made.stages[4].blocks[0].norm.eps = 3.0
    assert relative(outputs_of(made, x)["features"], expected) > 1e-4


def test_what_cannot_be_rescaled_is_refused(fastvit: nn.Module) -> None:
    foreign = copy.deepcopy(fastvit)
    foreign.stages[0].blocks[1] = nn.Conv2d(2, 2, 1)
    with pytest.raises(TypeError, match="Conv2d"):
        fp16.flow(foreign)


# --- every layer and activation is known


def test_the_flow_covers_the_encoder(fastvit: nn.Module) -> None:
    """Every layer, activation and normalization of the graph is in it once: none keeps its scale by being forgotten."""
    made = channel_first(copy.deepcopy(fastvit))
    found = fp16.flow(made)
    layers = [name for name, one in made.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    assert sorted({link.layer for link in found.links}) == sorted(layers)
    kinds = ("GELU", "Sigmoid", "Softmax")
    activations = {name for name, one in made.named_modules() if type(one).__name__ in kinds}
    listed = [name for value in found.values for name in value.activations]
    assert sorted(listed) == sorted(activations)
    norms = {name for name, one in made.named_modules() if type(one).__name__ == "ChannelNorm"}
    assert sorted(name for value in found.values for name in value.norms) == sorted(norms)
    others = {type(one).__name__ for one in made.modules() if not any(one.children())} - {
        "Conv2d", "GELU", "Sigmoid", "Softmax", "ChannelNorm", "Identity", "Dropout", "ReLU",
        "AdaptiveAvgPool2d", "Flatten",  # of the head, which isn't run
    }  # fmt: skip
    assert others == set()  # a ReLU is homogeneous
    ranges = measured(fastvit)
    assert {name for value in found.values for name in value.places} <= ranges.keys()


# --- choosing


magnitudes = st.floats(1e-3, 1e12) | st.sampled_from([0.0, LARGEST / 16, LARGEST, LARGEST * 2**10])


@settings(max_examples=40)
@given(data=st.data(), headroom=st.sampled_from([4.0, 16.0, 64.0]))
def test_exponent_is_the_smallest_that_keeps_the_headroom(
    fastvit: nn.Module, plain_ranges: dict[str, Measured], data: st.DataObject, headroom: float
) -> None:
    made, ranges = channel_first(copy.deepcopy(fastvit)), dict(plain_ranges)
    for parameter in made.parameters():  # so that no weight asks for a power
        parameter.zero_()
    values = [one for one in fp16.flow(made).values if not one.places[0].endswith((":queries", ":keys", ":scores"))]
    names = [name for value in values for name in (*value.places, *value.norms)]
    for name, value in data.draw(st.dictionaries(st.sampled_from(sorted(names)), magnitudes)).items():
        ranges[name] = Measured(ranges[name].largest, value) if name.endswith(".norm") else Measured(value)

    def safe(value: fp16.Value, k: int) -> bool:
        return all(ranges[name].largest * 2.0**-k <= LARGEST / headroom for name in value.places) and all(
            (ranges[name].square or 0) * 4.0**-k <= LARGEST / headroom for name in value.norms
        )

    for value in fp16.choose(made, ranges, headroom).values:
        k = value.exponent
        if not value.places[0].endswith((":queries", ":keys", ":scores")) and k >= 0:
            assert safe(value, k) and (k == 0 or not safe(value, k - 1)), value


def test_scores_share_their_power_between_queries_and_keys(fastvit: nn.Module) -> None:
    made, ranges = channel_first(copy.deepcopy(fastvit)), measured(fastvit)
    mixer = "stages.3.blocks.0.token_mixer"
    ranges[f"{mixer}:scores"] = Measured(LARGEST / 16 * 2**5)
    found = fp16.choose(made, ranges)
    assert found.layer_exponents() == {f"{mixer}.qkv": [-2, -3, 0]}
    assert found.activation_exponents() == {f"{mixer}.softmax": 5}
    ranges[f"{mixer}:keys"] = Measured(LARGEST / 16 * 2**7)
    assert fp16.choose(made, ranges).layer_exponents() == {f"{mixer}.qkv": [0, -7, 0]}


def test_headroom_is_16_and_nothing_small_is_scaled(fastvit: nn.Module) -> None:
    made = channel_first(copy.deepcopy(fastvit))
    ranges: dict[str, Measured] = {name: Measured(LARGEST / 16, 0.0) for name in measured(fastvit)}
    assert all(value.exponent == 0 for value in fp16.choose(made, ranges).values)
    ranges["stages.2.blocks.0.mlp.fc2"].largest = math.nextafter(LARGEST / 16, math.inf)
    ranges["stages.4.blocks.0.norm"].square = LARGEST / 16 * 4**3 * 1.001
    ranges["stem.1"].largest = LARGEST / 16 * 2
    found = fp16.choose(made, ranges)
    exponents = {value.places[0]: value.exponent for value in found.values if value.exponent}
    assert exponents == {
        "stem.1.reparam_conv": 1,
        "stages.2.blocks.0.token_mixer.reparam_conv": 1,
        "stages.4.pos_emb.reparam_conv": 4,
    }
    assert found.activation_exponents() == {"stem.1.act": 1}


def test_measured_modules_are_enough_and_give_the_same(fastvit: nn.Module) -> None:
    """The export's own measurement against the hooks of this file."""
    model = copy.deepcopy(fastvit).float()
    found = measure_modules(model, [pixels_of(64, dtype=torch.float32).numpy()])
    made, own = channel_first(copy.deepcopy(model)), measured(fastvit)
    for headroom in (16.0, 2.0**20):  # the second makes every value need a power
        exponents = [value.exponent for value in fp16.choose(made, found, headroom).values]
        assert exponents == [value.exponent for value in fp16.choose(made, own, headroom).values]
    assert all(exponents)


def test_headroom_is_that_of_the_rescaled_encoder(fastvit: nn.Module) -> None:
    original = scaled_by(fastvit, {"stages.3.downsample.proj.1.reparam_conv": 1e7, "stages.2.blocks.0.mlp.fc2": 1e4})
    before = fp16.flow(original).headroom(measured(original))
    real = {name: one.largest for name, one in measured(original).items() if ":" not in name}
    name = max(real, key=real.__getitem__)
    assert before.largest == real[name] and real[before.name.partition(":")[0]] == real[name]
    assert before.squares == LARGEST / max(one.square or 0 for one in measured(original).values())
    made, found = rescaled(original)
    outputs = outputs_of(made, pixels_of(64))
    values = {n: float(outputs[n].abs().max()) for value in found.values for n in value.places if n in outputs}
    after = found.headroom(measured(original))
    assert after.least == pytest.approx(LARGEST / max(values.values()), rel=1e-9)
    assert fp16.Headroom("x", 1.0, 0.0).squares is None


# --- weights too small for float16


SMALL = {
    "stages.0.blocks.1.mlp.fc2": 2.0**-15,
    "stages.1.blocks.0.mlp.conv.conv": 2.0**-16,
    "stages.3.blocks.0.token_mixer.proj": 2.0**-14,
    "stages.4.blocks.0.mlp.fc2": 2.0**-20,
    "stages.4.blocks.0.mlp.conv.conv": 2.0**-3,
}


def float16_snr_db(weight: torch.Tensor) -> float:
    noise = (weight.half().double() - weight).square().sum()
    return float(10 * torch.log10(weight.square().sum() / noise))


def test_lifting_spares_small_weights_and_no_others(fastvit: nn.Module) -> None:
    original = scaled_by(fastvit, SMALL)
    before = {name: float16_snr_db(original.get_submodule(name).weight) for name in SMALL}
    assert min(before.values()) < 40  # or nothing is shown
    made, found = rescaled(original)
    lifted = found.layer_exponents()
    poor = {name for name, snr in before.items() if snr < 66}
    assert lifted.keys() == poor and len(poor) >= 4 and all(m > 0 for m in lifted.values())  # type: ignore[operator]
    for name in lifted:
        assert float16_snr_db(made.get_submodule(name).weight) > 70
    after = outputs_of(made, pixels_of(64))
    assert all(float(after[name].abs().max()) <= LARGEST / 16 for name in lifted)
    assert relative(after["features"], outputs_of(original, pixels_of(64))["features"]) <= EXACT
    for left_alone in (fastvit, scaled_by(fastvit, {"stages.3.blocks.0.mlp.fc2": 0.0})):  # as it is; a silent branch
        assert rescaled(left_alone)[1].layer_exponents() == {}


def test_lifting_stops_where_the_values_would_get_large(fastvit: nn.Module) -> None:
    """Small weights behind large values: only as far as the headroom of 16 goes."""
    name = "stages.0.blocks.0.mlp.fc2"
    original = scaled_by(fastvit, {name: 2.0**-20})
    ranges, made = measured(original), channel_first(copy.deepcopy(original))
    for largest, room in ((LARGEST / 16 / 8, 3), (LARGEST / 16 / 1.1, 0), (LARGEST, -4)):
        found = fp16.choose(made, ranges | {name: Measured(largest)}).layer_exponents()
        assert found.get(name, 0) == room
