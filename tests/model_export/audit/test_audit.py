"""The audit: no finding in the graph that the guidance asks for, one for each broken rule; its figures."""

import dataclasses
import json
import logging
import struct
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mil_packages import save_program
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastvlm.checkpoint.checkpoint import open_checkpoint
from model_export import mil
from model_export.audit import rules as audit_rules
from model_export.audit.audit import audit, audit_program
from model_export.encoder.graph import folded_encoder
from model_export.mil import costs
from model_export.mil.program import BlobRef, Block, Constant, Function, NamedType, Operation, Program, TensorType

logging.getLogger("coremltools").setLevel(logging.ERROR)

import coremltools as ct  # noqa: E402
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

pytestmark = pytest.mark.slow

Shape = tuple[int, ...]


def save(path: Path, build: Callable[[Any], Any], shape: Shape, dtype: str = "float16", target: str = "iOS17") -> Path:
    """Save `build(x)` as it stands, with no graph passes, as a package whose input x has this shape."""
    save_program(path, lambda x: build(x), {"x": np.zeros(shape, dtype)}, target)
    return path


def half(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


def conv(x: Any, channels: int, kernel: int = 1, stride: int = 1, dilation: int = 1) -> Any:
    """A convolution that keeps (or divides) the picture; grouped, so that weights stay small."""
    groups = int(np.gcd(channels, x.shape[1]))
    pad = (kernel - 1) * dilation // 2
    return mb.conv(
        x=x,
        weight=half(channels, x.shape[1] // groups, kernel, kernel),
        bias=half(channels),
        pad_type="custom",
        pad=[pad] * 4,
        strides=[stride] * 2,
        dilations=[dilation] * 2,
        groups=groups,
    )


def pool(x: Any, kernel: list[int], strides: list[int]) -> Any:
    return mb.avg_pool(x=x, kernel_sizes=kernel, strides=strides, pad_type="valid")


def norm(x: Any) -> Any:
    channels = x.shape[1]
    return mb.layer_norm(x=x, axes=[1], gamma=half(channels), beta=half(channels), epsilon=np.float16(1e-5))


def attention_block(x: Any) -> Any:
    """FastViT's attention block as the guidance wants it: (1, C, H, W) throughout, heads of 32 channels."""
    _, channels, height, width = x.shape
    heads = channels // 32
    qkv = mb.reshape(x=conv(norm(x), 3 * channels), shape=[1, 3 * heads, 32, height * width])
    q, k, v = mb.split(x=qkv, num_splits=3, axis=1)
    scores = mb.matmul(x=mb.mul(x=q, y=np.float16(32**-0.5)), y=k, transpose_x=True, transpose_y=False)
    mixed = mb.matmul(x=v, y=mb.softmax(x=scores, axis=-1), transpose_x=False, transpose_y=True)
    x = mb.add(x=x, y=conv(mb.reshape(x=mixed, shape=[1, channels, height, width]), channels))
    hidden = conv(conv(x, channels, kernel=7), 4 * channels)
    return mb.add(x=x, y=conv(mb.gelu(x=hidden), channels))


def encoder(images: Any) -> Any:
    """The real encoder's shapes, one block a stage: (1, 3, S, S) -> (1, N, 3072), float32 at both ends."""
    x = conv(mb.cast(x=images, dtype="fp16"), 96, kernel=3, stride=2)
    x = mb.gelu(x=conv(x, 96, kernel=3, stride=2))
    for channels in (192, 384):
        x = conv(conv(x, channels, kernel=7, stride=2), channels, kernel=3)
    for channels in (768, 1536):
        x = attention_block(conv(conv(x, channels, kernel=7, stride=2), channels, kernel=7))
    x = conv(x, 3072, kernel=3)
    squeezed = mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True)
    x = mb.gelu(x=mb.mul(x=x, y=mb.sigmoid(x=conv(mb.relu(x=conv(squeezed, 192)), 3072))))
    flat = mb.reshape(x=x, shape=[1, 3072, x.shape[2] * x.shape[3]])
    return mb.cast(x=mb.transpose(x=flat, perm=[0, 2, 1]), dtype="fp32")


def counted(document: Mapping[str, Any]) -> dict[str, int]:
    """The rules that found something, and how often."""
    return {key: count for key, count in document["rules"].items() if count}


def test_the_graph_that_the_guidance_asks_for_has_no_finding(tmp_path: Path) -> None:
    document = audit(save(tmp_path / "a.mlpackage", encoder, (1, 3, 1024, 1024), dtype="float32"))
    assert document["functions"]["main"]["findings"] == [] and document["passed"] is True
    main = document["functions"]["main"]
    assert main["data_movement"] == {
        **{"transpose": 1, "reshape": 5, "squeeze": 0, "expand_dims": 0},
        **{"slice": 0, "split": 2, "concat": 0, "gather": 0},
    }
    assert main["padding"]["bytes"] > 0  # said, although it is no finding
    assert [*main["outputs"].values()] == ["fp32[1, 256, 3072]"]


def decomposed_norm(x: Any) -> Any:
    centred = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=[1], keep_dims=True))
    variance = mb.reduce_mean(x=mb.square(x=centred), axes=[1], keep_dims=True)
    root = mb.rsqrt(x=mb.add(x=variance, y=np.float16(1e-5)), epsilon=np.float16(0))
    return mb.mul(x=centred, y=root)


