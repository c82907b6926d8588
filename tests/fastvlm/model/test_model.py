"""Building the model: strictly, in every dtype and form, equal to what Transformers itself loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FastVlmForConditionalGeneration, LlavaProcessor

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import UserError
from fastvlm.model.build import build, encoder

Make = Callable[..., Path]


def inputs(tokens: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[300, *[512] * tokens, 17, 401, 62, 9]])
    return {"input_ids": ids, "pixel_values": torch.rand(1, 3, 128, 128, generator=generator)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**inputs()).logits.float()


@pytest.mark.parametrize("form", ["folded", "training"])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_from_pretrained(make_checkpoint: Make, form: str, tied: bool) -> None:
    """Oracle: Transformers' own loading of its own layout."""
    path = make_checkpoint(layout="fast_vlm", form=form, tied=tied)
    theirs = FastVlmForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    ours = build(open_checkpoint(path))
    counters = {name for name in theirs.state_dict() if name.endswith("num_batches_tracked")}
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert name in counters or torch.equal(ours.state_dict()[name], tensor), name
    rotary = ours.model.language_model.rotary_emb.inv_freq
    assert torch.equal(rotary, theirs.model.language_model.rotary_emb.inv_freq) and rotary.dtype == torch.float32
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (ours.lm_head.weight is ours.model.language_model.embed_tokens.weight) == tied
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
def test_dtypes(make_checkpoint: Make, layout: str, dtype: str) -> None:
    """Half precision is the checkpoint's values rounded: read as float32 they are exactly those stored."""
    exact = open_checkpoint(make_checkpoint(layout=layout))
    half = open_checkpoint(make_checkpoint(layout=layout, dtype=dtype))
    assert half.dtype == dtype
    stored, rounded = build(half, "float32"), build(exact, dtype)
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(
            stored.state_dict()[name], tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        )
    assert next(rounded.parameters()).dtype == getattr(torch, dtype)


def test_attention_implementations_agree(tiny_llava: Path) -> None:
    checkpoint = open_checkpoint(tiny_llava)
    eager, sdpa = (build(checkpoint, attn_implementation=name) for name in ("eager", "sdpa"))
    assert eager.config.text_config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), logits(sdpa), rtol=1e-4, atol=1e-4)


def test_encoder_holds_only_the_vision_tower(tiny_llava_training: Path) -> None:
    checkpoint = open_checkpoint(tiny_llava_training)
    tower = encoder(checkpoint, torch.float64)
    assert sum(p.numel() for p in tower.parameters()) < 400_000
    assert tower.forward_features(inputs()["pixel_values"].double()).shape == (1, 256, 2, 2)


def test_unknown_dtype_is_refused(tiny_llava: Path) -> None:
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        build(open_checkpoint(tiny_llava), "int8")


def test_activations_are_of_order_one(make_checkpoint: Make) -> None:
    """The synthetic weights must not hide errors: nothing vanishes, saturates or is degenerate."""
    for form in ("folded", "training"):
        model = build(open_checkpoint(make_checkpoint(layout="fast_vlm", form=form)))
        with torch.no_grad():
            features = model.model.vision_tower.timm_model.forward_features(inputs()["pixel_values"])
        last = logits(model)[0, -1]
        assert 0.1 < features.std() < 100
        assert 1 < last.std() < 10 and 0.005 < last.softmax(-1).max() < 0.99
        other = model(**(inputs() | {"pixel_values": inputs()["pixel_values"] ** 3})).logits[0, -1]
        assert (other - last).norm() > 0.005 * last.norm(), "the answer must depend on the picture"


def test_transformers_processor_reads_the_folder(tiny_fast_vlm: Path) -> None:
    processor = LlavaProcessor.from_pretrained(tiny_fast_vlm)
    picture = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = processor(images=picture, text="<image>\nhello", return_tensors="pt")
    assert (batch["input_ids"] == 512).sum() == 4
    torch.testing.assert_close(batch["pixel_values"][0], picture / 255)


def test_a_model_of_another_size_is_refused(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_fast_vlm, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"12 unexpected tensors: model\.language_model\.layers\.1"):
        open_checkpoint(folder)
