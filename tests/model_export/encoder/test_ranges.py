"""Ranges: every figure against plain NumPy, one thing made larger moves one figure, and the verb end to end."""

import argparse
import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import heated as heated_checkpoint
from encoders import outputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torch import nn

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.arguments import Parser
from fastvlm.common.cli import add_common, run
from fastvlm.common.errors import UserError
from model_export import mil
from model_export.audit.range_summary import summary, times
from model_export.audit.ranges_plot import write_plot
from model_export.audit.ranges_report import add_ranges
from model_export.encoder import vision
from model_export.encoder.channel_first import Encoder, channel_first
from model_export.encoder.coreml import coremltools, quiet_conversion
from model_export.encoder.package_ranges import measure_package
from model_export.encoder.ranges import (
    Range,
    largest,
    largest_square,
    layer_name,
    measure_graph,
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
    return measure_modules(fastvit, pixels)


@pytest.fixture(scope="module")
def operations(fastvit: nn.Module, pixels: list[np.ndarray]) -> list[Range]:
    """Of the graph as timm has it, with fused attention and LayerNorms between permutes."""
    return measure_graph(vision.graph(Encoder(fastvit), 128).run_decompositions({}), pixels)


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


def heated(fastvit: nn.Module, stage: int, factor: float) -> nn.Module:
    """The same function (up to LayerNorm's eps), but the stage's stream is `factor` times as large."""
    model = copy.deepcopy(fastvit)
    blocks = model.stages[stage].blocks
    last = stage == len(model.stages) - 1
    ends = model.final_conv if last else model.stages[stage + 1].downsample.proj[0]
    louder = [model.stages[stage].pos_emb.reparam_conv]
    louder += [layer for block in blocks for layer in (block.token_mixer.proj, block.mlp.fc2)]
    with torch.no_grad():
        for layer in louder:
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
        for layer in [*(block.mlp.conv.conv for block in blocks), ends.reparam_conv]:
            layer.weight.div_(factor)
    return model


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


def test_nothing_to_measure_on_is_refused(fastvit: nn.Module) -> None:
    with pytest.raises(UserError, match="no picture"):
        measure_modules(fastvit, [])
    with pytest.raises(UserError, match="no picture"):
        measure_graph(vision.graph(Encoder(fastvit), 128), [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fastvit.stages.3.blocks.0.mlp.fc2", "stages.3.blocks.0.mlp.fc2"),
        ("fastvit.final_conv", "final_conv"),
        ("stem.0.reparam_conv", "stem.0.reparam_conv"),
        ("p_fastvit_stages_3_blocks_0_token_mixer_qkv_weight_to_fp16", "stages.3.blocks.0.token_mixer.qkv"),
        ("p_fastvit_final_conv_reparam_conv_bias_to_fp16", "final_conv.reparam_conv"),
        ("p_fastvit_stages_4_pos_emb_reparam_conv_weight_palettized", "stages.4.pos_emb.reparam_conv"),
        ("linear_0_bias_0_to_fp16", None),
        ("", None),
    ],
)
def test_layer_names(text: str, name: str | None) -> None:
    assert layer_name(text) == name


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


def test_largest_over_all_pictures_not_of_the_last(
    fastvit: nn.Module, pixels: list[np.ndarray], modules: dict[str, Range]
) -> None:
    singles = [measure_modules(fastvit, [array]) for array in pixels]
    assert any(singles[0][name].largest > singles[1][name].largest for name in modules)  # else this proves nothing
    for name, found in modules.items():
        assert found.largest == max(single[name].largest for single in singles)


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
    moved = {name: found[name].largest / modules[name].largest for name in modules if found[name] != modules[name]}
    assert moved == {"stages.2.blocks.1.mlp.conv.conv": 4.0, "stages.2.blocks.1.mlp.conv": 4.0}


# -- the graph, for a checkpoint --------------------------------------------------------------------------------------


def test_operations_hold_what_float64_says(operations: list[Range], truth: dict[str, np.ndarray]) -> None:
    compared = 0
    for one in operations:
        if one.type in ("conv2d", "linear", "gelu", "layer_norm"):
            values = truth[str(one.layer)]
            assert one.largest == pytest.approx(np.abs(values).max(), rel=1e-4), one
            compared += 1
    assert compared == 38 + 4 + 18 + 2
    norms = [one for one in operations if one.square]
    assert [one.layer for one in norms] == ["stages.3.blocks.0.norm", "stages.4.blocks.0.norm"]
    for one in norms:
        assert one.type == "layer_norm" and one.square == pytest.approx(square_of(truth[f"{one.layer}<"]), rel=1e-4)


def test_scores_of_fused_attention_are_an_operation(operations: list[Range], truth: dict[str, np.ndarray]) -> None:
    (scores, *_) = [one for one in operations if one.name.endswith(":scores")]
    qkv = truth["stages.3.blocks.0.token_mixer.qkv"]  # (pictures, 1, N, 3 C), heads of 32
    q, k, _ = np.split(qkv, 3, axis=-1)
    heads = [slice(start, start + 32) for start in range(0, q.shape[-1], 32)]
    expected = max(np.abs(q[..., h] @ k[..., h].swapaxes(-1, -2)).max() for h in heads) / 32**0.5
    assert scores.largest == pytest.approx(expected, rel=1e-4) and scores.layer == "stages.3.blocks.0.token_mixer"


def test_subnormal_shares_of_values_and_weights(
    operations: list[Range], pixels: list[np.ndarray], fastvit: nn.Module
) -> None:
    values = values_of(copy.deepcopy(fastvit), pixels)  # in float32: where its GELU ends in zeros, float64's does not
    for one in operations:
        if one.type in ("conv2d", "gelu"):
            magnitudes = np.abs(values[str(one.layer)])
            expected = ((magnitudes < 2.0**-14) & (magnitudes > 0)).sum() / (magnitudes > 0).sum()
            assert one.subnormal == pytest.approx(expected, abs=1e-4), one
        if one.type == "conv2d":
            layer = fastvit.get_submodule(str(one.layer))
            weights = torch.cat([layer.weight.flatten(), layer.bias.flatten()]).numpy()
            assert one.weight_subnormal == pytest.approx((np.abs(weights) < 2.0**-14).sum() / (weights != 0).sum())
    assert max(one.subnormal for one in operations) > 0.01 and max(one.weight_subnormal for one in operations) > 0.01


def test_channel_first_graph_has_one_layer_norm_each(
    fastvit: nn.Module, pixels: list[np.ndarray], truth: dict[str, np.ndarray]
) -> None:
    found = measure_graph(vision.graph(Encoder(channel_first(copy.deepcopy(fastvit))), 128), pixels)
    norms = [one for one in found if one.type == "layer_norm"]
    assert [one.layer for one in norms] == ["stages.3.blocks.0.norm", "stages.4.blocks.0.norm"]
    for one in norms:
        assert one.square == pytest.approx(square_of(truth[f"{one.layer}<"]), rel=1e-4)
    assert not any(one.type == "rsqrt" for one in found)


@pytest.mark.parametrize("stage", [3, 4])
def test_a_hot_stream_shows_in_its_stage_alone(
    fastvit: nn.Module, pixels: list[np.ndarray], modules: dict[str, Range], stage: int
) -> None:
    factor = 2.0**14
    hot = measure_modules(heated(fastvit, stage, factor), pixels)
    stream = {f"stages.{stage}.{name}" for name in ("pos_emb", "pos_emb.reparam_conv", "blocks", "blocks.0")}
    stream |= {f"stages.{stage}.blocks.0.{name}" for name in ("mlp:input", "mlp", "mlp.fc2", "token_mixer")}
    stream |= {f"stages.{stage}.blocks.0.token_mixer.proj", f"stages.{stage}"}
    for name, found in hot.items():
        expected = factor if name in stream else 1.0
        assert found.largest / modules[name].largest == pytest.approx(expected, rel=1e-3), name
    norm = f"stages.{stage}.blocks.0.norm"
    assert hot[norm].square / modules[norm].square == pytest.approx(factor**2, rel=1e-3)
    assert hot[norm].square_headroom < 1 < modules[norm].square_headroom
    assert hot[f"stages.{stage}"].headroom < 1 < modules[f"stages.{stage}"].headroom


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
    from model_export.encoder.ranges import measure_checkpoint

    package = measure_package(mil.load(tiny_artefact / "fastvithd.mlpackage", compute="float32"), pixels)
    checkpoint = measure_checkpoint(open_checkpoint(tiny_checkpoint), 128, pixels)
    pairs = [
        [one for one in found if one.type.startswith("conv") and "concat" not in one.type]
        for found in (package, checkpoint)
    ]
    assert [one.layer for one in pairs[0]] == [one.layer for one in pairs[1]] and len(pairs[0]) > 30
    for a, b in zip(*pairs):
        assert a.largest == pytest.approx(b.largest, rel=0.01), (a, b)  # weights rounded to float16


# -- the verb ---------------------------------------------------------------------------------------------------------


def build() -> argparse.ArgumentParser:
    parser = Parser(prog="ranges")
    add_common(add_ranges(parser.add_subparsers(dest="verb", required=True, parser_class=Parser)))
    return parser


def ranges(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = run(build, ["ranges", *map(str, arguments)])
    except SystemExit as error:
        code = int(str(error.code))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def hot_checkpoint(tiny_fast_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 4's stream 60,000 times as large, the function as it was."""
    return heated_checkpoint(tiny_fast_vlm, tmp_path_factory.mktemp("hot") / "model", {4: 60_000.0})


def test_verb_on_a_hot_checkpoint(capsys: pytest.CaptureFixture[str], hot_checkpoint: Path, tmp_path: Path) -> None:
    before = listing(hot_checkpoint)
    code, out, told = ranges(
        capsys, "--checkpoint", hot_checkpoint, "--limit", 1, "--top", 3, "--plot", tmp_path / "new" / "a.svg", "--json"
    )
    assert code == 0 and listing(hot_checkpoint) == before
    *_, verdict, plot = told.splitlines()
    document = json.loads(out)
    assert document["verdict"] == verdict and "overflow" in verdict and str(tmp_path) in plot
    assert "PyTorch, the folded graph in float32, 128 x 128, 1 of 2 built-in pictures" in told
    table = [line for line in told.splitlines() if line.startswith("  layer ")]
    assert len(table) == 3 and "stages.4.blocks.0.norm" in table[0] and "stages.4" in table[1]
    operations = document["operations"]
    assert operations[0]["layer"] == "stem.0.reparam_conv" and len(operations) > 80
    by_name = {one["name"]: one for one in operations}
    assert len(by_name) == len(operations)
    hottest = by_name[document["smallest_headroom_at"]]
    assert hottest["layer"].startswith("stages.4") and hottest["headroom"] == document["smallest_headroom"] < 1
    assert hottest["largest"] == max(one["largest"] for one in operations)
    assert document["overflows"] >= 3 and document["square_overflows"] == 1
    assert by_name[document["largest_square_at"]]["layer"] == "stages.4.blocks.0.norm"
    svg = (tmp_path / "new" / "a.svg").read_text()
    assert re.search(r"square [\de+.]+ at stages\.4\.blocks\.0\.norm: headroom", svg) and "stage 4" in svg
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.svg"]


def test_verb_on_an_artefact_and_on_its_package(
    capsys: pytest.CaptureFixture[str], tiny_artefact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(("b.png", "a.jpg", ".hidden.png", "note.txt")):
        Image.fromarray(np.full((80, 120, 3), 60 * number, np.uint8)).save(folder / name, "png" if number else None)
    documents = []
    for model in (tiny_artefact, tiny_artefact / "fastvithd.mlpackage"):
        code, out, _ = ranges(capsys, "--model", model, "--images", folder, "--json")
        assert code == 0
        documents.append(json.loads(out.splitlines()[-1]))
    a, b = documents
    assert a["pictures"] == f"2 of 2 pictures in {folder}" and a["function"] == "main" and a["image_size"] == 128
    assert a["runner"].startswith("MIL executor") and a["operations"] == b["operations"]
    code, out, _ = ranges(capsys, "--model", tiny_artefact, "--images", folder, "--limit", 1, "--json")
    assert json.loads(out.splitlines()[-1])["operations"] != a["operations"]  # control: the pictures do matter


def test_function_of_a_package_with_several(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ct = coremltools()
    parts = [save_program(tmp_path / f"{name}.mlpackage", gain) for name, gain in (("one", 1.0), ("loud", 4.0))]
    description = ct.utils.MultiFunctionDescriptor()
    for part in parts:
        description.add_function(str(part), "main", part.stem)
    description.default_function_name = "one"
    with quiet_conversion():
        ct.utils.save_multifunction(description, str(tmp_path / "both.mlpackage"))
    found = {}
    for flags in ((), ("--function", "one"), ("--function", "loud")):
        code, out, _ = ranges(capsys, "--model", tmp_path / "both.mlpackage", *flags, "--json")
        document = json.loads(out.splitlines()[-1])
        found[flags] = (document["function"], {one["type"]: one["largest"] for one in document["operations"]})
        assert code == 0
    assert found[()] == found["--function", "one"] and found[()][0] == "one"
    assert found["--function", "loud"][1]["conv"] == pytest.approx(4 * found[()][1]["conv"])
    code, _, err = ranges(capsys, "--model", tmp_path / "both.mlpackage", "--function", "three")
    assert code == 2 and "no function 'three'" in err and "loud" in err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((), "one of the arguments --checkpoint --model is required"),
        (("--checkpoint", "C", "--model", "M"), "not allowed with"),
        (
            ("--checkpoint", "C", "--function", "f", "--limit", "0", "--image-size", "100"),
            "--limit.*--image-size.*--func",
        ),
        (
            ("--model", "M", "--image-size", "128", "--plot", "a.pdf"),
            "--image-size: a package has its own.*--plot a.pdf",
        ),
        (("--model", "TMP/none"), "no such package"),
        (("--checkpoint", "TMP/none"), "none"),
        (("--checkpoint", "TINY", "--images", "TMP"), "no pictures"),
        (("--checkpoint", "TINY", "--images", "TMP/none"), "not a folder"),
        (("--checkpoint", "TINY", "--images", "TMP/bad"), "one.png.*two.png"),
    ],
)
def test_unusable_input(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], what: str
) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("one.png", "two.png"):
        (tmp_path / "bad" / name).write_bytes(b"not a picture")
    words = [word.replace("TMP", str(tmp_path)).replace("TINY", str(tiny_checkpoint)) for word in arguments]
    code, out, err = ranges(capsys, *words)
    assert code == 2 and re.search(what, err) and not out
    assert [line for line in err.splitlines() if line.startswith("error:")] == err.splitlines()[-1:]


def test_program_that_takes_no_picture_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 7))], opset_version=ct.target.iOS16)
    def program(x: Any) -> Any:
        return mb.relu(x=x)

    with quiet_conversion():
        ct.convert(
            program, convert_to="mlprogram", skip_model_load=True, minimum_deployment_target=ct.target.iOS16
        ).save(str(tmp_path / "a.mlpackage"))
    code, _, err = ranges(capsys, "--model", tmp_path / "a.mlpackage")
    assert code == 2 and "expected one picture, (1, 3, S, S)" in err


