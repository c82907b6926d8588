"""Hot residual streams, and otherwise the same encoder."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.model.build import encoder
from fastvlm.synthetic import heat

FACTOR = 1024.0  # a power of two, so that only LayerNorm's eps tells the two apart


@pytest.fixture
def copy(tiny_fast_vlm, tmp_path):
    return shutil.copytree(tiny_fast_vlm, tmp_path / "hot")


def features_and_peaks(path):
    """(features, largest magnitude of what leaves each stage)."""
    model, peaks = encoder(open_checkpoint(path)), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: peaks.append(float(output.abs().max())))
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.forward_features(pixels).numpy(), peaks


@pytest.mark.parametrize("scale", [{3: FACTOR}, {4: FACTOR}, {3: FACTOR, 4: 4 * FACTOR}])
def test_streams_are_scaled_and_features_are_not(tiny_fast_vlm, copy, scale):
    plain, before = features_and_peaks(tiny_fast_vlm)
    hot, after = features_and_peaks(heat.heat(copy, scale))
    for stage, (cold, warm) in enumerate(zip(before, after)):
        assert warm == pytest.approx(cold * scale.get(stage, 1.0), rel=1e-3)
    assert np.abs(hot - plain).max() < 1e-3 * np.abs(plain).max()


@pytest.mark.parametrize(
    "part", ["pos_emb.reparam_conv.weight", "layer_scale_1", "layer_scale_2", "mlp.conv.conv", "final_conv"]
)
def test_each_factor_is_needed(tiny_fast_vlm, copy, monkeypatch, part):
    """The control: without one of the factors the features are others."""
    factors = heat._factors
    monkeypatch.setattr(
        heat, "_factors", lambda *args: {name: one for name, one in factors(*args).items() if part not in name}
    )
    plain, hot = features_and_peaks(tiny_fast_vlm)[0], features_and_peaks(heat.heat(copy, {4: FACTOR}))[0]
    assert np.abs(hot - plain).max() > 1e-2 * np.abs(plain).max()


def test_nothing_else_changes(tiny_fast_vlm, copy):
    plain, ends = load_file(tiny_fast_vlm / "model.safetensors"), ".layer_scale_1.gamma"
    hot = load_file(heat.heat(copy, {4: FACTOR}) / "model.safetensors")
    changed = {name for name, values in plain.items() if not torch.equal(values, hot[name])}
    assert len(changed) == 2 + 3 + 1  # the position encoding, one block's scales and convolution, the layer after
    assert all("stages.4." in name or "final_conv.reparam_conv.weight" in name for name in changed)
    loud = load_file(heat.heat(copy, {4: 1 / FACTOR}, attention=4.0) / "model.safetensors")
    assert {name for name, values in plain.items() if not torch.equal(values, loud[name])} == {
        name for name in plain if name.endswith(ends)
    }
    assert all(torch.equal(4 * plain[name], loud[name]) for name in plain if name.endswith(ends))
