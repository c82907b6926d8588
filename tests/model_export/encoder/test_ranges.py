"""Ranges: every figure against plain NumPy, one thing made larger moves one figure, and the verb end to end."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import mil_packages
import numpy as np
import pytest
import torch
from encoders import heated, outputs_of
from helpers import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torch import nn

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import UserError
from model_export import mil
from model_export.audit.range_summary import summary, times
from model_export.audit.ranges_plot import write_plot
from model_export.encoder import vision
from model_export.encoder.coreml import coremltools, quiet_conversion
from model_export.encoder.package_ranges import measure_package
from model_export.encoder.ranges import (
    Range,
    largest,
    largest_square,
    measure_checkpoint,
    measure_modules,
    subnormal_share,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fastvit(tiny_checkpoint: Path) -> nn.Module:
    return vision.folded_encoder(open_checkpoint(tiny_checkpoint))[0]


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.random((1, 3, 128, 128), dtype=np.float32) * scale for scale in (0.3, 1.0)]


@pytest.fixture(scope="module")
def modules(fastvit: nn.Module, pixels: list[np.ndarray]) -> dict[str, Range]:
    return measure_modules(fastvit, pixels, subnormals=True)


@pytest.fixture(scope="module")
def rows(modules: dict[str, Range]) -> list[Range]:
    """In a list, as the verb has them."""
    return [*modules.values()]


@pytest.fixture(scope="module")
def truth(fastvit: nn.Module, pixels: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The oracle: what a float64 copy computes."""
    return values_of(copy.deepcopy(fastvit).double(), [array.astype(np.float64) for array in pixels])


def values_of(model: nn.Module, pixels: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Every module's own values by name, outputs and (as `NAME<`) inputs, over the pictures (first axis)."""
    seen = [outputs_of(model, torch.from_numpy(array)) for array in pixels]
    return {name: np.stack([one[name].numpy() for one in seen]) for name in seen[0]}


def square_of(x: np.ndarray) -> float:
    """(pictures, B, C, H, W): the largest squared distance from the mean over C."""
    return float(((x - x.mean(axis=2, keepdims=True)) ** 2).max())


# -- figures ----------------------------------------------------------------------------------------------------------


@given(arrays.arrays(np.float16, arrays.array_shapes(max_dims=4, max_side=6)))
@settings(max_examples=60)
def test_subnormals_are_those_of_ieee_754(values: np.ndarray) -> None:
    bits = values.view(np.uint16)
    subnormal, zero = ((bits & 0x7C00) == 0) & ((bits & 0x3FF) != 0), (bits & 0x7FFF) == 0
    expected = subnormal.sum() / max((~zero).sum(), 1)
    assert subnormal_share([torch.from_numpy(values).float()]) == pytest.approx(expected)


@given(arrays.arrays(np.float32, (2, 4, 3, 5), elements=st.floats(-1e6, 1e6, width=32)), st.integers(0, 3))
@settings(max_examples=60)
def test_largest_square_is_numpys(values: np.ndarray, axis: int) -> None:
    wide = values.astype(np.float64)
    expected = ((wide - wide.mean(axis=axis, keepdims=True)) ** 2).max()
    assert largest_square(torch.from_numpy(values), (axis,)) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_figures_of_strided_and_empty_values() -> None:
    values = torch.arange(-24.0, 24.0).reshape(2, 4, 6)[:, ::2].transpose(0, 2)
    assert largest(values, "x") == 24.0 and largest(values[:0], "x") == 0.0
    assert subnormal_share([values * 2.0**-16]) == pytest.approx(sum(0 < abs(v) < 4 for v in values.flatten()) / 23)
    cold = Range("x", "conv", None, 0.0)
    assert cold.headroom == cold.square_headroom == float("inf")
    assert (
        Range("x", "conv", None, 65504.0, 131008.0).headroom == 1
        and Range("x", "n", None, 1, 131008.0).square_headroom == 0.5
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(fastvit: nn.Module, pixels: list[np.ndarray], value: float) -> None:
    broken = copy.deepcopy(fastvit)
    with torch.no_grad():
        broken.stages[2].blocks[0].mlp.fc1.bias[3] = value
    with pytest.raises(UserError, match=r"stages\.2\.blocks\.0\.mlp\.fc1: not finite even in float32"):
        measure_modules(broken, pixels)
    assert not any(module._forward_hooks for module in broken.modules())
    with pytest.raises(UserError, match="no picture"):
        measure_modules(fastvit, [])


# -- modules, for the export ------------------------------------------------------------------------------------------


def scores_of(qkv: np.ndarray, head: int = 32) -> np.ndarray:
    """q k^T / sqrt(head) of all heads, from (N, 3 C): queries first, then keys, heads of 32 channels side by side."""
    channels = qkv.shape[1] // 3
    starts = range(0, channels, head)
    products = [qkv[:, i : i + head] @ qkv[:, channels + i : channels + i + head].T for i in starts]
    return np.stack(products) / np.sqrt(head)


def test_modules_hold_what_float64_says(
    modules: dict[str, Range], truth: dict[str, np.ndarray], fastvit: nn.Module
) -> None:
    leaves = {name for name, module in fastvit.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear, nn.GELU))}
    blocks = {f"stages.{stage}.blocks.{i}" for stage in range(5) for i in range(len(fastvit.stages[stage].blocks))}
    assert leaves | blocks <= modules.keys()
    assert {int(np.abs(both).reshape(2, -1).max(1).argmax()) for both in truth.values()} == {0, 1}  # of all pictures
    for name, found in modules.items():
        mixer, _, part = name.partition(":")
        if part == "scores":
            expected = np.stack([scores_of(one[0]) for one in truth[f"{mixer}.qkv"]])
        elif part in ("queries", "keys", "values"):
            third = np.split(truth[f"{mixer}.qkv"], 3, -1)[("queries", "keys", "values").index(part)]
            expected = third * (32**-0.5 if part == "queries" else 1)
        else:
            expected = truth[name.removesuffix(":input") + ("<" if name.endswith(":input") else "")]
        assert found.largest == pytest.approx(np.abs(expected).max(), rel=1e-4), name
    norms = {name: found.square for name, found in modules.items() if found.square}
    assert norms.keys() == {"stages.3.blocks.0.norm", "stages.4.blocks.0.norm"}
    for name, square in norms.items():
        assert square == pytest.approx(square_of(truth[f"{name}<"]), rel=1e-4)
        assert square != pytest.approx(square_of(truth[name]), rel=0.1)  # control: the norm's input, not its output


