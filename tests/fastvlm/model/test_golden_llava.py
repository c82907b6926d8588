"""The LLaVA layout against what the original implementation computed once (tests/golden/llava/README.md)."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.model.build import build, encoder

GOLDEN = Path(__file__).parents[2] / "golden" / "llava"
TOLERANCE = 1e-4  # relative, float32: the bound; 1e-6 is typical
FORMS = ("folded", "training")
LAYOUTS = ("llava_qwen2", "fast_vlm")


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The script that made the golden files, for its inputs; it imports the original only when it runs."""
    spec = importlib.util.spec_from_file_location("golden_llava_make", GOLDEN / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def outputs(model: Any, image_token: int, make: ModuleType) -> dict[str, np.ndarray]:
    """The same quantities from Transformers' class, one placeholder token for each feature."""
    image = torch.from_numpy(make.pixels(256))
    features = model.model.vision_tower.timm_model.forward_features(image).flatten(2).transpose(1, 2)
    ids = torch.tensor([[*make.BEFORE, *[image_token] * features.shape[1], *make.AFTER]])
    logits = model(input_ids=ids, pixel_values=image).logits
    greedy = model.generate(
        input_ids=ids,
        pixel_values=image,
        do_sample=False,
        max_new_tokens=make.NEW_TOKENS,
        eos_token_id=-1,
        pad_token_id=0,
    )
    projected = model.model.multi_modal_projector(features)
    found = {"features": features, "projected": projected, "logits": logits, "greedy": greedy[:, ids.shape[1] :]}
    return {name: value.numpy() for name, value in found.items()}


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error over the largest value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_original(make_checkpoint: Callable[..., Path], make: ModuleType, layout: str, form: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint(layout=layout, form=form, image_size=256))
    golden = np.load(GOLDEN / f"{form}.npz")
    norm = sum(float(checkpoint.read(name).double().square().sum()) for name in checkpoint.tensors)
    assert norm == pytest.approx(float(golden["squared_norm"]), rel=1e-9), "the seeded weights aren't those of make.py"
    found = outputs(build(checkpoint), checkpoint.image_token_id, make)
    for name in ("features", "projected", "logits"):
        assert found[name].shape == golden[name].shape
        assert relative(found[name], golden[name]) < TOLERANCE, name
    assert found["greedy"].tolist() == golden["greedy"].tolist()
    assert len(set(golden["greedy"][0].tolist())) > 6, "a degenerate answer would prove little"


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("model.vision_tower.timm_model.stages.2.blocks.1.layer_scale.gamma", "features"),
        ("model.vision_tower.timm_model.stages.3.blocks.0.token_mixer.qkv.weight", "features"),
        ("model.multi_modal_projector.linear_1.bias", "projected"),
        ("model.language_model.layers.1.mlp.down_proj.weight", "logits"),
    ],
)
def test_one_perturbed_weight_is_seen(
    make_checkpoint: Callable[..., Path], make: ModuleType, name: str, broken: str
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(layout="llava_qwen2", image_size=256))
    golden = np.load(GOLDEN / "folded.npz")
    model = build(checkpoint)
    parameter = model.get_parameter(name)
    changed = parameter.detach().clone()
    changed.view(-1)[0] += 0.5
    parameter.data = changed
    found = outputs(model, checkpoint.image_token_id, make)
    assert relative(found[broken], golden[broken]) > TOLERANCE


def test_encoder_alone_gives_the_features(tiny_llava: Path) -> None:
    checkpoint = open_checkpoint(tiny_llava)
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = build(checkpoint).model.vision_tower(pixels).last_hidden_state
        assert torch.equal(encoder(checkpoint).forward_features(pixels), whole)
