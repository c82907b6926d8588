"""Range-safe float16: powers of two that change no value but its scale, chosen as small as the headroom allows."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from encoders import folded, outputs_of, pixels_of, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_export import fp16
from model_export.channel_first import channel_first
from model_export.fp16 import (
    hottest,
    layer_exponents,
    lift_small_weights,
    out_of_range,
    rescale,
    stream_exponents,
)
from model_export.ranges import measure_graph, measure_modules
from model_export.vision import graph

EXACT = 1e-12
LARGEST = 65504.0
DEPTHS, WIDTHS = (2, 1, 1, 2, 1), (2, 4, 4, 32, 64)
# By the module's name within its stage: what the residual stream passes through without a GELU in between.
STREAM = re.compile(
    r"pos_emb(\.reparam_conv)?|blocks\.\d+(\.(token_mixer(\.(reparam_conv|proj))?|mlp(\.(conv(\.(conv|bn))?|fc2))?"
    r"|drop_path\d?|layer_scale(_\d)?))?|blocks"
)
exponents_of_five = st.lists(st.integers(-9, 14), min_size=5, max_size=5)


@dataclass
class Measured:
    """What `fp16` wants to know of a module."""

    largest: float
    square: float | None = None


@pytest.fixture(scope="module")
def fastvit() -> nn.Module:
    return folded(3, DEPTHS, WIDTHS)


def measured(fastvit: nn.Module, size: int = 64) -> dict[str, Measured]:
    """The oracle of `measure_modules`: by hooks of our own, in float64."""
    outputs = outputs_of(fastvit, pixels_of(size))
    found = {name: Measured(float(x.abs().max())) for name, x in outputs.items() if not name.endswith("<")}
    for name, module in fastvit.named_modules():
        if isinstance(module, nn.LayerNorm):
            x = outputs[f"{name}<"]
            found[name].square = float((x - x.mean(1, keepdim=True)).square().max())
        if name.endswith(".mlp") and f"{name}<" in outputs:
            found[f"{name}:input"] = Measured(float(outputs[f"{name}<"].abs().max()))
    return found


def stage_and_rest(name: str) -> tuple[int, str] | None:
    found = re.fullmatch(r"stages\.(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else None


def in_stream(name: str) -> int | None:
    """The stage whose scaled stream a module puts out, if it does."""
    place = stage_and_rest(name)
    if not place or not STREAM.fullmatch(place[1]) or (place[0] < 3 and place[1] == "pos_emb"):
        return None  # the early stages have no position encoding
    return place[0]


# --- rescaling


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99),
    depths=st.tuples(*[st.integers(1, 2)] * 5),
    width=st.sampled_from([1, 2]),
    heads=st.sampled_from([(8, 1), (6, 2), (4, 3)]),
    bias=st.booleans(),
    sides=st.tuples(st.sampled_from([64, 96]), st.sampled_from([64, 128])),
    exponents=exponents_of_five,
)
def test_rescaled_encoder_is_the_original(
    seed: int,
    depths: tuple[int, ...],
    width: int,
    heads: tuple[int, int],
    bias: bool,
    sides: tuple[int, int],
    exponents: list[int],
) -> None:
    """Before and after `channel_first`; and every module carries just its own power of two."""
    channels = 2 * heads[0] * heads[1]
    original = folded(seed, depths, (width, 2 * width, 2 * width, channels, channels), heads[0], bias)
    x = pixels_of(*sides, seed=seed)
    expected = outputs_of(original, x)
    before = rescale(copy.deepcopy(original), exponents)
    actual = outputs_of(before, x)
    assert relative(actual["features"], expected["features"]) <= EXACT
    for name in expected.keys() & actual.keys():
        if name.endswith(("<", "drop")) or re.fullmatch(r"stages(\.\d+)?", name):
            continue  # a Dropout is called twice; a stage puts out what its last block does
        stage = in_stream(name)
        power = 2.0 ** -exponents[stage] if stage is not None else 1.0
        assert relative(actual[name], expected[name] * power) <= EXACT, name
    both = (channel_first(before), rescale(channel_first(copy.deepcopy(original)), exponents))
    for model in both:
        assert relative(outputs_of(model, x)["features"], expected["features"]) <= EXACT
    # Controls: one factor left out, or one exponent off by one somewhere, is seen.
    stage = next((number for number, k in enumerate(exponents) if k), None)
    if stage is not None:
        first = original.stages[stage].blocks[0]
        for layer in (first.mlp.fc1, first.mlp.fc2, first.mlp.conv.conv):
            broken = rescale(copy.deepcopy(original), exponents)
            other = (
                broken.stages[stage]
                .blocks[0]
                .get_submodule(next(name for name, one in first.named_modules() if one is layer))
            )
            (other.bias if layer is first.mlp.conv.conv else other.weight).data.copy_(
                layer.bias if layer is first.mlp.conv.conv else layer.weight
            )
            assert relative(outputs_of(broken, x)["features"], expected["features"]) > EXACT


def test_bit_for_bit_in_float32() -> None:
    original, x = folded(1, DEPTHS, WIDTHS, dtype=torch.float32), pixels_of(64, dtype=torch.float32)
    expected = outputs_of(original, x)["features"]
    assert torch.equal(outputs_of(rescale(copy.deepcopy(original), [3, 1, -2, 9, 12]), x)["features"], expected)
    original.stages[4].blocks[0].mlp.fc2.bias.data[0] *= 1 + 2**-20
    assert not torch.equal(outputs_of(original, x)["features"], expected)


def test_epsilon_follows_the_scale() -> None:
    """With a stream so small that eps decides; where eps does not follow, the features differ."""
    original, x = folded(5, DEPTHS, WIDTHS), pixels_of(64)
    for stage in (3, 4):
        for block in original.stages[stage].blocks:
            block.norm.eps = 3.0
    expected = outputs_of(original, x)["features"]
    exponents = [0, 0, 0, 5, 7]
    rescaled = rescale(copy.deepcopy(original), exponents)
    assert [block.norm.eps for block in rescaled.stages[3].blocks] == [3.0 / 4**5] * 2
    assert relative(outputs_of(rescaled, x)["features"], expected) <= EXACT
    rescaled.stages[4].blocks[0].norm.eps = 3.0
    assert relative(outputs_of(rescaled, x)["features"], expected) > 1e-4


def test_what_cannot_be_rescaled_is_refused(fastvit: nn.Module) -> None:
    with pytest.raises(ValueError, match="4 exponents for 5 stages"):
        rescale(copy.deepcopy(fastvit), [0] * 4)
    foreign = copy.deepcopy(fastvit)
    foreign.stages[0].blocks[1] = nn.Conv2d(2, 2, 1)
    with pytest.raises(TypeError, match="Conv2d"):
        rescale(foreign, [1] * 5)


# --- weights too small for float16


def shrunk(fastvit: nn.Module, factors: dict[str, float]) -> nn.Module:
    """A copy with these layers' weights multiplied."""
    model = copy.deepcopy(fastvit)
    for name, factor in factors.items():
        model.get_submodule(name).weight.data.mul_(factor)
        model.get_submodule(name).bias.data.mul_(factor)
    return model


