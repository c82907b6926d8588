"""Compressed layers in Apple's runtime: the very weights that their parts mean, in files of the predicted size."""

from pathlib import Path

import pytest

pytest.importorskip("coreai")

import numpy as np
import torch
from coreai_arrays import dequantized
from helpers import snr_db
from torch import nn

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import UserError
from fastvlm.data import scenes
from model_export.coreai import bundle, contract, programs
from model_export.coreai.compress import bundle_shapes, compress, plan_of, shapes_of
from model_export.coreai.convert import save
from model_export.coreai.modules import Embedding, VisionEncoder
from model_export.coreai.process import Runtime
from model_export.encoder.channel_first import Encoder, channel_first
from model_export.encoder.graph import folded_encoder
from quantization.coreai.forms import FORMS, PLAIN, nbytes, store
from quantization.recipe import load_recipe

COMPRESSING = [name for name in FORMS if name != PLAIN]
ENOUGH = 100.0  # dB, of float32 sums in another order


class Small(nn.Module):
    """Ids -> embeddings, a linear layer, a convolution and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding(torch.randn(512, 96))
        self.linear = nn.Linear(96, 128)
        self.conv = nn.Conv2d(128, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 7, padding=3, groups=64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values = self.linear(self.embedding(ids)).transpose(1, 2).unflatten(2, (7, 7))
        return self.depthwise(self.conv(values))


class Every(nn.Module):
    """One small network for each form, so that one program holds them all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.networks = nn.ModuleList(Small() for _ in COMPRESSING)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([network(ids) for network in self.networks])


def stored(network: nn.Module, form: str) -> dict[str, dict[str, np.ndarray]]:
    """Path -> parts of every layer that takes the form."""
    kept = {"depthwise"} if form in ("int8-b32", "int4-b32") else set()
    layers = {path: network.get_submodule(path) for path in shapes_of(network) if path not in kept}
    return {path: store(layer.weight.detach().half().numpy(), FORMS[form]) for path, layer in layers.items()}


@torch.no_grad()
def reference(network: nn.Module, parts: dict[str, dict[str, np.ndarray]], ids: torch.Tensor) -> np.ndarray:
    for path, part in parts.items():
        network.get_submodule(path).weight.copy_(torch.from_numpy(dequantized(part)))
    return network(ids).numpy()