def test_modules_come_in_order_and_leave_no_hook(modules: dict[str, Range], fastvit: nn.Module) -> None:
    order = list(modules)
    chain = ["stem.0.reparam_conv", "stem.0", "stages.3.pos_emb.reparam_conv", "stages.3.blocks.0.norm"]
    chain += ["stages.3.blocks.0.mlp:input", "stages.3.blocks.0.mlp.fc2", "stages.3.blocks.0", "final_conv"]
    assert [name for name in order if name in chain] == chain
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fastvit.modules())


def test_changes_in_place_are_seen_as_they_were() -> None:
    class Tower(nn.Sequential):
        forward_features = nn.Sequential.forward

    layer = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        layer.weight.copy_(-torch.eye(3)[:, :, None, None])
        layer.bias.zero_()
    found = measure_modules(Tower(layer, nn.ReLU(inplace=True)), [np.ones((1, 3, 2, 2), np.float32)])
    assert [one.largest for one in found.values()] == [1.0, 0.0]


def test_one_louder_layer_moves_its_figure_alone(
    fastvit: nn.Module, pixels: list[np.ndarray], modules: dict[str, Range]
) -> None:
    louder = copy.deepcopy(fastvit)
    mlp = louder.stages[2].blocks[1].mlp
    with torch.no_grad():
        mlp.conv.conv.weight.mul_(4)
        mlp.conv.conv.bias.mul_(4)
        mlp.fc1.weight.div_(4)
    found = measure_modules(louder, pixels)
    moved = {
        name: found[name].largest / modules[name].largest
        for name in modules
        if found[name].largest != modules[name].largest
    }
    assert moved == {"stages.2.blocks.1.mlp.conv.conv": 4.0, "stages.2.blocks.1.mlp.conv": 4.0}


