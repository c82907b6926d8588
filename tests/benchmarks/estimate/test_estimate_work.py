"""The counts against PyTorch's own, against `audit`'s of an exported package and against the tables of shapes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastvlm
from benchmarks.estimate.devices import facts
from benchmarks.estimate.work import LanguageModel, encoder_work, fastvit
from fastvlm.synthetic.checkpoint import SHAPES
from quantization.catalogue import weight_shapes

ENCODERS = facts("published.json")["encoders"]
TINY: dict[str, Any] = {"depths": [1, 1, 2, 1, 1], "widths": [8, 16, 32, 64, 128], "ratio": 4, "attention": [3, 4]}


def counted(name: str, resolution: int, **arguments: Any) -> int:
    """Multiply-accumulates that PyTorch counts in timm's model without its head."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
        picture = torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_features(picture)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("resolution", [256, 320, 1024])
def test_fastvithd_against_pytorch(resolution: int) -> None:
    ours = encoder_work(ENCODERS["fastvithd"], resolution).macs
    assert ours == pytest.approx(counted("fastvit_mci3", resolution, inference_mode=True), rel=1e-6)


@pytest.mark.parametrize(
    ("encoder", "name", "resolution", "arguments"),
    [
        ("mci2", "fastvit_mci2", 256, {"inference_mode": True}),
        ("mci4", "fastvit_mci4", 256, {"inference_mode": True}),
        ("fastvit-sa24", "fastvit_sa24", 256, {"inference_mode": True}),
        ("vit-l-14-336", "vit_large_patch14_clip_336", 336, {}),
        ("vit-b-16-224", "vit_base_patch16_224", 224, {}),
        ("siglip-so400m-384", "vit_so400m_patch14_siglip_384", 384, {"global_pool": "avg"}),
        ("convnext-l-320", "convnext_large", 320, {}),
        ("convnext-xxl-256", "convnext_xxlarge", 256, {}),
    ],
)
def test_the_measured_encoders_against_pytorch(
    encoder: str, name: str, resolution: int, arguments: dict[str, Any]
) -> None:
    """Within 1 %: timm's siblings differ in squeeze-and-excite blocks and the like."""
    ours = encoder_work(ENCODERS[encoder], resolution).macs
    assert ours == pytest.approx(counted(name, resolution, **arguments), rel=0.01)


def test_a_wrong_width_shows() -> None:
    wrong = {**ENCODERS["fastvithd"], "widths": [96, 192, 384, 768, 1568]}
    assert encoder_work(wrong, 256).macs != pytest.approx(encoder_work(ENCODERS["fastvithd"], 256).macs, rel=1e-3)


def test_against_the_audit_of_an_exported_package(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from model_export import mil
    from model_export.config import ExportConfig
    from model_export.export import export, plan
    from model_export.mil.costs import Graph, macs_of

    artefact = tmp_path / "tiny"
    export(plan(ExportConfig(make_checkpoint(form="training", dtype="float16"), artefact), ("vision",)))
    graph = Graph(next(iter(mil.read_package(artefact / "fastvithd.mlpackage").functions.values())))
    audited = {one.outputs[0].name: macs_of(graph, one) for one in graph.operations}
    ours = fastvit(128, **TINY, se=True)
    assert sum(macs or 0 for macs in audited.values()) == sum(one.macs for one in ours)
    assert sum(bool(macs) for macs in audited.values()) == sum(one.macs > 0 for one in ours)


def test_weights_against_the_published_tower() -> None:
    """All but norms and scales, which are 0.1 % of the tower."""
    table = json.loads((Path(fastvlm.__file__).parent / "checkpoint" / "fastvithd.json").read_text(encoding="utf-8"))[
        "folded"
    ]
    tower = sum(math.prod(shape) for shape in table.values())
    assert encoder_work(ENCODERS["fastvithd"], 1024).weights == pytest.approx(2 * tower, rel=2e-3)


@pytest.mark.parametrize("shape", ["0.5b", "1.5b", "7b", "tiny"])
def test_language_model_against_the_table_of_shapes(shape: str) -> None:
    s = SHAPES[shape]
    model = LanguageModel(s.layers, s.hidden, s.heads, s.kv_heads, s.hidden // s.heads, s.intermediate, s.vocab)
    shapes = weight_shapes(s)
    matrices = [size for name, size in shapes.items() if ".layers." in name and name.endswith("_proj.weight")]
    assert model.matrices == sum(map(math.prod, matrices))
    assert model.output == math.prod(shapes["language_model.model.embed_tokens.weight"])
    assert model.scores(10) == 100 * s.layers * s.heads


@pytest.mark.parametrize("name", ["0.5b", "1.5b", "7b"])
def test_the_published_shapes_are_the_measured_ones(name: str) -> None:
    s, published = SHAPES[name], facts("published.json")["languages"][f"qwen2-{name}"]
    assert published == {
        "layers": s.layers, "hidden": s.hidden, "heads": s.heads, "kv_heads": s.kv_heads,
        "head": s.hidden // s.heads, "inner": s.intermediate, "vocab": s.vocab,
    }  # fmt: skip


def test_spilling_and_attention_grow_with_the_picture() -> None:
    """FastViTHD has no tensor above the limit at 1024, and ConvNeXt-L, counted, one from 1024 on."""
    for resolution, spills, tokens in ((256, False, 64), (1024, False, 1024), (1536, True, 2304)):
        work = encoder_work(ENCODERS["fastvithd"], resolution)
        assert (work.spilled > 0, work.longest_attention) == (spills, tokens)
    spilled = {size: encoder_work(ENCODERS[f"convnext-l-{size}"], size).spilled for size in (512, 768, 1024)}
    assert spilled[512] == spilled[768] == 0 < spilled[1024]


def test_an_architecture_without_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="no resolution"):
        encoder_work(ENCODERS["fastvithd"], None)
