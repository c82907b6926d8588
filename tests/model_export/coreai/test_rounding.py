"""The encoder's rearranged graph is the same function."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from fastvlm.model.fold import fold
from model_export.coreai import rounding
from model_export.coreai.modules import VisionEncoder
from model_export.encoder.channel_first import Encoder, channel_first
from model_export.encoder.fp16 import Gain
from tests.model_export.encoders import randomize

SIDE = 128
ARGS = {"layers": [1, 1, 2, 1, 1], "embed_dims": [8, 16, 32, 64, 128], "num_classes": 0}


@pytest.fixture(scope="module")
def parts():
    """A folded encoder in float64 and a projector."""
    torch.manual_seed(0)
    fastvit = fold(randomize(timm.create_model("fastvit_mci3", pretrained=False, **ARGS), 1).double())
    projector = nn.Linear(256, 64).double().requires_grad_(False), nn.Linear(64, 64).double().requires_grad_(False)
    return fastvit, projector


def expected(fastvit: nn.Module, projector: tuple[nn.Linear, nn.Linear], pixels: torch.Tensor) -> torch.Tensor:
    features = fastvit.forward_features(pixels).flatten(2).transpose(1, 2)
    return projector[1](functional.gelu(projector[0](features)))


def rearranged(fastvit: nn.Module, projector: tuple[nn.Linear, nn.Linear], gain: int = 0) -> VisionEncoder:
    fastvit = copy.deepcopy(fastvit)
    if gain:  # as the export does it: the branch is smaller, and a Gain behind it gives that back
        block = fastvit.stages[0].blocks[0]
        for part in (block.mlp.fc2.weight, block.mlp.fc2.bias):
            part.mul_(2.0**-gain)
        block.layer_scale = Gain(gain)
    module = VisionEncoder(Encoder(channel_first(fastvit)), projector).double()
    module.output_dtype = torch.float64
    return module


@pytest.mark.parametrize("gain", [0, 3])
@pytest.mark.parametrize("keys", [128, 4], ids=["one matmul", "blocks of keys"])
def test_same_function(parts, monkeypatch, gain, keys):
    monkeypatch.setattr(rounding, "_KEYS", keys)
    pixels = torch.rand(1, 3, SIDE * 2, SIDE * 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    right, module = expected(*parts, pixels), rearranged(*parts, gain)
    assert torch.allclose(module(pixels), right, rtol=0, atol=1e-9 * float(right.abs().max()))
    biases = [name for name, _ in module.named_parameters() if name.endswith("bias")]
    assert not [name for name in biases if name.endswith("token_mixer.reparam_conv.bias")]
    shift = next(value for name, value in module.named_parameters() if name.endswith("shift"))
    shift.mul_(1.001)
    assert not torch.allclose(module(pixels), right, rtol=0, atol=1e-7 * float(right.abs().max()))