def test_subnormal_shares_of_values_and_weights(
    rows: list[Range], pixels: list[np.ndarray], fastvit: nn.Module
) -> None:
    values = values_of(copy.deepcopy(fastvit), pixels)  # in float32: where its GELU ends in zeros, float64's does not
    for one in rows:
        if one.type in ("Conv2d", "GELU"):
            magnitudes = np.abs(values[one.name])
            expected = ((magnitudes < 2.0**-14) & (magnitudes > 0)).sum() / (magnitudes > 0).sum()
            assert one.subnormal == pytest.approx(expected, abs=1e-3), one
        if one.type == "Conv2d":
            layer = fastvit.get_submodule(one.name)
            weights = torch.cat([layer.weight.flatten(), layer.bias.flatten()]).numpy()
            assert one.weight_subnormal == pytest.approx((np.abs(weights) < 2.0**-14).sum() / (weights != 0).sum())
    assert max(one.subnormal for one in rows) > 0.01 and max(one.weight_subnormal for one in rows) > 0.01


def test_containers_are_those_that_compute_nothing(modules: dict[str, Range], fastvit: nn.Module) -> None:
    containers = {name for name, one in modules.items() if one.type == "container"}
    assert {"stages.3", "stages.3.blocks", "stages.3.blocks.0.mlp", "stem.0", "final_conv"} <= containers
    assert (
        modules["stages.3.blocks.0"].type == "AttentionBlock" and modules["stages.0.blocks.0"].type == "RepMixerBlock"
    )
    leaves = {name for name, module in fastvit.named_modules() if not [*module.children()]}
    assert not containers & leaves


# -- a package --------------------------------------------------------------------------------------------------------


def save_program(path: Path, gain: float = 1.0, precision: Any = None, constexpr: bool = False) -> Path:
    """cast, conv (gain 3 x 3 of 0.5, -2, 1), LayerNorm over channels, split in two; all known in closed form."""
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 3, 64, 64))], opset_version=ct.target.iOS16)
    def program(images: Any) -> Any:
        weight: Any = np.diag([0.5, -2.0, 1.0]).astype(np.float32)[:, :, None, None] * np.float32(gain)
        if constexpr:
            data = np.diag([1, -4, 2]).astype(np.int8)[:, :, None, None]
            scale, zero = np.float16(2.0**-16), np.int8(0)
            weight = mb.constexpr_affine_dequantize(quantized_data=data, zero_point=zero, scale=scale, axis=0)
            images = mb.cast(x=images, dtype="fp16")
        x = mb.conv(x=images, weight=weight, name="first")
        x = mb.layer_norm(x=x, axes=[1], epsilon=np.float16(1e-5) if constexpr else np.float32(1e-5), name="norm")
        left, right = mb.split(x=x, split_sizes=[1, 2], axis=1, name="halves")
        return mb.concat(values=[right, left], axis=1, name="out")

    with quiet_conversion():
        model = ct.convert(
            program,
            convert_to="mlprogram",
            compute_precision=precision or ct.precision.FLOAT16,
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
        )
        model.save(str(path))
    return path


def measured(package: Path, pixels: list[np.ndarray], function: str | None = None) -> dict[str, Range]:
    found = measure_package(mil.load(package, compute="float32", function_name=function), pixels)
    return {one.type: one for one in found}


@pytest.fixture(scope="module")
def small() -> list[np.ndarray]:
    return [np.random.default_rng(1).random((1, 3, 64, 64), dtype=np.float32) * np.float32(1000)]


def test_package_holds_what_numpy_says(tmp_path: Path, small: list[np.ndarray]) -> None:
    found = measured(save_program(tmp_path / "a.mlpackage"), small)
    first = small[0].astype(np.float64) * np.array([0.5, -2.0, 1.0])[:, None, None]
    assert found["conv"].largest == pytest.approx(np.abs(first).max(), rel=1e-6)
    assert found["layer_norm"].square == pytest.approx(square_of(first[None]), rel=1e-6)
    deviation = (first - first.mean(1, keepdims=True)) / first.std(1, keepdims=True)
    assert found["layer_norm"].largest == found["concat"].largest == pytest.approx(np.abs(deviation).max(), rel=1e-3)
    assert found["split"].largest == found["layer_norm"].largest  # of both halves together
    assert {one.dtype for one in found.values()} == {"fp16", "fp32"} and found["conv"].dtype == "fp16"
    assert found["conv"].weight_subnormal == 0.0

    louder = measured(save_program(tmp_path / "b.mlpackage", gain=64.0), small)  # the norm undoes it
    moved = {type for type in found if louder[type].largest != pytest.approx(found[type].largest, rel=1e-3)}
    assert moved == {"conv"} and louder["conv"].headroom < 1  # seen, not lost in an infinity
    assert louder["layer_norm"].square == pytest.approx(64**2 * found["layer_norm"].square, rel=1e-6)
    assert "1 overflow;" in summary(list(louder.values()))["verdict"]