def decomposed_norm_with_products(x: Any) -> Any:
    centred = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=[1], keep_dims=True))
    variance = mb.reduce_mean(x=mb.mul(x=centred, y=centred), axes=[1], keep_dims=True)
    return mb.real_div(x=centred, y=mb.sqrt(x=mb.add(x=variance, y=np.float16(1e-5))))


def wrapped_norm(x: Any) -> Any:
    last = mb.transpose(x=mb.relu(x=x), perm=[0, 2, 3, 1])
    normal = mb.layer_norm(x=last, axes=[-1], epsilon=np.float16(1e-5))
    return mb.relu(x=mb.transpose(x=normal, perm=[0, 3, 1, 2]))


def island(x: Any) -> Any:
    wide = mb.sqrt(x=mb.cast(x=mb.relu(x=mb.relu(x=x)), dtype="fp32"))
    return mb.relu(x=mb.cast(x=wide, dtype="fp16"))


def noisy(x: Any) -> Any:
    return mb.add(x=x, y=mb.random_normal(shape=[1], mean=np.float16(0), stddev=np.float16(1)))


def branched(x: Any) -> Any:
    large = mb.greater(x=mb.reduce_max(x=x, keep_dims=False), y=np.float16(1))
    return mb.cond(pred=large, _true_fn=lambda: mb.relu(x=x), _false_fn=lambda: mb.relu(x=x))


def einsum_attention(x: Any) -> Any:
    """Apple's reference: heads of (1, C, 1, S), products by einsum."""
    x = mb.reshape(x=mb.relu(x=x), shape=[1, 64, 1, 64])
    scores = mb.softmax(x=mb.einsum(values=[mb.transpose(x=x, perm=[0, 3, 2, 1]), x], equation=QK), axis=1)
    return mb.relu(x=mb.reshape(x=mb.einsum(values=[x, scores], equation=QK), shape=[1, 64, 2, 32]))


def gathered(x: Any) -> Any:
    index = mb.reduce_argmax(x=x, axis=1, keep_dims=False)
    return mb.gather(x=half(16, 8), indices=index, axis=0, batch_dims=0)