SMALL = {
    "stages.0.blocks.1.mlp.fc2": 2.0**-15,
    "stages.1.blocks.0.mlp.conv.conv": 2.0**-16,
    "stages.3.blocks.0.token_mixer.proj": 2.0**-14,
    "stages.4.blocks.0.mlp.fc2": 2.0**-20,
    "stages.4.blocks.0.mlp.conv.conv": 2.0**-3,
}


@settings(max_examples=10)
@given(
    factors=st.dictionaries(st.sampled_from(sorted(SMALL)), st.integers(-22, 2), max_size=5),
    exponents=exponents_of_five,
)
def test_lifted_encoder_is_the_original(fastvit: nn.Module, factors: dict[str, int], exponents: list[int]) -> None:
    original = shrunk(fastvit, {name: 2.0**power for name, power in factors.items()})
    x = pixels_of(64)
    expected = outputs_of(original, x)
    ranges = measured(original)
    rescaled = rescale(copy.deepcopy(original), exponents)
    lifted = lift_small_weights(rescaled, ranges, exponents)
    assert all(m > 0 for m in lifted.values())
    actual = outputs_of(rescaled, x)
    assert relative(actual["features"], expected["features"]) <= EXACT
    layers = {name for name, module in original.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    powers = layer_exponents(layers, exponents, lifted)
    assert powers.keys() == layers
    for name in layers:  # what parity multiplies the reference by, layer by layer
        assert relative(actual[name], expected[name] * 2.0 ** powers[name]) <= EXACT, name
    assert relative(outputs_of(channel_first(rescaled), x)["features"], expected["features"]) <= EXACT
    if lifted:
        name = next(iter(lifted))
        wrong = layer_exponents(layers, exponents, {**lifted, name: lifted[name] + 1})
        assert relative(actual[name], expected[name] * 2.0 ** wrong[name]) > EXACT


def float16_snr_db(weight: torch.Tensor) -> float:
    noise = (weight.half().double() - weight).square().sum()
    return float(10 * torch.log10(weight.square().sum() / noise))


def test_lifting_spares_small_weights_and_no_others(fastvit: nn.Module) -> None:
    model = shrunk(fastvit, SMALL)
    ranges = measured(model)
    before = {name: float16_snr_db(model.get_submodule(name).weight) for name in SMALL}
    assert min(before.values()) < 40  # or nothing is shown
    lifted = lift_small_weights(model, ranges, [0] * 5)
    poor = {name for name, snr in before.items() if snr < 66}
    assert lifted.keys() == poor and len(poor) >= 4
    for name in lifted:
        assert float16_snr_db(model.get_submodule(name).weight) > 70
    after = outputs_of(model, pixels_of(64))
    assert all(float(after[name].abs().max()) <= LARGEST / 16 for name in lifted)
    assert lift_small_weights(model, measured(model), [0] * 5) == {}
    assert lift_small_weights(copy.deepcopy(fastvit), measured(fastvit), [0] * 5) == {}


def test_lifting_stops_where_the_values_would_get_large(fastvit: nn.Module) -> None:
    """Small weights behind large values: only as far as the headroom of 16 goes."""
    name = "stages.0.blocks.0.mlp.fc2"
    model = shrunk(fastvit, {name: 2.0**-20})
    ranges = measured(model)
    for largest, room in ((LARGEST / 16 / 8, 3), (LARGEST / 16 / 1.1, 0), (LARGEST, 0)):
        found = lift_small_weights(copy.deepcopy(model), ranges | {name: Measured(largest)}, [0] * 5)
        assert found == ({name: room} if room else {})
    scaled = rescale(copy.deepcopy(model), [2, 0, 0, 0, 0])  # the exponent makes the same value smaller
    assert lift_small_weights(scaled, ranges | {name: Measured(LARGEST / 16 / 8)}, [2, 0, 0, 0, 0])[name] == 5


def test_silent_branches_are_left_alone(fastvit: nn.Module) -> None:
    model = shrunk(fastvit, {"stages.3.blocks.0.mlp.fc2": 0.0})
    assert lift_small_weights(model, measured(model), [0] * 5) == {}


# --- choosing the exponents


magnitudes = st.floats(1e-3, 1e12) | st.sampled_from([0.0, LARGEST / 16, LARGEST, LARGEST * 2**10])


@settings(max_examples=60)
@given(data=st.data(), headroom=st.sampled_from([4.0, 16.0, 64.0]))
def test_exponent_is_the_smallest_that_keeps_the_headroom(
    fastvit: nn.Module, data: st.DataObject, headroom: float
) -> None:
    base = data.draw(st.floats(1e-3, 1e3))
    ranges: dict[str, Measured] = {}
    for name in measured(fastvit):  # what no power of two reaches is huge, and does not count
        stream = in_stream(name) is not None or name.endswith(":input")
        ranges[name] = Measured(base if stream else 1e9, base if name.endswith(".norm") else None)
    names = [name for name in sorted(ranges) if is_leaf_of_stream(name)]
    for name, value in data.draw(st.dictionaries(st.sampled_from(names), magnitudes)).items():
        ranges[name] = Measured(1e9, value) if name.endswith(".norm") else Measured(value)
    values, squares = [0.0] * 5, [0.0] * 5
    for name in names:
        stage = int(name.split(".")[1])
        if name.endswith(".norm"):
            squares[stage] = max(squares[stage], ranges[name].square or 0.0)
        else:
            values[stage] = max(values[stage], ranges[name].largest)
    found = stream_exponents(fastvit, ranges, headroom)

    def safe(stage: int, k: int) -> bool:
        return values[stage] * 2.0**-k <= LARGEST / headroom and squares[stage] * 4.0**-k <= LARGEST / headroom

    for stage, k in enumerate(found):
        assert k >= 0 and safe(stage, k) and (k == 0 or not safe(stage, k - 1)), (stage, k)


def is_leaf_of_stream(name: str) -> bool:
    """A module that puts out a value of the stream, or a LayerNorm of it; containers put out what these do."""
    place = stage_and_rest(name)
    return (
        bool(place)
        and bool(
            re.fullmatch(
                r"pos_emb\.reparam_conv|blocks\.\d+(\.token_mixer\.(reparam_conv|proj)|\.mlp\.(conv\.conv|fc2)|\.norm"
                r"|\.mlp:input)?",
                place[1],
            )
        )
        and not (name.endswith(":input") and place[0] < 3)
    )


def test_headroom_is_16_unless_told_and_negative_powers_are_not_used(fastvit: nn.Module) -> None:
    ranges: dict[str, Measured] = {name: Measured(LARGEST / 16, 0.0) for name in measured(fastvit)}
    assert stream_exponents(fastvit, ranges) == [0] * 5
    ranges["stages.2.blocks.0.mlp.fc2"].largest = math.nextafter(LARGEST / 16, math.inf)
    ranges["stages.4.blocks.0.norm"].square = LARGEST / 16 * 4**3 * 1.001
    assert stream_exponents(fastvit, ranges) == [0, 0, 1, 0, 4]
    tiny = {name: Measured(1e-30, 1e-30) for name in ranges}
    assert stream_exponents(fastvit, tiny) == [0] * 5


def test_module_that_was_not_measured_is_an_error(fastvit: nn.Module) -> None:
    ranges = measured(fastvit)
    for name in ("stages.3.blocks.1.mlp:input", "stages.0.blocks.0.mlp.fc2", "stages.4.blocks.0.norm"):
        with pytest.raises(KeyError, match=re.escape(name)):
            stream_exponents(fastvit, {key: one for key, one in ranges.items() if key != name})


def test_measured_modules_are_enough_and_give_the_same(fastvit: nn.Module) -> None:
    """The export's own measurement against the hooks of this file."""
    model = copy.deepcopy(fastvit).float()
    found = measure_modules(model, [pixels_of(64, dtype=torch.float32).numpy()])
    own = measured(fastvit)
    for headroom in (16.0, 2.0**20):  # the second makes every stage need a power
        exponents = stream_exponents(model, found, headroom)
        assert exponents == stream_exponents(fastvit, own, headroom)
    assert all(exponents)


@settings(max_examples=20)
@given(exponents=exponents_of_five)
def test_hottest_is_what_the_rescaled_encoder_holds(fastvit: nn.Module, exponents: list[int]) -> None:
    found = hottest(fastvit, measured(fastvit), exponents)
    rescaled = rescale(copy.deepcopy(fastvit), exponents)
    outputs = outputs_of(rescaled, pixels_of(64))
    real = {name: float(x.abs().max()) for name, x in outputs.items() if not name.endswith("<")}
    name = max(real, key=real.__getitem__)
    assert found.largest == pytest.approx(real[name], rel=1e-9)
    assert real[found.name.replace(":input", "")] == pytest.approx(found.largest) or found.name.endswith(":input")
    assert found.headroom == pytest.approx(LARGEST / real[name], rel=1e-9)
    squares = []
    for name, module in rescaled.named_modules():
        if isinstance(module, nn.LayerNorm):
            x = outputs[f"{name}<"]
            squares.append(float((x - x.mean(1, keepdim=True)).square().max()))
    assert found.square == pytest.approx(max(squares), rel=1e-9)
    assert found.square_headroom == pytest.approx(LARGEST / max(squares), rel=1e-9)


def test_hottest_names_the_value_that_no_power_reaches(fastvit: nn.Module) -> None:
    ranges: dict[str, Measured] = measured(fastvit)
    ranges["stages.1.blocks.0.mlp.fc1"].largest = 7e4
    ranges["stages.3.blocks.0.mlp.fc2"].largest = 9e4
    assert hottest(fastvit, ranges, [0] * 5).name == "stages.3.blocks.0.mlp.fc2"
    after = hottest(fastvit, ranges, [0, 0, 0, 6, 0])
    assert (after.name, after.largest) == ("stages.1.blocks.0.mlp.fc1", 7e4)
    assert after.headroom == pytest.approx(LARGEST / 7e4)
    assert fp16.Hottest("x", 1.0, 0.0).square_headroom is None


# --- what stays in float32


@pytest.fixture(scope="module")
def nodes() -> list[SimpleNamespace]:
    """A chain with a branch: a -> b -> c -> d, b -> e."""
    made: dict[str, SimpleNamespace] = {}
    for name, op, inputs in (
        ("images", "placeholder", ()), ("a", "call_function", ("images",)), ("b", "call_function", ("a",)),
        ("c", "call_function", ("b",)), ("d", "call_function", ("c",)), ("e", "call_function", ("b",)),
        ("output", "output", ("d", "e")),
    ):  # fmt: skip
        made[name] = SimpleNamespace(name=name, op=op, all_input_nodes=[made[one] for one in inputs])
    return list(made.values())


@pytest.mark.parametrize(
    ("hot", "expected"),
    [
        ({}, set()),
        ({"a": 2e4}, {"a", "b"}),
        ({"b": 1e30}, {"b", "c", "e"}),
        ({"d": 2e4}, {"d"}),
        ({"images": 2e4}, {"a"}),
        ({"a": 16376.0}, set()),
        ({"a": 16376.5}, {"a", "b"}),
    ],
)
def test_operations_that_give_or_take_a_large_value(
    nodes: list[SimpleNamespace], hot: dict[str, float], expected: set[str]
) -> None:
    largest = {"a": 1.0, "b": 1.0, "c": 1.0} | hot
    assert out_of_range(SimpleNamespace(nodes=nodes), largest) == expected


def test_out_of_range_of_a_real_graph() -> None:
    """By the graph's own names: the convolution before a GELU, the GELU, and the convolution after it."""
    model = folded(3, DEPTHS, WIDTHS, dtype=torch.float32)
    model.stages[1].blocks[0].mlp.fc1.weight.data *= 1e6
    program = graph(channel_first(model), 64)
    ranges = measure_graph(program, [pixels_of(64, dtype=torch.float32).numpy()])
    found = out_of_range(program.graph, {one.name: one.largest for one in ranges})
    kinds: Callable[[str], str] = lambda name: re.sub(r"_\d+$", "", name)  # noqa: E731
    where = {
        node.name: list(node.meta["nn_module_stack"].values())[-1][0].removeprefix("fastvit.")
        for node in program.graph.nodes
        if node.name in found
    }
    assert {"stages.1.blocks.0.mlp.fc1", "stages.1.blocks.0.mlp.act", "stages.1.blocks.0.mlp.fc2"} <= set(
        where.values()
    )
    cool = {one.name for one in ranges if one.largest * 4 <= LARGEST}
    takers = {
        node.name for node in program.graph.nodes if any(n.name not in cool and n.name in {r.name for r in ranges}
                                                         for n in node.all_input_nodes)
    }  # fmt: skip
    assert {kinds(name) for name in found} >= {"conv2d", "gelu"}
    assert found == {node.name for node in program.graph.nodes if node.op == "call_function"} & (
        takers | {one.name for one in ranges if one.name not in cool}
    )