# -- the plot ---------------------------------------------------------------------------------------------------------


def drawn(ranges: list[Range], target: Path) -> bytes:
    write_plot(ranges, target, "title")
    return target.read_bytes()


def test_plot_repeats_and_shows_a_change(operations: list[Range], tmp_path: Path) -> None:
    first = drawn(operations, tmp_path / "a.png")
    assert first == drawn(operations, tmp_path / "b.png") and first.startswith(b"\x89PNG")
    hotter = [*operations[:-9], Range("x", "conv", "stages.4.x", 1e5, 1e12, 0.2, 0.4), *operations[-9:]]
    assert first != drawn(hotter, tmp_path / "a.png")
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), dtype=int)
    assert image.shape[1] > 1500 and (image.sum(2) < 700).mean() > 0.01
    assert drawn(operations, tmp_path / "a.svg") == drawn(operations, tmp_path / "c.svg")
    assert b"date" not in (tmp_path / "a.svg").read_bytes()


@pytest.mark.parametrize("values", [(0.0, 0.0), (1e30, 3.0)])
def test_plot_of_the_extremes(tmp_path: Path, values: tuple[float, float]) -> None:
    assert drawn([Range(str(i), "conv", None, value) for i, value in enumerate(values)], tmp_path / "a.png")


def test_plot_that_cannot_be_written_leaves_nothing(tmp_path: Path, operations: list[Range]) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError):
        write_plot(operations, tmp_path / "taken.png", "title")
    assert os.listdir(tmp_path) == ["taken.png"]


def test_times() -> None:
    assert [times(x) for x in (0.0001, 0.5, 12.345, 400.2, 65504.0)] == ["0.0001x", "0.50x", "12.3x", "400x", "65,504x"]
