"""The counts of published.json against PyTorch's own, and the language models' formula against the table of shapes."""

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.estimate.devices import facts
from benchmarks.estimate.work import LanguageModel, encoder_work
from fastvlm.checkpoint.shapes import tower_shapes
from fastvlm.common.errors import UserError
from fastvlm.synthetic.checkpoint import SHAPES
from quantization.catalogue import weight_shapes


@pytest.mark.parametrize(
    ("encoder", "name", "resolution", "arguments"),
    [
        ("fastvithd", "fastvit_mci3", 256, {"inference_mode": True}),
        ("fastvithd", "fastvit_mci3", 1088, {"inference_mode": True}),
        ("mci2-256", "fastvit_mci2", 256, {"inference_mode": True}),
        ("mci4-256", "fastvit_mci4", 256, {"inference_mode": True}),
        ("fastvit-sa24-256", "fastvit_sa24", 256, {"inference_mode": True}),
        ("vit-l-14-336", "vit_large_patch14_clip_336", 336, {}),
        ("siglip-so400m-384", "vit_so400m_patch14_siglip_384", 384, {"global_pool": "avg"}),
        ("convnext-l-320", "convnext_large", 320, {}),
        ("convnext-xxl-256", "convnext_xxlarge", 256, {}),
    ],
)
def test_the_measured_encoders_against_pytorch(
    encoder: str, name: str, resolution: int, arguments: dict[str, Any]
) -> None:
    """timm's model without its head; siblings differ by up to 1 %, in squeeze-and-excite blocks and the like."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
        picture = torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_features(picture)
    tolerance = 1e-6 if encoder == "fastvithd" else 0.01
    assert encoder_work(encoder, resolution).macs == pytest.approx(counter.get_total_flops() // 2, rel=tolerance)


def test_every_size_of_fastvithd_is_counted() -> None:
    """Everything grows with the number of pixels, attention with its square; a tensor leaves the fast path from 1152
    pixels on. Its weights are all of the published tower but norms and scales, which are 0.1 % of it."""
    sides = range(64, 2049, 64)
    works = [encoder_work("fastvithd", side) for side in sides]
    tokens = np.array([(side // 64) ** 2 for side in sides], float)
    for field in ("macs", "attention_macs", "activations"):
        counts = [getattr(work, field) for work in works]
        curve = np.polynomial.Polynomial.fit(tokens, counts, 2)
        assert curve(tokens) == pytest.approx(counts, rel=1e-6)
    assert works[3].attention_macs == works[0].attention_macs * 16**2
    assert [work.spilled > 0 for work in works] == [side >= 1152 for side in sides]
    assert all(work.spilled < work.activations for work in works)
    tower = sum(math.prod(shape) for shape in tower_shapes("folded").values())
    assert works[0].weights == pytest.approx(2 * tower, rel=2e-3)
    for wrong in (None, 100, 2112):
        with pytest.raises(UserError, match="expected a multiple of 64"):
            encoder_work("fastvithd", wrong)


@pytest.mark.parametrize("shape", ["0.5b", "1.5b", "7b", "tiny"])
def test_language_model_against_the_table_of_shapes(shape: str) -> None:
    s = SHAPES[shape]
    sizes = (s.layers, s.hidden, s.heads, s.kv_heads, s.hidden // s.heads, s.intermediate, s.vocab)
    model, shapes = LanguageModel(*sizes), weight_shapes(s)
    matrices = [size for name, size in shapes.items() if ".layers." in name and name.endswith("_proj.weight")]
    assert model.matrices == sum(map(math.prod, matrices))
    assert model.output == math.prod(shapes["language_model.model.embed_tokens.weight"])
    assert model.scores(10) == 100 * s.layers * s.heads
    if shape != "tiny":
        assert tuple(facts("published.json")["languages"][f"qwen2-{shape}"].values()) == sizes