PICTURE = (1, 8, 16, 32)
QK = "bkhc,bchq->bkhq"
# (rule, how often it finds something, the program, its input's shape)
VIOLATIONS: list[tuple[str, int, Callable[[Any], Any], Shape]] = [
    ("rank", 2, lambda x: mb.relu(x=x), (1, 2, 4, 8, 32)),
    ("last-axis", 2, lambda x: mb.relu(x=x), (1, 3072, 64, 1)),
    ("last-axis", 2, lambda x: mb.relu(x=x), (1, 8192, 8, 7)),
    ("unsupported-operation", 1, lambda x: mb.topk(x=x, k=4, axis=-1)[0], PICTURE),
    ("unsupported-operation", 1, lambda x: mb.sinh(x=x), PICTURE),
    ("unsupported-operation", 1, noisy, PICTURE),
    ("unsupported-operation", 1, branched, PICTURE),
    ("compute-precision", 1, lambda x: mb.relu(x=mb.cast(x=x, dtype="fp32")), PICTURE),
    ("float32-island", 1, island, PICTURE),
    ("float32-island", 1, lambda x: mb.reduce_argmax(x=mb.relu(x=x), axis=1, keep_dims=True), PICTURE),
    ("transpose", 1, lambda x: mb.relu(x=mb.transpose(x=mb.relu(x=x), perm=[0, 1, 3, 2])), PICTURE),
    ("transpose", 1, einsum_attention, PICTURE),
    ("squeeze", 1, lambda x: mb.squeeze(x=x, axes=[0]), PICTURE),
    ("squeeze", 1, lambda x: mb.expand_dims(x=x, axes=[0]), PICTURE[1:]),
    ("reshape", 1, lambda x: mb.relu(x=mb.reshape(x=mb.relu(x=x), shape=[1, 8, 8, 64])), PICTURE),
    ("reshape-chain", 1, lambda x: mb.reshape(x=mb.reshape(x=x, shape=[1, 8, 8, 64]), shape=[1, 64, 64]), PICTURE),
    ("layer-norm-decomposed", 1, decomposed_norm, PICTURE),
    ("layer-norm-decomposed", 1, decomposed_norm_with_products, PICTURE),
    ("layer-norm-transposed", 1, wrapped_norm, PICTURE),
    ("large-kernel", 1, lambda x: conv(x, 8, kernel=15), PICTURE),
    ("large-kernel", 1, lambda x: conv(x, 8, kernel=7, dilation=3), PICTURE),
    ("large-kernel", 1, lambda x: pool(x, [3, 3], [3, 3]), PICTURE),
    ("global-pool", 1, lambda x: pool(x, [16, 32], [1, 1]), PICTURE),
    ("tensor-size", 2, lambda x: mb.relu(x=x), (1, 8, 1, 16385)),
    ("linear", 1, lambda x: mb.linear(x=x, weight=half(16, 32), bias=half(16)), (1, 64, 32)),
    ("linear", 1, lambda x: mb.matmul(x=x, y=half(32, 16), transpose_x=False, transpose_y=False), (1, 64, 32)),
]


@pytest.mark.parametrize("rule, count, build, shape", VIOLATIONS, ids=[row[0] for row in VIOLATIONS])
def test_a_package_that_breaks_one_rule_has_that_finding_alone(
    tmp_path: Path, rule: str, count: int, build: Callable[[Any], Any], shape: Shape
) -> None:
    document = audit(save(tmp_path / "a.mlpackage", build, shape))
    assert counted(document) == {rule: count} and document["passed"] is False
    finding = document["functions"]["main"]["findings"][-1]
    row = audit_rules.rules()[rule]
    assert finding["rule"] == rule and finding["found"] and finding["remedy"] and finding["operation"]
    assert all(url.startswith("https://") for url in finding["source"])
    if rule != "unsupported-operation":
        assert finding["remedy"] == row.remedy and finding["source"] == [url for _, url in row.sources]


ALLOWED: list[tuple[str, Callable[[Any], Any], Shape]] = [
    ("an axis of 16384", lambda x: mb.relu(x=x), (1, 8, 1, 16384)),
    ("a small picture", lambda x: mb.relu(x=x), (1, 8192, 8, 8)),  # 4 x, 4 MB: its own geometry
    ("squeeze and excite", lambda x: mb.relu(x=x), (1, 3072, 1, 1)),  # 32 x, but 0.2 MB
    ("hidden at 256", lambda x: mb.relu(x=x), (1, 6144, 4, 4)),
    ("kernel 13", lambda x: conv(x, 8, kernel=13), PICTURE),
    ("kernel 7, dilated to 13", lambda x: conv(x, 8, kernel=7, dilation=2), PICTURE),
    ("pooling", lambda x: pool(x, [3, 3], [2, 2]), PICTURE),
    ("one vector", lambda x: mb.linear(x=x, weight=half(16, 32), bias=half(16)), (1, 32)),
    ("constant rows", lambda x: mb.gather(x=x, indices=np.int32([1, 0]), axis=1, batch_dims=0), PICTURE),
    ("variance alone", lambda x: mb.reduce_mean(x=mb.square(x=x), axes=[1], keep_dims=True), PICTURE),
    ("transpose of the input", lambda x: mb.relu(x=mb.transpose(x=x, perm=[0, 1, 3, 2])), PICTURE),
    ("a constant, transposed", lambda x: mb.add(x=x, y=mb.transpose(x=half(32, 16), perm=[1, 0])), PICTURE),
    ("a constant of rank 5", lambda x: mb.add(x=x, y=mb.reshape(x=half(1, 2, 4, 16, 32), shape=PICTURE)), PICTURE),
]