def test_float32_operations_of_a_mixed_package_are_not_judged(tmp_path: Path, small: list[np.ndarray]) -> None:
    ct = coremltools()
    half_but_first = ct.transform.FP16ComputePrecision(op_selector=lambda op: op.op_type != "conv")
    found = measured(save_program(tmp_path / "a.mlpackage", 64.0, half_but_first), small)
    assert found["conv"].dtype == "fp32" and found["conv"].headroom < 1
    assert summary(list(found.values()))["smallest_headroom_at"] != "first"
    wide = measured(save_program(tmp_path / "b.mlpackage", 64.0, ct.precision.FLOAT32), small)
    document = summary(list(wide.values()))
    assert document["smallest_headroom_at"] == "first" and document["verdict"].startswith(
        "in a float32 program, were it float16:"
    )


def test_compressed_weights_are_unpacked(tmp_path: Path, small: list[np.ndarray]) -> None:
    found = measured(save_program(tmp_path / "a.mlpackage", constexpr=True), small)
    assert found["conv"].weight_subnormal == pytest.approx(2 / 3)  # 2^-16 and 2^-15 are, -2^-14 is the smallest normal
    assert found["conv"].largest == pytest.approx(
        max(abs(small[0] * w)[:, i].max() for i, w in enumerate([2**-16, 2**-14, 2**-15])), rel=1e-3
    )


def test_both_front_ends_agree(tiny_artefact: Path, tiny_checkpoint: Path, pixels: list[np.ndarray]) -> None:
    package = measure_package(mil.load(tiny_artefact / "fastvithd.mlpackage", compute="float32"), pixels)
    checkpoint = {one.name: one for one in measure_checkpoint(open_checkpoint(tiny_checkpoint), pixels)}
    convolutions = [one for one in package if one.type == "conv" and not str(one.layer).endswith(".qkv")]
    assert len(convolutions) > 30
    for one in convolutions:
        assert one.largest == pytest.approx(checkpoint[str(one.layer)].largest, rel=0.01), one  # weights in float16


# -- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hot_checkpoint(tiny_fast_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 4's stream 60,000 times as large, the function as it was."""
    return heated(tiny_fast_vlm, tmp_path_factory.mktemp("hot") / "model", {4: 60_000.0})


def test_verb_on_a_hot_checkpoint(cli: Any, hot_checkpoint: Path, tmp_path: Path) -> None:
    before = contents(hot_checkpoint)
    plot = tmp_path / "new" / "a.svg"
    answer = cli("ranges", "--checkpoint", hot_checkpoint, "--limit", 1, "--top", 3, "--plot", plot, "--json")
    assert answer.code == 0 and contents(hot_checkpoint) == before
    document = answer.document
    assert document["verdict"] in answer.err and "overflow" in document["verdict"] and document["plot"] == str(plot)
    assert (document["image_size"], document["pictures"][:6]) == (128, "1 of 2")
    table = [line for line in answer.err.splitlines() if line.startswith("  layer ")]
    assert len(table) == 3 and "stages.4.blocks.0.norm" in table[0] and "stages.4" in table[1]
    by_name = {one["name"]: one for one in document["operations"]}
    assert next(iter(by_name)) == "stem.0.reparam_conv" and len(by_name) == len(document["operations"]) > 80
    hottest = by_name[document["smallest_headroom_at"]]
    assert hottest["layer"].startswith("stages.4") and hottest["headroom"] == document["smallest_headroom"] < 1
    assert hottest["largest"] == max(one["largest"] for one in document["operations"])
    assert hottest["exponent"] > 0 and document["smallest_exported_headroom"] >= 16
    assert document["overflows"] >= 3 and document["square_overflows"] == 1
    assert by_name[document["largest_square_at"]]["layer"] == "stages.4.blocks.0.norm"
    assert "square " in plot.read_text() and "stage 4" in plot.read_text()
    assert [path.name for path in plot.parent.iterdir()] == ["a.svg"]


