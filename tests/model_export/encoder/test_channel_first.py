"""The rewritten graph: the same function in float64, and what the saved program is made of."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import (
    REAL_DEPTHS,
    constant_of,
    counts_of,
    decomposed,
    folded,
    largest_rank,
    operations_of,
    outputs_of,
    pixels_of,
    save_encoder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.fastvit import AttentionBlock
from torch import nn

from model_export import contract
from model_export.audit.audit import audit
from model_export.encoder import vision
from model_export.encoder.channel_first import ChannelNorm, Encoder, channel_first
from model_export.encoder.fp16 import Gain
from model_export.encoder.scaled import SCALED
from tests.helpers import relative

pytestmark = pytest.mark.slow

EXACT = 1e-12
# Nothing of it depends on widths. The plain trace of the real one has 37 transposes, 25 reshapes and 18 squeezes.
TINY_COUNTS = {
    "add": 8, "cast": 2, "conv": 42, "gelu": 18, "layer_norm": 2, "matmul": 4, "mul": 1, "reduce_mean": 1, "relu": 1,
    "reshape": 5, "sigmoid": 1, "softmax": 2, "split": 2, "transpose": 1,
}  # fmt: skip
REAL_COUNTS = {
    "add": 50, "cast": 2, "conv": 198, "gelu": 56, "layer_norm": 6, "matmul": 12, "mul": 1, "reduce_mean": 1, "relu": 1,
    "reshape": 13, "sigmoid": 1, "softmax": 6, "split": 6, "transpose": 1,
}  # fmt: skip


def described(program: torch.export.ExportedProgram) -> list[str]:
    """All of a graph that a conversion reads: nodes, shapes, where they come from in the source."""
    kept = ("val", "nn_module_stack", "stack_trace")
    return [
        f"{node.name} {node.target} {node.args} {node.kwargs} {[node.meta.get(key) for key in kept]}"
        for node in program.graph.nodes
    ]


# --- the same function


@st.composite
def attention_blocks(draw: Callable[..., int]) -> tuple[nn.Module, torch.Tensor]:
    """A block of any size that timm could have, and an input of any shape; float64."""
    heads, head_dim = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    model = folded(
        draw(st.integers(0, 99)), widths=(1, 2, 4, heads * head_dim * 4, heads * head_dim * 4), head_dim=head_dim,
        qkv_bias=draw(st.booleans()),
    )  # fmt: skip
    block = copy.deepcopy(model.stages[3].blocks[0])
    block.norm.eps = draw(st.sampled_from([1e-5, 1e-2, 0.5]))
    shape = draw(st.integers(1, 2)), heads * head_dim * 4, draw(st.integers(1, 7)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return block, torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.3, 40.0]))


@settings(max_examples=25)
@given(attention_blocks(), st.data())
def test_attention_block_of_any_shape_stays_what_it_was(
    drawn: tuple[AttentionBlock, torch.Tensor], data: st.DataObject
) -> None:
    block, x = drawn
    expected = block(x)
    rewritten = channel_first(nn.ModuleList([copy.deepcopy(block)]))[0]
    assert not [module for module in rewritten.modules() if isinstance(module, (nn.Linear, nn.LayerNorm))]
    assert relative(rewritten(x), expected) <= EXACT
    # The control: the comparison sees one value of any of its parts that is off by a millionth.
    parts = [block.norm.weight, block.norm.bias, block.token_mixer.qkv.weight, block.token_mixer.proj.weight]
    parts += [block.token_mixer.proj.bias]
    if block.token_mixer.qkv.bias is not None:
        parts.append(block.token_mixer.qkv.bias)
    part = data.draw(st.sampled_from(parts)).data
    if x.shape[2:] == (1, 1):
        return  # one position attends to itself alone: queries and keys count for nothing
    part.view(-1)[-1] += 1e-4 * part.abs().max()  # of gamma and beta the last channel's, of q, k and v the last value
    assert relative(channel_first(nn.ModuleList([block]))[0](x), expected) > EXACT


@settings(max_examples=10)
@given(
    seed=st.integers(0, 99),
    depths=st.tuples(*[st.integers(1, 2)] * 5),
    width=st.sampled_from([1, 3]),
    heads=st.sampled_from([(6, 1), (12, 2), (6, 5)]),
    bias=st.booleans(),
    sides=st.tuples(st.sampled_from([64, 96, 160]), st.sampled_from([64, 128])),
)
def test_encoder_of_any_shape_stays_what_it_was(
    seed: int, depths: tuple[int, ...], width: int, heads: tuple[int, int], bias: bool, sides: tuple[int, int]
) -> None:
    last = heads[0] * heads[1]
    model = folded(seed, depths, (width, 2 * width, 2 * width, last, last), heads[0], bias)
    x = pixels_of(*sides, seed=seed)
    expected = outputs_of(model, x)
    rewritten = channel_first(copy.deepcopy(model))
    actual = outputs_of(rewritten, x)
    for name in expected:  # module by module, under timm's names
        if name in actual and not name.endswith(("<", ".norm", ".qkv", ".token_mixer.proj")):
            assert relative(actual[name], expected[name]) <= EXACT, name
    with torch.no_grad():
        tokens = Encoder(rewritten)(x)
    assert tokens.shape == (1, expected["features"].shape[2] * expected["features"].shape[3], 2 * last)
    rows = [expected["features"][0, :, i, j] for i in range(expected["features"].shape[2])
            for j in range(expected["features"].shape[3])]  # fmt: skip
    assert relative(tokens[0], torch.stack(rows)) <= EXACT


def test_names_stay_timms_and_it_happens_in_place() -> None:
    model = folded()
    names = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    rewritten = channel_first(model)
    assert rewritten is model
    after = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    norms = {name for name, module in model.named_modules() if isinstance(module, ChannelNorm)}
    assert names - after == norms == {"stages.3.blocks.0.norm", "stages.4.blocks.0.norm"} and after <= names


@pytest.mark.parametrize("exponent", [0, 3])
def test_nothing_of_the_exported_graph_is_left_to_decompose(exponent: int) -> None:
    plain = Encoder(folded(dtype=torch.float32), exponent)
    encoder = Encoder(channel_first(copy.deepcopy(plain.fastvit)), exponent)
    for name, module in [*encoder.named_modules()] if exponent else []:
        if scaled := SCALED.get(type(module).__name__):
            encoder.set_submodule(name, scaled(exponent))
        elif name.endswith("layer_scale_1"):
            encoder.set_submodule(name, Gain(exponent))
    assert described(vision.graph(encoder, 128)) == described(decomposed(encoder, 128))
    assert described(vision.graph(plain, 128)) != described(decomposed(plain, 128))  # the control


# --- the saved program


@pytest.fixture(scope="module")
def real_depths(shared: Any) -> Path:
    """All blocks of the real architecture, few channels wide."""
    fastvit = channel_first(folded(depths=REAL_DEPTHS, widths=(4, 8, 16, 32, 64), dtype=torch.float32))
    return shared("real.mlpackage", partial(save_encoder, fastvit, 256))


def faults(package: Path, blocks: int) -> list[str]:
    """What the saved program has that the guidance for the Neural Engine would not; `blocks` of it attend."""
    counts = counts_of(package)
    norms = [operation for operation in operations_of(package) if operation.type == "layer_norm"]
    axes = [list(constant_of(package, norm, "axes").ints.values) for norm in norms]
    return [
        name
        for name, wrong in {
            "rank": largest_rank(package) > 4,
            "layer_norm": len(norms) != blocks,
            "axes": any(one != [1] for one in axes),
            "affine": any("gamma" in norm.inputs or "beta" in norm.inputs for norm in norms),
            "squeeze": bool(counts.get("squeeze", 0) + counts.get("expand_dims", 0)),
            "transpose": counts.get("transpose", 0) != 1,
            "reshape": counts.get("reshape", 0) != 2 * blocks + 1,
            "linear": "linear" in counts,
            "pool": "avg_pool" in counts,
        }.items()
        if wrong
    ]


def test_program_is_channels_first_throughout(tiny_artefact: Path, plain_package: Path) -> None:
    assert faults(tiny_artefact / contract.PACKAGE, 2) == []
    assert set(faults(plain_package, 2)) >= {"rank", "axes", "affine", "squeeze", "transpose", "reshape", "linear"}


def test_golden_operation_counts(tiny_artefact: Path, real_depths: Path) -> None:
    assert counts_of(tiny_artefact / contract.PACKAGE) == TINY_COUNTS
    assert faults(real_depths, 6) == [] and counts_of(real_depths) == REAL_COUNTS


def test_matmuls_carry_their_transposes(tiny_artefact: Path) -> None:
    """q k^T and v w^T with a flag each, instead of a copy."""
    package = tiny_artefact / contract.PACKAGE
    flags = [
        tuple(constant_of(package, operation, f"transpose_{side}").bools.values[0] for side in "xy")
        for operation in operations_of(package)
        if operation.type == "matmul"
    ]
    assert flags == [(True, False), (False, True)] * 2


def test_audit_finds_nothing(tiny_artefact: Path, real_depths: Path) -> None:
    """And much in the plain package: test_audit."""
    for package in (tiny_artefact / contract.PACKAGE, real_depths):
        document = audit(package)
        assert document["passed"] and not any(document["rules"].values()), document["rules"]
        assert document["functions"]["main"]["operations"] == counts_of(package)  # as protobuf has them
        json.dumps(document, allow_nan=False)
