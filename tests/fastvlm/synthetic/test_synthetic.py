"""`write_checkpoint(stream_scale=...)`: hot residual streams, and otherwise the same encoder."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import UserError
from fastvlm.model.build import encoder
from fastvlm.synthetic.checkpoint import write_checkpoint

FACTOR = 1024.0  # a power of two, so that only LayerNorm's eps tells the two apart


def features_and_peaks(path, skip=()):
    """(features, largest magnitude of what leaves each stage); `skip` names tensors to take from nowhere."""
    model, peaks = encoder(open_checkpoint(path)), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: peaks.append(float(output.abs().max())))
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.forward_features(pixels).numpy(), peaks


@pytest.mark.parametrize("layout", ["fast_vlm", "llava_qwen2"])
@pytest.mark.parametrize("scale", [{3: FACTOR}, {4: FACTOR}, {3: FACTOR, 4: 4 * FACTOR}])
def test_streams_are_scaled_and_features_are_not(make_checkpoint, tmp_path, layout, scale):
    plain, before = features_and_peaks(make_checkpoint(layout=layout, form="folded"))
    hot, after = features_and_peaks(write_checkpoint(tmp_path / "hot", layout=layout, stream_scale=scale))
    for stage, (cold, warm) in enumerate(zip(before, after)):
        assert warm == pytest.approx(cold * scale.get(stage, 1.0), rel=1e-3)
    assert np.abs(hot - plain).max() < 1e-3 * np.abs(plain).max()


def test_each_factor_is_needed(tmp_path, monkeypatch):
    """The control: without one of the factors the features are others."""
    from fastvlm.synthetic import checkpoint

    plain, _ = features_and_peaks(write_checkpoint(tmp_path / "plain"))
    factors = checkpoint._factors
    for part in ("pos_emb.reparam_conv.weight", "layer_scale_1", "layer_scale_2", "mlp.conv.conv", "final_conv"):
        monkeypatch.setattr(
            checkpoint,
            "_factors",
            lambda *args, part=part: {name: factor for name, factor in factors(*args).items() if part not in name},
        )
        hot, _ = features_and_peaks(write_checkpoint(tmp_path / part, stream_scale={4: FACTOR}))
        assert np.abs(hot - plain).max() > 1e-2 * np.abs(plain).max(), part


def test_nothing_else_changes(make_checkpoint, tmp_path):
    hot = write_checkpoint(tmp_path / "hot", stream_scale={4: FACTOR})
    with safe_open(make_checkpoint() / "model.safetensors", "pt") as a, safe_open(hot / "model.safetensors", "pt") as b:
        assert a.keys() == b.keys()
        changed = {name for name in a.keys() if not torch.equal(a.get_tensor(name), b.get_tensor(name))}  # noqa: SIM118
    assert len(changed) == 2 + 3 + 1  # the position encoding, one block's scales and convolution, the layer after
    assert all("stages.4." in name or "final_conv.reparam_conv.weight" in name for name in changed)
    none = write_checkpoint(tmp_path / "none", stream_scale={})
    assert (none / "model.safetensors").read_bytes() == (make_checkpoint() / "model.safetensors").read_bytes()


def test_attention_scale(make_checkpoint, tmp_path):
    plain, loud = make_checkpoint(), write_checkpoint(tmp_path / "loud", attention_scale=4.0)
    with safe_open(plain / "model.safetensors", "pt") as a, safe_open(loud / "model.safetensors", "pt") as b:
        changed = {name for name in a.keys() if not torch.equal(a.get_tensor(name), b.get_tensor(name))}  # noqa: SIM118
        assert len(changed) == 2 and all(name.endswith(".layer_scale_1.gamma") for name in changed)
        assert all(torch.equal(4 * a.get_tensor(name), b.get_tensor(name)) for name in changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stream_scale": {2: 2.0}}, "stream_scale 2"),
        ({"stream_scale": {5: 2.0}}, "stream_scale 5"),
        ({"stream_scale": {4: 2.0}, "form": "training"}, "form training"),
        ({"stream_scale": {4: 2.0}, "dtype": "float16"}, "dtype float16"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        write_checkpoint(tmp_path / "hot", **arguments)
    assert not any(tmp_path.iterdir())