def test_verb_on_an_artefact_and_on_its_package(cli: Any, tiny_artefact: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("b.png", "a.jpg", ".hidden.png", "note.txt")):
        Image.fromarray(np.full((80, 120, 3), 60 * number, np.uint8)).save(tmp_path / name, "png" if number else None)
    flags = ("--images", tmp_path, "--json")
    whole, alone, one = (
        cli("ranges", "--model", model, *flags, *more).document
        for model, more in (
            (tiny_artefact, ()),
            (tiny_artefact / "fastvithd.mlpackage", ()),
            (tiny_artefact, ("--limit", 1)),
        )
    )
    assert whole["pictures"] == f"2 of 2 pictures in {tmp_path}"
    assert whole["function"] == "main" and whole["image_size"] == 128
    assert whole["runner"].startswith("MIL executor") and whole["operations"] == alone["operations"]
    assert one["operations"] != whole["operations"]  # control: the pictures do matter


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((), "--checkpoint or --model: is missing"),
        (("--checkpoint", "C", "--model", "M"), "not allowed with"),
        (("--checkpoint", "C", "--limit", "0", "--top", "x"), "--limit: got 0.*--top: got x"),
        (("--checkpoint", "C", "--image-size", "100"), "--image-size: got 100"),
        (("--checkpoint", "C", "--function", "f", "--plot", "a.pdf"), "--function: a checkpoint.*--plot a.pdf"),
        (("--model", "M", "--image-size", "128", "--plot", "a.pdf"), "--image-size: a package.*--plot a.pdf"),
        (("--model", "TMP/none"), "no such package"),
        (("--model", "TMP/vector.mlpackage"), r"expected one picture of a fixed size, \(1, 3, S, S\)"),
        (("--checkpoint", "TMP/none"), "none"),
        (("--checkpoint", "TINY", "--images", "TMP/none"), "not a folder"),
        (("--checkpoint", "TINY", "--images", "TMP/bad"), "one.png.*two.png"),
    ],
)
def test_unusable_input(cli: Any, tiny_checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("one.png", "two.png"):
        (tmp_path / "bad" / name).write_bytes(b"not a picture")
    if "TMP/vector.mlpackage" in arguments:
        mil_packages.save_program(tmp_path / "vector.mlpackage", lambda x: x, {"x": np.zeros((1, 7), np.float16)})
    words = [word.replace("TMP", str(tmp_path)).replace("TINY", str(tiny_checkpoint)) for word in arguments]
    answer = cli("ranges", *words)
    assert answer.code == 2 and re.search(what, answer.err) and not answer.out
    assert [line for line in answer.err.splitlines() if line.startswith("error:")] == answer.err.splitlines()[-1:]


# -- the plot ---------------------------------------------------------------------------------------------------------


def drawn(ranges: list[Range], target: Path) -> bytes:
    write_plot(ranges, target, "title")
    return target.read_bytes()


def test_plot_repeats_and_shows_a_change(rows: list[Range], tmp_path: Path) -> None:
    first = drawn(rows, tmp_path / "a.png")
    assert first == drawn(rows, tmp_path / "b.png")
    hotter = [*rows[:-9], Range("x", "conv", "stages.4.x", 1e5, 1e12, 0.2, 0.4), *rows[-9:]]
    assert first != drawn(hotter, tmp_path / "a.png")
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), dtype=int)
    assert image.shape[1] > 1500 and (image.sum(2) < 700).mean() > 0.01
    assert b"date" not in drawn(rows, tmp_path / "a.svg")


@pytest.mark.parametrize("values", [(0.0, 0.0), (1e30, 3.0)])
def test_plot_of_the_extremes(tmp_path: Path, values: tuple[float, float]) -> None:
    assert drawn([Range(str(i), "conv", None, value) for i, value in enumerate(values)], tmp_path / "a.png")


def test_plot_that_cannot_be_written_leaves_nothing(tmp_path: Path, rows: list[Range]) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError):
        write_plot(rows, tmp_path / "taken.png", "title")
    assert os.listdir(tmp_path) == ["taken.png"]


def test_times() -> None:
    assert [times(x) for x in (0.0001, 0.5, 12.345, 400.2, 65504.0)] == ["0.0001x", "0.50x", "12.3x", "400x", "65,504x"]