@pytest.mark.parametrize("build, shape", [row[1:] for row in ALLOWED], ids=[row[0] for row in ALLOWED])
def test_what_is_on_the_right_side_of_a_rule(tmp_path: Path, build: Callable[[Any], Any], shape: Shape) -> None:
    assert counted(audit(save(tmp_path / "a.mlpackage", build, shape))) == {}


def test_a_shape_that_is_not_fixed(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.ReLU(), torch.zeros(1, 3, 8, 32))
    shape = ct.Shape((1, 3, ct.RangeDim(8, 64, default=8), 32))
    model = ct.convert(
        traced,
        inputs=[ct.TensorType("x", shape=shape, dtype=np.float16)],
        outputs=[ct.TensorType("y", dtype=np.float16)],
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "a.mlpackage"))
    document = audit(tmp_path / "a.mlpackage")
    assert counted(document) == {"dynamic-shape": 1}
    (finding,) = document["functions"]["main"]["findings"]
    assert (finding["operation"], finding["type"], finding["shape"]) == ("x", "input", "fp16[1, 3, ?, 32]")


def hand_made(weight: TensorType) -> Program:
    """A program of one convolution with a weight that is never read."""
    x, y = TensorType("fp16", (1, 8, 32, 32)), TensorType("fp16", (1, 8, 32, 32))
    stored = Constant(weight, BlobRef(Path("weight.bin"), 64))
    operations = (
        Operation("const", "w", {}, (NamedType("w", weight),), {"val": stored}),
        Operation("conv", "y", {"x": ("x",), "weight": ("w",)}, (NamedType("y", y),), {}),
    )
    block = Block((), ("y",), operations)
    function = Function("main", "CoreML7", (NamedType("x", x),), block, {"x": x}, {"y": y})
    return Program(Path("hand.mlpackage"), 8, {"main": function}, "main")


def test_more_weights_than_the_engine_takes() -> None:
    assert counted(audit_program(hand_made(TensorType("fp16", (16384, 10000, 3, 3))))) == {"weights-size": 1}
    assert counted(audit_program(hand_made(TensorType("fp16", (16384, 10000, 3, 1))))) == {}