def touched(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With 1 % more on one scale, or on one value of a palette: that of the first row's largest value."""
    name = "lut" if "lut" in parts else "scale"
    floats = parts[name].copy()
    place = parts["indices"][0].flat[np.abs(dequantized(parts)[0]).argmax()] if name == "lut" else 0
    floats.ravel()[place] *= np.float16(1.01)
    return parts | {name: floats}


def test_the_runtime_computes_exactly_the_dequantized_weights(tmp_path):
    module, plain = Every(), Every()
    ids = torch.arange(0, 490, 10, dtype=torch.int32)[None]
    parts = [stored(network, form) for network, form in zip(plain.networks, COMPRESSING)]
    kept = {}
    for index, form in enumerate(COMPRESSING):
        kept |= {form: compress(module.networks[index], dict.fromkeys(shapes_of(plain.networks[index]), FORMS[form]))}
    blocks = {"depthwise": "1 input channels do not divide into blocks of 32"}
    assert kept == {form: blocks if form in ("int8-b32", "int4-b32") else {} for form in COMPRESSING}

    asset = tmp_path / "every.aimodel"
    save(module, {"ids": ids}, asset, output="values")
    runtime = Runtime()
    runtime.load("every", asset)
    values = runtime.call("every", {"ids": ids.numpy()})
    for index, form in enumerate(COMPRESSING):
        network = plain.networks[index]
        found = {"as stored": snr_db(reference(network, parts[index], ids), values[index])}
        for path in parts[index]:
            wrong = parts[index] | {path: touched(parts[index][path])}
            found[path] = snr_db(reference(network, wrong, ids), values[index])
        assert found.pop("as stored") > ENOUGH > max(found.values()), (form, found)


@pytest.mark.parametrize("form", COMPRESSING)
def test_embeddings_decode_the_gathered_rows_alone(form):
    weight = torch.randn(512, 96) * 0.05
    module, plain = Embedding(weight.clone()), Embedding(weight)
    parts = store(weight.half().numpy(), FORMS[form])
    assert compress(module, {"": FORMS[form]}) == {}
    ids = torch.arange(0, 512, 7, dtype=torch.int32)[None]
    assert np.array_equal(module(ids).numpy(), dequantized(parts)[ids.numpy()])
    held = sum(buffer.nbytes for buffer in module.buffers())
    in_float32 = sum(part.nbytes for name, part in parts.items() if name in ("scale", "lut"))  # once more
    table = 4 * 256 if form == "fp8" else 0  # E4M3's values
    assert held == nbytes((512, 96), FORMS[form]) + in_float32 + table

    def largest(module: nn.Module) -> int:
        values = [
            node.meta.get("val")
            for node in torch.export.export(module, (ids,)).graph.nodes
            if node.op == "call_function"
        ]
        sizes = [value.numel() for value in values if isinstance(value, torch.Tensor)]
        return max(sizes)

    assert largest(module) < 512 * 96

    class Whole(nn.Module):  # the control: decodes the table
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return (plain.weight * 2)[ids]

    assert largest(Whole()) == 512 * 96


@pytest.mark.parametrize("recipe", ["palette4", "mixed-4-8"])
def test_files_are_as_large_as_predicted(recipe, tmp_path):
    checkpoint = open_checkpoint(scenes.CHECKPOINT)
    shapes = bundle_shapes(checkpoint)
    plan = plan_of(load_recipe(recipe), shapes)
    assert plan.forms.keys() | plan.kept.keys() == shapes.keys()
    writing = programs.Programs(checkpoint, bundle.shape_of(checkpoint), plan=plan)
    size = checkpoint.image_size
    picture = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    writing.write_decoder(tmp_path / contract.ASSETS["main"])
    writing.write_embedding(tmp_path / contract.ASSETS["embedding"])
    writing.write_vision(tmp_path / contract.ASSETS["vision"], lambda: iter([picture]))
    for asset, expected in bundle.planned_bytes(plan, shapes).items():
        actual = Path(tmp_path, asset, contract.PROGRAM).stat().st_size
        assert abs(actual / expected - 1) < 0.02, (asset, actual, expected)


def test_a_recipes_names_are_the_encoders():
    """Whatever the module's graph was rearranged to: a rule reaches every layer."""
    checkpoint = open_checkpoint(scenes.CHECKPOINT)
    writing = programs.Programs(checkpoint, bundle.shape_of(checkpoint), "float32")
    encoder = VisionEncoder(Encoder(channel_first(folded_encoder(checkpoint)[0])), writing._projector())
    ours = {f"vision.{path}": shape for path, shape in shapes_of(encoder).items()}
    named = bundle_shapes(checkpoint)
    assert ours == {name: shape for name, shape in named.items() if name.startswith("vision.")} and len(ours) > 40


def test_refusals():
    network = Small()
    nn.init.constant_(network.conv.weight, 1e6)
    with pytest.raises(UserError, match=r"nowhere: no such layer; conv: values beyond float16"):
        compress(network, {"nowhere": FORMS["int8"], "conv": FORMS["int8"], "linear": FORMS["int8"]})
    assert compress(Embedding(torch.zeros(1024, 98)), {"": FORMS["palette6"]}) == {
        "": "rows of 98 do not divide into whole bytes"
    }
    shapes = bundle_shapes(open_checkpoint(scenes.CHECKPOINT))
    with pytest.raises(UserError, match=r"int4-awq: has no Core AI forms: expected fp16, int4-g32, int4, int6, "):
        plan_of(load_recipe("int4-awq"), shapes)