@pytest.fixture(scope="module")
def palettized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 x 1 convolution with 4-bit indices into one palette (iOS 18 form): 2048 bytes and 16 fp16."""

    def build(x: Any) -> Any:
        indices = np.zeros((64, 64, 1, 1), types.nptype_from_builtin(types.uint4))
        weight = mb.constexpr_lut_to_dense(indices=indices, lut=half(1, 1, 1, 1, 16, 1))
        return mb.conv(x=x, weight=weight, pad_type="valid")

    path = tmp_path_factory.mktemp("palettized") / "a.mlpackage"
    return save(path, build, (1, 64, 16, 32), target="iOS18")


def test_compressed_weights_below_their_opset(palettized: Path) -> None:
    program = mil.read_package(palettized)
    assert counted(audit_program(program)) == {}
    older = dataclasses.replace(program.functions["main"], opset="CoreML7")
    program = dataclasses.replace(program, functions={"main": older})
    document = audit_program(program)
    assert counted(document) == {"weights-opset": 1}
    assert "needs CoreML8 (specification 9), the function is CoreML7" in str(document["functions"]["main"]["findings"])
    again = dataclasses.replace(mil.read_package(palettized), specification_version=8)
    assert counted(audit_program(again)) == {"weights-opset": 1}


def test_compressed_weights_count_as_they_are_stored(palettized: Path) -> None:
    document = audit(palettized)
    main = document["functions"]["main"]
    assert main["weights"] == {"bytes": 64 * 64 // 2 + 16 * 2, "forms": {"constexpr_lut_to_dense": 1}}
    picture = 64 * 16 * 32 * 2
    assert main["bytes"] == {"total": 2 * picture + 2080, "inputs": picture, "outputs": picture, "weights": 2080} | {
        "by_type": {"fp16": 2 * picture + 32, "uint4": 2048}
    }
    assert main["macs"] == 64 * 64 * 16 * 32
    assert main["intensity"] == main["macs"] / main["bytes"]["total"]
    assert main["operations"] == {"conv": 1}


def test_every_rule_has_a_check_a_control_and_sources() -> None:
    rules = audit_rules.rules()
    assert set(audit_rules.CHECKS) | {"weights-opset"} == set(rules)
    elsewhere = {"dynamic-shape", "weights-size", "weights-opset"}
    assert {row[0] for row in VIOLATIONS} | elsewhere == set(rules)
    for rule in rules.values():
        assert rule.sources and rule.reason and rule.remedy and rule.title
        assert all(title and url.startswith("https://") for title, url in rule.sources)
    table = json.loads(audit_rules.TABLE.read_text())
    named = [name for row in table["rules"] for name in row["sources"]]
    threshold = rules["unsupported-operation"].threshold
    groups = [*threshold["groups"], threshold["gathers"]]
    assert {*named, *(group["source"] for group in groups)} == set(table["sources"])
    names = Counter(name for group in groups for name in group["operations"])
    assert max(names.values()) == 1


def test_a_plain_export_has_many_findings_and_what_it_costs_is_what_pytorch_counts(
    plain_package: Path, tiny_checkpoint: Path
) -> None:
    """Weights are the blobs of the weight file, whose metadata of 64 bytes begins with 0xDEADBEEF, then uint32 type and
    uint64 size; a few scalars are immediate."""
    document = audit(plain_package)
    assert counted(document) == {
        **{"rank": 6, "transpose": 8, "squeeze": 6, "reshape": 4, "layer-norm-transposed": 2, "linear": 4}
    }
    main = document["functions"]["main"]
    assert main["data_movement"]["transpose"] == 13
    fastvit = folded_encoder(open_checkpoint(tiny_checkpoint))[0]
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        fastvit.forward_features(torch.zeros(1, 3, 128, 128))
    assert main["macs"] == counter.get_total_flops() // 2 > 0 and main["macs_unknown"] == []
    assert main["costliest"][0]["macs"] == max(row["macs"] for row in main["costliest"])
    content = (plain_package / "Data/com.apple.CoreML/weights/weight.bin").read_bytes()
    metadata = [content[at : at + 16] for at in range(64, len(content), 64)]
    blobs = [struct.unpack("<IIQ", item)[2] for item in metadata if item[:4] == b"\xef\xbe\xad\xde"]
    assert len(blobs) > 10 and 0 <= document["weights"]["bytes"] - sum(blobs) < 128


def test_multiply_accumulates_of_what_no_encoder_has(tmp_path: Path) -> None:
    def transposed(x: Any) -> Any:
        return mb.conv_transpose(x=x, weight=half(8, 5, 2, 2), strides=[2, 2])

    path = save(tmp_path / "c.mlpackage", transposed, (1, 8, 4, 6))
    assert audit(path)["functions"]["main"]["macs"] == 4 * 6 * 8 * 5 * 2 * 2  # each value by each weight of its channel

    def einsum(x: Any) -> Any:
        return mb.einsum(values=[x, half(2, 7, 3, 4)], equation="bchw,bwhq->bchq")

    path = save(tmp_path / "a.mlpackage", einsum, (2, 5, 3, 7))
    assert audit(path)["functions"]["main"]["macs"] == 2 * 5 * 3 * 7 * 4  # b, c, h, w, q

    def attention(x: Any) -> Any:
        return mb.scaled_dot_product_attention(query=x, key=half(1, 2, 9, 8), value=half(1, 2, 9, 6))

    path = save(tmp_path / "b.mlpackage", attention, (1, 2, 5, 8), target="iOS18")
    assert audit(path)["functions"]["main"]["macs"] == 2 * 5 * 9 * (8 + 6)


def test_operations_that_break_two_rules_at_once(tmp_path: Path) -> None:
    document = audit(save(tmp_path / "a.mlpackage", gathered, (1, 16, 8)))  # gather; argmax, which is int32
    assert counted(document) == {"unsupported-operation": 1, "float32-island": 1}
    path = save(tmp_path / "b.mlpackage", lambda x: mb.non_zero(x=x), (1, 4, 8, 32))
    assert {"unsupported-operation", "dynamic-shape"} <= counted(audit(path)).keys()


@given(st.lists(st.integers(1, 70), max_size=4), st.sampled_from(["fp16", "fp32", "int8"]))
def test_padding_is_to_whole_units_of_64_bytes(shape: list[int], dtype: str) -> None:
    """Beside NumPy, which pads rows by itself."""
    values = np.zeros(shape, {"fp16": np.float16, "fp32": np.float32, "int8": np.int8}[dtype])
    type = TensorType(dtype, tuple(shape))
    assert costs.size_of(type) == values.nbytes
    rows = values.reshape(-1, shape[-1]).view(np.uint8) if shape else values.reshape(1).view(np.uint8)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 64))) if shape else rows
    assert costs.padded_size_of(type, 64) == padded.nbytes
    assert costs.size_of(TensorType("uint4", (3, 5))) == 8 and costs.padded_size_of(TensorType("fp16", (0, 4)), 64) == 0
    assert costs.size_of(TensorType("fp16", (None, 4))) is None


def test_exit_codes_text_and_json(cli: Any, tmp_path: Path) -> None:
    good = save(tmp_path / "good.mlpackage", lambda x: mb.relu(x=x), PICTURE)
    bad = save(tmp_path / "bad.mlpackage", lambda x: mb.sinh(x=mb.squeeze(x=x, axes=[0])), PICTURE)
    answer = cli("audit", good)
    assert answer.code == 0 and f"{good}: no finding by {len(audit_rules.rules())} rules" in answer.out
    if sys.platform != "darwin":
        assert "compute plan: skipped (needs macOS): it would say" in answer.out
    answer = cli("audit", bad, "--json")
    assert answer.code == 1 and answer.document["passed"] is False
    assert counted(answer.document) == {"unsupported-operation": 1, "squeeze": 1}
    for piece in ("[squeeze] squeeze and expand_dims: 1", "remedy: keep_dims", "(sinh) fp16[8, 16, 32]: no element"):
        assert piece in answer.err
    empty = save(tmp_path / "empty.mlpackage", lambda x: mb.add(x=x, y=half(*x.shape)), PICTURE)
    next(empty.rglob("weight.bin")).write_bytes(b"")
    for words, error in (
        ((empty,), "truncated weight file: 0 bytes"),
        ((good, "--function", "other"), "no function 'other'; it has main"),
        ((tmp_path / "none.mlpackage",), "no such package"),
    ):
        answer = cli("audit", *words)
        assert answer.code == 2 and error in answer.err and answer.err.count("\n") == 1


def test_a_package_with_a_picture_as_input_is_audited_and_executed(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 3, 64, 64))])
    def program(image: Any) -> Any:
        return mb.squeeze(x=mb.relu(x=image), axes=[0])

    image = ct.ImageType(name="image", shape=(1, 3, 64, 64))
    model = ct.convert(program, inputs=[image], convert_to="mlprogram", skip_model_load=True)
    model.save(str(tmp_path / "image.mlpackage"))
    assert counted(audit(tmp_path / "image.mlpackage")) == {"squeeze": 1}
    picture = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    (result,) = mil.load(tmp_path / "image.mlpackage").predict({"image": picture}).values()
    np.testing.assert_array_equal(result, np.asarray(picture).transpose(2, 0, 1))
